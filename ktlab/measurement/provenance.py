"""Where a number comes from: machine, libraries, revision, seed and date."""

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import ktlab
from ktlab import hardware, html
from ktlab.kernels import native
from ktlab.kernels.request import EMULATED, ISA_VARIABLE
from ktlab.kernels.threads import default_threads
from ktlab.record import Record

LIBRARIES = ("torch", "numpy", "numba", "gguf")


@dataclass(frozen=True, kw_only=True)
class Provenance(Record):
    """What a result carries so that it can be repeated, or its difference explained."""

    model: str
    cpu: str
    isa: tuple[str, ...]
    """Instruction sets usable here (AMX only if the operating system grants it)."""
    cores: int
    threads: int
    """Threads of torch."""
    kernels: str = ""
    """The native kernels: instruction sets usable in this process and their default threads, or why
    there are none."""
    python: str
    system: str
    versions: dict[str, str]
    revision: str | None
    """Git revision of the clone that ran ("+" appended if it was changed); None for a wheel."""
    seed: int | None
    date: str
    """UTC, ISO 8601."""

    @classmethod
    def collect(cls, *, model: str = "", seed: int | None = None) -> "Provenance":
        """Of this process, now."""
        import torch

        return cls(
            model=model,
            cpu=hardware.cpu_name(),
            isa=hardware.isa(),
            cores=hardware.cores(),
            threads=torch.get_num_threads(),
            kernels=_kernels(),
            python=platform.python_version(),
            system=f"{platform.system()} {platform.release()}",
            versions={
                "ktlab": ktlab.__version__,
                **{name: v for name in LIBRARIES if (v := version(name))},
            },
            revision=git_revision(),
            seed=seed,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {v}" for name, v in self.versions.items())
        parts = [
            f"{self.model} on {self.cpu}, {self.threads} of {self.cores} cores"
            if self.model
            else f"{self.cpu}, {self.threads} of {self.cores} cores",
            f"{', '.join(self.isa) or 'instruction sets unknown'}",
            self.kernels,
            f"Python {self.python}, {versions}",
            f"revision {self.revision[:12]}" if self.revision else "no git revision",
            f"seed {self.seed}" if self.seed is not None else "",
            self.date,
        ]
        return "; ".join(part for part in parts if part)

    def to_html(self) -> html.Raw:
        """Folded away under one line."""
        return html.details("where this comes from", str(self))


def _kernels() -> str:
    reason = native.unavailable()
    if reason:
        return f"no native kernels: {reason}"
    forced = os.environ.get(ISA_VARIABLE, "").strip()
    usable = [isa for isa, why in native.isas().items() if not why and isa not in EMULATED]
    what = f"native kernels {', '.join(usable)}, {default_threads()} threads by default"
    return f"{what}, {ISA_VARIABLE}={forced}" if forced else what


def version(package: str) -> str | None:
    """The installed version, without importing the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def git_revision() -> str | None:
    """Revision of the clone that this file lies in, "+" appended if it differs from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
