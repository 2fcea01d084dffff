"""The C kernels, or the reason why they are not here.

`native` is the module ktlab_ext._native, or None; `reason` is then why, and "" otherwise. The
kernels layer of ktlab is the only one that imports this.
"""

import importlib
from types import ModuleType

native: ModuleType | None
reason: str

try:
    native = importlib.import_module("ktlab_ext._native")
except ImportError as error:
    native = None
    reason = (
        f"the C kernels are not installed ({error}); they need Linux on x86-64, a C compiler and"
        " Cython when ktlab is installed"
    )
else:
    reason = ""
