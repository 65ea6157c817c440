"""Stillroom: run a teacher once, keep what it said, train any number of students from it.

One idea: this is the name that a program imports. What most programs need is here by itself; the
rooms are `stillroom.pipeline`, `stillroom.stages` and `stillroom.cache_schemas`. A name is
loaded when it is first asked for, so `import stillroom` costs next to nothing, and reading a cache
needs neither vLLM nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stillroom.cache_schemas.errors import StillroomError
    from stillroom.pipeline.cache.reader import TeacherCache
    from stillroom.pipeline.cache.writer import CacheWriter
    from stillroom.pipeline.doors.cached import CachedBatch, CachedDataset
    from stillroom.pipeline.doors.loss import distillation_loss, loss_totals
    from stillroom.pipeline.doors.stream import PackedStream
    from stillroom.pipeline.kernels.distributed_head import DivergenceHead, sharded_topk_divergence
    from stillroom.pipeline.kernels.linear_divergence import linear_divergence
    from stillroom.pipeline.kernels.packed_topk import PackedTopk
    from stillroom.pipeline.kernels.topk_divergence import topk_divergence
    from stillroom.pipeline.record import Example, TeacherRecord
    from stillroom.pipeline.student.apart import keeps_documents_apart

__all__ = [
    "CacheWriter",
    "CachedBatch",
    "CachedDataset",
    "DivergenceHead",
    "Example",
    "PackedStream",
    "PackedTopk",
    "StillroomError",
    "TeacherCache",
    "TeacherRecord",
    "distillation_loss",
    "keeps_documents_apart",
    "linear_divergence",
    "loss_totals",
    "sharded_topk_divergence",
    "topk_divergence",
]

HOMES = {
    "CacheWriter": "pipeline.cache.writer",
    "CachedBatch": "pipeline.doors.cached",
    "CachedDataset": "pipeline.doors.cached",
    "DivergenceHead": "pipeline.kernels.distributed_head",
    "Example": "pipeline.record",
    "PackedStream": "pipeline.doors.stream",
    "PackedTopk": "pipeline.kernels.packed_topk",
    "StillroomError": "cache_schemas.errors",
    "TeacherCache": "pipeline.cache.reader",
    "TeacherRecord": "pipeline.record",
    "distillation_loss": "pipeline.doors.loss",
    "keeps_documents_apart": "pipeline.student.apart",
    "linear_divergence": "pipeline.kernels.linear_divergence",
    "loss_totals": "pipeline.doors.loss",
    "sharded_topk_divergence": "pipeline.kernels.distributed_head",
    "topk_divergence": "pipeline.kernels.topk_divergence",
}


def __getattr__(name: str):
    if name == "__version__":
        return _version()
    if name not in HOMES:
        raise AttributeError(f"module 'stillroom' has no attribute {name!r}")
    value = getattr(import_module(f"stillroom.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES, "__version__"])


def _version() -> str:
    """The installed version; `0+unknown` in a checkout that was never installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("stillroom")
    except PackageNotFoundError:
        return "0+unknown"
