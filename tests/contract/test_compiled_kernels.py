"""The machine code of the kernels for five generations of GPUs, compiled on a machine without one.

What is asserted is what a change can lose in silence: nothing spilled, registers within what two
blocks of a multiprocessor have, loads of 16 bytes also at widths that 16 does not divide, no
barrier inside the divergence's loops over a row, and a bound on instructions for each logit.
"""

import re

import pytest

from tests.ahead_of_time import ARCHITECTURES, read
from tests.kernel_builds import CASES

pytestmark = pytest.mark.slow

MOST_REGISTERS = 128
"""65,536 of a multiprocessor, over two blocks of 256 threads."""
DIVERGENCE = {
    "sparse, odd width": 7.5,
    "sparse JSD, T = 2, cap, CE": 26.0,
    "dense JSD, T = 2, cap, CE": 60.0,
}
"""Most instructions for a loaded logit in any loop over whole blocks."""
TEACHER = {"teacher 12 + 56, odd width": 24.0}
OLDEST = {"teacher 512 + 512, four T": 40.0}
"""What once spilled on sm_80 is looked at there."""


def whole_blocks(build):
    """Loops over whole blocks, which load without a mask: more than once in a thread's turn, or
    (dense) from both buffers."""
    return [loop for loop in build.streams if loop.wide_loads >= 2]


def check(name, architecture, most_instructions, loops):
    build = read(CASES[name](architecture=architecture))
    assert build.spills == build.stack == 0
    assert build.registers <= MOST_REGISTERS
    assert build.shared <= 32 * 1024
    assert re.search(r"ld\.global\S*\.v4\.b32", build.ptx)
    streams = whole_blocks(build)
    assert len(streams) >= loops
    assert all(loop.narrow_loads == 0 for loop in streams)
    assert max(loop.per_word for loop in streams) <= most_instructions
    return build, streams


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", DIVERGENCE)
def test_a_divergence_streams_its_row(name, architecture):
    build, streams = check(name, architecture, DIVERGENCE[name], loops=2)
    assert re.search(r"st\.global\S*\.v4\.b32", build.ptx)
    assert all(loop.count("BAR") == 0 for loop in streams)
    assert all(loop.count("SHFL") == 0 for loop in streams)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [*((name, a) for name in TEACHER for a in ARCHITECTURES), *((name, 80) for name in OLDEST)],
)
def test_a_teachers_sweep_streams_its_row(name, architecture):
    _, streams = check(name, architecture, (TEACHER | OLDEST)[name], loops=2)
    assert streams[0].count("BAR") == 0
