"""Compiled inner loops of the record codec.

One idea: plain functions over NumPy arrays, compiled by numba at their first call. Import these
modules inside the functions that use them: numba itself takes half a second to import. They check
every index that comes from stored bytes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numba


def compiled(function: Any = None, **options: Any) -> Callable:
    """`numba.njit` without the GIL, cached on disk where a directory for that can be written."""
    if function is None:
        return partial(compiled, **options)
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # no directory for the cache can be written
        return numba.njit(nogil=True, **options)(function)
