"""Collation: every row keeps its own token, label, example and teacher, however it is packed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.config import Capture
from stillroom.pipeline.data.batch import collate
from stillroom.pipeline.record import Example, ImageSpan, TeacherRecord
from stillroom.pipeline.teacher.protocol import ModelShape, empty_record


def record(tokens, first_answer=1, first_row=0, images=()):
    tokens = np.array(tokens, dtype=np.int32)
    mask = np.arange(len(tokens)) >= first_answer
    example = Example(f"id{tokens[0]}", "doc", "source", tokens, mask, images, weight=2.0)
    rows = len(tokens) - 1 - first_row
    topk = np.stack([tokens[first_row : first_row + rows]] * 2, axis=1)
    positions = np.array([0, len(tokens) - 1], dtype=np.int32)
    hidden = tokens[positions].astype(np.float32)[:, None]
    signals = {"topk_ids": topk, "hidden.final": hidden}
    return TeacherRecord(example, first_row, signals, positions)


A, B, C = record([10, 11, 12]), record([20, 21, 22, 23], 2, 1), record([30, 31])


@pytest.mark.parametrize("padding_free", [False, True])
def test_rows_follow_their_documents(padding_free):
    batch = collate([[{"": A}, {"": C}], [{"": B}]], 6, padding_free)
    flat = batch.input_ids.flatten()
    assert batch.input_ids.shape == ((1, 9) if padding_free else (2, 6))
    assert flat[batch.rows.flat].tolist() == [10, 11, 30, 21, 22]
    assert batch.labels.tolist() == [11, 12, 31, 22, 23]
    assert batch.rows.example.tolist() == [0, 0, 1, 2, 2]
    assert batch.rows.answer.tolist() == [True, True, True, True, True]
    assert batch.own_answer.tolist() == [False, True, False, False, True]
    teacher = batch.teachers[""]
    assert torch.equal(teacher.signals["topk_ids"][:, 0].long(), flat[batch.rows.flat])
    assert teacher.signals["hidden.final"][:, 0].tolist() == flat[teacher.positions.flat].tolist()
    assert batch.num_tokens == 9
    assert batch.sample_weight.tolist() == [2.0, 2.0, 2.0]


def test_positions_restart_at_documents_and_padding():
    batch = collate([[{"": A}, {"": C}], [{"": B}]], 6)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]


def test_image_rows_are_marked():
    pictured = record([1, 2, 3, 4], images=(ImageSpan("x", 1, 2),))
    assert collate([[{"": pictured}]], 4).rows.image.tolist() == [False, True, True]


def test_caches_of_other_rows_are_refused():
    other = replace(B, first_row=0)
    with pytest.raises(StudentError, match=r"rows from 0 in cache 'b'.*rows from 1"):
        collate([[{"": B, "b": other}]], 8)


def said(record, *names):
    return replace(record, signals={name: record.signals[name] for name in names})


def rejected(record):
    shape = ModelShape("Tiny", num_layers=1, hidden_size=1, vocab_size=64, context=8)
    capture = Capture(k=2, tail_draws=0, hidden_layers=("final",))
    return said(empty_record(record.example, capture, shape), "topk_ids", "hidden.final")


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize(
    "signals", [("topk_ids",), ("hidden.final",), ("topk_ids", "hidden.final")]
)
@pytest.mark.parametrize("by", ["", "second", "both"])
def test_an_example_that_a_cache_rejected_adds_nothing_from_any(by, signals, padding_free):
    """Whichever rejected B, the answers about A and C stay at their texts."""
    gone = rejected(B)
    first, second = (gone if by in ("", "both") else B), (B if by == "" else gone)
    rows = [[(A, A), (first, second)], [(C, C)]]
    batch = collate(
        [[{"": one, "second": said(two, *signals)} for one, two in row] for row in rows],
        7,
        padding_free,
    )
    flat = batch.input_ids.flatten()
    assert flat[batch.rows.flat].tolist() == [10, 11, 30]
    assert batch.rows.example.tolist() == [0, 0, 2]
    for teacher in batch.teachers.values():
        assert teacher.positions.example.tolist() == [0, 0, 2, 2]
        placed = flat[teacher.positions.flat].tolist()
        assert placed == [10, 12, 30, 31]
        if "hidden.final" in teacher.signals:
            assert teacher.signals["hidden.final"][:, 0].tolist() == placed
        if "topk_ids" in teacher.signals:
            assert teacher.signals["topk_ids"][:, 0].tolist() == [10, 11, 30]


def test_what_a_cache_that_nobody_reads_rejected_stays():
    batch = collate([[{"": B, "second": said(rejected(B))}]], 4)
    assert batch.input_ids.flatten()[batch.rows.flat].tolist() == [21, 22]
