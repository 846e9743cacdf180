"""Progress with an estimate of the time left: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import TextIO


def spoken_duration(seconds: float) -> str:
    """Seconds as 0:42, 3:07 or 2:15:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Counts up to `total` in `unit`s and prints how far it is; `total` None means unknown.

    A terminal line is redrawn 5 times a second, a plain line is printed after 5 s and then ever more seldom (at least
    every minute), so that a log of a long job stays readable. `clock` counts seconds and never runs backwards.
    """

    def __init__(
        self,
        label: str,
        total: float | None,
        *,
        unit: str = "",
        start: float = 0,
        stream: TextIO | None = None,
        clock=time.monotonic,
    ):
        self.label, self.total, self.unit, self.done = label, total, unit, start
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._clock = clock
        self._began = self._shown = clock()
        self._start = start
        self._note = ""
        self._said: float | None = None  # what was done when the last line was printed
        self._pause = 0.2 if self._terminal else 5.0

    def __enter__(self) -> "Progress":
        return self

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Adds to what is done; `note` is free text for the end of the line (a loss, a rate)."""
        self.done += amount
        self._note = note
        now = self._clock()
        if now - self._shown >= self._pause:
            self._show(now)
            if not self._terminal:
                self._pause = min(60.0, self._pause * 1.5)

    def line(self, now: float) -> str:
        """What is printed: label, share or count, rate, time left, note."""
        elapsed = max(now - self._began, 1e-9)
        rate = (self.done - self._start) / elapsed
        parts = [f"{self.label}: {_short(self.done)}"]
        if self.total is not None and self.total > 0:
            parts[0] += f"/{_short(self.total)} {self.unit}".rstrip() + f" {100 * self.done / self.total:.0f} %"
        else:
            parts[0] += f" {self.unit}".rstrip()
        parts.append(f"{_short(rate)} {self.unit}/s".replace(" /s", "/s"))
        if self.total is not None and rate > 0 and self.done < self.total:
            parts.append(f"{spoken_duration((self.total - self.done) / rate)} left")
        else:
            parts.append(f"{spoken_duration(elapsed)} so far")
        if self._note:
            parts.append(self._note)
        return ", ".join(parts)

    def _show(self, now: float) -> None:
        self._shown, self._said = now, self.done
        line = self.line(now)
        if self._terminal:
            if self.total:
                filled = round(20 * min(1.0, self.done / self.total))
                line = f"[{'#' * filled}{'.' * (20 - filled)}] {line}"
            self._stream.write(f"\r\x1b[K{line}")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal or (kind is None and self._said != self.done):
            self._show(self._clock())
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()


def _short(number: float) -> str:
    if isinstance(number, int) or float(number).is_integer():
        return f"{int(number)}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}"
