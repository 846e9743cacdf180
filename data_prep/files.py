"""Durable writes: a temporary name, fsync, rename, fsync of the folder; one hook sees every operation."""

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import xxhash

from data_prep.errors import DataError

WRITE_PIECE = 1 << 20  # bytes handed to the system at a time, so that a crash in the middle of a file can be rehearsed
RETRY_DELAYS = (0.02, 0.1, 0.5, 2.0)  # seconds; network file systems show a new name late or fail a rename once
TRANSIENT = {errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.EIO, errno.ENOENT}
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
TEMPORARY_MARK = ".unfinished-"

Result = TypeVar("Result")
Hook = Callable[[str, Path], None]

_hook: Hook | None = None


@contextmanager
def watching_operations(hook: Hook) -> Iterator[None]:
    """Calls hook(operation, path) before every write, fsync, rename, mkdir and remove; what the hook raises, the
    operation raises. Tests crash, fill the disk or delay at operation k with it."""
    global _hook  # noqa: PLW0603
    previous, _hook = _hook, hook
    try:
        yield
    finally:
        _hook = previous


def _announce(operation: str, path: Path) -> None:
    if _hook is not None:
        _hook(operation, path)


def portable_name(name: str) -> str:
    """A file name as text that does not depend on the locale of the process."""
    return os.fsencode(name).decode("utf-8", "replace")


def content_hash(data: bytes | memoryview) -> str:
    """The xxh3_128 of the bytes, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def file_hash(path: Path) -> str:
    """The xxh3_128 of a file's content, read in pieces."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()


def stored_hash(path: Path) -> str:
    """The xxh3_128 of what the disk holds: what the system has kept of a synced file in memory is dropped first."""
    _announce("read", path)
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return file_hash(path)


class HashingWriter:
    """A binary file for writing that counts and hashes what goes through it; pyarrow can write into it."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path, self._digest = file, path, xxhash.xxh3_128()
        self.num_bytes = 0
        self.closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), WRITE_PIECE):
            piece = view[start : start + WRITE_PIECE]
            _announce("write", self._path)
            self._file.write(piece)
            self._digest.update(piece)
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


@contextmanager
def replacing_file(path: Path) -> Iterator[HashingWriter]:
    """Writes beside `path` and takes its place when the block ends; after an exception `path` is as it was."""
    temporary = path.with_name(f".{path.name}{TEMPORARY_MARK}{uuid.uuid4().hex[:12]}")
    try:
        with translating_no_space(path):
            _announce("open", temporary)
            with open(temporary, "xb") as file:
                writer = HashingWriter(file, temporary)
                yield writer
                file.flush()
                _announce("fsync", temporary)
                os.fsync(file.fileno())
            rename(temporary, path)
            wait_for_size(path, writer.num_bytes)
    except Exception:  # a crash (BaseException) leaves the temporary behind, as a real one would
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes | memoryview) -> str:
    """Replaces the file `path` by `data` and returns the content's hash."""
    with replacing_file(path) as writer:
        writer.write(data)
    return writer.hexdigest()


def copy_file(source: Path, target: Path) -> str:
    """Replaces `target` by a copy of `source` and returns the hash of what was copied."""
    with open(source, "rb") as file, replacing_file(target) as writer:
        while piece := file.read(8 << 20):
            writer.write(piece)
    return writer.hexdigest()


def write_json(path: Path, value: Any) -> str:
    """Replaces the file `path` by indented UTF-8 JSON and returns the content's hash."""
    return write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, mend: str) -> Any:
    """The JSON value in `path`; DataError, ending with `mend`, when the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"reading {path}: no such file - {mend}") from None
    except (ValueError, OSError) as error:
        raise DataError(f"reading {path}: {error} - {mend}") from None


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields a fresh folder beside `path` that takes the name `path` when the block ends, with all its files synced.

    An older folder of that name is moved aside first and removed last, so that one of the two is complete at any time.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY_MARK}{uuid.uuid4().hex[:12]}")
    make_folder(temporary)
    try:
        with translating_no_space(path):
            yield temporary
            for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
                _announce("fsync", file)
                _sync(file)
            for folder in [*sorted(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
                _announce("fsync_folder", folder)
                _sync(folder)
            older = path.with_name(f"{temporary.name}-older")
            if path.exists():
                rename(path, older)
            rename(temporary, path)
            remove_folder(older)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def make_folder(path: Path) -> None:
    """Creates a folder with its parents; an existing one is fine."""
    _announce("mkdir", path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"creating folder {path}: a file of that name is in the way - choose another --out") from None
    except OSError as error:
        raise DataError(f"creating folder {path}: {error.strerror} - choose a writable --out") from None


def rename(source: Path, target: Path) -> None:
    """Moves `source` over `target` in one step that survives a power cut; retries what network file systems fail."""

    def attempt() -> None:
        # A rename may have happened although the reply was lost: the name that matters is the target's.
        _announce("rename", target)
        if source.exists() or not target.exists():
            os.replace(source, target)

    retrying(attempt)
    _announce("fsync_folder", target.parent)
    _sync(target.parent)


def remove(path: Path) -> None:
    """Removes a file; a missing one is fine."""
    _announce("remove", path)
    path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Removes a folder with its content; a missing one is fine."""
    if path.exists():
        _announce("remove", path)
        shutil.rmtree(path)


def remove_leftovers(folder: Path) -> list[str]:
    """Removes what crashed writers left in `folder` and returns the names; call it only while holding the lock."""
    leftovers = [path for path in sorted(folder.iterdir()) if TEMPORARY_MARK in path.name]
    for path in leftovers:
        if path.is_dir():
            remove_folder(path)
        else:
            remove(path)
    return [path.name for path in leftovers]


def retrying(attempt: Callable[[], Result]) -> Result:
    """The result of attempt(), tried again after each of RETRY_DELAYS when the system reports a passing fault."""
    for delay in RETRY_DELAYS:
        try:
            return attempt()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
        time.sleep(delay)
    return attempt()


def wait_for_size(path: Path, num_bytes: int) -> None:
    """Returns when `path` is visible with its full size; existing is not taken for complete."""

    def attempt() -> None:
        _announce("stat", path)
        if (seen := path.stat().st_size) != num_bytes:
            raise OSError(errno.ESTALE, f"{seen} of {num_bytes} bytes visible", str(path))

    try:
        retrying(attempt)
    except OSError as error:
        raise DataError(
            f"writing {path}: {error.strerror} after {sum(RETRY_DELAYS):.1f} s - the file system lost the file - "
            "check the disk and run the same command again"
        ) from None


@contextmanager
def translating_no_space(path: Path) -> Iterator[None]:
    """Turns a full disk, quota or size limit into a DataError that names the path and the free bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise DataError(
            f"writing {path}: {error.strerror} ({free_bytes(path.parent)} bytes free) - what was complete is kept - "
            "free some space and run the same command again"
        ) from None


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written in `folder`, or in its nearest existing parent."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_free_space(folder: Path, needed_bytes: int) -> None:
    """Raises DataError, with both figures, when `folder` has less room than needed."""
    free = free_bytes(folder)
    if free < needed_bytes:
        raise DataError(
            f"writing to {folder}: about {needed_bytes} bytes needed, {free} free - "
            "free some space or choose another folder"
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
