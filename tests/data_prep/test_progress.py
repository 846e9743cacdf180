import io

from data_prep.progress import Progress, spoken_duration


def test_a_log_gets_plain_lines_with_rate_and_time_left():
    now = [0.0]
    stream = io.StringIO()
    with Progress("prepare", 100, unit="MB", stream=stream, clock=lambda: now[0]) as progress:
        for _ in range(100):
            now[0] += 1
            progress.advance(1)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "prepare: 5/100 MB 5 %, 1 MB/s, 1:35 left"
    assert lines[-1].startswith("prepare: 100/100 MB 100 %")
    assert len(lines) < 12


def test_a_terminal_gets_a_bar_that_is_redrawn():
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    now = [0.0]
    with Progress("train", 4, unit="steps", stream=stream, clock=lambda: now[0]) as progress:
        for _ in range(4):
            now[0] += 1
            progress.advance(1, note="loss 1.5")
    assert "\r\x1b[K[#####...............] train: 1/4 steps 25 %, 1 steps/s, 0:03 left, loss 1.5" in stream.getvalue()


def test_an_unknown_total_shows_count_and_rate():
    stream = io.StringIO()
    with Progress("read", None, unit="documents", stream=stream) as progress:
        progress.advance(7)
    assert stream.getvalue().startswith("read: 7 documents, ")


def test_durations_read_like_a_clock():
    assert [spoken_duration(s) for s in (42, 187, 8109)] == ["0:42", "3:07", "2:15:09"]


def test_a_log_says_the_end_once():
    now = [0.0]
    stream = io.StringIO()
    with Progress("distil", 12, unit="steps", stream=stream, clock=lambda: now[0]) as progress:
        for _ in range(2):
            now[0] += 6
            progress.advance(6)
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["distil: 6/12 steps 50 %", "distil: 12/12 steps 100 %"]
