"""Pytest plugin (`-p tests.interpreted`): Triton's interpreter, which patches its language once a
launch instead of at every call of a device function.

One idea: the patches stand on modules until the launch restores them, so that a second one within
it finds nothing left to do, and takes 60 % of a test's time to find out. It changes no result.
"""

from types import FunctionType

import triton.language as tl
from triton.runtime import interpreter

LANGUAGES = {id(tl), id(tl.core)}


def pytest_configure() -> None:
    interpreter._patch_lang = patched_once(interpreter._patch_lang)


def patched_once(patch):
    """`patch`, doing nothing for what the running launch has patched."""
    patched: set[int] = set()

    def once(function: FunctionType):
        named = {id(value) for value in function.__globals__.values()} & LANGUAGES
        if patched and named <= patched:
            return interpreter._LangPatchScope()
        scope = patch(function)
        if not patched:
            scope.restore = restoring(scope.restore)
        patched.update(named)
        return scope

    def restoring(restore):
        def restore_and_forget() -> None:
            patched.clear()
            restore()

        return restore_and_forget

    return once
