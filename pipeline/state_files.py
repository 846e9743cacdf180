"""Writes pieces of tensors as safetensors, one file per rank, and reads any other pieces back from such files."""

import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.errors import CheckpointError
from data_prep.files import replacing_file
from pipeline.state_pieces import MOMENTS, Piece

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_pieces(path: Path, pieces: Iterable[Piece]) -> str:
    """Writes what is owned of the pieces and returns the file's hash; one tensor is copied to the CPU at a time."""
    tensors: dict[str, Tensor] = {}
    places: dict[str, list[Any]] = {}
    for piece in pieces:
        first, last = piece.owned.start, piece.owned.stop
        if first < last:
            places[piece.name] = [piece.start + first, list(piece.shape)]
            tensors |= {f"{part}/{piece.name}": view[first:last] for part, view in piece.views.items()}
    return write_tensors(path, tensors, {"pieces": json.dumps(places)})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Writes a safetensors file piece by piece, durably, and returns its hash.

    The library's own writer holds a second copy of everything and refuses views into one buffer.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    # Data begins at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    with replacing_file(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in tensors.values():
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return file.hexdigest()


@dataclass(frozen=True)
class _Run:
    """Elements `start` to `stop` of a flattened tensor, in one file."""

    start: int
    stop: int
    file: Any


class StateFiles:
    """The opened state files of a checkpoint, as one set of whole tensors."""

    def __init__(self, files: list[Path], opened: ExitStack):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._runs: dict[str, list[_Run]] = {}
        for path in files:
            try:
                file = opened.enter_context(safe_open(path, framework="pt"))
                places = json.loads(file.metadata()["pieces"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"checkpoint file {path}: not readable ({error}) - restore a copy") from error
            for name, (start, shape) in places.items():
                stop = start + file.get_slice(f"weight/{name}").get_shape()[0]
                self.shapes[name] = tuple(shape)
                self._runs.setdefault(name, []).append(_Run(start, stop, file))
        for runs in self._runs.values():
            runs.sort(key=lambda run: run.start)

    def parts(self, name: str) -> tuple[str, ...]:
        """Which of `weight` and the moments there are."""
        stored = set(self._runs[name][0].file.keys())
        return tuple(part for part in ("weight", *MOMENTS) if f"{part}/{name}" in stored)

    def read(self, part: str, name: str, start: int, into: Tensor) -> None:
        """Fills the flat tensor `into` with elements from `start` on; CheckpointError where some are missing."""
        stop, reached = start + into.numel(), start
        for run in self._runs.get(name, []):
            first, last = max(run.start, reached), min(run.stop, stop)
            if first > reached:
                break
            if first < last:
                found = run.file.get_slice(f"{part}/{name}")[first - run.start : last - run.start]
                into[first - start : last - start].copy_(found)
                reached = last
        if reached < stop:
            raise CheckpointError(f"checkpoint: elements {reached} to {stop} of {part} of {name} are missing")

    def whole(self, part: str, name: str) -> Tensor:
        """A whole tensor in its shape."""
        dtype = self._runs[name][0].file.get_slice(f"{part}/{name}")[:1].dtype
        tensor = torch.empty(prod(self.shapes[name]), dtype=dtype)
        self.read(part, name, 0, tensor)
        return tensor.view(self.shapes[name])


def fill_pieces(files: list[Path], pieces: list[Piece], names: set[str]) -> None:
    """Fills the pieces of an engine whose tensors are called `names`; CheckpointError when they are not the files'."""
    with ExitStack() as opened:
        state = StateFiles(files, opened)
        differing = sorted(names ^ state.shapes.keys())
        if differing:
            raise CheckpointError(
                f"checkpoint {files[0].parent}: holds another student - {len(differing)} tensors are only in one of "
                f"the two, first {differing[0]} - set the student's fields back"
            )
        for piece in pieces:
            if piece.shape != state.shapes[piece.name]:
                raise CheckpointError(
                    f"checkpoint {files[0].parent}: {piece.name} has shape {state.shapes[piece.name]}, this student "
                    f"{piece.shape} - set the student's fields back"
                )
            for part, view in piece.views.items():
                state.read(part, piece.name, piece.start, view)


def read_weights(files: list[Path]) -> dict[str, Tensor]:
    """The whole weights of a checkpoint, on the CPU."""
    with ExitStack() as opened:
        state = StateFiles(files, opened)
        return {name: state.whole("weight", name) for name in state.shapes}


def whole_pieces(files: list[Path], *, max_bytes: int = 1 << 31) -> Iterator[list[Piece]]:
    """All tensors of a checkpoint as whole pieces, in lots of about `max_bytes` that are in memory one at a time."""
    with ExitStack() as opened:
        state = StateFiles(files, opened)
        lot: list[Piece] = []
        size = 0
        for name, shape in state.shapes.items():
            views = {part: state.whole(part, name).view(-1) for part in state.parts(name)}
            lot.append(Piece(name, 0, shape, views, slice(0, prod(shape))))
            size += sum(view.numel() * view.element_size() for view in views.values())
            if size >= max_bytes:
                yield lot
                lot, size = [], 0
        if lot:
            yield lot
