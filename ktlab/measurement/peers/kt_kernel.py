"""kt-kernel: the CPU kernels of KTransformers, through the extension module of its wheel.

The extension is loaded by the wheel's own detection (KT_KERNEL_CPU_VARIANT forces a variant), but
without importing the package, which would need torch: the kernels take addresses. The calls are
those of kt_kernel/utils/llamafile.py and amx.py, version 0.7.2 (Apache-2.0, github.com/kvcache-ai/
ktransformers). Runs in the peer's environment under host.py.
"""

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

METHODS = {"llamafile": "MOE", "amxint8": "AMXInt8_MOE", "amxint4": "AMXInt4_MOE"}
NOT_BUILT = "the wheel has no"
MAX_TOKENS = 4096
GROUP_MIN_TOKENS = 10  # the wrapper's own: below it LLAMAFILE computes token by token
ROW_BLOCK = 32  # likewise


def load_extension() -> tuple[Any, str]:
    """(extension module, variant), chosen as `import kt_kernel` would."""
    package = importlib.util.find_spec("kt_kernel")
    if package is None or package.origin is None:
        raise ImportError("kt-kernel is not installed in this environment: make peers")
    path = Path(package.origin).parent / "_cpu_detect.py"
    spec = importlib.util.spec_from_file_location("kt_cpu_detect", path)
    assert spec is not None and spec.loader is not None
    detection = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(detection)
    extension, variant = detection.initialize()
    return extension, variant


def bfloat16(values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """float32 to bfloat16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Layer:
    """One layer of routed experts in kt-kernel's memory."""

    def __init__(self, folder: Path, case: dict[str, Any], method: str, threads: int) -> None:
        self.extension, self.variant = load_extension()
        self.method, self.hidden = method, case["hidden"]
        pool = self.extension.WorkerPoolConfig()
        pool.subpool_count = 1
        pool.subpool_numa_map = [0]
        pool.subpool_thread_count = [threads]
        self.cpu = self.extension.CPUInfer(pool)
        # No expert is on a GPU; the library keeps this pointer.
        self.gpu_mask_E = np.zeros(case["experts"], np.bool_)
        config = self.extension.moe.MOEConfig(
            case["experts"],
            case["top_k"],
            case["hidden"],
            case["width"],
            self.gpu_mask_E.ctypes.data,
        )
        config.layer_idx = 0
        config.pool = self.cpu.backend_
        config.max_len = MAX_TOKENS
        weights = self._weights(folder, config, case["formats"])
        if not hasattr(self.extension.moe, METHODS[method]):
            raise RuntimeError(
                f"{NOT_BUILT} {METHODS[method]} for {self.variant}, all this CPU has"
            )
        self.moe = getattr(self.extension.moe, METHODS[method])(config)
        identity_E = np.arange(case["experts"], dtype=np.int64)
        self.cpu.submit(self.moe.load_weights_task(identity_E.ctypes.data))
        self.cpu.sync()
        # LLAMAFILE computes from these blocks in place, the others have quantized their own copy.
        self.weights = weights if method == "llamafile" else None
        self.bound: dict[tuple[int, int], tuple[Any, ...]] = {}
        self.last_TD: Any = None

    def _weights(self, folder: Path, config: Any, formats: dict[str, str]) -> list[Any]:
        """Point the configuration at the weights; they must live until they are loaded."""
        kept = []
        for name in ("gate", "up", "down"):
            file = f"{name}.npy" if self.method == "llamafile" else f"{name}_bf16.npy"
            array = np.load(folder / file)
            setattr(config, f"{name}_proj", array.ctypes.data)
            kept.append(array)
            if self.method == "llamafile":
                types = self.extension.kvcache.ggml_type
                setattr(config, f"{name}_type", getattr(types, _ggml_name(formats[name])))
        if self.method == "llamafile":
            config.hidden_type = self.extension.kvcache.ggml_type.BF16
            config.m_block = ROW_BLOCK
            config.group_min_len = GROUP_MIN_TOKENS
            config.group_max_len = MAX_TOKENS
        else:
            # Quantized here from bfloat16, nothing written to disk.
            config.save = config.load = False
        return kept

    def describe(self) -> dict[str, str]:
        return {
            "version": metadata.version("kt-kernel"),
            "isa": self.variant,
            "kernel": METHODS[self.method],
            "layout": "ggml_blocks" if self.method == "llamafile" else "tiles",
        }

    def bind(self, hidden_TD: Any, ids_TK: Any, weights_TK: Any, routing: int) -> Any:
        tokens, top_k = ids_TK.shape
        if (tokens, routing) not in self.bound:
            arrays = (
                np.array([tokens], np.int32),
                ids_TK,
                weights_TK,
                bfloat16(hidden_TD),
                np.zeros((tokens, self.hidden), np.uint16),
            )
            count, *rest = (array.ctypes.data for array in arrays)
            self.bound[tokens, routing] = (arrays, (count, top_k, *rest, False))
        arrays, arguments = self.bound[tokens, routing]
        self.last_TD = arrays[-1]

        def call() -> None:
            self.cpu.submit(self.moe.forward_task(*arguments))
            self.cpu.sync()

        return call

    def output(self) -> "np.ndarray[Any, Any]":
        """(T, D) float32 of the last call; the library writes bfloat16."""
        return (self.last_TD.astype(np.uint32) << 16).view(np.float32)


def _ggml_name(format: str) -> str:
    return {"f32": "FP32", "f16": "FP16"}.get(format, format.upper())
