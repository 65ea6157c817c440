"""Triton kernels compiled for an H100 on a machine without one, to see what ptxas makes of them."""

import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Iterable[str],
    options: Mapping[str, Any],
) -> Any:
    """A compiled kernel.

    Args:
        kernel: a `triton.jit` function.
        types: of its run-time arguments, such as `*bf16` or `i32`.
        constants: its compile-time arguments.
        aligned: run-time arguments that are divisible by 16.
        options: `num_warps` and the like.
    """
    place = kernel.arg_names.index
    signature = dict(types) | dict.fromkeys(constants, "constexpr")
    divisible = {(place(name),): [["tt.divisibility", 16]] for name in aligned}
    values = {(place(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, divisible)
    return triton.compile(source, target=TARGET, options=dict(options))


def ptxas_report(kernel: Any, directory: Path) -> str:
    """What ptxas says with Triton's own flags."""
    source = directory / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    ptxas = knobs.nvidia.ptxas_blackwell.path
    flags = ["-v", "-lineinfo", "--regAllocOptLevel=2", "--gpu-name=sm_90a"]
    run = subprocess.run(
        [ptxas, *flags, str(source), "-o", "/dev/null"], capture_output=True, text=True, check=True
    )
    return run.stdout + run.stderr


def registers(report: str) -> int:
    """Registers of a thread."""
    found = re.search(r"Used (\d+) registers", report)
    assert found is not None, report
    return int(found[1])
