"""What is seen while a run goes on: JSON lines, TensorBoard, and what they show after a resume."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from data_prep.files import write_bytes


class JsonLines:
    """A file of one JSON object per line, each with a `step`, that never goes back in time."""

    def __init__(self, path: Path, *, resume_step: int):
        """Opens for appending and drops the lines after `resume_step`, which the resumed run writes again."""
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= resume_step]
            write_bytes(path, "".join(line + "\n" for line in kept).encode())
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # A line cut short by a kill.


class Tracker:
    """Writes each measurement to metrics.jsonl and TensorBoard; a TensorBoard that fails is named once and left."""

    def __init__(self, run: Path, *, resume_step: int):
        self._lines = JsonLines(run / "metrics.jsonl", resume_step=resume_step)
        self._writer = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            # Steps after the resume point were drawn by an interrupted run: purge_step hides them, also those of a run
            # that was killed before its first checkpoint.
            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=resume_step + 1)
        except OSError as error:
            self._give_up(error)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Records scalars and lists of scalars; a list becomes one curve per entry."""
        self._lines.write({"step": step, **values})
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                if isinstance(value, list):
                    for index, entry in enumerate(value):
                        self._writer.add_scalar(f"{name}/{index}", entry, step)
                else:
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        self._lines.close()
        if self._writer is not None:
            self._writer.close()

    def _give_up(self, error: OSError) -> None:
        print(f"warning: TensorBoard is off ({error}); metrics.jsonl goes on", file=sys.stderr)
        self._writer = None
