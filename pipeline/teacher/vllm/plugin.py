"""The `vllm.general_plugins` entry point: runs in every vLLM process before it imports a model.

One idea: make vLLM start on a CPU, and nothing else. Importing `stillroom.pipeline` repairs this
process (see its `cpu_wheels`). vLLM's model-inspection subprocess and its worker processes import
torchvision before any plugin can run, so where the wheels do not match, models are inspected here
instead, and workers begin in this module. Scoring hooks are not installed here, so another
program's vLLM is left alone: they enter only with our engine's own `worker_extension_cls`.
"""

from stillroom.pipeline import cpu_wheels


def register() -> None:
    """Called by vLLM; may be called more than once."""
    cpu_wheels.install()
    let_llvmlite_be_scanned()
    if cpu_wheels.mismatched("torchvision"):
        from vllm.model_executor.models import registry
        from vllm.v1.executor.multiproc_executor import WorkerProc

        registry._run_in_subprocess = _run_here
        WorkerProc.worker_main = staticmethod(worker_main)


def let_llvmlite_be_scanned() -> None:
    """vLLM on a CPU asks every object of every module for its `__dict__`.

    numba's door to LLVM answers with a C function of that name, and vLLM fails to start beside any
    program that has compiled something.
    """
    try:
        from llvmlite.binding import ffi
    except ImportError:
        return
    table = getattr(ffi.lib, "_fntab", None)
    if isinstance(table, dict):
        table.setdefault("__dict__", {})


def worker_main(*args, **kwargs) -> None:
    """What a worker process of tensor or pipeline parallelism runs in place of vLLM's function.

    A spawned process imports the module of its function first: here that repairs it before it
    imports anything of vLLM.
    """
    from vllm.v1.executor.multiproc_executor import WorkerProc

    WorkerProc.worker_main(*args, **kwargs)


def _run_here(function):
    return function()
