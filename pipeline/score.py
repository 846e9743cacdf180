"""Scores a model on evaluation tasks: several seeds, mean and interval, one JSON file and a printed table."""

import difflib
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_prep.errors import ConfigError, DataError, reports_errors
from data_prep.files import file_hash, make_folder, read_json, write_json
from data_prep.progress import Progress
from pipeline.eval_tasks import GROUPS, TASKS
from pipeline.eval_tasks.intervals import student_interval
from pipeline.eval_tasks.settings import EvalSettings
from pipeline.eval_tasks.task import Task, Unit

SCHEMA_VERSION = 1
THROUGHPUT_LENGTH = 128
MEND_RESULT = "remove the file and run the same command again"


@dataclass(frozen=True)
class ScoreConfig:
    """Fine-tunes and scores a model on evaluation tasks. A repeated command skips what is complete."""

    model: str
    """Hugging Face folder, hub name, or package:NAME for a folder inside an installed Python package."""
    tasks: tuple[str, ...]
    """Task names, or the groups glue, ner and llm."""
    data: Path
    """Folder with one folder per task, as GLUE and the NER sets are distributed (nothing is downloaded)."""
    out: Path
    """Folder for scores.json and, below scores/, one result per task and seed."""
    seeds: int = 3
    """Number of seeds; the interval needs at least two."""
    first_seed: int = 1
    """The seeds are first_seed, first_seed + 1, ..."""
    settings: Annotated[EvalSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=EvalSettings)
    trust_remote_code: bool = False
    """Run Python code that comes with the model; needed for exported MiniMoE folders."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes the GPU when there is one."""
    throughput_batch_size: int = 32
    """Rows of 128 tokens per batch when tokens per millisecond are measured; 0 leaves it out."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"cannot score: --seeds ({self.seeds}) - needs at least 1 - 3 gives an interval")
        if not self.tasks:
            raise ConfigError(f"cannot score: --tasks () - names no task - choose from {' '.join([*GROUPS, *TASKS])}")


@dataclass(frozen=True)
class Result:
    """One finished unit as it lies on disk."""

    unit: Unit
    metrics: dict[str, float]
    selection: float
    counts: dict[str, int]
    settings: dict[str, Any]
    seconds: float


@reports_errors
def main(argv: list[str] | None = None) -> int:
    config = tyro.cli(ScoreConfig, args=argv, prog="capgap score")
    tasks = {name: TASKS[name] for name in expand_tasks(config.tasks)}
    # A misspelt name there would be ignored without a word.
    expand_tasks([*config.settings.learning_rate_of], flag="--learning-rate-of")
    # Missing files and wrong names show before torch is imported.
    data_hashes = {
        name: {path.name: file_hash(path) for path in task.files(config.data)} for name, task in tasks.items()
    }

    from pipeline.eval_tasks.loading import ModelSource

    source = ModelSource.find(config.model, trust_remote_code=config.trust_remote_code)
    for name, task in tasks.items():
        refuse_long_rows(name, task.resolved(config.settings).get("max_length"), source.num_positions)
        # A teacher that was trained on under the same name must not leave an old comparison standing.
        if teacher := task.resolved(config.settings).get("teacher"):
            found = ModelSource.find(teacher, trust_remote_code=config.trust_remote_code)
            data_hashes[name]["teacher"] = found.fingerprint()
    fingerprint = source.fingerprint()
    folder = config.out / "scores"
    make_folder(folder)
    refuse_another_model(folder / "model.json", config=config, fingerprint=fingerprint)

    expected = {
        unit: {"model": fingerprint, "data": data_hashes[name], "settings": task.resolved(config.settings)}
        for name, task in tasks.items()
        for unit in units_of(name, task, config)
    }
    done = {unit: read_result(folder / unit.file_name, unit, expected[unit]) for unit in expected}
    pending = [unit for unit, result in done.items() if result is None]
    if len(pending) < len(expected):
        print(f"{len(expected) - len(pending)} of {len(expected)} measurements are complete in {folder} and are kept.")
    if pending or not (folder / "model.json").exists():
        measure_pending(config, tasks, pending, source=source, fingerprint=fingerprint, expected=expected)
    results = [read_result(folder / unit.file_name, unit, expected[unit]) for unit in expected]
    summary = summarise(tasks, [result for result in results if result is not None], out=config.out)
    write_json(config.out / "scores.json", summary)
    print_table(summary)
    print(f"written to {config.out / 'scores.json'}")
    return 0


def expand_tasks(names: Sequence[str], *, flag: str = "--tasks") -> list[str]:
    """Task names with groups replaced by their members, each once; ConfigError with a hint for an unknown name."""
    known = [*GROUPS, *TASKS]
    expanded: list[str] = []
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {' '.join(known)}"
            raise ConfigError(f"cannot score: {flag} ({name}) - no such task - {hint}")
        expanded += [member for member in GROUPS.get(name, (name,)) if member not in expanded]
    return expanded


def units_of(name: str, task: Task, config: ScoreConfig) -> list[Unit]:
    """Every measurement of a task: learning rates times seeds, or a single one where nothing is trained."""
    if not task.seeded:
        return [Unit(name)]
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    own = config.settings.learning_rate_of.get(name)
    rates = task.learning_rates(config.settings) if own is None else (own,)
    return [Unit(name, seed=seed, learning_rate=rate) for rate in rates for seed in seeds]


def refuse_long_rows(task: str, max_length: int | None, num_positions: int | None) -> None:
    if max_length and num_positions and max_length > num_positions:
        raise ConfigError(
            f"cannot score {task}: --max-length ({max_length}) - the model has {num_positions} positions - "
            f"give --max-length {num_positions} or less"
        )


def refuse_another_model(path: Path, *, config: ScoreConfig, fingerprint: str) -> None:
    if path.exists() and (seen := read_json(path, MEND_RESULT)).get("fingerprint") != fingerprint:
        raise ConfigError(
            f"cannot score into {config.out} ({config.model}) - {path} is of another model, or of an older state of it "
            f"({seen.get('source')}) - choose another --out, or remove its scores folder"
        )


def read_result(path: Path, unit: Unit, expected: dict[str, Any]) -> Result | None:
    """The measurement in `path`, None when there is none; ConfigError when it was made with other settings or data."""
    if not path.exists():
        return None
    stored = read_json(path, MEND_RESULT)
    for part in ("settings", "data"):
        if part not in stored or not isinstance(stored[part], dict):
            raise DataError(f"reading {path}: it has no {part} - {MEND_RESULT}")
        for key in {**expected[part], **stored[part]}:
            old, new = stored[part].get(key), expected[part].get(key)
            if old != new:
                raise ConfigError(
                    f"cannot resume {path}: {key} ({new}) - it was scored with {key} {old} - "
                    "choose another --out, or remove the file"
                )
    return Result(
        unit=unit,
        metrics=stored["metrics"],
        selection=stored["selection"],
        counts=stored["counts"],
        settings=stored["settings"],
        seconds=stored["seconds"],
    )


def measure_pending(
    config: ScoreConfig,
    tasks: dict[str, Task],
    pending: list[Unit],
    *,
    source: Any,
    fingerprint: str,
    expected: dict[Unit, dict],
) -> None:
    """Runs every pending unit and writes its result; the model's own figures first: a broken model shows at once."""
    # Deterministic matrix products on a GPU need this before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # it warns of the new head, which is the point here
    transformers.utils.logging.disable_progress_bar()
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("cannot score: --device (cuda) - torch sees no GPU - use --device cpu")
        torch.use_deterministic_algorithms(True, warn_only=True)
    tokenizer = source.tokenizer()
    names = list(dict.fromkeys(unit.task for unit in pending)) or list(tasks)[:1]
    prepared = {name: tasks[name].prepare(config.data, tokenizer, config.settings) for name in names}
    folder = config.out / "scores"
    if not (folder / "model.json").exists():
        figures = model_figures(config, source, device=device, ids=prepared[names[0]].sample_ids)
        write_json(folder / "model.json", {"fingerprint": fingerprint, **figures})
    if not pending:
        return
    total = sum(tasks[unit.task].work(prepared[unit.task], config.settings) for unit in pending)
    with Progress("score", total, unit="passes") as progress:
        for unit in pending:
            label = unit.task if unit.seed is None else f"{unit.task} seed {unit.seed}"
            began = time.perf_counter()
            measurement = tasks[unit.task].measure(
                prepared[unit.task],
                source=source,
                settings=config.settings,
                unit=unit,
                device=device,
                on_step=partial(advance, progress, label),
            )
            write_json(
                folder / unit.file_name,
                {
                    **{key: value for key, value in asdict(unit).items() if value is not None},
                    **asdict(measurement),
                    "seconds": round(time.perf_counter() - began, 3),
                    **expected[unit],
                },
            )


def advance(progress: Progress, label: str, count: int) -> None:
    progress.advance(count, label)


def model_figures(config: ScoreConfig, source: Any, *, device: Any, ids: Any) -> dict[str, Any]:
    """Parameters, multiply-accumulates and throughput of the base model, and the software that ran it."""
    import numpy as np
    import torch
    import transformers

    from pipeline.eval_tasks.loading import encoder_figures
    from pipeline.eval_tasks.throughput import measure_throughput

    # As it would be served: with weights, not only arithmetic, in the precision asked for.
    dtype = torch.bfloat16 if config.settings.precision == "bf16" else torch.float32
    model = source.model(transformers.AutoModel, device=device, dtype=dtype)
    figures = {
        "name": config.model,
        "source": str(source.folder.resolve()),
        "architecture": type(model).__name__,
        **encoder_figures(model, THROUGHPUT_LENGTH),
        "software": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if config.throughput_batch_size:
        # The task's own text, one example after the other, gives full rows without padding.
        rows_BT = np.resize(ids, (config.throughput_batch_size, THROUGHPUT_LENGTH)).astype(np.int64)
        throughput = measure_throughput(model, torch.from_numpy(rows_BT), precision=config.settings.precision)
        figures["throughput"] = asdict(throughput)
    return figures


def summarise(tasks: dict[str, Task], results: list[Result], *, out: Path) -> dict[str, Any]:
    """What scores.json holds: the model's figures and per task the mean and 95 % interval over seeds.

    Tasks that an earlier command scored into the same folder, with the same model, stay in it.
    """
    model = read_json(out / "scores" / "model.json", MEND_RESULT)
    earlier = read_json(out / "scores.json", MEND_RESULT) if (out / "scores.json").exists() else {}
    kept = earlier.get("tasks", {}) if earlier.get("model", {}).get("fingerprint") == model["fingerprint"] else {}
    scored = kept | {
        name: summarise_task(task, [result for result in results if result.unit.task == name])
        for name, task in tasks.items()
    }
    # The order of the table of tasks, not of the commands.
    scored = {name: scored[name] for name in TASKS if name in scored}
    summary = {"schema_version": SCHEMA_VERSION, "model": model, "tasks": scored}
    values = [headline["values"] for name in GROUPS["glue"] if name in scored for headline in scored[name]["headlines"]]
    if set(GROUPS["glue"]) <= set(scored) and len(set(map(len, values))) == 1:
        per_seed = [math.fsum(of_seed) / len(of_seed) for of_seed in zip(*values, strict=True)]
        summary["glue_score"] = {"label": "GLUE score", "percent": True, **student_interval(per_seed).as_json()}
    return summary


def summarise_task(task: Task, results: list[Result]) -> dict[str, Any]:
    """One task's entry: the seeds of the best learning rate, their mean and interval, and how they were made."""
    rates = list(dict.fromkeys(result.unit.learning_rate for result in results))
    by_rate = {rate: [result for result in results if result.unit.learning_rate == rate] for rate in rates}
    best = max(rates, key=lambda rate: math.fsum(result.selection for result in by_rate[rate]) / len(by_rate[rate]))
    chosen = by_rate[best]
    intervals = {name: student_interval([result.metrics[name] for result in chosen]) for name in chosen[0].metrics}
    return {
        "headlines": [
            asdict(headline)
            | {"floor": intervals[headline.floor_metric].mean if headline.floor_metric else None}
            | intervals[headline.metric].as_json()
            for headline in task.headlines
        ],
        "metrics": {name: interval.as_json() for name, interval in intervals.items()},
        "seeds": [result.unit.seed for result in chosen],
        "learning_rate": best,
        "learning_rates_tried": rates,
        "settings": chosen[0].settings,
        "counts": chosen[0].counts,
        "seconds": round(math.fsum(result.seconds for result in results), 3),
    }


def print_table(summary: dict[str, Any]) -> None:
    """One line per headline on stdout: mean and interval, seeds, learning rate, examples, seconds."""
    rows = [("task", "mean ± 95 %", "seeds", "learning rate", "train", "scored", "seconds")]
    for task in summary["tasks"].values():
        counts = task["counts"]
        scored = sum(count for name, count in counts.items() if name not in ("train", "malformed_rows_skipped"))
        for headline in task["headlines"]:
            rate = "" if task["learning_rate"] is None else f"{task['learning_rate']:g}"
            seeds = str(len(headline["values"]))
            rows.append(
                (
                    headline["label"],
                    spoken_score(headline),
                    seeds,
                    rate,
                    f"{counts.get('train', '')}",
                    f"{scored}",
                    f"{task['seconds']:.1f}",
                )
            )
    if "glue_score" in summary:
        score = summary["glue_score"]
        rows.append((score["label"], spoken_score(score), str(len(score["values"])), "", "", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            ).rstrip()
        )
    skipped = sum(task["counts"].get("malformed_rows_skipped", 0) for task in summary["tasks"].values())
    if skipped:
        print(f"{skipped} malformed rows of the task files were skipped.")
    if throughput := summary["model"].get("throughput"):
        print(
            f"{throughput['tokens_per_ms']:.1f} tokens/ms on {throughput['device']} (length {throughput['length']}, "
            f"{throughput['precision']}; {throughput['slowest']:.1f} to {throughput['fastest']:.1f})"
        )


def spoken_score(score: dict[str, Any]) -> str:
    """A mean with its interval as people write it: percent with one digit, other units with three."""
    scale, digits = (100, 1) if score.get("percent") else (1, 3)
    text = f"{scale * score['mean']:.{digits}f}"
    half_width = score.get("half_width_95")
    return text if half_width is None else f"{text} ± {scale * half_width:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
