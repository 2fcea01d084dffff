"""How functions are compiled here: three kinds, and one key for their code on disk."""

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
import numba.extending

COMPILED = (
    "codings", "encodings", "numba_jit", "numba_vectors", "numba_bytes", "numba_tiles",
    "numba_formats", "numba_products", "numba_rows", "numba_plan", "numba_rounding",
    "numba_search", "numba_encode",
)  # fmt: skip


def fingerprint(texts: Iterable[bytes]) -> int:
    """A number that changes with any of the texts."""
    digest = sha256()
    for text in texts:
        digest.update(sha256(text).digest())
    return int.from_bytes(digest.digest()[:7], "little")


SOURCES = fingerprint(Path(__file__).with_name(f"{name}.py").read_bytes() for name in COMPILED)
"""Default of an argument that nobody uses, and so part of the key of the compiled code on disk.
Numba itself asks only whether the file of the outermost function has changed."""

# Any: Numba describes neither all options nor what a decorated function takes inside others.
_njit: Any = numba.njit
intrinsic: Any = numba.extending.intrinsic

outer = _njit(nogil=True, cache=True, error_model="numpy")
"""For what Python calls. All arguments are numbers, addresses or contiguous arrays."""
_PART = {
    "nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True
}  # fmt: skip
inner = _njit(**_PART)
"""For its parts."""
folded = _njit(forceinline=True, **_PART)
"""For parts that several others fold in: typed once, copied by LLVM."""
inlined = _njit(nogil=True, inline="always")
"""For parts that only one other folds in: copied before types are known. All three cost seconds to
compile where chosen otherwise: everything folded 20 s, everything inlined 38 s, this 15 s."""
