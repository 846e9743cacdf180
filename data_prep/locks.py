"""One writer per output folder: a lock that the kernel frees when its holder dies, with a note of who holds it."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import DataError


@contextmanager
def folder_lock(folder: Path, name: str = "writer", *, wait: bool = False) -> Iterator[None]:
    """Holds the lock `name` of a folder for the block; DataError, naming the holder, when another process holds it,
    unless the caller would rather wait.

    The lock is flock's, so a killed holder leaves nothing stale behind: the next command takes over, also a Slurm
    requeue of the same job on another host. The file stays: removing it would let two writers lock two files.
    """
    path = folder / f".{name}.lock"
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise DataError(
                    f"locking {path}: {error.strerror} - this file system has no locks - choose another --out"
                ) from None
            raise DataError(
                f"locking {folder}: in use by {_holder(path)} - two writers would mix their files - "
                "wait for it, stop it, or choose another --out"
            ) from None
        file.seek(0)
        file.truncate()
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        note = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "start": started,
        }
        file.write(json.dumps(note))
        file.flush()
        try:
            yield
        finally:
            file.seek(0)
            file.truncate()
            file.flush()
            fcntl.flock(file, fcntl.LOCK_UN)


def _holder(path: Path) -> str:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the holder is just about to write its note
        return "another process"
    job = f" of job {note['job']}" if note["job"] else ""
    return f"process {note['pid']}{job} on {note['host']} since {note['start']}"
