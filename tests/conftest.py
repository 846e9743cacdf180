"""A tiny teacher, a tiny shard folder and a recipe for them."""

import os
import shutil
from collections.abc import Callable
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


@pytest.fixture
def injected(record_property) -> Callable[..., None]:
    """injected(count, survived=None, note=""): how often a test injected its faults, for the table of `make faults`.

    Without it a test counts as one fault, survived when it passes.
    """

    def injected(count: int, survived: int | None = None, note: str = "") -> None:
        record_property("injected", count)
        record_property("survived", count if survived is None else survived)
        if note:
            record_property("note", note)

    return injected


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        numbers = {number for mark in item.iter_markers("fault") for number in mark.args}
        assert numbers <= FAULTS.keys(), f"{item.nodeid}: no such fault in tests/faults.py: {numbers - FAULTS.keys()}"
        item.user_properties.extend(("fault", number) for number in sorted(numbers))


def pytest_terminal_summary(terminalreporter) -> None:
    """`pytest -m fault` ends with a table, in Markdown, of what was injected and what was survived."""
    if "fault" not in terminalreporter.config.option.markexpr:
        return
    rows = {number: {"injected": 0, "survived": 0, "notes": {}} for number in FAULTS}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            counts = {name: [value for key, value in report.user_properties if key == name] for name in COUNTED}
            tried, survived = (sum(counts[name]) if counts["injected"] else 1 for name in ("injected", "survived"))
            if outcome != "passed":
                survived = min(survived, tried - 1)
                counts["note"].append(f"**{outcome}: {report.nodeid.rpartition('::')[2]}**")
            for number in counts["fault"]:
                rows[number]["injected"] += tried
                rows[number]["survived"] += survived
                rows[number]["notes"] |= dict.fromkeys(counts["note"])
    terminalreporter.section("faults")
    terminalreporter.write_line("| # | fault | injected | survived | lost | note |\n|---|---|---|---|---|---|")
    for number, row in rows.items():
        lost, notes = row["injected"] - row["survived"], "; ".join(row["notes"])
        terminalreporter.write_line(
            f"| {number} | {FAULTS[number]} | {row['injected']} | {row['survived']} | {lost} | {notes} |"
        )


COUNTED = ("fault", "injected", "survived", "note")
