"""What cannot fit is refused with numbers before it is loaded."""

import pytest
import torch

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.config.training import Lora, Student, Train
from stillroom.pipeline.student import memory
from stillroom.pipeline.student.loading import load
from stillroom.pipeline.student.model import initial_student
from stillroom.pipeline.training.memory import check_memory, parts_of
from stillroom.pipeline.training.parallel import ALONE


@pytest.fixture
def room(monkeypatch):
    """Sets what is free."""
    return lambda size: monkeypatch.setattr(memory, "room_on", lambda _: size)


def weights(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_numbers_are_those_of_the_model(tiny_llama, tiny_qwen3):
    for directory in (tiny_llama, tiny_qwen3):
        assert sum(memory.numbers_in(directory).values()) == weights(load(directory))


def test_a_step_holds_as_much_as_was_reckoned(tiny_llama):
    model = load(tiny_llama)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(4, 20)[None]).logits.sum().backward()
    optimizer.step()
    every = list(model.parameters())
    moments = [optimizer.state[p][key] for p in every for key in ("exp_avg", "exp_avg_sq")]
    held = {
        "weights": sum(p.nbytes for p in every),
        "gradients": sum(p.grad.nbytes for p in every),
        "moments": sum(moment.nbytes for moment in moments),
        "averages": 0,
        "states": 0,
    }
    assert parts_of(memory.numbers_in(tiny_llama), 0, Train(), 1) == held


def test_what_is_not_trained_and_what_is_shared_needs_less(tiny_llama):
    numbers = memory.numbers_in(tiny_llama)
    whole = parts_of(numbers, 0, Train(ema=0.9), 1)
    shared = parts_of(numbers, 0, Train(ema=0.9, parallel="fsdp"), 4)
    assert shared == {name: size // 4 for name, size in whole.items()}
    assert parts_of(numbers, 0, Train(freeze=("*",)), 1)["gradients"] == 0
    assert parts_of(numbers, 0, Train(lora=Lora()), 1)["moments"] == 0


def test_training_that_cannot_fit_is_refused_and_fits_with_adapters(tiny_llama, room):
    room(2 * memory.FP32 * sum(memory.numbers_in(tiny_llama).values()))
    small = {"batch_tokens": 2}
    with pytest.raises(StudentError, match=r"at least 0\.00 GiB \(weights .*moments.*train\.lora"):
        check_memory(tiny_llama, Train(**small), ALONE)
    check_memory(tiny_llama, Train(lora=Lora(), **small), ALONE)
    check_memory(tiny_llama, Train(freeze=("*",), **small), ALONE)
    with pytest.raises(StudentError, match="states"):
        check_memory(tiny_llama, Train(lora=Lora(), batch_tokens=10**9), ALONE)
    with pytest.raises(StudentError, match="states"):  # a row that is one example
        check_memory(tiny_llama, Train(lora=Lora(), **small), ALONE, longest=10**9)


def test_a_source_that_cannot_fit_is_refused_before_it_is_loaded(tiny_llama, tmp_path, room):
    room(1000)
    with pytest.raises(StudentError, match=r"weights in fp32.*`stillroom student` needs no GPU"):
        initial_student(Student(), Teacher(model=str(tiny_llama)), tmp_path / "made")
    room(10**9)
    initial_student(Student(), Teacher(model=str(tiny_llama)), tmp_path / "made")


def test_a_control_group_bounds_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    whole = memory.room_on(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("600\n")
    assert memory.room_on(torch.device("cpu")) > 1000
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.room_on(torch.device("cpu")) == 400 < whole
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.room_on(torch.device("cpu")) == 100
