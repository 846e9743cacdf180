import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.packing import fill_blocks, fill_pairs, plan_blocks, plan_pairs

SENTENCES = st.lists(st.lists(st.integers(0, 40), max_size=12), min_size=1, max_size=8)
CLS, SEP, PAD = 60001, 60002, 60003


def rows_of(documents, *, length=32, **options):
    plan = plan_pairs(documents, range(len(documents)), length=length, **options)
    tokens = np.arange(sum(map(sum, documents)), dtype=np.uint16)
    return plan, fill_pairs(plan, tokens, length=length, cls_id=CLS, sep_id=SEP, pad_id=PAD)


@given(SENTENCES)
@settings(max_examples=200, deadline=None)
def test_pairs_hold_every_token_once_and_in_order(documents):
    _, columns = rows_of(documents)
    ids = columns["input_ids"]
    assert ids[ids < CLS].tolist() == list(range(sum(map(sum, documents))))


@given(SENTENCES)
@settings(max_examples=200, deadline=None)
def test_pairs_have_the_shape_of_bert_input(documents):
    _, columns = rows_of(documents)
    for ids, length, boundary in zip(columns["input_ids"], columns["length"], columns["segment_boundary"], strict=True):
        assert ids[0] == CLS and ids[length - 1] == SEP and ids[boundary - 1] == SEP
        assert (ids[length:] == PAD).all() and (ids[:length] != PAD).all()
        assert (ids[:length] == SEP).sum() == (1 if boundary == length else 2)


@given(SENTENCES)
@settings(max_examples=100, deadline=None)
def test_no_row_holds_two_documents(documents):
    _, columns = rows_of(documents)
    ends = np.cumsum([sum(counts) for counts in documents])
    for ids in columns["input_ids"]:
        assert len(set(np.searchsorted(ends, ids[ids < CLS], side="right"))) <= 1


@given(SENTENCES)
@settings(max_examples=100, deadline=None)
def test_a_random_second_segment_adds_copies_and_loses_nothing(documents):
    plan, columns = rows_of(documents, pairing="random-next")
    ends = np.cumsum([sum(counts) for counts in documents])
    own = []
    for row, in_order in enumerate(plan.in_order):
        ids, boundary = columns["input_ids"][row], columns["segment_boundary"][row]
        first, second = ids[1 : boundary - 1], ids[boundary : columns["length"][row] - 1]
        own += [*first, *second] if in_order else first.tolist()
        if not in_order:
            assert np.searchsorted(ends, first[0], side="right") != np.searchsorted(ends, second[0], side="right")
    assert own == list(range(sum(map(sum, documents))))


def test_sentence_order_swaps_about_half_of_the_pairs_and_says_which():
    documents = [[7, 8, 9, 5, 6, 7, 8] * 3 for _ in range(200)]
    _, columns = rows_of(documents, pairing="sentence-order")
    swapped = ~columns["segments_in_order"]
    assert 0.4 < swapped.mean() < 0.6
    for row in np.flatnonzero(swapped)[:50]:
        assert columns["input_ids"][row][1] > columns["input_ids"][row][columns["segment_boundary"][row]]


def test_short_rows_come_about_as_often_as_asked_for():
    documents = [[10] * 4000]
    full, _ = rows_of(documents, length=128, short_row_probability=0.0)
    some, _ = rows_of(documents, length=128, short_row_probability=0.5)
    assert len(some.first) > 1.2 * len(full.first)


def test_a_documents_rows_do_not_depend_on_its_neighbours():
    rng = random.Random(1)
    documents = [[rng.randint(1, 30) for _ in range(20)] for _ in range(10)]
    together = plan_pairs(documents, range(10), length=64)
    alone = plan_pairs([documents[4]], [4], length=64)
    shift = sum(map(sum, documents[:4]))
    end = shift + sum(documents[4])
    assert [(s - shift, n) for s, n in together.first if shift <= s < end] == alone.first


COUNTS = st.lists(st.integers(0, 100), max_size=30)


@given(COUNTS, st.booleans())
@settings(max_examples=200, deadline=None)
def test_blocks_hold_every_token_once(counts, best_fit):
    tokens = np.arange(sum(counts), dtype=np.uint16)
    columns = fill_blocks(plan_blocks(counts, length=16, best_fit=best_fit), tokens, length=16, pad_id=PAD)
    ids = columns["input_ids"]
    assert sorted(ids[ids != PAD].tolist()) == tokens.tolist()
    assert int(columns["length"].sum()) == len(tokens)
    assert all((row[:n] != PAD).all() and (row[n:] == PAD).all() for row, n in zip(ids, columns["length"], strict=True))


@given(COUNTS)
@settings(max_examples=100, deadline=None)
def test_back_to_back_blocks_are_full_but_the_last(counts):
    columns = fill_blocks(
        plan_blocks(counts, length=16), np.arange(sum(counts), dtype=np.uint16), length=16, pad_id=PAD
    )
    assert (columns["length"][:-1] == 16).all()
    assert columns["input_ids"].reshape(-1)[: sum(counts)].tolist() == list(range(sum(counts)))


@given(COUNTS)
@settings(max_examples=100, deadline=None)
def test_best_fit_cuts_only_documents_longer_than_a_row(counts):
    spans = plan_blocks(counts, length=16, best_fit=True)
    starts = np.cumsum([0, *counts])
    for start, count in zip(starts, counts, strict=False):
        pieces = [span for span in spans if start <= span[2] < start + count]
        assert len(pieces) == -(-count // 16)


@pytest.mark.parametrize("best_fit", [False, True])
def test_no_documents_give_no_rows(best_fit):
    columns = fill_blocks(plan_blocks([], length=8, best_fit=best_fit), np.zeros(0, np.uint16), length=8, pad_id=0)
    assert columns["input_ids"].shape == (0, 8)
    _, pairs = rows_of([[]])
    assert pairs["input_ids"].shape == (0, 32)
