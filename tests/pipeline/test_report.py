"""`capgap report` on run folders written by the test itself; the numbers in them mean nothing."""

import json
import re
import xml.dom.minidom
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline import report
from pipeline.report_charts import NUM_HEAT_CLASSES, heat_class, log_ticks, nice_ticks, short_number
from pipeline.report_records import binned, binned_loads, natural_order, read_curves

TEACHER = {"parameters_served": 2000, "linear_macs_per_sequence": 4_000_000, "sequence_length": 128}
STUDENT = {
    "parameters_training": 1100,
    "parameters_served": 1000,
    "linear_macs_per_sequence": 1_000_000,
    "sequence_length": 128,
}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def score_file(name: str, values: list[float], tokens_per_ms: float, **throughput: object) -> dict:
    headline = {"label": "QNLI acc", "metric": "accuracy", "percent": True, "higher_is_better": True, "floor": 0.5}
    task = {
        "headlines": [headline | {"mean": sum(values) / len(values), "half_width_95": 0.021, "values": values}],
        "seeds": [1, 2],
        "learning_rate": 1e-4,
        "learning_rates_tried": [1e-4],
        "settings": {"epochs": 2, "batch_size": 16, "max_train_examples": 500},
        "counts": {"train": 500, "dev": 250},
    }
    speed = {"tokens_per_ms": tokens_per_ms, "length": 128, "batch_size": 8, "num_batches": 9, "precision": "fp32"}
    speed |= {"device": "one CPU core", "slowest": 0.9 * tokens_per_ms, "fastest": 1.1 * tokens_per_ms, **throughput}
    model = {
        "name": name,
        "source": f"/models/{name}",
        "parameters": 7,
        "linear_macs_per_sequence": None,
        "throughput": speed,
    }
    return {"model": model | {"sequence_length": 128}, "tasks": {"qnli": task}}


def write_run(folder: Path, *, moe: bool, steps: int = 30) -> Path:
    write_json(
        folder / "run.json",
        {
            "config": {"teacher": {"model": "big"}, "student": {"num_experts": 4}},
            "student": STUDENT,
            "teacher": TEACHER,
        },
    )
    lines = []
    for step in range(1, steps + 1):
        entry = {
            "step": step,
            "tokens": 100 * step,
            "train/loss": 3.0 / step,
            "train/relation_kl": 2.5 / step,
            "learning_rate": 3e-4,
        }
        if moe:
            entry |= {"router/0/load": [0.7, 0.1, 0.1, 0.1], "router/0/entropy": 1.0}
        lines.append(json.dumps(entry))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A dense and a mixture-of-experts run of one teacher, all three scored."""
    write_run(tmp_path / "dense", moe=False)
    write_json(tmp_path / "dense" / "scores.json", score_file("dense/export", [0.6, 0.62], 8.0))
    write_run(tmp_path / "moe", moe=True)
    write_json(tmp_path / "moe" / "scores.json", score_file("moe/export", [0.64, 0.66], 6.0))
    (tmp_path / "moe" / "DONE").write_text("{}")
    write_json(tmp_path / "teacher-scores" / "scores.json", score_file("big", [0.7, 0.72], 4.0))
    return tmp_path


class Page(HTMLParser):
    """Collects what a page asks the network for, and which tags stay open."""

    VOID = frozenset(
        {"meta", "link", "br", "img", "input", "hr", "line", "rect", "circle", "polyline", "polygon", "path"}
    )

    def __init__(self, text: str):
        super().__init__()
        self.outside: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe"):
            self.outside.append(tag)
        self.outside += [f"{name}={value}" for name, value in attrs if name in ("src", "href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def table_of(markdown: str) -> list[list[str]]:
    rows = [line.strip("|").split("|") for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not row[0].startswith("---")]


def test_teacher_and_students_stand_side_by_side(runs, capsys):
    names = [str(runs / "dense"), f"mixture={runs / 'moe'}", f"BIG={runs / 'teacher-scores'}"]
    assert report.main([*names, "--out", str(runs / "out")]) == 0
    assert table_of((runs / "out" / "report.md").read_text(encoding="utf-8")) == [
        [
            "model",
            "parameters trained",
            "parameters served",
            "linear MACs per 128 tokens (papers: “GFLOPs”)",
            "tokens/ms",
            "QNLI acc",
        ],
        ["BIG (teacher)", "–", "2,000", "0.004 G", "4.0", "71.0 ± 2.1"],
        ["dense", "1,100", "1,000", "0.001 G", "8.0", "61.0 ± 2.1"],
        ["mixture", "1,100", "1,000", "0.001 G", "6.0", "65.0 ± 2.1"],
    ]
    assert "| BIG (teacher) |" in capsys.readouterr().out


def test_the_page_is_whole_and_asks_for_nothing_outside(runs):
    report.main(
        [str(runs / "dense"), str(runs / "moe"), f"teacher={runs / 'teacher-scores'}", "--out", str(runs / "out")]
    )
    text = (runs / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.outside == []
    assert page.open == []
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text)
    for wanted in (
        "71.0 ± 2.1",
        "Experts of moe",
        "prefers-color-scheme: dark",
        "Loss part: relation kl",
        "0.50 times the teacher",
    ):
        assert wanted in text
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(pictures) == 6  # one score, three curves, the colour scale and one layer
    for picture in pictures:
        xml.dom.minidom.parseString(picture)


def test_the_page_does_not_overtake_names_as_markup(runs):
    report.main([f"<b>x</b>={runs / 'dense'}", "--out", str(runs / "out"), "--title", "a < b & c"])
    text = (runs / "out" / "report.html").read_text(encoding="utf-8")
    assert "<b>x</b>" not in text
    assert "a &lt; b &amp; c" in text
    assert Page(text).open == []


def test_the_report_lies_beside_the_first_run_when_no_folder_is_given(runs):
    assert report.main([str(runs / "moe")]) == 0
    assert (runs / "moe" / "report.html").exists()
    assert (runs / "moe" / "report.md").exists()


def test_a_run_without_scores_or_curves_is_shown_as_far_as_it_came(tmp_path):
    run = write_run(tmp_path / "young", moe=False)
    (run / "metrics.jsonl").unlink()
    assert report.main([str(run)]) == 0
    assert "not complete: 0 steps logged" in (run / "report.html").read_text(encoding="utf-8")


def test_score_folders_alone_make_a_table_too(runs):
    assert report.main([f"a={runs / 'teacher-scores'}", "--out", str(runs / "out")]) == 0
    rows = table_of((runs / "out" / "report.md").read_text(encoding="utf-8"))
    assert rows[1][0] == "a (scored only)"
    assert rows[1][2] == "7"


def test_speeds_of_different_machines_are_not_divided(runs):
    write_json(runs / "dense" / "scores.json", score_file("dense/export", [0.6, 0.62], 800.0, device="some GPU"))
    report.main(
        [str(runs / "dense"), str(runs / "moe"), f"teacher={runs / 'teacher-scores'}", "--out", str(runs / "out")]
    )
    text = (runs / "out" / "report.html").read_text(encoding="utf-8")
    dense, moe = re.findall(r"<li>((?:dense|moe) (?:has|holds).*?)</li>", text)
    assert "tokens per millisecond" not in dense
    assert "1.5 times as many tokens per millisecond" in moe


def test_a_speed_that_was_disturbed_is_called_so_and_not_compared(runs):
    write_json(runs / "dense" / "scores.json", score_file("dense/export", [0.6, 0.62], 2.0, slowest=1.0, fastest=8.0))
    teacher = f"teacher={runs / 'teacher-scores'}"
    report.main([str(runs / "dense"), str(runs / "moe"), teacher, "--out", str(runs / "out")])
    text = (runs / "out" / "report.html").read_text(encoding="utf-8")
    assert "The tokens/ms of dense went from 1.0 to 8.0" in text
    assert "0.5 times as many tokens" not in text
    assert "1.5 times as many tokens" in text


def test_scores_made_with_different_settings_are_called_so(runs):
    changed = score_file("moe/export", [0.64, 0.66], 6.0)
    changed["tasks"]["qnli"]["counts"]["train"] = 400
    write_json(runs / "moe" / "scores.json", changed)
    report.main([str(runs / "dense"), str(runs / "moe"), "--out", str(runs / "out")])
    assert "scored with different settings or examples" in (runs / "out" / "report.md").read_text(encoding="utf-8")


def test_every_score_file_of_a_run_counts(runs):
    extra = score_file("dense/export", [0.3, 0.32], 8.0)
    extra["tasks"] = {"rte": extra["tasks"]["qnli"]}
    extra["tasks"]["rte"]["headlines"][0]["label"] = "RTE acc"
    write_json(runs / "dense" / "scores-rte.json", extra)
    report.main([str(runs / "dense"), "--out", str(runs / "out")])
    assert table_of((runs / "out" / "report.md").read_text(encoding="utf-8"))[0][-2:] == ["QNLI acc", "RTE acc"]


@pytest.mark.parametrize(
    ("prepare", "complaint"),
    [
        (lambda folder: None, "nothing: - no such folder"),
        (lambda folder: folder.mkdir(), "holds neither run.json nor scores.json"),
        (lambda folder: write_json(folder / "run.json", {"student": {}}), "student.parameters_served is missing"),
        (lambda folder: write_json(folder / "scores.json", {"tasks": 3}), "it is not a score file"),
    ],
)
def test_a_folder_that_cannot_be_reported_is_named(tmp_path, capsys, prepare, complaint):
    folder = tmp_path / "nothing"
    prepare(folder)
    assert report.main([str(folder)]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert complaint.split(":")[-1].strip(" -") in error
    assert "nothing" in error


def test_a_repeated_step_counts_once_and_a_cut_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [{"step": 1, "train/loss": 5.0}, {"step": 2, "train/loss": 4.0}, {"step": 2, "train/loss": 3.5}]
    path.write_text("\n".join(map(json.dumps, whole)) + '\n{"step": 3, "tra')
    curves = read_curves(path)
    assert curves.scalars["train/loss"] == ([1, 2], [5.0, 3.5])
    assert curves.num_dropped_lines == 1


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(runs, capsys):
    path = runs / "dense" / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 5.0}\nnot json\n{"step": 3, "train/loss": 4.0}\n')
    assert report.main([str(runs / "dense")]) == 3
    assert "metrics.jsonl:2: not a JSON object with a step" in capsys.readouterr().err


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": NaN}\n{"step": 2, "train/loss": 4.0}\n')
    assert read_curves(path).scalars["train/loss"] == ([2], [4.0])


def test_long_runs_and_many_experts_stay_a_small_page(tmp_path):
    run = write_run(tmp_path / "long", moe=False)
    with (run / "metrics.jsonl").open("w") as lines:
        for step in range(1, 3001):
            entry: dict = {"step": step, "train/loss": 1 / step}
            if step % 10 == 0:
                for layer in range(24):
                    entry[f"router/{layer}/load"] = [((expert * step) % 7 + 1) / 256 for expert in range(64)]
            lines.write(json.dumps(entry) + "\n")
    assert report.main([str(run)]) == 0
    assert (run / "report.html").stat().st_size < 4_000_000


def test_binning_keeps_means_and_extremes():
    points = binned(list(range(1, 101)), [float(i) for i in range(100)], 10)
    assert len(points) == 10
    assert points[0] == (5.5, 4.5, 0.0, 9.0)
    assert binned([1, 2], [3.0, 4.0], 10) == [(1.0, 3.0, 3.0, 3.0), (2.0, 4.0, 4.0, 4.0)]
    assert binned_loads([10, 20, 30], [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], 2) == [
        (10, 20, [0.5, 0.5]),
        (30, 30, [0.5, 0.5]),
    ]


def test_layers_are_ordered_as_people_count():
    assert natural_order(["10", "2", "0.attention", "0"]) == ["0", "0.attention", "2", "10"]


def test_ticks_are_round_and_cover_the_values():
    assert nice_ticks(0, 100) == [0, 25, 50, 75, 100]
    ticks = nice_ticks(0.313, 2.61)
    assert ticks[0] <= 0.313 and ticks[-1] >= 2.61
    assert nice_ticks(5.0, 5.0)[0] <= 5.0
    assert log_ticks(0.01, 100) == [0.01, 0.1, 1.0, 10.0, 100.0]
    assert [short_number(value) for value in (0, 1500, 2e6, 3e-4, 0.25)] == ["0", "1.5k", "2M", "3e-4", "0.25"]


def test_heat_classes_run_from_a_quarter_to_four_times_the_even_share():
    assert [heat_class(share, 4) for share in (0.0, 0.0625, 0.25, 1.0)] == [
        0,
        0,
        (NUM_HEAT_CLASSES - 1) // 2,
        NUM_HEAT_CLASSES - 1,
    ]


def test_a_run_whose_export_taught_the_others_is_the_teacher(runs, capsys):
    """As in `make demo-llm`, where the teacher is trained by the same trainer."""
    record = json.loads((runs / "moe" / "run.json").read_text(encoding="utf-8"))
    taught = record | {"config": {"teacher": {"model": str(runs / "dense" / "export")}, "student": {}}}
    write_json(runs / "moe" / "run.json", taught)
    own = {"config": {"teacher": {"model": None}, "student": {}}, "student": TEACHER | {"parameters_training": 2000}}
    write_json(runs / "dense" / "run.json", own)
    assert report.main([str(runs / "dense"), str(runs / "moe"), "--out", str(runs / "report")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 2
    assert rows[0].startswith("| dense (teacher) | 2,000 | 2,000 |") and "61.0" in rows[0]
    assert rows[1].startswith("| moe |")
