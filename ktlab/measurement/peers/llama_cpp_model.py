"""llama.cpp on a whole GGUF file, through the bindings that llama-cpp-python brings.

Prompt and continuation are given as ids, so that both programs compute the same tokens. Weights are
mapped; "repack" lets llama.cpp re-tile what it can (its default), "cpu" keeps them as they lie in
the file. Runs in the peer's environment under host.py.
"""

import importlib
import importlib.util
import sys
import time
import types
import typing
from importlib import metadata
from pathlib import Path
from typing import Any

METHODS = ("repack", "cpu")
BATCH = 512


def bindings() -> Any:
    """llama_cpp.llama_cpp without the package around it, whose other modules want more packages."""
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise ImportError("llama-cpp-python is not installed in this environment: make peers")
    if "llama_cpp" not in sys.modules:
        bare = types.ModuleType("llama_cpp")
        bare.__path__ = [str(Path(package.origin).parent)]
        sys.modules["llama_cpp"] = bare
        # All that the bindings take from there is in `typing` since Python 3.10.
        sys.modules.setdefault("typing_extensions", typing)
    return importlib.import_module("llama_cpp.llama_cpp")


class Model:
    """A model and one context for up to `context` tokens."""

    def __init__(self, file: str, method: str, threads: int, context: int) -> None:
        self.llama = llama = bindings()
        self.method, self.threads = method, threads
        # Kept alive: the library calls it for as long as it runs. It is quiet but for errors.
        self.log = llama.llama_log_callback(self._remember)
        self.last_error = ""
        llama.llama_log_set(self.log, None)
        llama.llama_backend_init()
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_extra_bufts = method == "repack"
        self.model = llama.llama_model_load_from_file(file.encode(), parameters)
        if not self.model:
            raise ValueError(f"llama.cpp refuses {file}: {self.last_error}")
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise ValueError(f"llama.cpp makes no context of {context} tokens: {self.last_error}")

    def _remember(self, level: int, text: bytes, _: Any) -> None:
        if level >= 4 and text.strip():  # GGML_LOG_LEVEL_ERROR; 5 goes on with the last
            self.last_error = text.decode(errors="replace").strip()

    def describe(self) -> dict[str, str]:
        return {
            "version": f"llama-cpp-python {metadata.version('llama-cpp-python')}",
            "method": self.method,
            "system": self.llama.llama_print_system_info().decode(),
        }

    def run(self, prompt: list[int], following: list[int]) -> dict[str, Any]:
        """Seconds of the prompt and of the tokens after it one by one; `ids`: what it would say."""
        llama = self.llama
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        start = time.perf_counter()
        for first in range(0, len(prompt), BATCH):
            self._decode(prompt[first : first + BATCH])
        prefilled = time.perf_counter()
        ids, seconds = [self._best()], []
        for token in following:
            began = time.perf_counter()
            self._decode([token])
            seconds.append(time.perf_counter() - began)
            ids.append(self._best())
        return {"prefill_s": prefilled - start, "decode_s": seconds, "ids": ids}

    def _decode(self, ids: list[int]) -> None:
        array = (self.llama.llama_token * len(ids))(*ids)
        status = self.llama.llama_decode(
            self.context, self.llama.llama_batch_get_one(array, len(ids))
        )
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}: {self.last_error}")

    def _best(self) -> int:
        import numpy as np

        vocabulary = self.llama.llama_vocab_n_tokens(self.llama.llama_model_get_vocab(self.model))
        logits = self.llama.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())
