"""A piece of work done inside a wrapped model's forward pass.

One idea: DDP and FSDP act when the model that they wrap is called, so whatever uses its weights
must happen inside that call. For the length of one call the inner model's `forward` is the work.
"""

from collections.abc import Callable
from typing import Any


def through(wrapper: Any, inner: Any, work: Callable[..., Any], *given: Any) -> Any:
    """What `work(*given)` returns, called as `inner`'s forward pass by `wrapper`.

    Args:
        wrapper: what is called: DDP, FSDP or the model itself.
        inner: the model inside.
        work: may call parts of the model, or the model itself.
        given: what the wrapper hands on.
    """
    missing = object()
    before = vars(inner).get("forward", missing)  # libraries put one there too

    def restore() -> None:
        if before is missing:
            vars(inner).pop("forward", None)
        else:
            inner.forward = before

    def once(*handed: Any) -> Any:
        restore()
        return work(*handed)

    inner.forward = once
    try:
        return wrapper(*given)
    finally:
        restore()
