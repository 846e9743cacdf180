"""A tiny teacher, a tiny shard folder and a recipe for them."""

import os
import shutil
from pathlib import Path

# Triton decides when it is imported whether it interprets, and transformers may import it before the kernel tests do.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from faults import FAULTS
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


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        for mark in item.iter_markers("fault"):
            assert set(mark.args) <= FAULTS.keys(), f"{item.nodeid}: no such fault in tests/faults.py: {mark.args}"
            item.user_properties.extend(("fault", number) for number in mark.args)


def pytest_terminal_summary(terminalreporter) -> None:
    """`pytest -m fault` ends with what was injected: tests record counts with record_property("injected", n)."""
    if terminalreporter.config.option.markexpr != "fault":
        return
    table: dict[int, dict[str, int]] = {}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            injected = sum(value for name, value in report.user_properties if name == "injected") or 1
            for number in {value for name, value in report.user_properties if name == "fault"}:
                row = table.setdefault(number, {"injected": 0, "passed": 0, "failed": 0, "skipped": 0})
                row[outcome] += 1
                row["injected"] += injected if outcome != "skipped" else 0
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':52} {'injected':>8} {'tests':>6} {'failed':>6}")
    for number, name in FAULTS.items():
        found = table.get(number)
        counts = "   no test"
        if found:
            counts = f"{found['injected']:8} {found['passed'] + found['failed']:6} {found['failed']:6}"
        terminalreporter.write_line(f"{number:2} {name:49} {counts}")
