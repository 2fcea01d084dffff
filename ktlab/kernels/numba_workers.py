"""Work shared by a few Python threads: the compiled kernels run without the GIL.

Numba's own parallel loops are left alone: which of their layers exists depends on the machine, one
may not be called from two threads, another dies after fork, and they take far longer to compile.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

Piece = TypeVar("Piece")


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="ktlab-numba")


# A forked child has none of its parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)


def share(threads: int, pieces: Iterable[Piece], worker: Callable[[Iterator[Piece]], None]) -> None:
    """Call `worker(pieces)` on `threads` threads, this one included; each takes the next piece
    when it is done with one. Returns when all are done; raises what a worker raised."""
    left = iter(list(pieces))
    if threads <= 1:
        worker(left)
        return
    helpers = _helpers(threads - 1)
    others = [helpers.submit(worker, left) for _ in range(threads - 1)]
    try:
        worker(left)
    finally:
        for other in others:
            other.result()
