"""Compiled inner loops of the record codec.

One idea: plain functions over NumPy arrays, compiled by numba at their first call. Import these
modules inside the functions that use them: numba itself takes half a second to import. They check
every index that comes from stored bytes.
"""

from collections.abc import Callable

import numba


def compiled(function: Callable) -> Callable:
    """`numba.njit` without the GIL, cached on disk where a directory for that can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no directory for the cache can be written
        return numba.njit(nogil=True)(function)
