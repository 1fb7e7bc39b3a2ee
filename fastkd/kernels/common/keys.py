"""What compiled kernels are called in Triton's cache: the same in every process."""

from __future__ import annotations

from typing import Any

import triton.language as tl


def settle(kernel: Any) -> None:
    """Let Triton hash the functions that a kernel calls, and those that they call, before the kernel.

    Into a function's hash go the constants that its callees read. Triton 3.6 forgets those of callees that no
    other kernel has used before. A kernel's key would depend on what a process has launched until then, and
    what another has compiled would not be found. Triton 3.8 forgets none. An interpreted kernel has no hash.
    """
    _settle(kernel, set())


def _settle(function: Any, seen: set[int]) -> None:
    if getattr(function, "hash", "") is not None or id(function) in seen:
        return
    seen.add(id(function))
    code = function.fn
    for name in code.__code__.co_names:
        for callee in (code.__globals__.get(name), getattr(tl, name, None)):
            _settle(callee, seen)
    _ = function.cache_key
