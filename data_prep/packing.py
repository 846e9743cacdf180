"""Decides which tokens share a row: pure functions of token counts and seeds, and the copy that follows from them.

A plan lists spans (row, column, start, count): `count` tokens from position `start` of the flat token array go to
`column` of `row`. Every token of a document is in exactly one span (a random second segment adds copies).
"""

import random
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import numpy as np

from data_prep.shards import narrowest_unsigned

Pairing = Literal["consecutive", "sentence-order", "random-next"]


@dataclass
class PairPlan:
    """Rows of [CLS] A [SEP] B [SEP]: parallel lists, one entry per row."""

    first: list[tuple[int, int]] = field(default_factory=list)  # (start, count) of segment A in the flat tokens
    second: list[tuple[int, int]] = field(default_factory=list)  # the same of segment B; count 0: there is none
    in_order: list[bool] = field(default_factory=list)  # B follows A in the document


def plan_pairs(
    documents: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    length: int,
    short_row_probability: float = 0.1,
    pairing: Pairing = "consecutive",
) -> PairPlan:
    """Groups whole sentences into rows; no row holds two documents, unless random-next asks for it.

    documents[d] are the token counts of its sentences, all tokens lying end to end. A sentence that is longer than a
    row is cut into row-long pieces, so no token is lost. With probability short_row_probability a row aims at a random
    shorter length, as in BERT (arXiv 1810.04805). sentence-order swaps half of the pairs (ALBERT, arXiv 1909.11942),
    random-next takes half of the second segments from another document.
    """
    room = length - 3
    ends: list[list[int]] = []  # of each document, where its sentences end in the flat tokens, after its own start
    position = 0
    for counts in documents:
        if counts and max(counts) > room:
            counts = [piece for count in counts for piece in _cut(count, room)]  # noqa: PLW2901
        document_ends = list(accumulate(filter(None, counts), initial=position))
        position = document_ends[-1]
        ends.append(document_ends)

    plan = PairPlan()
    nonempty = [d for d, document_ends in enumerate(ends) if len(document_ends) > 1]
    for d, seed in enumerate(seeds):
        _plan_document(plan, d, ends, nonempty, random.Random(seed), room, short_row_probability, pairing)
    return plan


def _cut(count: int, room: int) -> list[int]:
    """A sentence's tokens as pieces of at most `room`."""
    return [room] * (count // room) + [count % room]


def _plan_document(
    plan: PairPlan,
    d: int,
    ends: list[list[int]],
    nonempty: list[int],
    rng: random.Random,
    room: int,
    short_row_probability: float,
    pairing: Pairing,
) -> None:
    own = ends[d]
    sentence, last = 0, len(own) - 1
    while sentence < last:
        target = rng.randint(2, room) if rng.random() < short_row_probability else room
        start = own[sentence]
        end = max(sentence + 1, bisect_right(own, start + target, sentence) - 1)
        cut = rng.randint(sentence + 1, end - 1) if end - sentence > 1 else end
        middle = own[cut]
        first = (start, middle - start)
        second = (middle, own[end] - middle) if cut < end else (0, 0)
        in_order = True
        if pairing == "random-next" and len(nonempty) > 1 and first[1] < room and rng.random() < 0.5:
            other = d
            while other == d:
                other = rng.choice(nonempty)
            second = _random_span(rng, ends[other], room - first[1])
            in_order = False
            end = cut  # what B would have been comes in the next row
        elif pairing == "sentence-order" and second[1] and rng.random() < 0.5:
            first, second = second, first
            in_order = False
        plan.first.append(first)
        plan.second.append(second)
        plan.in_order.append(in_order)
        sentence = end


def _random_span(rng: random.Random, ends: list[int], room: int) -> tuple[int, int]:
    """Whole sentences of another document from a random place on, at most `room` tokens (one sentence may be cut)."""
    sentence = rng.randrange(len(ends) - 1)
    start = ends[sentence]
    end = max(sentence + 1, bisect_right(ends, start + room, sentence) - 1)
    return start, min(ends[end] - start, room)


def fill_pairs(
    plan: PairPlan, tokens: np.ndarray, *, length: int, cls_id: int, sep_id: int, pad_id: int
) -> dict[str, np.ndarray]:
    """The columns of R planned rows: input_ids [R, length], length, segment_boundary and segments_in_order [R]."""
    first = np.array(plan.first, np.int64).reshape(-1, 2)
    second = np.array(plan.second, np.int64).reshape(-1, 2)
    num_rows = len(first)
    input_ids = np.full((num_rows, length), pad_id, tokens.dtype)
    rows = np.arange(num_rows)
    boundary = 2 + first[:, 1]
    has_second = second[:, 1] > 0
    valid = boundary + np.where(has_second, second[:, 1] + 1, 0)
    input_ids[:, 0] = cls_id
    copy_spans(input_ids, tokens, rows, np.ones(num_rows, np.int64), first[:, 0], first[:, 1])
    copy_spans(input_ids, tokens, rows, boundary, second[:, 0], second[:, 1])
    input_ids[rows, boundary - 1] = sep_id
    input_ids[rows[has_second], valid[has_second] - 1] = sep_id
    small = narrowest_unsigned(length)
    return {
        "input_ids": input_ids,
        "length": valid.astype(small),
        "segment_boundary": boundary.astype(small),
        "segments_in_order": np.array(plan.in_order, bool),
    }


def copy_spans(
    rows_RL: np.ndarray, tokens: np.ndarray, row: np.ndarray, column: np.ndarray, start: np.ndarray, count: np.ndarray
) -> None:
    """Copies count[i] tokens from start[i] to rows_RL[row[i], column[i]:], all spans at once."""
    total = int(count.sum())
    if not total:
        return
    before = np.cumsum(count) - count
    step = np.arange(total)
    target = np.repeat(row * rows_RL.shape[1] + column - before, count)
    target += step
    source = np.repeat(start - before, count)
    source += step
    rows_RL.reshape(-1)[target] = tokens[source]


def plan_blocks(counts: Sequence[int], *, length: int, best_fit: bool = False) -> np.ndarray:
    """Spans [S, 4] (row, column, start, count) that pack documents of `counts` tokens into rows of `length`.

    Back to back: every row but the last is full, and a document goes on in the next row. Best fit (arXiv 2404.10830):
    only documents longer than a row are cut; the pieces go, longest first, where the least room would remain.
    """
    counts_array = np.asarray(counts, np.int64)
    starts = np.cumsum(counts_array) - counts_array
    if not best_fit:
        total = int(counts_array.sum())
        cuts = np.union1d(np.append(starts, total), np.append(np.arange(0, total, length), total))
        begins, sizes = cuts[:-1], np.diff(cuts)
        return np.stack([begins // length, begins % length, begins, sizes], axis=1)
    pieces = [
        (min(length, int(count) - offset), int(start) + offset)
        for start, count in zip(starts, counts_array, strict=True)
        for offset in range(0, int(count), length)
    ]
    pieces.sort(key=lambda piece: (-piece[0], piece[1]))
    rooms: list[tuple[int, int]] = []  # (free tokens, row), sorted
    spans = np.empty((len(pieces), 4), np.int64)
    num_rows = 0
    for index, (size, start) in enumerate(pieces):
        at = bisect_left(rooms, (size, -1))
        if at < len(rooms):
            free, row = rooms.pop(at)
        else:
            free, row, num_rows = length, num_rows, num_rows + 1
        spans[index] = (row, length - free, start, size)
        if free > size:
            insort(rooms, (free - size, row))
    return spans


def fill_blocks(spans: np.ndarray, tokens: np.ndarray, *, length: int, pad_id: int) -> dict[str, np.ndarray]:
    """The columns of the planned rows: input_ids [R, length] and length [R] (valid tokens)."""
    row, column, start, count = spans.T if len(spans) else np.zeros((4, 0), np.int64)
    num_rows = int(row.max()) + 1 if len(spans) else 0
    input_ids = np.full((num_rows, length), pad_id, tokens.dtype)
    if np.array_equal(row * length + column, start):  # back to back, where every token keeps its place: one copy
        input_ids.reshape(-1)[: len(tokens)] = tokens
    else:
        copy_spans(input_ids, tokens, row, column, start, count)
    valid = np.bincount(row, weights=count, minlength=num_rows) if len(spans) else np.zeros(0)
    return {"input_ids": input_ids, "length": valid.astype(narrowest_unsigned(length))}
