"""Reads what runs left behind: run.json, metrics.jsonl and scores*.json."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.files import read_json

MEND_SCORES = "write it again with `capgap score`"
MEND_RUN = "give a folder that `capgap distill` wrote, or NAME=DIR with a folder that `capgap score` wrote"


@dataclass(frozen=True)
class Score:
    """A headline number of a task: mean and 95 % half width over seeds, as fractions where `percent`."""

    label: str
    mean: float
    half_width: float | None
    num_seeds: int
    percent: bool = True
    higher_is_better: bool = True
    floor: float | None = None
    """What naming the most frequent class every time gives."""

    @property
    def scale(self) -> int:
        return 100 if self.percent else 1

    @property
    def text(self) -> str:
        digits = 1 if self.percent else 3
        mean = f"{self.scale * self.mean:.{digits}f}"
        return mean if self.half_width is None else f"{mean} ± {self.scale * self.half_width:.{digits}f}"


@dataclass(frozen=True)
class ScoredTask:
    """How one task was scored, for the small print."""

    name: str
    settings: dict[str, Any]
    counts: dict[str, int]
    learning_rate: float | None
    num_rates: int
    num_seeds: int

    @property
    def is_part(self) -> bool:
        return any(self.settings.get(key) is not None for key in ("max_train_examples", "max_eval_examples"))


@dataclass(frozen=True)
class Scores:
    """Everything that the scores*.json of one folder say; later files win."""

    model: dict[str, Any]
    scores: dict[str, Score]
    tasks: dict[str, ScoredTask]


@dataclass(frozen=True)
class Curves:
    """What a run logged, by name: steps and values in step order; loads hold one share per expert."""

    scalars: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    loads: dict[str, tuple[list[int], list[list[float]]]] = field(default_factory=dict)
    last_step: int = 0
    tokens: int | None = None
    num_dropped_lines: int = 0


@dataclass(frozen=True)
class Run:
    """A training run: its configuration and figures, its curves, its scores if there are any."""

    name: str
    folder: Path
    record: dict[str, Any]
    curves: Curves
    scores: Scores | None
    is_done: bool

    @property
    def config(self) -> dict[str, Any]:
        return self.record.get("config", {})

    @property
    def teacher_name(self) -> str | None:
        return (self.config.get("teacher") or {}).get("model")


def open_run(name: str, folder: Path) -> Run:
    """A run folder with run.json; DataError names the file that is missing or damaged."""
    record = read_json(folder / "run.json", MEND_RUN)
    # A decoder that was trained on text alone has no teacher.
    for role in ("student", "teacher") if "teacher" in record else ("student",):
        if not isinstance(record.get(role), dict) or "parameters_served" not in record[role]:
            raise DataError(f"reading {folder / 'run.json'}: {role}.parameters_served is missing - {MEND_RUN}")
    metrics = folder / "metrics.jsonl"
    return Run(
        name=name,
        folder=folder,
        record=record,
        curves=read_curves(metrics) if metrics.exists() else Curves(),
        scores=read_scores(folder),
        is_done=(folder / "DONE").exists(),
    )


def read_scores(folder: Path) -> Scores | None:
    """The scores of a folder: scores*.json in it or one level below; None when there are none."""
    files = [*sorted(folder.glob("*/scores.json")), *sorted(folder.glob("scores*.json"), key=lambda path: path.stem)]
    if not files:
        return None
    model: dict[str, Any] = {}
    scores: dict[str, Score] = {}
    tasks: dict[str, ScoredTask] = {}
    for path in files:
        stored = read_json(path, MEND_SCORES)
        try:
            model |= stored["model"]
            groups = [(task["headlines"], task) for task in stored["tasks"].values()]
            if "glue_score" in stored:
                groups.append(([stored["glue_score"]], None))
            for headlines, _ in groups:
                for entry in headlines:
                    scores[entry["label"]] = Score(
                        label=entry["label"],
                        mean=entry["mean"],
                        half_width=entry["half_width_95"],
                        num_seeds=len(entry["values"]),
                        percent=entry["percent"],
                        higher_is_better=entry.get("higher_is_better", True),
                        floor=entry.get("floor"),
                    )
            for name, task in stored["tasks"].items():
                tasks[name] = ScoredTask(
                    name=name,
                    settings=task["settings"],
                    counts=task["counts"],
                    learning_rate=task["learning_rate"],
                    num_rates=len(task["learning_rates_tried"]),
                    num_seeds=len(task["seeds"]),
                )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"reading {path}: it is not a score file ({error!r}) - {MEND_SCORES}") from None
    return Scores(model=model, scores=scores, tasks=tasks)


def read_curves(path: Path) -> Curves:
    """Curves of a metrics.jsonl. Of a repeated step the later line wins; a last line cut by a crash is dropped.

    Raises DataError with the line number for any other line that is not a JSON object with a step.
    """
    by_step: dict[int, dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")
    dropped = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # no line feed behind it: the writer was stopped in the middle
                dropped += 1
                continue
            raise DataError(
                f"reading {path}:{number}: not a JSON object with a step ({error!r}) - "
                "remove the line and run the report again"
            ) from None
        by_step[step] = {**by_step.get(step, {}), **entry}
    scalars: dict[str, tuple[list[int], list[float]]] = {}
    loads: dict[str, tuple[list[int], list[list[float]]]] = {}
    tokens = None
    for step in sorted(by_step):
        for name, value in by_step[step].items():
            if name.startswith("router/") and name.endswith("/load"):
                steps, shares = loads.setdefault(name.removeprefix("router/").removesuffix("/load"), ([], []))
                steps.append(step)
                shares.append([float(share) for share in value])
            elif name == "tokens":
                tokens = int(value)
            elif (
                name != "step"
                and isinstance(value, int | float)
                and not isinstance(value, bool)
                and math.isfinite(value)
            ):
                steps, values = scalars.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value))
    return Curves(
        scalars=scalars, loads=loads, last_step=max(by_step, default=0), tokens=tokens, num_dropped_lines=dropped
    )


def binned(steps: list[int], values: list[float], num_bins: int) -> list[tuple[float, float, float, float]]:
    """At most `num_bins` points (mean step, mean, lowest, highest value) of a curve, in order."""
    count = len(steps)
    size = max(1, math.ceil(count / num_bins))
    points = []
    for start in range(0, count, size):
        part_steps, part = steps[start : start + size], values[start : start + size]
        points.append((math.fsum(part_steps) / len(part), math.fsum(part) / len(part), min(part), max(part)))
    return points


def binned_loads(steps: list[int], loads: list[list[float]], num_bins: int) -> list[tuple[int, int, list[float]]]:
    """At most `num_bins` columns (first step, last step, mean share per expert) of a layer's expert loads."""
    size = max(1, math.ceil(len(steps) / num_bins))
    columns = []
    for start in range(0, len(steps), size):
        part = loads[start : start + size]
        shares = [math.fsum(column) / len(part) for column in zip(*part, strict=True)]
        columns.append((steps[start], steps[min(start + size, len(steps)) - 1], shares))
    return columns


def natural_order(names: Iterable[str]) -> list[str]:
    """Layer names with 2 before 10."""
    return sorted(
        names,
        key=lambda name: [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")],
    )
