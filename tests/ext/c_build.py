"""Compiles the C tests; .build/ keeps each object under the hash of what it was made of.

Run as a program, it compiles the sanitized core, which takes longest, ahead of the tests: CI does
so while it installs. Needs nothing but Python and gcc.
"""

import hashlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "ktlab_ext" / "csrc"
KEPT = ROOT / ".build" / "csrc"
COMPILER = shutil.which("gcc")

STRICT = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-ffp-contract=off", "-pthread")
PLAIN = ("-O2",)
ADDRESSES = (
    *("-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"),
    "-fsanitize=address,undefined,float-cast-overflow",
    # A null pointer traps and an object's end is the address sanitizer's business all the same;
    # checking both twice took a quarter of the compile time.
    "-fno-sanitize=null,object-size",
)
THREADS = ("-O1", "-g1", "-fsanitize=thread")


def core() -> list[Path]:
    """All C files of the core; the largest first, so that two cores end together."""
    return sorted(CSRC.glob("*.c"), key=lambda path: -path.stat().st_size)


def call(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"


def short_hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def object_of(source: Path, flags: tuple[str, ...]) -> Path:
    made_of = (source, *sorted(CSRC.glob("**/*.h")))
    kind = f"{source.stem}-{short_hash(*(flag.encode() for flag in flags))}"
    kept = KEPT / f"{kind}-{short_hash(*(path.read_bytes() for path in made_of))}.o"
    if not kept.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        for old in KEPT.glob(f"{kind}-*"):
            old.unlink()
        fresh = kept.with_suffix(".tmp")
        call(COMPILER, *flags, "-c", source, "-o", fresh)
        fresh.replace(kept)
    return kept


def objects_of(sources: list[Path], flags: tuple[str, ...]) -> list[Path]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda path: object_of(path, (*STRICT, *flags)), sources))


def build(test: str, flags: tuple[str, ...], sources: list[Path], where: Path) -> Path:
    """The program of csrc/tests/<test>.c with `sources`, at `where`/<test>."""
    assert COMPILER is not None
    objects = objects_of([*sources, CSRC / "tests" / f"{test}.c"], flags)
    program = where / test
    call(COMPILER, *STRICT, *flags, *objects, "-o", program, "-lm")
    return program


def run(program: Path, *arguments: object, timeout: float = 300) -> str:
    done = subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{program.name} ended with {done.returncode}\n{done.stderr}"
    return done.stdout


if __name__ == "__main__" and COMPILER is not None:
    objects_of(core(), ADDRESSES)
