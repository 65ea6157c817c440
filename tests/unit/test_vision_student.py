"""Task tokens in the sequence, and LLaVA-type students on packed batches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.data.batch import collate
from stillroom.pipeline.data.images import ImageBatch, Pictures
from stillroom.pipeline.record import Example, ImageSpan, TeacherRecord
from stillroom.pipeline.student.llava import embed, insert_behind_images, with_tokens
from stillroom.pipeline.student.model import load
from stillroom.pipeline.student.states import forward_states
from tests import tiny_image_models


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """HF directory of a tiny LLaVA: 16 placeholders an image, 2 blocks, width 64."""
    return tiny_image_models.save("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def model(llava):
    return load(llava).eval()


IMAGE_TOKENS = 16


def record(model, length: int, spans: list[int], seed: int) -> TeacherRecord:
    """An example of `length` tokens with an image at each start in `spans`."""
    random = np.random.default_rng(seed)
    tokens = random.integers(5, 700, length).astype(np.int32)
    images = []
    for number, start in enumerate(spans):
        tokens[start : start + IMAGE_TOKENS] = model.config.image_token_id
        images.append(ImageSpan(f"{seed}-{number}", start, IMAGE_TOKENS))
    mask = np.arange(length) >= length - 4
    example = Example(f"e{seed}", f"d{seed}", "s", tokens, mask, tuple(images))
    return TeacherRecord(example, 0, {"topk_ids": np.zeros((length - 1, 1), np.int32)})


def packed(model, *rows, capacity=64):
    """A batch of rows of records, with random pixels for its images."""
    batch = collate([[{"": one} for one in row] for row in rows], capacity)
    if batch.images is None:
        return batch
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(len(batch.images.names), 3, 28, 28, generator=generator)
    return replace(batch, images=replace(batch.images, pixels=pixels))


def states(model, batch, tokens=None, blocks=(1, 2)):
    with torch.no_grad():
        return forward_states(
            model, batch.input_ids, batch.position_ids, blocks, batch.images, tokens
        )


def test_a_packed_student_is_transformers_llava_on_each_example(model):
    records = [record(model, 24, [2], 0), record(model, 30, [3], 1), record(model, 40, [1, 20], 2)]
    batch = packed(model, records[:2], records[2:])
    found = states(model, batch).final
    starts, image = [0, 24, 64], 0
    for one, start in zip(records, starts, strict=True):
        count = len(one.example.images)
        with torch.no_grad():
            wanted = model.model(
                input_ids=torch.from_numpy(one.example.token_ids)[None].long(),
                pixel_values=batch.images.pixels[image : image + count],
            ).last_hidden_state[0]
        image += count
        torch.testing.assert_close(found[start : start + len(wanted)], wanted, rtol=1e-4, atol=1e-4)


def test_task_tokens_stand_behind_their_image_and_are_taken_out_again(model):
    records = [record(model, 24, [2], 0), record(model, 30, [3], 1), record(model, 40, [1, 20], 2)]
    batch = packed(model, records[:2], records[2:])
    tokens = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    found = states(model, batch, tokens)
    assert found.final.shape == (128, 64)
    starts, image = [0, 24, 64], 0
    for one, start in zip(records, starts, strict=True):
        spans = one.example.images
        ids = torch.from_numpy(one.example.token_ids)[None].long()
        with torch.no_grad():
            embeddings = model.get_input_embeddings()(ids)[0]
            pixels = batch.images.pixels[image : image + len(spans)]
            features = model.model.get_image_features(pixel_values=pixels).pooler_output
            pieces, last = [], 0
            for span, feature in zip(spans, features, strict=True):
                pieces += [embeddings[last : span.start], feature, tokens]
                last = span.start + span.length
            sequence = torch.cat([*pieces, embeddings[last:]])[None]
            wanted = model.model.language_model(inputs_embeds=sequence).last_hidden_state[0]
        image += len(spans)
        inserted = torch.zeros(len(wanted), dtype=torch.bool)
        for number, span in enumerate(spans):
            at = span.start + span.length + 3 * number
            inserted[at : at + 3] = True
        kept = found.final[start : start + len(one.example.token_ids)]
        torch.testing.assert_close(kept, wanted[~inserted], rtol=1e-4, atol=1e-4)


def test_what_a_task_reads_is_its_document_without_other_tasks_tokens(model):
    records = [record(model, 24, [2], 0), record(model, 30, [3], 1), record(model, 40, [1, 20], 2)]
    batch = packed(model, records[:2], records[2:])
    found = states(model, batch, torch.randn(5, 64))
    layout = found.wide.layout
    for task in (range(2), range(2, 5)):
        seen = found.wide.about(torch.arange(4), task)
        lengths = [24, 30, 40, 40]
        for image, length in enumerate(lengths):
            places = seen.places[image][seen.present[image]]
            assert len(places) == length + len(task)
            assert set(layout.document[places].tolist()) == {int(layout.of_image[image])}
            own = layout.inserted[image, list(task)]
            assert seen.own[image].tolist() == own.tolist()
            assert set(own.tolist()) <= set(places.tolist())
            others = set(layout.inserted.flatten().tolist()) - set(own.tolist())
            assert not others & set(places.tolist())
        states_seen, present, own_states = seen.at(2)
        assert states_seen.shape[:2] == present.shape
        torch.testing.assert_close(own_states, found.wide.blocks[2][seen.own])


def test_positions_restart_with_every_document_and_have_no_gap(model):
    records = [record(model, 20, [2], 0), record(model, 18, [2], 1), record(model, 9, [], 2)]
    batch = packed(model, records)
    layout = insert_behind_images(batch.position_ids, batch.images, 2)
    assert layout.width == 68
    wanted = [*range(22), *range(20), *range(9)]
    assert layout.position_ids[0, : len(wanted)].tolist() == wanted
    assert (layout.position_ids[0, len(wanted) :] == 0).all()


def test_an_image_at_the_end_of_a_document_keeps_its_tokens_to_itself(model):
    records = [record(model, 18, [2], 0), record(model, 20, [0], 1)]
    batch = packed(model, records)
    layout = insert_behind_images(batch.position_ids, batch.images, 2)
    assert layout.document[:42].tolist() == [0] * 20 + [1] * 22
    assert layout.position_ids[0, :42].tolist() == [*range(20), *range(22)]


def test_no_task_tokens_change_nothing(model):
    batch = packed(model, [record(model, 24, [2], 0), record(model, 30, [3], 1)])
    none = states(model, batch, torch.empty(0, 64))
    plain = states(model, batch)
    assert torch.equal(none.final, plain.final)
    assert torch.equal(none.blocks[2], plain.blocks[2])
    assert none.wide is not None


def test_architectures_without_image_positions_have_their_tokens_in_front():
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
    zeros = torch.zeros(2, dtype=torch.int64)
    places = torch.tensor([0, 3])
    images = ImageBatch(("a", "b"), zeros, torch.arange(2), places, places, zeros)
    layout = insert_behind_images(position_ids, images, 2)
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0]]
    assert layout.inserted.tolist() == [[0, 1], [5, 6]]
    made = with_tokens(torch.ones(1, 8, 4), layout, torch.zeros(2, 4))
    assert made[0, :, 0].tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]


def test_a_tower_with_another_number_of_features_is_refused(model):
    one = record(model, 24, [2], 0)
    short = ImageSpan("x", 2, IMAGE_TOKENS - 1)
    changed = replace(one, example=replace(one.example, images=(short,)))
    batch = packed(model, [changed])
    with pytest.raises(StudentError, match=r"gives 16 features.*expected 15"):
        embed(model, batch.input_ids, batch.images)


def test_a_text_student_given_pixels_is_refused(model, tiny_llama):
    batch = packed(model, [record(model, 24, [2], 0)])
    with pytest.raises(StudentError, match="takes no pictures"):
        embed(load(tiny_llama), batch.input_ids, batch.images)


def test_an_image_that_vanished_before_training_is_named():
    pictures = Pictures(lambda name: Path("/nowhere", name).read_bytes(), lambda image: image)
    zeros = torch.zeros(1, dtype=torch.int64)
    images = ImageBatch(("ab" * 32,), zeros, zeros, zeros, zeros, zeros)
    with pytest.raises(StudentError, match=r"image abababababab is gone.*Restore"):
        pictures.fill(images)
    truncated = Pictures(lambda _: tiny_image_models.image()[:50], lambda image: image)
    with pytest.raises(StudentError, match="cut short"):
        truncated.fill(images)
