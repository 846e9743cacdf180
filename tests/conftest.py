"""A tiny teacher, a tiny shard folder and a recipe for them."""

from pathlib import Path

import pytest

from tiny_runs import RECIPE, write_rows, write_teacher


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="session")
def shards_folder(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows")


@pytest.fixture
def recipe(tmp_path, teacher_folder, shards_folder) -> Path:
    """A run of six steps that takes about a second after its start-up."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(out=tmp_path / "run", shards=shards_folder, teacher=teacher_folder))
    return path
