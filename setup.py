"""What pyproject.toml cannot say: where data/ lies in the wheel, and how the C core is built.

data/ is a folder of the repository and ktlab/data in the wheel. The C core becomes the module
ktlab_ext._native; where it cannot be built (no compiler, no Cython, another processor,
KTLAB_NO_NATIVE=1) the install succeeds all the same and one line says why: everything then works
on Numba. Everything else is in pyproject.toml.
"""

import copy
import importlib.util
import os
import shutil
import sys
import sysconfig
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError
from setuptools.modified import newer_group

DATA = ["ktlab.data"] + [
    f"ktlab.data.{name}" for name in find_namespace_packages("data", exclude=["recipe", "recipe.*"])
]
SUFFIXES = ("gguf", "txt", "md", "json", "csv", "yaml", "png", "svg")
DATA_FILES = [f"*.{suffix}" for suffix in SUFFIXES]

# Paths relative to this file, as setuptools wants them.
CSRC = Path("ktlab_ext/csrc")
C_SOURCES = sorted(str(path) for path in CSRC.glob("*.c"))
C_HEADERS = sorted(str(path) for path in CSRC.glob("*") if path.suffix in (".h", ".inc"))
# No -march: each C file names its own target, so one build runs on every x86-64. No contraction:
# a result must not depend on where the compiler finds a multiply beside an add. No trapping: a
# comparison may be made where it was not asked for, without which GCC takes e^x number by number
# under AVX2.
C_FLAGS = [
    "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fvisibility=hidden", "-pthread",
]  # fmt: skip

REQUIRED = os.environ.get("KTLAB_REQUIRE_NATIVE", "0") not in ("", "0")
REFUSED = os.environ.get("KTLAB_NO_NATIVE", "0") not in ("", "0")


def say_no_native(reason: str) -> None:
    print(f"ktlab: no C kernels, everything runs on Numba: {reason}", file=sys.stderr, flush=True)


def why_not() -> str:
    """Why the C core cannot be built here, as far as can be told without a compiler; or ""."""
    if REFUSED:
        return "KTLAB_NO_NATIVE is set"
    if sysconfig.get_platform() != "linux-x86_64":
        return f"they need Linux on x86-64, this is {sysconfig.get_platform()}"
    if importlib.util.find_spec("Cython") is None:
        return "Cython is missing (pip install cython)"
    return ""


def extensions() -> list[Extension]:
    reason = why_not()
    if reason and REQUIRED:
        raise SystemExit(f"ktlab: KTLAB_REQUIRE_NATIVE is set, but {reason}")
    if reason:
        say_no_native(reason)
        return []
    from Cython.Build import cythonize

    native = Extension(
        "ktlab_ext._native",
        ["ktlab_ext/_native.pyx", *C_SOURCES],
        include_dirs=[str(CSRC)],
        depends=[*C_HEADERS, "setup.py"],
        extra_compile_args=C_FLAGS,
        extra_link_args=["-pthread"],
        libraries=["m"],
    )
    (generated,) = cythonize([native], build_dir="build/cython")
    generated.optional = not REQUIRED  # cythonize forgets it
    return [generated]


class BuildKernels(build_ext):
    """One file a core at a time, only those that changed; a failure is a line, not an end."""

    def run(self) -> None:
        if not self.extensions:
            return
        import fcntl  # not everywhere, but where there are extensions

        os.makedirs("build", exist_ok=True)
        with open("build/lock", "w") as lock:  # two builds at once would mix their objects
            fcntl.flock(lock, fcntl.LOCK_EX)
            super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(self.compiled(ext))
        except (BaseError, CCompilerError):
            if REQUIRED:
                raise
            self.remove_stale(ext)
            compiler = self.compiler.compiler[0]
            if shutil.which(compiler) is None:
                say_no_native(f"no C compiler is here (looked for {compiler})")
            else:
                say_no_native(f"{compiler} failed (pip install -v shows its words)")

    def compiled(self, ext: Extension) -> Extension:
        """The extension with objects in place of its sources."""

        def object_of(source: str) -> str:
            (target,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
            if self.force or newer_group([source, *ext.depends], target):
                begin = time.time()
                self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    include_dirs=ext.include_dirs,
                    extra_postargs=ext.extra_compile_args,
                )
                os.utime(target, (begin, begin))  # a source saved meanwhile is newer
            return target

        done = copy.copy(ext)
        largest_first = sorted(ext.sources, key=os.path.getsize, reverse=True)
        with ThreadPool(os.cpu_count()) as pool:
            done.extra_objects = pool.map(object_of, largest_first, chunksize=1)
        done.sources, done.depends = [], [*ext.depends, *ext.sources]
        return done

    def remove_stale(self, ext: Extension) -> None:
        """What an earlier build left must not pass for this one."""
        name = self.get_ext_filename(self.get_ext_fullname(ext.name))
        for folder in (self.build_lib, "."):
            Path(folder, name).unlink(missing_ok=True)


setup(
    packages=find_packages(include=["ktlab", "ktlab.*", "ktlab_ext"]) + DATA,
    package_data={
        "ktlab": ["py.typed", "**/*.css", "**/*.js", "**/*.yaml"],
        "ktlab_ext": ["py.typed", "*.pyi"],
    }
    | {name: DATA_FILES for name in DATA},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
)
