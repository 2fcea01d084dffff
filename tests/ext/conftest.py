"""The native module, or a reason to skip that is honest: a failed build is a failure."""

import os
import shutil
import sysconfig
from types import ModuleType

import pytest

import ktlab_ext


@pytest.fixture(scope="session")
def native() -> ModuleType:
    if ktlab_ext.native is not None:
        return ktlab_ext.native
    if os.environ.get("KTLAB_NO_NATIVE", "0") not in ("", "0"):
        pytest.skip("KTLAB_NO_NATIVE is set")
    if sysconfig.get_platform() != "linux-x86_64":
        pytest.skip(f"no C kernels on {sysconfig.get_platform()}")
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        pytest.skip("no C compiler is here")
    pytest.fail(f"expected the C kernels (make venv builds them), found: {ktlab_ext.reason}")
