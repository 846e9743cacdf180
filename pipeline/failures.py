"""Turns what went wrong in the middle of a run into one line for the user, and keeps the traceback in a file."""

import os
import traceback
from pathlib import Path

from data_prep.errors import CapgapError
from pipeline.config import RunConfig


def explain(error: Exception, config: RunConfig) -> CapgapError:
    """The error that a user reads. The traceback of anything unexpected goes to OUT/errors/rank-N.txt."""
    if isinstance(error, CapgapError):
        return error
    text = str(error)
    where = _keep_traceback(error, Path(config.out))
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text or isinstance(error, MemoryError):
        return CapgapError(
            f"out of memory with batch.micro_size {config.batch.micro_size} and precision {config.engine.precision} "
            f"({_first_line(text)}) - the checkpoints are intact - in this order: halve batch.micro_size, set "
            "engine.activation_checkpointing true, use engine.ds_config ds_configs/zero2.json (traceback: "
            f"{where})"
        )
    if any(sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")):
        return CapgapError(
            f"another rank is gone ({_first_line(text)}) - its own message says why - "
            f"run the same command again to resume (traceback: {where})"
        )
    return CapgapError(f"{type(error).__name__}: {_first_line(text)} (traceback: {where})")


def _keep_traceback(error: Exception, out: Path) -> str:
    written = "".join(traceback.format_exception(error))
    path = out / "errors" / f"rank-{os.environ.get('RANK', '0')}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written, encoding="utf-8")
        return str(path)
    except OSError:
        # Nowhere to keep it: better on the screen than lost.
        return f"not saved:\n{written}"


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0]
