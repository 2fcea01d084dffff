"""llama.cpp: one MoE layer as a ggml graph, through the libraries that llama-cpp-python built.

The graph is that of llm_graph_context::build_moe_ffn (llama.cpp, src/llama-graph.cpp, MIT) from
the selected experts on: mul_mat_id up and gate, swiglu, mul_mat_id down, times the routing weight,
sum over the experts. The weights lie in the plain CPU buffer ("cpu", where ggml's tiled kernels
compute many tokens) or, as far as it takes them, in the one that it re-tiles ("repack"); its AMX
buffer takes no mul_mat_id. Runs in the peer's environment under host.py.
"""

import ctypes
import importlib.util
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_void_p
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("cpu", "repack")
# enum ggml_type, ggml/include/ggml.h
TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q5_0": 6, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12,
    "q5_k": 13, "q6_k": 14, "iq4_nl": 20, "iq4_xs": 23, "bf16": 30,
}  # fmt: skip
I32 = 26
GRAPH_BYTES = 16 << 20  # tensors' descriptions only


class InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (
        ("mem_size", c_size_t),
        ("mem_buffer", c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def load_libraries() -> dict[str, Any]:
    """Functions by name, with their types, from the package's libggml*.so."""
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise ImportError("llama-cpp-python is not installed in this environment: make peers")
    folder = Path(package.origin).parent / "lib"
    base, cpu = (
        ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL)
        for name in ("ggml-base", "ggml-cpu")
    )
    pointer = c_void_p
    signatures: dict[Any, dict[str, tuple[Any, ...]]] = {
        base: {
            "ggml_init": (pointer, InitParams),
            "ggml_free": (None, pointer),
            "ggml_new_tensor_2d": (pointer, pointer, c_int, c_int64, c_int64),
            "ggml_new_tensor_3d": (pointer, pointer, c_int, c_int64, c_int64, c_int64),
            "ggml_mul_mat_id": (pointer,) * 5,
            "ggml_swiglu_split": (pointer,) * 4,
            "ggml_mul": (pointer,) * 4,
            "ggml_add": (pointer,) * 4,
            "ggml_view_2d": (pointer, pointer, pointer, c_int64, c_int64, c_size_t, c_size_t),
            "ggml_cont": (pointer,) * 3,
            "ggml_new_graph": (pointer, pointer),
            "ggml_build_forward_expand": (None, pointer, pointer),
            "ggml_nbytes": (c_size_t, pointer),
            "ggml_backend_alloc_ctx_tensors_from_buft": (pointer,) * 3,
            "ggml_backend_buffer_free": (None, pointer),
            "ggml_backend_tensor_set": (None, pointer, pointer, c_size_t, c_size_t),
            "ggml_backend_tensor_get": (None, pointer, pointer, c_size_t, c_size_t),
            "ggml_backend_graph_compute": (c_int, pointer, pointer),
            "ggml_backend_buft_name": (c_char_p, pointer),
            "ggml_backend_cpu_buffer_type": (pointer,),
            "ggml_backend_reg_get_proc_address": (pointer, pointer, c_char_p),
            "ggml_backend_reg_dev_get": (pointer, pointer, c_size_t),
            "ggml_gallocr_new": (pointer, pointer),
            "ggml_gallocr_alloc_graph": (ctypes.c_bool, pointer, pointer),
            "ggml_backend_dev_supports_op": (ctypes.c_bool, pointer, pointer),
        },
        cpu: {
            "ggml_backend_cpu_init": (pointer,),
            "ggml_backend_cpu_set_n_threads": (None, pointer, c_int),
            "ggml_backend_cpu_reg": (pointer,),
        },
    }
    functions = {}
    for library, table in signatures.items():
        for name, (result, *arguments) in table.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            functions[name.removeprefix("ggml_")] = function
    return functions


class Layer:
    """One layer of routed experts in ggml's memory."""

    def __init__(self, folder: Path, case: dict[str, Any], method: str, threads: int) -> None:
        self.ggml = load_libraries()
        self.method, self.case = method, case
        self.backend = self.ggml["backend_cpu_init"]()
        self.ggml["backend_cpu_set_n_threads"](self.backend, threads)
        register = self.ggml["backend_cpu_reg"]()
        self.device = self.ggml["backend_reg_dev_get"](register, 0)
        self.plain = self.ggml["backend_cpu_buffer_type"]()
        self.extra = None if method == "cpu" else self._extra_buffer_type(register)
        self.features = self._features(register)
        self.graphs: dict[int, tuple[Any, tuple[Any, ...], Any]] = {}
        self.last: tuple[Any, int] = (None, 0)
        self.layouts: dict[str, str] = {}
        hidden, width = case["hidden"], case["width"]
        self.weights = {
            name: self._weight(name, np.load(folder / f"{name}.npy"), *shape)
            for name, shape in {
                "gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)
            }.items()
        }  # fmt: skip
        if self.extra is not None and self.method not in self.layouts.values():
            raise ValueError(f"ggml's {method} buffer takes none of {case['formats']}")

    def _weight(self, name: str, blocks: Any, columns: int, rows: int) -> Any:
        """A stack of matrices: in the extra buffer if it computes this one, as llama.cpp does."""
        for buffer_type, layout in ((self.extra, self.method), (self.plain, "ggml_blocks")):
            if buffer_type is None:
                continue
            context = self._context()
            kind = TYPES[self.case["formats"][name]]
            tensor = self.ggml["new_tensor_3d"](context, kind, columns, rows, len(blocks))
            buffer = self.ggml["backend_alloc_ctx_tensors_from_buft"](context, buffer_type)
            if not buffer:
                raise MemoryError(f"ggml could not allocate {blocks.nbytes} bytes for {name}")
            if self._computes(tensor, columns):
                self._set(tensor, blocks)
                self.layouts[name] = layout
                return tensor
            self.ggml["backend_buffer_free"](buffer)
            self.ggml["free"](context)
        raise ValueError(
            f"ggml's CPU backend has no mul_mat_id for {name} ({self.case['formats'][name]})"
        )

    def _computes(self, tensor: Any, columns: int) -> bool:
        """Whether the backend has mul_mat_id for this weight where it lies."""
        context = self._context()
        x = self.ggml["new_tensor_3d"](context, TYPES["f32"], columns, 1, 1)
        ids = self.ggml["new_tensor_2d"](context, I32, 1, 1)
        node = self.ggml["mul_mat_id"](context, tensor, x, ids)
        answer = self.ggml["backend_dev_supports_op"](self.device, node)
        self.ggml["free"](context)
        return bool(answer)

    def _context(self) -> Any:
        return self.ggml["init"](InitParams(GRAPH_BYTES, None, True))

    def _set(self, tensor: Any, array: Any) -> None:
        if self.ggml["nbytes"](tensor) != array.nbytes:
            raise ValueError(
                f"ggml expects {self.ggml['nbytes'](tensor)} bytes, found {array.nbytes}"
            )
        self.ggml["backend_tensor_set"](tensor, array.ctypes.data, 0, array.nbytes)

    def _procedure(self, register: Any, name: bytes, result: Any) -> Any:
        address = self.ggml["backend_reg_get_proc_address"](register, name)
        return ctypes.CFUNCTYPE(result, c_void_p)(address)

    def _extra_buffer_type(self, register: Any) -> Any:
        """The buffer type called CPU_REPACK."""
        listed = self._procedure(register, b"ggml_backend_dev_get_extra_bufts", POINTER(c_void_p))(
            self.device
        )
        names, index = [], 0
        while listed[index]:
            name = self.ggml["backend_buft_name"](listed[index]).decode()
            if name.lower().endswith(self.method):
                return listed[index]
            names.append(name)
            index += 1
        raise ValueError(f"ggml offers no {self.method} buffer here, only {', '.join(names)}")

    def _features(self, register: Any) -> str:
        """The best instruction set that this build of ggml uses here."""

        class Feature(ctypes.Structure):
            _fields_ = (("name", c_char_p), ("value", c_char_p))

        listed = self._procedure(register, b"ggml_backend_get_features", POINTER(Feature))(register)
        names, index = [], 0
        while listed[index].name:
            if listed[index].value == b"1":
                names.append(listed[index].name.decode().lower())
            index += 1
        # Best first; AMX is not among them because mul_mat_id has no path through it.
        known = ("avx512_vnni", "avx512", "avx2")
        return next((name for name in known if name in names), "+".join(names))

    def describe(self) -> dict[str, str]:
        return {
            "version": f"llama-cpp-python {metadata.version('llama-cpp-python')}",
            "isa": self.features,
            "kernel": "mul_mat_id",
            "layout": "+".join(dict.fromkeys(self.layouts.values())),
        }

    def bind(self, hidden_TD: Any, ids_TK: Any, weights_TK: Any, routing: int) -> Any:
        tokens, top_k = ids_TK.shape
        if tokens not in self.graphs:
            self.graphs[tokens] = self._graph(tokens, top_k)
        graph, inputs, output = self.graphs[tokens]
        for tensor, array in zip(
            inputs, (hidden_TD, ids_TK.astype(np.int32), weights_TK), strict=True
        ):
            self._set(tensor, array)
        self.last = (output, tokens)

        def call() -> None:
            status = self.ggml["backend_graph_compute"](self.backend, graph)
            if status:
                raise RuntimeError(f"ggml_backend_graph_compute failed with status {status}")

        return call

    def _graph(self, tokens: int, top_k: int) -> tuple[Any, tuple[Any, ...], Any]:
        """(graph, its three inputs, its output)"""
        ggml, weights = self.ggml, self.weights
        hidden = self.case["hidden"]
        inputs, context = self._context(), self._context()
        x = ggml["new_tensor_3d"](inputs, TYPES["f32"], hidden, 1, tokens)
        ids = ggml["new_tensor_2d"](inputs, I32, top_k, tokens)
        routing = ggml["new_tensor_3d"](inputs, TYPES["f32"], 1, top_k, tokens)
        ggml["backend_alloc_ctx_tensors_from_buft"](inputs, self.plain)
        up = ggml["mul_mat_id"](context, weights["up"], x, ids)
        gate = ggml["mul_mat_id"](context, weights["gate"], x, ids)
        inner = ggml["swiglu_split"](context, gate, up)
        experts = ggml["mul_mat_id"](context, weights["down"], inner, ids)
        weighted = ggml["mul"](context, experts, routing)
        graph = ggml["new_graph"](context)
        row_bytes = hidden * 4
        total = None
        for index in range(top_k):
            view = ggml["view_2d"](
                context, weighted, hidden, tokens, row_bytes * top_k, row_bytes * index
            )
            ggml["build_forward_expand"](graph, view)
            total = view if total is None else ggml["add"](context, total, view)
        if top_k == 1:
            total = ggml["cont"](context, total)
        ggml["build_forward_expand"](graph, total)
        allocator = ggml["gallocr_new"](self.plain)
        if not ggml["gallocr_alloc_graph"](allocator, graph):
            raise MemoryError(f"ggml could not allocate a graph for {tokens} tokens")
        return graph, (x, ids, routing), total

    def output(self) -> "np.ndarray[Any, Any]":
        """(T, D) float32 of the last call."""
        tensor, tokens = self.last
        result = np.empty((tokens, self.case["hidden"]), np.float32)
        self.ggml["backend_tensor_get"](tensor, result.ctypes.data, 0, result.nbytes)
        return result
