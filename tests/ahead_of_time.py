"""Triton kernels compiled on a machine without a GPU, and what their machine code says.

One idea: `triton.compile` with a target gives PTX and a cubin with no device at hand; registers,
spills and shared memory stand in the cubin, and a loop of its SASS is the stretch between a branch
backwards and its target. What a kernel costs in time is not read here: nothing runs.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 89, 90, 100, 120)
"""A100, RTX 40 and L4, H100, B200, RTX 50."""
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@\S+ )?(\S+)\s*(.*?);", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop of a kernel: the mnemonics of its instructions, in order."""

    instructions: tuple[str, ...]

    def count(self, start: str) -> int:
        """Instructions whose mnemonic starts so."""
        return sum(name.startswith(start) for name in self.instructions)

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes."""
        return sum(n.startswith("LDG") and ".128" in n for n in self.instructions)

    @property
    def narrow_loads(self) -> int:
        """Loads of one value of two bytes."""
        return sum(n.startswith("LDG") and ".U16" in n for n in self.instructions)

    @property
    def words(self) -> int:
        """bf16 values that a thread loads in one turn."""
        return 8 * self.wide_loads + self.narrow_loads

    @property
    def per_word(self) -> float:
        """Instructions for each of them."""
        return len(self.instructions) / max(self.words, 1)


@dataclass(frozen=True, slots=True)
class Build:
    """A kernel compiled for one architecture: per thread, but shared memory, which a block has."""

    registers: int
    stack: int
    shared: int
    spills: int
    loops: tuple[Loop, ...]
    ptx: str

    @property
    def streams(self) -> tuple[Loop, ...]:
        """Loops that read logits 16 bytes at a time, in the order of the code."""
        return tuple(loop for loop in self.loops if loop.wide_loads)


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Iterable[str],
    options: Mapping[str, Any],
    architecture: int = 90,
) -> Any:
    """A compiled kernel.

    Args:
        kernel: a `triton.jit` function.
        types: of its run-time arguments, such as `*bf16` or `i32`.
        constants: its compile-time arguments.
        aligned: run-time arguments that are divisible by 16.
        options: `num_warps` and the like.
        architecture: 90 is sm_90.
    """
    place = kernel.arg_names.index
    signature = dict(types) | dict.fromkeys(constants, "constexpr")
    divisible = {(place(name),): [["tt.divisibility", 16]] for name in aligned}
    values = {(place(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, divisible)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=dict(options))


def read(kernel: Any) -> Build:
    """What the machine code of a compiled kernel says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    said = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    lines = [
        (int(at, 16), name, rest) for at, _, name, rest in _LINE.findall(sass) if name != "NOP"
    ]
    spills = sum(name.startswith(("STL", "LDL")) for _, name, _ in lines)
    stack = said["STACK"] + said["LOCAL"]
    shared = kernel.metadata.shared
    return Build(said["REG"], stack, shared, spills, tuple(_loops(lines)), kernel.asm["ptx"])


def _loops(lines: list[tuple[int, str, str]]) -> Iterable[Loop]:
    spans = []
    for at, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest)
        # The branch to itself behind the last instruction is padding.
        if name.startswith("BRA") and target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    for first, last in sorted(spans):
        inner = any((a, b) != (first, last) and first <= a and b <= last for a, b in spans)
        if not inner:
            yield Loop(tuple(name for at, name, _ in lines if first <= at <= last))


def _cuobjdump(*arguments: str) -> str:
    command = [knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
