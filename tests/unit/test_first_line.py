"""What another library raised is told in one line that says something."""

import pytest

from stillroom.cache_schemas.errors import LONGEST, first_line
from stillroom.pipeline.teacher.vllm.failures import out_of_memory

RAISED = {
    "nothing": (MemoryError(), "MemoryError"),
    "blank lines": (ValueError("\n \n it is so\nand so on"), "it is so"),
    "a key": (KeyError("swirl"), "KeyError: 'swirl'"),
    "an announcement": (
        ValueError("Validation error:\n  not an int\nmore"),
        "Validation error: not an int",
    ),
}


@pytest.mark.parametrize("name", RAISED)
def test_it_is_the_line_that_says_something(name):
    error, line = RAISED[name]
    assert first_line(error) == line


def test_it_is_not_long():
    assert len(first_line(ValueError("x" * 9999))) == LONGEST


def test_a_machine_without_memory_says_no_more_than_that():
    assert "vLLM ran out of memory (MemoryError)" in str(out_of_memory(MemoryError()))
