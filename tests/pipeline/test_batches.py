"""The data order: nothing lost, nothing twice, and the same whatever the ranks and micro-batches."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.shards import open_shards
from pipeline.batches import BatchPlan, bert_batch, rows_digest, sample_rows, to_device
from pipeline.config import BatchConfig
from tiny_runs import LENGTH, write_rows


def order(start: int, stop: int, *, num_rows: int, seed: int = 0) -> list[int]:
    return sample_rows(start, stop, num_rows=num_rows, seed=seed).tolist()


@settings(deadline=None)
@given(num_rows=st.integers(1, 700), seed=st.integers(0, 2**63 - 1), epochs=st.integers(1, 4))
def test_every_epoch_holds_every_row_exactly_once(num_rows, seed, epochs):
    rows = np.array(order(0, epochs * num_rows, num_rows=num_rows, seed=seed)).reshape(epochs, num_rows)
    assert (np.sort(rows, axis=1) == np.arange(num_rows)).all()


@settings(deadline=None)
@given(data=st.data(), num_rows=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_the_order_is_the_same_at_every_cut_point(data, num_rows, seed):
    total = 3 * num_rows
    whole = order(0, total, num_rows=num_rows, seed=seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=6)))
    pieces = [order(a, b, num_rows=num_rows, seed=seed) for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    assert [row for piece in pieces for row in piece] == whole


def test_epochs_and_seeds_have_orders_of_their_own_and_are_well_mixed():
    num_rows = 5000
    orders = [sample_rows(0, num_rows, num_rows=num_rows, seed=seed) for seed in range(3)]
    orders.append(sample_rows(num_rows, 2 * num_rows, num_rows=num_rows, seed=0))
    orders.append(np.arange(num_rows))
    for index, one in enumerate(orders):
        for other in orders[:index]:
            # Two independent permutations agree in one place on average, and are uncorrelated within 1/sqrt(n).
            assert (one == other).sum() < 10
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(num_rows)


def test_the_order_is_pinned_because_a_resumed_run_must_find_it_again():
    assert order(0, 12, num_rows=10, seed=0) == [3, 7, 1, 2, 8, 5, 4, 9, 0, 6, 2, 8]
    assert order(10**12, 10**12 + 3, num_rows=7 * 10**9, seed=5) == [89307160, 2521862448, 5459598719]


def test_the_digest_changes_with_every_row_and_position_and_adds_up():
    rows = sample_rows(0, 64, num_rows=50, seed=1)
    positions = np.arange(64)
    whole = rows_digest(positions, rows)
    parts = sum(rows_digest(positions[rank::3], rows[rank::3]) for rank in range(3))
    assert (parts - whole) % 2**64 == 0
    assert -(2**63) <= whole < 2**63
    swapped = rows.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert rows_digest(positions, swapped) != whole
    assert rows_digest(positions + 1, rows) != whole


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return open_shards(write_rows(tmp_path_factory.mktemp("rows") / "rows", rows=50, seed=3))


STEPS, GLOBAL_SIZE = 9, 24  # 216 samples: more than four epochs of 50 rows


def global_order(plans: list[BatchPlan], step: int) -> list[int]:
    """The rows of a step in the order of the samples, put together from the ranks as they take them."""
    taken = [plan.step_data(step).rows for plan in plans]
    return [int(row) for micro in zip(*taken, strict=True) for rows in micro for row in rows]


def cut(shards, world_size: int, micro_size: int) -> list[BatchPlan]:
    batch = BatchConfig(GLOBAL_SIZE, micro_size)
    return [BatchPlan(shards, batch, order_seed=7, rank=rank, world_size=world_size) for rank in range(world_size)]


CUTS = [(ranks, micro) for ranks in (1, 2, 3, 4) for micro in (1, 2, 3, 4, 6, 8, 12, 24) if 24 % (ranks * micro) == 0]


@pytest.mark.parametrize(("world_size", "micro_size"), CUTS)
@pytest.mark.fault(18)
def test_any_number_of_ranks_and_any_micro_batch_see_the_same_samples_in_the_same_order(shards, world_size, micro_size):
    plans = cut(shards, world_size, micro_size)
    (alone,) = cut(shards, 1, GLOBAL_SIZE)
    for step in range(STEPS):
        expected = alone.step_data(step)
        parts = [plan.step_data(step) for plan in plans]
        assert global_order(plans, step) == [int(row) for row in expected.rows[0]]
        assert (sum(part.digest for part in parts) - expected.digest) % 2**64 == 0
        assert sum(part.num_valid_tokens for part in parts) == expected.num_valid_tokens
        assert all(len(part.micro_batches) == 24 // (world_size * micro_size) for part in parts)


@pytest.mark.fault(18)
def test_going_on_with_another_number_of_ranks_loses_and_repeats_nothing(shards, injected):
    """For every cut point, and from and to every number of ranks: what is read is the unbroken order."""
    sizes = {world_size: cut(shards, world_size, 2) for world_size in (1, 2, 3, 4)}
    steps = {size: [global_order(plans, step) for step in range(STEPS)] for size, plans in sizes.items()}
    samples = sample_rows(0, STEPS * GLOBAL_SIZE, num_rows=50, seed=7).tolist()
    injected(len(sizes) ** 2 * (STEPS + 1))
    for before in sizes:
        for after in sizes:
            for stop in range(STEPS + 1):
                seen = [row for step in steps[before][:stop] + steps[after][stop:] for row in step]
                assert seen == samples
    for epoch in range(4):
        assert set(Counter(samples[epoch * 50 : (epoch + 1) * 50]).values()) == {1}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_no_sample(shards, world_size):
    for step in range(STEPS):
        # Rows may come twice where an epoch ends inside the step; samples may not.
        sizes = [sum(map(len, plan.step_data(step).rows)) for plan in cut(shards, world_size, 2)]
        assert sizes == [GLOBAL_SIZE // world_size] * world_size
    assert len(set(global_order(cut(shards, world_size, 2), 0))) == GLOBAL_SIZE


def test_reading_ahead_gives_the_same_steps_and_ends_where_it_should(shards):
    plan = cut(shards, 2, 3)[1]
    read = list(plan.steps(2, 6))
    assert len(read) == 4
    for step, data in enumerate(read, start=2):
        alone = plan.step_data(step)
        assert data.digest == alone.digest
        for ours, expected in zip(data.micro_batches, alone.micro_batches, strict=True):
            assert torch.equal(ours.input_ids, expected.input_ids) and torch.equal(ours.valid_BT, expected.valid_BT)
    assert list(plan.steps(4, 4)) == []


@pytest.mark.fault(7)
def test_what_goes_wrong_while_reading_ahead_reaches_the_training_loop(tmp_path):
    damaged = open_shards(write_rows(tmp_path / "rows", rows=48))
    file = tmp_path / "rows" / damaged.locate(0)[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"data-0000[01]-of-00002\.arrow"):
        list(cut(damaged, 1, 24)[0].steps(0, 4))


def test_a_batch_is_what_the_row_says(shards):
    columns = shards.read(np.arange(50))
    batch = bert_batch(columns)
    assert batch.token_type_ids is not None
    assert batch.input_ids.shape == batch.valid_BT.shape == batch.token_type_ids.shape == (50, LENGTH)
    assert (batch.input_ids.dtype, batch.valid_BT.dtype) == (torch.int64, torch.bool)
    for row in range(50):
        length, boundary = int(columns["length"][row]), int(columns["segment_boundary"][row])
        assert batch.valid_BT[row].tolist() == [True] * length + [False] * (LENGTH - length)
        expected = [0] * boundary + [1] * (length - boundary) + [0] * (LENGTH - length)
        assert batch.token_type_ids[row].tolist() == expected
        assert not batch.input_ids[row, length:].any()
    assert to_device(batch, torch.device("cpu")) is batch


def test_a_row_without_a_second_segment_is_all_segment_a():
    columns: dict[str, np.ndarray] = {
        "input_ids": np.array([[2, 9, 3, 0]], dtype=np.uint16),
        "length": np.array([3], dtype=np.uint8),
        "segment_boundary": np.array([3], dtype=np.uint8),
    }
    segments = bert_batch(columns).token_type_ids
    assert segments is not None and segments.tolist() == [[0, 0, 0, 0]]
