"""The data order, and the micro-batches that one rank takes from it.

The order is a pure function of (rows, seed, epoch). A step takes the next `global_size` samples of it, whatever the
number of ranks, so a run can stop and go on with another number of ranks and see exactly the samples that remain.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.shards import ShardSet
from pipeline.cached_signals import CachedSignals
from pipeline.config import BatchConfig
from pipeline.signals import Batch

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)
_FEISTEL_ROUNDS = 6


def sample_rows(start: int, stop: int, *, num_rows: int, seed: int) -> np.ndarray:
    """The shard rows [stop - start] int64 of samples `start` to `stop` of an endless run over the data.

    Sample i is the (i mod num_rows)-th of epoch i // num_rows; each epoch is a permutation of its own. A Feistel
    network with cycle walking gives any element without holding the permutation: no memory, and the same numbers
    under every version of every library.
    """
    samples = np.arange(start, stop, dtype=np.int64)
    epochs, positions = samples // num_rows, samples % num_rows
    rows = np.empty_like(samples)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = _permute(
            positions[chosen].astype(np.uint64), num_rows, _mix(_mix(seed) ^ _as_u64(int(epoch) + 1))
        )
    return rows


def _permute(positions: np.ndarray, size: int, key: np.uint64) -> np.ndarray:
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)

    def network(values: np.ndarray) -> np.ndarray:
        left, right = values >> shift, values & low
        for round_number in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key ^ _as_u64(round_number))) & low)
        return (left << shift) | right

    values = network(positions)
    # The network permutes the next power of four; walking on until the value falls inside keeps it a permutation.
    while (outside := values >= np.uint64(size)).any():
        values[outside] = network(values[outside])
    return values.astype(np.int64)


def _as_u64(number: int) -> np.uint64:
    return np.uint64(number & 0xFFFFFFFFFFFFFFFF)


def _mix(value: Any) -> Any:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        value = (np.uint64(value) if isinstance(value, int | np.integer) else value) + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def rows_digest(positions: np.ndarray, rows: np.ndarray) -> int:
    """An int64 that adds up over ranks to the same number whatever their count: which row stood at which sample."""
    with np.errstate(over="ignore"):
        return int(
            _mix(_mix(positions.astype(np.uint64)) ^ rows.astype(np.uint64)).sum(dtype=np.uint64).astype(np.int64)
        )


@dataclass(frozen=True)
class StepData:
    """What one rank needs for one optimizer step."""

    micro_batches: list[Batch]
    rows: list[np.ndarray]
    """Shard rows of each micro-batch."""
    num_valid_tokens: int
    """Valid tokens in this rank's micro-batches."""
    digest: int
    """This rank's part of the step's `rows_digest`."""


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch falls to the ranks: micro-batch m of rank r takes the (m * ranks + r)-th slice."""

    shards: ShardSet
    batch: BatchConfig
    order_seed: int
    rank: int
    world_size: int
    cache: CachedSignals | None = None

    def step_data(self, step: int) -> StepData:
        """This rank's micro-batches of optimizer step `step` (counted from 0), on the CPU."""
        first = step * self.batch.global_size
        micro_batches, rows, digest, num_valid = [], [], 0, 0
        for index in range(self.batch.accumulation_steps(self.world_size)):
            start = first + (index * self.world_size + self.rank) * self.batch.micro_size
            positions = np.arange(start, start + self.batch.micro_size)
            taken = sample_rows(start, start + self.batch.micro_size, num_rows=len(self.shards), seed=self.order_seed)
            batch = BATCHES[self.shards.manifest.rows](self.shards.read(taken))
            if self.cache is not None:
                columns = self.cache.read(taken)
                batch = replace(batch, cached_signals={name: _signed(column) for name, column in columns.items()})
            micro_batches.append(batch)
            rows.append(taken)
            digest += rows_digest(positions, taken)
            num_valid += int(batch.valid_BT.sum())
        return StepData(micro_batches, rows, num_valid, (digest + 2**63) % 2**64 - 2**63)

    def steps(self, start: int, stop: int) -> Iterator[StepData]:
        """The data of steps `start` to `stop`; the next one is read while the current one is used."""
        with ThreadPoolExecutor(max_workers=1) as reader:
            upcoming = reader.submit(self.step_data, start) if start < stop else None
            for step in range(start, stop):
                assert upcoming is not None
                data = upcoming.result()
                upcoming = reader.submit(self.step_data, step + 1) if step + 1 < stop else None
                yield data


def bert_batch(columns: dict[str, np.ndarray]) -> Batch:
    """A Batch from the columns of `bert-pairs` rows."""
    input_ids = torch.from_numpy(columns["input_ids"].astype(np.int64))
    positions = torch.arange(input_ids.shape[1])
    length = _column(columns["length"])
    boundary = _column(columns["segment_boundary"])
    valid_BT = positions < length
    return Batch(input_ids, valid_BT, ((positions >= boundary) & valid_BT).long())


def decoder_batch(columns: dict[str, np.ndarray]) -> Batch:
    """A Batch from the columns of `lm-blocks` rows.

    A document that was cut at the end of a row begins anew in the next. Each token of the padding is a document of its
    own, so that no attention is empty and none reaches it.
    """
    input_ids = columns["input_ids"].astype(np.int64)
    columns_T = np.arange(input_ids.shape[1])
    is_padding_BT = columns_T >= columns["length"].astype(np.int64)[:, None]
    goes_on_BT = np.zeros(input_ids.shape, bool)
    goes_on_BT[:, 1:] = (np.diff(columns["document_index"].astype(np.int64), axis=1) == 0) & ~is_padding_BT[:, 1:]
    first_BT = np.maximum.accumulate(np.where(goes_on_BT, 0, columns_T), axis=1)
    labels_BT = np.full(input_ids.shape, -1)
    labels_BT[:, :-1] = np.where(goes_on_BT[:, 1:], input_ids[:, 1:], -1)
    return Batch(
        torch.from_numpy(input_ids),
        valid_BT=torch.from_numpy(labels_BT >= 0),
        position_ids=torch.from_numpy(columns_T - first_BT),
        labels_BT=torch.from_numpy(labels_BT),
    )


BATCHES = {"bert-pairs": bert_batch, "lm-blocks": decoder_batch}


def _column(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).unsqueeze(1)


def _signed(packed: np.ndarray) -> Tensor:
    # torch has few operations on unsigned integers, so the same bits travel as signed ones.
    return torch.from_numpy(packed.view(packed.dtype.name.removeprefix("u")))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; from a CPU it is copied without waiting."""
    if device.type == "cpu":
        return batch

    def moved(part):
        if isinstance(part, dict):
            return {name: moved(tensor) for name, tensor in part.items()}
        return None if part is None else part.pin_memory().to(device, non_blocking=True)

    return Batch(**{part.name: moved(getattr(batch, part.name)) for part in fields(batch)})
