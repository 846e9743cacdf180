"""What is written while a run goes on, after a resume, and when TensorBoard cannot be written."""

import json
from pathlib import Path

import pytest

from launching import json_lines
from pipeline.tracking import JsonLines, Tracker


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars that TensorBoard shows, purged as it purges them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def log(tracker: Tracker, start: int, stop: int, *, offset: float = 0.0) -> None:
    for step in range(start, stop):
        tracker.log(step, {"train/loss": step + offset, "router/a/load": [0.25, 0.75]})
    tracker.close()


def test_each_measurement_is_in_the_json_lines_and_in_tensorboard_a_list_as_one_curve_per_entry(tmp_path):
    log(Tracker(tmp_path, resume_step=0), 1, 4)
    assert json_lines(tmp_path / "metrics.jsonl") == [
        {"step": step, "train/loss": step, "router/a/load": [0.25, 0.75]} for step in (1, 2, 3)
    ]
    shown = curves(tmp_path)
    assert shown["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert shown["router/a/load/1"] == [(step, 0.75) for step in (1, 2, 3)]


def test_after_a_resume_no_step_comes_twice_and_the_new_values_are_shown(tmp_path):
    log(Tracker(tmp_path, resume_step=0), 1, 9)
    log(Tracker(tmp_path, resume_step=4), 5, 12, offset=0.5)
    expected = [(step, step + (0.5 if step > 4 else 0.0)) for step in range(1, 12)]
    assert [(line["step"], line["train/loss"]) for line in json_lines(tmp_path / "metrics.jsonl")] == expected
    assert curves(tmp_path)["train/loss"] == expected


def test_a_run_that_starts_over_shows_nothing_of_the_one_before(tmp_path):
    """Killed before its first checkpoint: the run begins again at step 0."""
    log(Tracker(tmp_path, resume_step=0), 1, 6)
    log(Tracker(tmp_path, resume_step=0), 1, 4, offset=0.5)
    expected = [(step, step + 0.5) for step in (1, 2, 3)]
    assert [(line["step"], line["train/loss"]) for line in json_lines(tmp_path / "metrics.jsonl")] == expected
    assert curves(tmp_path)["train/loss"] == expected


@pytest.mark.parametrize("torn", ['{"step": 3, "a"', "", "null", '{"a": 1}', "\0\0\0"])
@pytest.mark.fault(1)
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, torn):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn, encoding="utf-8")
    lines = JsonLines(path, resume_step=2)
    lines.write({"step": 3})
    lines.close()
    assert json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    lines = JsonLines(tmp_path / "lines.jsonl", resume_step=0)
    for step in (1, 2):
        lines.write({"step": step, "text": "ü"})
        assert len(json_lines(tmp_path / "lines.jsonl")) == step
    lines.close()


@pytest.mark.fault(26)
def test_a_file_in_the_way_of_tensorboard_is_named_once_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way", encoding="utf-8")
    log(Tracker(tmp_path, resume_step=0), 1, 4)
    assert len(json_lines(tmp_path / "metrics.jsonl")) == 3
    assert capsys.readouterr().err.count("warning: TensorBoard is off") == 1


@pytest.mark.fault(26)
def test_tensorboard_failing_in_the_middle_is_named_once_and_the_run_goes_on(tmp_path, capsys):
    tracker = Tracker(tmp_path, resume_step=0)
    tracker.log(1, {"train/loss": 1.0})
    assert tracker._writer is not None

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    tracker._writer.add_scalar = full_disk  # type: ignore[method-assign]
    for step in (2, 3):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close()
    assert len(json_lines(tmp_path / "metrics.jsonl")) == 3
    error = capsys.readouterr().err
    assert error.count("warning: TensorBoard is off") == 1 and "No space left" in error


def test_values_that_are_no_numbers_do_not_break_the_json_lines(tmp_path):
    tracker = Tracker(tmp_path, resume_step=0)
    tracker.log(1, {"train/loss": float("nan")})
    tracker.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["step"] == 1
