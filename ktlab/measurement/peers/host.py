"""What runs inside a peer's environment: one MoE layer, or a model, behind JSON lines.

    python -I host.py ADAPTER.py

One request a line on standard input, one answer a line on standard output, `{"ok": false, "error":
...}` when something went wrong. Whatever the peer's library prints goes to standard error. Only
the standard library, NumPy and the peer itself may be imported here and in the adapters: this
file knows nothing of ktlab.

    {"do": "prepare", "folder": ..., "method": ..., "threads": 2}  -> what it is: version, isa ...
    {"do": "run", "tokens": 8, "repeats": 3}                       -> {"seconds": [...]}
    {"do": "output", "tokens": 8, "file": ...}                     -> (T, D) float32 in the file
    {"do": "close"}

and for an adapter that runs whole models

    {"do": "prepare", "file": ..., "method": ..., "threads": 2, "context": 600}
    {"do": "generate", "prompt": [...], "following": [...]}
        -> {"prefill_s": ..., "decode_s": [...], "ids": [...]}

The folder holds case.json (experts, hidden, width, top_k, formats of gate, up and down), the
weights (gate.npy ... as GGUF blocks, gate_bf16.npy ... where asked for) and, for T tokens,
hidden_T.npy (T, D) float32, ids_T.npy (V, T, K) int64, weights_T.npy (V, T, K) float32: V routings
that the runs take in turn, so that a few tokens do not find the last run's experts in the cache.
"output" is that of the first routing.
"""

import ctypes
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

PR_SET_PDEATHSIG = 1


def load_adapter(path: Path) -> Any:
    """The adapter module: it offers `Layer(folder, case, method, threads)` or
    `Model(file, method, threads, context)`."""
    spec = importlib.util.spec_from_file_location("adapter", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Host:
    """Answers requests about one layer or one model."""

    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter
        self.layer: Any = None
        self.model: Any = None
        self.folder = Path()
        self.inputs: dict[int, Any] = {}
        self.turn = 0

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        if "file" in request:
            self.model = self.adapter.Model(
                request["file"], request["method"], request["threads"], request["context"]
            )
            return dict(self.model.describe())
        self.folder = Path(request["folder"])
        case = json.loads((self.folder / "case.json").read_text())
        self.layer = self.adapter.Layer(self.folder, case, request["method"], request["threads"])
        return dict(self.layer.describe())

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        seconds = []
        for _ in range(request["repeats"]):
            self.turn += 1
            call = self._call(request["tokens"], self.turn)
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def output(self, request: dict[str, Any]) -> dict[str, Any]:
        self._call(request["tokens"], 0)()
        np.save(request["file"], self.layer.output())
        return {}

    def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        return dict(self.model.run(request["prompt"], request["following"]))

    def _call(self, tokens: int, turn: int) -> Any:
        """A function without arguments that computes the layer for the routing of that turn."""
        if tokens not in self.inputs:
            self.inputs[tokens] = tuple(
                np.ascontiguousarray(np.load(self.folder / f"{name}_{tokens}.npy"))
                for name in ("hidden", "ids", "weights")
            )
        hidden_TD, ids_VTK, weights_VTK = self.inputs[tokens]
        routing = turn % len(ids_VTK)
        return self.layer.bind(hidden_TD, ids_VTK[routing], weights_VTK[routing], routing)

    def answer(self, line: str) -> dict[str, Any]:
        request = json.loads(line)
        try:
            action = {
                "prepare": self.prepare,
                "run": self.run,
                "output": self.output,
                "generate": self.generate,
            }
            return {"ok": True, **action[request["do"]](request)}
        except Exception as error:  # the client raises it with its own words
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def private_stdout() -> TextIO:
    """Standard output for the answers alone; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def die_with_parent() -> None:
    """A peer that is suspended would not notice that its pipe is gone (Linux)."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):
        pass


def main() -> None:
    die_with_parent()
    answers = private_stdout()
    host = Host(load_adapter(Path(sys.argv[1])))
    for line in sys.stdin:
        if json.loads(line)["do"] == "close":
            break
        print(json.dumps(host.answer(line)), file=answers, flush=True)
    # Some libraries hang or crash while they take down their threads; nothing is left to save.
    os._exit(0)


if __name__ == "__main__":
    main()
