"""Starts dead experts again as noisy copies of the busiest one, however the engine has cut them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel import Ranks
from pipeline.state_pieces import MOMENTS, Piece, finish_filling, held_pieces, updates_taken, whole_shapes
from pipeline.watching import DEAD_BELOW

NOISE = 0.01  # of the root mean square of what is copied


def dead_experts(load: list[float]) -> list[int]:
    """The experts with less than a tenth of an even share of the tokens; when there is none, the idlest."""
    dead = [expert for expert, share in enumerate(load) if share < DEAD_BELOW / len(load)]
    return dead or [load.index(min(load))]


def reseed(engine: Any, ranks: Ranks, *, router: str, load: list[float], seed: int) -> list[int]:
    """Copies the busiest expert of a router over its dead ones and returns these; every rank calls it together.

    A copy takes over the expert's weights, its row of the router, its selection bias and Adam's moments. Noise on the
    matrices, the same on every rank and in every cut, makes the two part: the router sends each about half of the
    tokens that the one got.

    Args:
        router: name of the router's module within the student.
        load: share of the tokens per expert.
    """
    busiest, dead = load.index(max(load)), dead_experts(load)
    generator = torch.Generator().manual_seed(seed)
    pieces = held_pieces(engine)
    shapes, trained = whole_shapes(engine), {n for n, p in engine.module.named_parameters() if p.requires_grad}
    for name in sorted(shapes):
        if f".{router}." not in f".{name}" or shapes[name][0] != len(load):
            continue
        held = [piece for piece in pieces if piece.name == name]
        numel = torch.Size(shapes[name]).numel() // len(load)
        source = {
            part: _gathered(held, part, busiest * numel, numel, ranks)
            for part in ("weight", *(MOMENTS if name in trained else ()))
        }
        for expert in dead:
            for part, values in source.items():
                new = values
                if part == "weight" and len(shapes[name]) > 1:
                    new = values + NOISE * values.square().mean().sqrt() * torch.randn(numel, generator=generator)
                _write(held, part, expert * numel, new)
    finish_filling(engine, updates_taken(engine))
    return dead


def _gathered(pieces: list[Piece], part: str, start: int, numel: int, ranks: Ranks) -> Tensor:
    """A run of elements of a whole tensor, put together on every rank from the parts that one rank each answers for."""
    values = torch.zeros(numel)
    for piece in pieces:
        first = max(start, piece.start + piece.owned.start)
        last = min(start + numel, piece.start + piece.owned.stop)
        if first < last:
            values[first - start : last - start] = piece.views[part][first - piece.start : last - piece.start]
    dist.all_reduce(values, group=ranks.control)
    return values


def _write(pieces: list[Piece], part: str, start: int, values: Tensor) -> None:
    """Puts a run of elements into every piece that holds some of it."""
    for piece in pieces:
        first, last = max(start, piece.start), min(start + len(values), piece.start + piece.numel)
        if first < last:
            piece.views[part][first - piece.start : last - piece.start].copy_(values[first - start : last - start])
