"""Decompresses bz2 files of one or many streams without losing a byte silently, and finds where streams begin."""

import bz2
import mmap
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import DataError

READ_BYTES = 1 << 18
OUTPUT_BYTES = 1 << 20  # most bytes that one step may unpack to: bounded memory whatever the compression ratio
STREAM_MAGIC = b"1AY&SY"  # the block magic 0x314159265359 that follows "BZh" and the level digit


class Meter:
    """Counts the bytes of a source that have been read, for the progress line."""

    def __init__(self) -> None:
        self.num_bytes = 0


def decompress(path: Path, start: int = 0, end: int | None = None, meter: Meter | None = None) -> Iterator[bytes]:
    """The content of the streams in bytes start..end of the file, in chunks of at most 1 MiB.

    Python's bz2.open drops whatever follows the first stream when it is not a bz2 header; here that is a DataError,
    as is a stream that is cut or damaged, each with its byte offset.
    """
    end = path.stat().st_size if end is None else end
    with open(path, "rb") as file:
        file.seek(start)
        position = stream_start = start  # of the next byte that the decompressor has not seen
        pending = b""
        decompressor = bz2.BZ2Decompressor()
        while True:
            if decompressor.eof:
                pending = decompressor.unused_data
                stream_start = position - len(pending)
                decompressor = bz2.BZ2Decompressor()
            if decompressor.needs_input and not pending:
                pending = file.read(min(READ_BYTES, end - position))
                position += len(pending)
                if meter is not None:
                    meter.num_bytes += len(pending)
                if not pending:
                    if position != stream_start:
                        raise DataError(
                            f"reading {path}: byte {position}, stream that begins at byte {stream_start} - "
                            "ends too early, the file was cut short - download it again"
                        )
                    return
            try:
                chunk = decompressor.decompress(pending, OUTPUT_BYTES)
            except (OSError, ValueError):
                raise DataError(
                    f"reading {path}: near byte {position}, stream that begins at byte {stream_start} - "
                    "not valid bz2 data there - download it again"
                ) from None
            pending = b""
            if chunk:
                yield chunk


def find_streams(path: Path) -> list[int]:
    """The offsets at which streams begin, found by their magic number; a multistream dump has one per 100 pages."""
    if path.stat().st_size == 0:
        return []
    starts = []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        position = content.find(STREAM_MAGIC)
        while position != -1:
            # The magic of a block inside a stream is bit-aligned and has no "BZh1".."BZh9" before it.
            if (
                position >= 4
                and content[position - 4 : position - 1] == b"BZh"
                and content[position - 1] in b"123456789"
            ):
                starts.append(position - 4)
            position = content.find(STREAM_MAGIC, position + 1)
    return starts


def read_index(path: Path) -> list[int]:
    """The stream offsets in a multistream index (`offset:page id:title` per line, plain or .bz2), each once, rising."""
    content = b"".join(decompress(path)) if path.suffix == ".bz2" else path.read_bytes()
    offsets: list[int] = []
    for number, line in enumerate(content.splitlines(), 1):
        digits = line.split(b":", 1)[0]
        if not digits.isdigit() or (offsets and int(digits) < offsets[-1]):
            raise DataError(
                f"reading index {path}: line {number} ({line[:40].decode(errors='replace')!r}) - not a rising "
                "offset:id:title - download the index that belongs to the dump, or remove it to scan the dump instead"
            )
        if not offsets or int(digits) > offsets[-1]:
            offsets.append(int(digits))
    return offsets
