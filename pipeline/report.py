"""Puts runs side by side: one self-contained HTML page and one Markdown table."""

import math
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_prep.errors import ConfigError, DataError, reports_errors
from data_prep.files import make_folder, write_bytes
from pipeline.report_charts import Bar, Line, bar_chart, heat_legend, heat_map, line_chart
from pipeline.report_records import (
    MEND_RUN,
    Run,
    Score,
    ScoredTask,
    Scores,
    binned,
    binned_loads,
    natural_order,
    open_run,
    read_scores,
)

TEACHER_COLOUR = "series0"
NUM_STUDENT_COLOURS = 6
CURVE_POINTS = 240
# Enough columns to see a router settle; few enough that many experts in many layers stay a small page.
MAX_HEAT_CELLS, MAX_HEAT_COLUMNS, MIN_HEAT_COLUMNS = 12_000, 70, 10
DASH = "–"


@dataclass(frozen=True)
class ReportConfig:
    """Compares runs and score folders on one HTML page, with the same table as Markdown."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, or NAME=FOLDER; a folder that `capgap score` wrote (a teacher's, say) works too."""
    out: Path | None = None
    """Folder for report.html and report.md; by default the first run's."""
    title: str = "Distillation report"
    """Heading of the page."""


@dataclass
class Model:
    """A row of the table. None is what nobody measured."""

    name: str
    role: str
    colour: str
    parameters_training: int | None = None
    parameters_served: int | None = None
    macs: int | None = None
    length: int | None = None
    throughput: dict[str, Any] | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    tasks: dict[str, ScoredTask] = field(default_factory=dict)

    @property
    def tokens_per_ms(self) -> float | None:
        return self.throughput["tokens_per_ms"] if self.throughput else None


@reports_errors
def main(argv: list[str] | None = None) -> int:
    config = tyro.cli(ReportConfig, args=argv, prog="capgap report")
    named = [name_and_folder(text) for text in config.runs]
    if not named:
        raise ConfigError("cannot report: no run given - there is nothing to compare - name one or more run folders")
    runs = [open_run(name, folder) for name, folder in named if (folder / "run.json").exists()]
    scored = {name: read_scored(folder) for name, folder in named if not (folder / "run.json").exists()}
    models = table_rows(runs, scored)
    out = config.out or named[0][1]
    make_folder(out)
    page = render(config.title, models, runs)
    write_bytes(out / "report.html", page.encode())
    table = markdown(config.title, models)
    write_bytes(out / "report.md", table.encode())
    print(table)
    print(f"written to {out / 'report.html'} and {out / 'report.md'}")
    return 0


def name_and_folder(text: str) -> tuple[str, Path]:
    """`NAME=FOLDER`, or a folder that is called by its own name; DataError when it does not exist."""
    name, separator, folder = text.partition("=")
    if not separator or Path(text).is_dir():
        name, folder = Path(text).resolve().name, text
    if not Path(folder).is_dir():
        raise DataError(f"cannot report: {folder} - no such folder - {MEND_RUN}")
    return name, Path(folder)


def read_scored(folder: Path) -> Scores:
    scores = read_scores(folder)
    if scores is None:
        raise DataError(f"cannot report: {folder} - it holds neither run.json nor scores.json - {MEND_RUN}")
    return scores


def table_rows(runs: list[Run], scored: dict[str, Scores]) -> list[Model]:
    """Teachers first, then students in the order given, then models that were only scored.

    A score folder becomes the teacher's when its model has the teacher's name, or when it is called `teacher`; a run
    does when the teacher is what it exported.
    """
    teachers: dict[str, Model] = {}
    for run in runs:
        if "teacher" not in run.record:
            continue
        name = run.teacher_name or "teacher"
        if name not in teachers:
            teachers[name] = Model(name=name, role="teacher", colour=TEACHER_COLOUR)
            set_figures(teachers[name], run.record["teacher"])
    others: list[Model] = []
    for name, scores in scored.items():
        owner = teachers.get(scores.model.get("name", "")) or teachers.get(scores.model.get("source", ""))
        if owner is None and name == "teacher" and len(teachers) == 1:
            owner = next(iter(teachers.values()))
        if owner is None:
            owner = Model(name=name, role="scored only", colour=TEACHER_COLOUR if not runs and not others else "")
            others.append(owner)
        owner.name = name
        add_scores(owner, scores)
    students = []
    for run in runs:
        teacher = next((teachers[name] for name in teachers if is_export_of(run, name)), None)
        student = teacher or Model(name=run.name, role="student", colour="")
        student.name = run.name
        set_figures(student, run.record["student"])
        if run.scores:
            add_scores(student, run.scores)
        if teacher is None:
            students.append(student)
    colours = (f"series{1 + i % NUM_STUDENT_COLOURS}" for i in range(len(students) + len(others)))
    for model in [*students, *others]:
        model.colour = model.colour or next(colours)
    return [*teachers.values(), *students, *others]


def is_export_of(run: Run, name: str) -> bool:
    return (run.folder / "export").resolve() == Path(name).resolve()


def set_figures(model: Model, figures: dict[str, Any]) -> None:
    model.parameters_training = figures.get("parameters_training")
    model.parameters_served = figures["parameters_served"]
    model.macs = figures.get("linear_macs_per_sequence")
    model.length = figures.get("sequence_length")


def add_scores(model: Model, scores: Scores) -> None:
    """Adds scores and throughput; sizes only where no run told them (it knows how many experts are active)."""
    model.scores |= scores.scores
    model.tasks |= scores.tasks
    model.throughput = scores.model.get("throughput") or model.throughput
    if model.parameters_served is None:
        model.parameters_served = scores.model.get("parameters")
        model.macs = scores.model.get("linear_macs_per_sequence")
        model.length = scores.model.get("sequence_length")


def score_labels(models: list[Model]) -> list[str]:
    return list(dict.fromkeys(label for model in models for label in model.scores))


def comparisons(models: list[Model]) -> list[str]:
    """Sentences on what each student costs against the first teacher, as far as both were measured."""
    teacher = next((model for model in models if model.role == "teacher"), None)
    if teacher is None:
        return []
    sentences = []
    for student in (model for model in models if model.role == "student"):
        facts = []
        if student.parameters_served and teacher.parameters_served:
            ratio = student.parameters_served / teacher.parameters_served
            facts.append(f"{'has' if ratio < 1 else 'holds'} {ratio:.2f} times the teacher's parameters")
        if student.macs and teacher.macs and student.length == teacher.length:
            facts.append(f"does {100 * student.macs / teacher.macs:.0f} % of its multiply-accumulates per sequence")
        if comparable_throughput(student, teacher):
            assert student.tokens_per_ms and teacher.tokens_per_ms
            facts.append(
                f"encodes {student.tokens_per_ms / teacher.tokens_per_ms:.1f} times as many tokens per millisecond"
            )
        if facts:
            sentences.append(
                f"{student.name} " + (", ".join(facts[:-1]) + " and " + facts[-1] if len(facts) > 1 else facts[0]) + "."
            )
    return sentences


def comparable_throughput(first: Model, second: Model) -> bool:
    """Whether both were measured on the same kind of device, with the same precision and row length, and calmly."""
    if not first.throughput or not second.throughput:
        return False
    calm = all(not is_noisy(speed) for speed in (first.throughput, second.throughput))
    return calm and all(first.throughput[key] == second.throughput[key] for key in ("device", "precision", "length"))


def is_noisy(throughput: dict[str, Any]) -> bool:
    """Whether something else slowed the machine while it was measured: batches were not within a factor of 1.5."""
    return throughput["fastest"] > 1.5 * throughput["slowest"]


def speed_notes(models: list[Model]) -> list[str]:
    """How tokens/ms was measured, once per way of measuring, and which numbers not to trust."""
    ways: dict[str, None] = {}
    notes = []
    for model in models:
        if (speed := model.throughput) is None:
            continue
        way = f"forward pass over rows of {speed['length']} tokens of real text, {speed['batch_size']} per batch"
        ways[f"tokens/ms: {way}, {speed['precision']}, {speed['device']}; the median of several batches."] = None
        if is_noisy(speed):
            spread = f"{rate(speed['slowest'])} to {rate(speed['fastest'])}"
            notes.append(f"The tokens/ms of {model.name} went from {spread} while it was measured: measure again.")
    return [*ways, *notes]


def score_notes(models: list[Model]) -> list[str]:
    """What a reader must know before comparing the scores with anything else."""
    notes = []
    tasks: dict[str, list[tuple[str, ScoredTask]]] = {}
    for model in models:
        for name, task in model.tasks.items():
            tasks.setdefault(name, []).append((model.name, task))
    for name, entries in tasks.items():
        first = entries[0][1]
        counts = ", ".join(
            f"{count} {part}" for part, count in first.counts.items() if part != "malformed_rows_skipped"
        )
        note = f"{name}: {counts}{'' if 'tokens' in first.counts else ' examples'}"
        if first.learning_rate is not None:
            rates = ", ".join(dict.fromkeys(f"{task.learning_rate:g}" for _, task in entries))
            epochs, batch_size = first.settings["epochs"], first.settings["batch_size"]
            note += f", {epochs:g} epoch{'' if epochs == 1 else 's'}, batch {batch_size}, learning rate {rates}"
            if any(task.num_rates > 1 for _, task in entries):
                note += " (the best of several on the development set)"
            note += f", {first.num_seeds} seeds" if first.num_seeds != 1 else ", one seed"
        if any(task.is_part for _, task in entries):
            note += ". A part of the task: not comparable with published scores"
        if any((task.settings, task.counts) != (first.settings, first.counts) for _, task in entries):
            note += ". Careful: the models were scored with different settings or examples"
        notes.append(note + ".")
    if any(score.half_width is not None for model in models for score in model.scores.values()):
        notes.append("± is the 95 % Student-t interval of the mean over seeds; another distillation may differ more.")
    return notes


def markdown(title: str, models: list[Model]) -> str:
    """The table of the page as Markdown, with exact parameter counts."""
    labels = score_labels(models)
    lengths = {model.length for model in models if model.length}
    per = f"{lengths.pop()} tokens" if len(lengths) == 1 else "sequence"
    head = [
        "model",
        "parameters trained",
        "parameters served",
        f"linear MACs per {per} (papers: “GFLOPs”)",
        "tokens/ms",
        *labels,
    ]
    rows = []
    for model in models:
        label = model.name if model.role == "student" else f"{model.name} ({model.role})"
        rows.append(
            [
                label.replace("|", "\\|"),
                exact(model.parameters_training),
                exact(model.parameters_served),
                giga(model.macs),
                rate(model.tokens_per_ms),
                *(model.scores[name].text if name in model.scores else DASH for name in labels),
            ]
        )
    lines = [f"# {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    notes = [*speed_notes(models), *score_notes(models)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def exact(count: int | None) -> str:
    return DASH if count is None else f"{count:,}"


def millions(count: int | None) -> str:
    if count is None:
        return DASH
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def giga(macs: int | None) -> str:
    if macs is None:
        return DASH
    return f"{macs / 1e9:.3f} G" if macs < 1e10 else f"{macs / 1e9:.2f} G"


def rate(tokens_per_ms: float | None) -> str:
    return DASH if tokens_per_ms is None else f"{tokens_per_ms:.1f}" if tokens_per_ms < 100 else f"{tokens_per_ms:.0f}"


def loss_charts(runs: list[Run], colours: dict[str, str]) -> list[dict[str, str]]:
    """The whole loss, its parts, then how the training went; a chart compares all runs that logged the number."""
    names = dict.fromkeys(name for run in runs for name in run.curves.scalars)
    parts = [name for name in names if name.startswith("train/") and name != "train/loss"]
    order = [("train/loss", "Loss")]
    order += [(name, f"Loss part: {name.removeprefix('train/').replace('_', ' ')}") for name in parts]
    order += [
        ("tokens_per_second", "Tokens per second"),
        ("grad_norm", "Gradient norm"),
        ("learning_rate", "Learning rate"),
    ]
    charts = []
    for name, title in order:
        lines = [
            Line(colours[run.name], run.name, binned(*run.curves.scalars[name], CURVE_POINTS))
            for run in runs
            if name in run.curves.scalars
        ]
        # A part that only repeats the whole loss (a single loss) would say the same thing twice.
        if lines and not all(name in parts and same_curve(run, name) for run in runs if name in run.curves.scalars):
            charts.append(
                {"title": title, "svg": line_chart(lines, title=title, may_be_logarithmic=name != "learning_rate")}
            )
    return charts


def same_curve(run: Run, name: str) -> bool:
    return run.curves.scalars.get(name) == run.curves.scalars.get("train/loss")


def score_charts(models: list[Model]) -> list[dict[str, str]]:
    charts = []
    for label in score_labels(models):
        having = [model for model in models if label in model.scores]
        sample = having[0].scores[label]
        bars = [
            Bar(
                colour=model.colour,
                label=model.name,
                value=sample.scale * model.scores[label].mean,
                half_width=None if (half := model.scores[label].half_width) is None else sample.scale * half,
                text=model.scores[label].text,
            )
            for model in having
        ]
        title = label if sample.higher_is_better else f"{label} (lower is better)"
        floor = None if sample.floor is None else sample.scale * sample.floor
        note = "" if floor is None else f"Dashed: {floor:.1f}, always naming the most frequent class."
        svg = bar_chart(bars, title=title, percent=sample.percent, floor=floor)
        charts.append({"title": title, "svg": svg, "note": note})
    return charts


def router_sections(runs: list[Run]) -> list[dict[str, Any]]:
    """Per run with routers: a heat map and the closing figures of every layer."""
    sections = []
    for run in runs:
        loads = run.curves.loads
        if not loads:
            continue
        cells_per_column = sum(len(shares[0]) for _, shares in loads.values())
        columns = min(MAX_HEAT_COLUMNS, max(MIN_HEAT_COLUMNS, MAX_HEAT_CELLS // cells_per_column))
        layers = []
        for layer in natural_order(loads):
            steps, shares = loads[layer]
            last = binned_loads(steps, shares, 10)[-1][2]
            note = f"In the last tenth {100 * min(last):.0f} to {100 * max(last):.0f} % per expert"
            note += f", even is {100 / len(last):.0f} %"
            entropy = run.curves.scalars.get(f"router/{layer}/entropy")
            if entropy:
                note += f"; router entropy {entropy[1][-1]:.2f} of at most {math.log(len(last)):.2f}"
            layers.append(
                {
                    "title": layer_title(layer),
                    "note": note,
                    "svg": heat_map(binned_loads(steps, shares, columns), title=layer_title(layer)),
                }
            )
        sections.append({"name": run.name, "layers": layers})
    return sections


def layer_title(name: str) -> str:
    """`layers.0.moe`, as a router is logged, for people: Layer 0, moe."""
    return "Layer " + ", ".join(name.removeprefix("layers.").split("."))


def run_details(run: Run, colour: str) -> dict[str, Any]:
    """The small print of a run: where it is, how far it came, its configuration flattened to dotted keys."""
    state = "complete" if run.is_done else f"not complete: {run.curves.last_step} steps logged"
    facts = [("folder", str(run.folder)), ("state", state)]
    if run.curves.tokens is not None:
        facts.append(("tokens seen", f"{run.curves.tokens:,}"))
    if run.curves.num_dropped_lines:
        facts.append(("metrics.jsonl", "the last line was cut off and left out"))
    return {"name": run.name, "colour": colour, "facts": facts, "settings": flattened(run.config)}


def flattened(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    entries: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, dict) and value:
            entries += flattened(value, f"{prefix}{key}.")
        else:
            entries.append((prefix + key, str(value)))
    return entries


def render(title: str, models: list[Model], runs: list[Run]) -> str:
    """The HTML page; style and pictures are inside it, so that it can be sent as one file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    colours = {run.name: next(model.colour for model in models if model.name == run.name) for run in runs}
    labels = score_labels(models)
    lengths = {model.length for model in models if model.length}
    rows = [
        {
            "model": model,
            "trained": millions(model.parameters_training),
            "trained_exact": exact(model.parameters_training),
            "served": millions(model.parameters_served),
            "served_exact": exact(model.parameters_served),
            "macs": giga(model.macs),
            "rate": rate(model.tokens_per_ms),
            "scores": [model.scores[label].text if label in model.scores else DASH for label in labels],
        }
        for model in models
    ]
    return environment.get_template("report.html.jinja").render(
        title=title,
        written=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
        models=models,
        rows=rows,
        labels=labels,
        length=lengths.pop() if len(lengths) == 1 else None,
        comparisons=comparisons(models),
        notes=[*speed_notes(models), *score_notes(models)],
        score_charts=score_charts(models),
        loss_charts=loss_charts(runs, colours),
        curve_names=[(run.name, colours[run.name]) for run in runs],
        routers=router_sections(runs),
        heat_legend=heat_legend(),
        details=[run_details(run, colours[run.name]) for run in runs],
    )


if __name__ == "__main__":
    sys.exit(main())
