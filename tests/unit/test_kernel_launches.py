"""What surrounds a kernel, on a machine without a GPU: the device it starts on, the options that
its backend takes, the product that only a GPU has, and what is said where something is missing."""

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import PTXASError

import stillroom.pipeline
from stillroom.pipeline.kernels import chunked, execution, products
from stillroom.pipeline.kernels.chunked import chunk_rows
from stillroom.pipeline.kernels.divergences import Objective
from stillroom.pipeline.kernels.triton import rows
from stillroom.pipeline.kernels.triton.sweep import launch_options
from stillroom.pipeline.kernels.vocabulary_shards import Shard
from tests.contract.divergence_cases import error, make_case

PIPELINE = Path(stillroom.pipeline.__file__).parent


class Kernel:
    """Stands where a `triton.jit` function would."""

    __name__ = "_sweep_row"

    def __init__(self, run):
        self.run = run

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.run(grid, arguments, options)


def test_a_kernel_starts_on_the_device_of_its_buffer(monkeypatch):
    seen, buffer = [], torch.zeros(3)

    @contextmanager
    def device_of(tensor):
        seen.append(("on", tensor is buffer))
        yield
        seen.append("off")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    kernel = Kernel(lambda grid, arguments, options: seen.append((grid, len(arguments), options)))
    rows.launch(kernel, 7, buffer, 1, 2, BLOCK=8)
    assert seen == [("on", True), ((7,), 3, {"BLOCK": 8}), "off"]


def test_no_kernel_starts_in_another_way():
    launches = {}
    for path in PIPELINE.rglob("*.py"):
        text = path.read_text()
        if "triton" in text and (found := re.findall(r"\w+\[\(.*\)\]\(", text)):
            launches[path.name] = found
    assert launches == {"rows.py": ["kernel[(programs,)]("]}


def test_a_kernel_that_does_not_compile_says_what_works_instead():
    def fail(*_):
        raise PTXASError("Internal Triton PTX codegen error\nptxas fatal: no such architecture")

    message = r"Triton \d.* does not run _sweep_row on cpu .*no such architecture.*impl='chunked'"
    with pytest.raises(RuntimeError, match=message):
        rows.launch(Kernel(fail), 1, torch.zeros(1))
    with pytest.raises(RuntimeError, match="STILLROOM_SWEEP=torch"):
        rows.launch(Kernel(fail), 1, torch.zeros(1), instead="set STILLROOM_SWEEP=torch")


def test_registers_are_limited_only_where_the_backend_can(monkeypatch):
    heavy = Objective(softcap=30.0)
    assert launch_options(1000, heavy)["maxnreg"] == 96
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "maxnreg" not in launch_options(1000, heavy)


class OnCuda:
    """A tensor of an old GPU, as far as the choice of an implementation asks."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda:0")


def test_a_gpu_too_old_is_named_with_what_works(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    message = r"compute capability 8\.0 or more; Tesla T4 has 7\.5: use impl='chunked'"
    with pytest.raises(RuntimeError, match=message):
        execution.sparse_sweep("triton", OnCuda(), Shard.whole(10))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    execution.sparse_sweep("triton", OnCuda(), Shard.whole(10))


def test_a_device_without_memory_is_told_what_was_asked(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(chunked.Workbench, "_make_buffers", fail)
    message = r"cpu has no room .* 11 rows over 131 words: .* a smaller memory_budget"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        make_case().run("chunked")


@pytest.fixture
def widening(monkeypatch):
    """The product with a wider sum, which a CPU lacks, given to it for a test."""

    def addmm(total, left, right, out_dtype, *, beta=1, alpha=1, out):
        assert total.dtype == out.dtype == out_dtype == torch.float32
        product = alpha * (left.double() @ right.double())
        return out.copy_(product if beta == 0 else product + beta * total.double())

    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(products, "widens", lambda _: True)
    yield
    library._destroy()


def test_an_fp32_head_under_autocast_takes_the_widening_product(widening):
    """The trainer's case on a GPU. The sums over chunks are then exact to fp32, where a CPU's own
    round every chunk's product to bf16."""
    case = make_case(64, 24, 131)
    truth = case.to(torch.float64).run("eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = case.run("chunked")
        pieces = case.run("chunked", memory_budget=8 * 192 * 6)
    for name, expected in truth.items():
        assert error(whole[name], expected) < 2e-2, name
    assert error(pieces["unembedding"], whole["unembedding"]) < 64 * 2.0**-24
    assert pieces["unembedding"].dtype == torch.float32


@pytest.mark.parametrize("fresh", [True, False])
def test_torch_itself_takes_the_widening_product(fresh):
    """On `meta`, where torch checks an operator's arguments and computes nothing."""
    left, right = (torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in ((8, 6), (6, 4)))
    products.add_(torch.empty(8, 4, device="meta"), left, right, fresh)


def test_a_torch_without_the_widening_product_is_named(monkeypatch):
    monkeypatch.setattr(products, "widens", lambda _: True)
    left, right = (torch.zeros(*s, dtype=torch.bfloat16) for s in ((8, 6), (6, 4)))
    with pytest.raises(
        RuntimeError, match=r"has no product of torch\.bfloat16 factors in .*float32"
    ):
        products.add_(torch.zeros(8, 4), left, right, True)


@pytest.mark.parametrize("rows", [1, 100, 1000, 4095, 8192, 100_000])
@pytest.mark.parametrize("most", [1, 100, 128, 300, 4096])
def test_chunks_fit_the_budget_in_whole_tiles(rows, most):
    size = chunk_rows(rows, 10, 10 * most)
    assert 1 <= size <= most
    assert size % 128 == 0 or size == rows or most < 128
    chunks = -(-rows // size)
    assert chunks <= -(-rows // (most - most % 128 if most >= 128 else most))
