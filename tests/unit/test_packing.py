"""Rows of an epoch: complete, bounded, and the same for whoever walks them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.pipeline.data.loader import Geometry
from stillroom.pipeline.data.packing import Position, RowPlan, pack

lengths_lists = st.lists(st.integers(2, 32), min_size=1, max_size=200)


@given(lengths_lists, st.integers(0, 3), st.integers(1, 5))
def test_every_example_is_in_exactly_one_row_that_holds_it(lengths, epoch, window):
    plan = RowPlan(np.array(lengths), np.arange(len(lengths)) // 7, 32, seed=3, window=window)
    rows = plan.epoch(epoch)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(sum(lengths[example] for example in row) <= 32 for row in rows)


@given(lengths_lists, st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_taking_in_pieces_is_taking_at_once(lengths, pieces):
    plan = RowPlan(np.array(lengths), np.arange(len(lengths)) // 5, 32)
    whole, end = plan.take(Position(), sum(pieces))
    position, parts = Position(), []
    for count in pieces:
        rows, position = plan.take(position, count)
        parts += rows
    assert parts == whole
    assert position == end


def test_a_row_never_joins_more_shards_than_the_window():
    shards = np.arange(240) // 8
    plan = RowPlan(np.full(240, 5), shards, 40, window=3)
    rows = plan.epoch(0)
    seen: list[set] = []
    for row in rows:
        here = {int(shards[example]) for example in row}
        if not seen or not (here <= seen[-1] or len(seen[-1] | here) <= 3):
            seen.append(set())
        seen[-1] |= here
    assert len(seen) == 10
    assert all(len(group) == 3 for group in seen)


def test_epochs_differ_and_repeat():
    plan = RowPlan(np.full(50, 9), np.arange(50) // 5, 20)
    again = RowPlan(np.full(50, 9), np.arange(50) // 5, 20)
    assert plan.epoch(0) != plan.epoch(1)
    assert [again.epoch(e) for e in (3, 0, 1)] == [plan.epoch(e) for e in (3, 0, 1)]


def test_first_fit_fills_rows():
    assert pack([10, 11, 12, 13], [3, 4, 2, 2], 6) == [(10, 12), (11, 13)]


def test_an_example_longer_than_a_row_is_refused_by_number():
    with pytest.raises(
        StudentError,
        match=r"example 1 has 9 tokens.*at most 8, the tokens of a row.*batch_tokens to 9",
    ):
        RowPlan(np.array([4, 9]), np.zeros(2, int), 8)


def test_an_empty_cache_is_refused():
    with pytest.raises(StudentError, match="no examples"):
        RowPlan(np.array([], int), np.array([], int), 8)


def test_ranks_share_a_step_without_overlap():
    rows = list(range(24))
    shares = [Geometry(8, 3, accumulate=8, rank=r, world_size=4).own(rows) for r in range(4)]
    assert [row for share in shares for batch in share for row in batch] == rows
    assert Geometry(8, 6, accumulate=4).own(rows) == [rows[i : i + 6] for i in range(0, 24, 6)]


def test_microbatches_that_ranks_cannot_share_are_refused():
    with pytest.raises(ConfigError, match="accumulate = 3 over 2 ranks"):
        Geometry(8, 1, accumulate=3, world_size=2)
