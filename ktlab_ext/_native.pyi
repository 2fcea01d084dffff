"""The types of _native.pyx; its docstrings say what each thing does."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy.typing as npt

Array = npt.NDArray[Any]

HEADER_BYTES: int
LAYOUTS: tuple[str, ...]

class Header(NamedTuple):
    format: str
    experts: int
    rows: int
    cols: int
    source: str

class Pool:
    threads: int
    cpus: tuple[int, ...] | None
    def __init__(self, threads: int, cpus: Iterable[int] | None = None) -> None: ...

class Matrix:
    buffer: Array
    format: str
    layout: str
    experts: int
    rows: int
    cols: int
    expert_stride: int
    def __init__(
        self,
        buffer: Array,
        format: str,
        layout: str,
        experts: int,
        rows: int,
        cols: int,
        expert_stride: int | None = None,
    ) -> None: ...

def formats() -> tuple[str, ...]: ...
def isas() -> dict[str, str]: ...
def cpu_vendor() -> str: ...
def pairs(isa: str) -> bool: ...
def set_pairs(wanted: bool | None) -> None: ...
def computes(isa: str, format: str) -> bool: ...
def row_bytes(format: str, cols: int) -> int: ...
def packed_bytes(format: str, rows: int, cols: int) -> int: ...
def linear(
    pool: Pool, isa: str, few: int, matrix: Matrix, expert: int, x: Array, y: Array
) -> None: ...
def linear_by_head(pool: Pool, isa: str, few: int, matrix: Matrix, x: Array, y: Array) -> None: ...
def attend(pool: Pool, isa: str, q: Array, keys: Array, scale: float, y: Array) -> None: ...
def attends_many(isa: str) -> bool: ...
def attend_many(
    pool: Pool,
    isa: str,
    q: Array,
    q_rope: Array,
    keys: Array,
    k_b: Array,
    v_b: Array,
    scale: float,
    y: Array,
) -> None: ...

class MLA:
    matrices: tuple[Matrix | None, ...]
    def __init__(
        self,
        q_a: Matrix | None,
        q_a_norm: Array | None,
        q_b: Matrix,
        kv_a: Matrix,
        kv_a_norm: Array,
        k_b: Matrix,
        v_b: Matrix,
        output: Matrix,
        halves: bool,
        eps: float,
        scale: float,
    ) -> None: ...

class Router:
    gate: Matrix
    isa: str
    def __init__(
        self,
        isa: str,
        gate: Matrix,
        bias: Array | None,
        sigmoid: bool,
        normalise: bool,
        groups: int,
        open_groups: int,
        top_k: int,
        scale: float,
    ) -> None: ...

class Experts:
    matrices: tuple[Matrix, Matrix, Matrix]
    def __init__(self, isa: str, few: int, gate: Matrix, up: Matrix, down: Matrix) -> None: ...

class Layer:
    parts: tuple[MLA, Router | None, Experts, Experts | None]
    def __init__(
        self,
        isa: str,
        attention_norm: Array,
        mla: MLA,
        mlp_norm: Array,
        router: Router | None,
        routed: Experts,
        shared: Experts | None,
    ) -> None: ...

def mla_token(
    pool: Pool, isa: str, mla: MLA, turns: Array, x: Array, keys: Array, q: Array, y: Array
) -> None: ...
def route(pool: Pool, router: Router, x: Array, ids: Array, weights: Array) -> None: ...
def layers_token(
    pool: Pool, layers: list[Layer], turns: list[Array], x: Array, keys: list[Array], y: Array
) -> None: ...
def moe(
    pool: Pool,
    isa: str,
    few: int,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    x: Array,
    ids: Array,
    weights: Array,
    y: Array,
) -> None: ...
def pack(pool: Pool, matrix: Matrix, out: Array) -> None: ...
def unpack(pool: Pool, matrix: Matrix, out: Array) -> None: ...
def convert(pool: Pool, matrix: Matrix, format: str, out: Array) -> None: ...
def dequantize(matrix: Matrix, expert: int, row: int, out: Array) -> None: ...
def header_write(format: str, experts: int, rows: int, cols: int, source: str = "") -> bytes: ...
def header_read(data: Array | bytes, total_bytes: int | None = None) -> Header: ...
def peak_ops(pool: Pool, isa: str, seconds: float = 0.2, loading: bool = False) -> float: ...
def peak_fma(pool: Pool, seconds: float = 0.2) -> float: ...
def peak_read(pool: Pool, buffer: Array, seconds: float = 0.2) -> float: ...
