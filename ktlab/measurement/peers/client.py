"""Drives a peer: starts it in its environment, asks it in JSON lines, stops it while others run.

`make peers` creates the environments in .peers/ of the clone; KTLAB_PEERS names another folder. A
peer is suspended (SIGSTOP) between its turns: some libraries keep their threads spinning for a
while, which would slow down whoever is measured next.
"""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ktlab import hardware
from ktlab.errors import SettingError, nearest

HERE = Path(__file__).resolve().parent
FOLDER_VARIABLE = "KTLAB_PEERS"
KT_VARIANT = "KT_KERNEL_CPU_VARIANT"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way in which a peer computes the layer."""

    peer: str
    """"kt-kernel" or "llama.cpp"."""
    name: str
    formats: tuple[str, ...]
    """What it computes as it is; () = it makes its own format from bfloat16 weights."""
    own_format: str = ""
    own_bits: int = 0
    """A weight, in that format."""

    @property
    def label(self) -> str:
        return f"{self.peer}/{self.name}"


GGML = "f32 f16 bf16 q8_0 q4_0 q5_0 q2_k q3_k q4_k q5_k q6_k iq4_nl iq4_xs".split()
METHODS = (
    Method(peer="kt-kernel", name="llamafile", formats=tuple(GGML)),
    Method(peer="kt-kernel", name="amxint8", formats=(), own_format="int8_channel", own_bits=8),
    Method(peer="kt-kernel", name="amxint4", formats=(), own_format="int4_channel", own_bits=4),
    Method(peer="llama.cpp", name="cpu", formats=tuple(GGML)),
    Method(peer="llama.cpp", name="repack", formats=tuple(GGML)),
)
MODEL_METHODS = (
    Method(peer="llama.cpp", name="repack", formats=()),
    Method(peer="llama.cpp", name="cpu", formats=()),
)
"""Ways in which a peer runs a whole model file."""
ADAPTERS = {"kt-kernel": "kt_kernel.py", "llama.cpp": "llama_cpp.py"}
MODEL_ADAPTERS = {"llama.cpp": "llama_cpp_model.py"}


def environments() -> Path:
    """The folder of the peers' environments, whether it is there or not."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else HERE.parents[2] / ".peers"


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment; `SettingError` where it was not made."""
    python = environments() / peer / "bin" / "python"
    if not (python.parent.parent / "ready").exists():
        raise SettingError(
            f"{peer} is not installed: expected its environment at {python.parent.parent}, found "
            f"{'an unfinished one' if python.exists() else 'nothing'}. Create it with: make peers "
            f"(or name the folder that holds it in {FOLDER_VARIABLE})"
        )
    return python


def choose(names: Sequence[str], formats: Sequence[str]) -> tuple[Method, ...]:
    """The methods of these labels ("llama.cpp", "kt-kernel/amxint8"); none named: all that compute
    these formats as they are, and for int8_channel and int4_* what comes nearest."""
    if not names:
        exact = tuple(m for m in METHODS if set(formats) <= set(m.formats))
        kind = formats[0].split("_")[0]
        return exact or tuple(m for m in METHODS if m.own_format.split("_")[0] == kind)
    chosen = []
    for name in names:
        found = [m for m in METHODS if name in (m.label, m.peer)]
        if not found:
            labels = [m.label for m in METHODS]
            raise SettingError(
                f"unknown peer {name!r}{nearest(name, labels)}; there are {', '.join(labels)}"
            )
        chosen += [m for m in found if name == m.label or set(formats) <= set(m.formats or formats)]
    return tuple(dict.fromkeys(chosen))


def choose_for_models(names: Sequence[str]) -> tuple[Method, ...]:
    """The methods of these labels that run whole models; none named: all."""
    labels = [m.label for m in MODEL_METHODS]
    chosen = []
    for name in names or dict.fromkeys(m.peer for m in MODEL_METHODS):
        found = [m for m in MODEL_METHODS if name in (m.label, m.peer)]
        if not found:
            raise SettingError(
                f"peer {name!r} runs no whole models{nearest(name, labels)}; "
                f"there are {', '.join(labels)}"
            )
        chosen += found
    return tuple(dict.fromkeys(chosen))


def kt_variant(isa: str) -> str | None:
    """The build of kt-kernel to force so that it uses no more than `isa`; None: its own choice."""
    if isa == "avx2":
        return "avx2"
    if isa != "avx512_vnni":
        return None
    flags = set(hardware.cpuinfo().get("flags", "").split())
    return "avx512_bf16" if {"avx512_bf16", "avx512vbmi"} <= flags else "avx512_vnni"


_Process = TypeVar("_Process", bound="Process")


class PeerError(RuntimeError):
    """A peer that refused, or died."""


class Process:
    """One method of one peer in a process of its own; a context manager.

    `request` is what "prepare" gets besides the method's name.
    """

    def __init__(self, method: Method, adapter: str, *, isa: str = "auto", **request: Any) -> None:
        self.method = method
        self._log = tempfile.TemporaryFile("w+")
        environment = dict(os.environ)
        variant = kt_variant(isa)
        if method.peer == "kt-kernel" and variant:
            environment.setdefault(KT_VARIANT, variant)
        self._process = subprocess.Popen(
            # -I: neither this process's PYTHONPATH nor the adapters' folder, whose names would
            # hide the packages that they are named after.
            [python_of(method.peer), "-I", HERE / "host.py", HERE / adapter],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        try:
            self.description = self._ask(do="prepare", method=method.name, **request)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process; safe to call twice."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                pass

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.send_signal(signal.SIGCONT)
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"{self.method.label} ended unexpectedly {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            raise PeerError(f"{self.method.label}: {answer['error']}")
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()[-3:]
        return f"(exit code {code})" + (": " + " / ".join(lines) if lines else "")

    def __enter__(self: _Process) -> _Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Peer(Process):
    """A peer that computes one MoE layer, from a folder that `SyntheticExperts.save` wrote."""

    def __init__(self, method: Method, folder: Path, *, threads: int, isa: str = "auto") -> None:
        adapter = ADAPTERS[method.peer]
        super().__init__(method, adapter, isa=isa, folder=str(folder), threads=threads)

    def run(self, tokens: int, repeats: int) -> list[float]:
        """Seconds of each repeat."""
        return list(self._ask(do="run", tokens=tokens, repeats=repeats)["seconds"])

    def output(self, tokens: int, file: Path) -> NDArray[np.float32]:
        """(T, D) for the first routing."""
        self._ask(do="output", tokens=tokens, file=str(file))
        output: NDArray[np.float32] = np.load(file)
        return output


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What one run of a model took, and the id that it would have gone on with after each step."""

    prefill_s: float
    decode_s: tuple[float, ...]
    ids: tuple[int, ...]


class ModelPeer(Process):
    """A peer that runs a whole model file."""

    def __init__(self, method: Method, file: Path, *, threads: int, context: int) -> None:
        adapter = MODEL_ADAPTERS[method.peer]
        super().__init__(method, adapter, file=str(file), threads=threads, context=context)

    def generate(self, prompt: Sequence[int], following: Sequence[int]) -> Generated:
        """Run the prompt from an empty cache, then the following ids one by one."""
        found = self._ask(do="generate", prompt=list(prompt), following=list(following))
        return Generated(
            prefill_s=found["prefill_s"],
            decode_s=tuple(found["decode_s"]),
            ids=tuple(found["ids"]),
        )
