"""Copies checkpoints to a second place while the run goes on."""

import sys
import threading
from pathlib import Path

from data_prep.errors import DataError
from data_prep.files import copy_file, make_folder, read_json, remove_folder, rename
from pipeline.checkpoints import PARTIAL, RECORD, keep_last


class Copies:
    """One thread that copies the newest checkpoint; what it cannot copy is told and never stops the run.

    A checkpoint that waits is replaced by a newer one: a slow second place gets fewer of them.
    """

    def __init__(self, target: Path, keep: int):
        self._target, self._keep = target, keep
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._copying: Path | None = None
        # A daemon: a run that is told to stop does not wait for it. Its leftover is removed by the next copy.
        threading.Thread(target=self._work, daemon=True).start()

    @property
    def in_use(self) -> Path | None:
        """The checkpoint that is being read now and must stay."""
        return self._copying

    def add(self, checkpoint: Path) -> None:
        """Asks for a copy of a complete checkpoint."""
        with self._changed:
            self._waiting = checkpoint
            self._changed.notify_all()

    def finish(self) -> None:
        """Returns when nothing waits or is being copied."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and self._copying is None)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                self._copying, self._waiting = self._waiting, None
            assert self._copying is not None
            try:
                copy_checkpoint(self._copying, self._target)
                keep_last(self._target / self._copying.name, self._keep)
            except Exception as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                print(f"warning: {self._copying.name} is not copied to {self._target}: {reason}", file=sys.stderr)
            with self._changed:
                self._copying = None
                self._changed.notify_all()


def copy_checkpoint(checkpoint: Path, target: Path) -> None:
    """TARGET/step-... as a copy of a complete checkpoint, its record last, and TARGET/run.json beside it.

    Nothing to do when it is there already.

    Raises DataError for a file that is not what the checkpoint's record says.
    """
    final = target / checkpoint.name
    if (final / RECORD).is_file() and (final / RECORD).read_bytes() == (checkpoint / RECORD).read_bytes():
        return
    partial = final.with_name(final.name + PARTIAL)
    remove_folder(partial)
    make_folder(partial)
    # Says whose checkpoints these are, should nothing else be left.
    copy_file(checkpoint.parent.parent / "run.json", target / "run.json")
    record = read_json(checkpoint / RECORD, "the checkpoint is incomplete")
    for name, expected in record["files"].items():
        if copy_file(checkpoint / name, partial / name) != expected:
            raise DataError(f"file {name} does not match the checkpoint's record")
    copy_file(checkpoint / RECORD, partial / RECORD)
    remove_folder(final)
    rename(partial, final)
