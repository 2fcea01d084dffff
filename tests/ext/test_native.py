"""The skin: what it refuses and how it says so; what it accepts; what a call costs."""

import inspect
import re
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import ktlab_ext

EXPERTS, ROWS, COLS, TOKENS, TOP_K = 3, 48, 64, 5, 2


class Case:
    """Valid arguments of linear and moe, float32, each replaceable."""

    def __init__(self, native: ModuleType) -> None:
        rng = np.random.default_rng(7)
        self.native, self.pool = native, native.Pool(2)
        self.gate_EFD = rng.standard_normal((EXPERTS, ROWS, COLS)).astype(np.float32)
        self.down_EDF = rng.standard_normal((EXPERTS, COLS, ROWS)).astype(np.float32)
        self.x_TD = rng.standard_normal((TOKENS, COLS)).astype(np.float32)
        self.ids_TK = rng.integers(-1, EXPERTS, (TOKENS, TOP_K))
        self.weights_TK = rng.random((TOKENS, TOP_K)).astype(np.float32)
        self.gate, self.down = self.matrix(self.gate_EFD), self.matrix(self.down_EDF)

    def matrix(self, values_ENK: np.ndarray) -> Any:
        return self.native.Matrix(
            values_ENK.view(np.uint8).reshape(-1), "f32", "ggml_blocks", *values_ENK.shape
        )

    def linear(self, **changed: Any) -> np.ndarray:
        given = dict(
            pool=self.pool, isa="serial", few=4, matrix=self.gate, expert=1, x=self.x_TD,
            y=np.full((TOKENS, ROWS), np.nan, np.float32),
        ) | changed  # fmt: skip
        self.native.linear(**given)
        return given["y"]

    def moe(self, **changed: Any) -> np.ndarray:
        given = dict(
            pool=self.pool, isa="serial", few=4, gate=self.gate, up=self.gate, down=self.down,
            x=self.x_TD, ids=self.ids_TK, weights=self.weights_TK,
            y=np.full((TOKENS, COLS), np.nan, np.float32),
        ) | changed  # fmt: skip
        self.native.moe(**given)
        return given["y"]


@pytest.fixture
def case(native: ModuleType) -> Case:
    return Case(native)


def unaligned(array: np.ndarray) -> np.ndarray:
    """The same values one byte off."""
    room = np.empty(array.nbytes + array.itemsize, np.uint8)
    start = (-room.ctypes.data) % array.itemsize + 1
    raw = (
        room[start : start + array.nbytes] if start < array.itemsize else room[1 : 1 + array.nbytes]
    )
    copy = raw.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


# ---- names ---------------------------------------------------------------------------------------


def test_names(native: ModuleType) -> None:
    known = native.isas()
    assert list(known)[:3] == ["serial", "avx2", "avx512_vnni"]
    assert known["serial"] == known["amx_int8_emulated"] == known["amx_bf16_emulated"] == ""
    for isa, reason in known.items():
        assert reason == "" or re.search(r"cpuid|operating system", reason), (isa, reason)
    assert native.computes("serial", "q4_k") and not native.computes("amx_int8", "f32")
    assert native.row_bytes("q8_0", 64) == 2 * 34
    assert native.packed_bytes("q4_k", 17, 256) % 64 == 0


def test_reasons_agree_with_the_kernel(native: ModuleType) -> None:
    """What cpuid says of the sets without a grant of their own, /proc/cpuinfo says too."""
    flags = set(re.findall(r"\S+", Path("/proc/cpuinfo").read_text().split("flags", 1)[1]))
    usable = {isa for isa, reason in native.isas().items() if not reason}
    assert ("avx2" in usable) == ({"avx2", "fma", "f16c"} <= flags)
    assert ("avx512_vnni" in usable) == ({"avx512_vnni", "avx512bw", "avx512vl"} <= flags)
    assert not {"amx_int8", "amx_bf16"} & usable or "amx_tile" in flags


def test_the_stub_tells_the_truth(native: ModuleType) -> None:
    """_native.pyi, which mypy believes, has the module's names and its parameters."""
    text = (Path(ktlab_ext.__file__).parent / "_native.pyi").read_text()
    defined = {
        name: re.findall(r"(\w+): ", arguments)
        for name, arguments in re.findall(r"^def (\w+)\((.*?)\) ->", text, re.M | re.S)
    }
    functions = {
        name: list(inspect.signature(value).parameters)
        for name, value in vars(native).items()
        if inspect.isroutine(value)
        and value.__module__ == native.__name__
        and not name.startswith("_")
    }
    assert defined == functions


# ---- what is refused -----------------------------------------------------------------------------

F64 = np.zeros((TOKENS, COLS))
WRONG_LINEAR: dict[str, tuple[dict[str, Any], str]] = {
    "unknown isa": (dict(isa="sse"), "unknown instruction set 'sse'; known: serial"),
    "expert": (dict(expert=EXPERTS), "expert: expected 0 to 2, found 3"),
    "x a list": (dict(x=[1.0]), "x: expected 2 dimensions of float32.*found list"),
    "x 1-D": (dict(x=np.zeros(COLS, np.float32)), "x: expected 2 dimensions.*found 1"),
    "x float64": (dict(x=F64), "x: expected 2 dimensions of float32.*'d'"),
    "x big-endian": (dict(x=F64.astype(">f4")), "x: expected 2 dimensions of float32"),
    "x too narrow": (dict(x=F64[:, 1:].astype(np.float32)), "x: expected 64 columns, found 63"),
    "x columns apart": (dict(x=np.zeros((5, 128), np.float32)[:, ::2]), "x: expected contiguous"),
    "x upside down": (dict(x=F64.astype(np.float32)[::-1]), "x: expected rows that follow"),
    "x unaligned": (dict(x=unaligned(F64.astype(np.float32))), "x: expected data aligned"),
    "y shape": (dict(y=np.zeros((5, 47), np.float32)), r"y: expected shape \(5, 48\), found"),
    "y uint16": (dict(y=np.zeros((5, 48), np.uint16)), "y: expected 2 dimensions of float32"),
    "y read-only": (
        dict(y=np.broadcast_to(np.float32(0), (5, 48))),
        "y: expected a writable array",
    ),
}
WRONG_MOE: dict[str, tuple[dict[str, Any], str]] = {
    "id too large": (dict(ids=np.array([[0, 1], [3, 0]] + [[0, 0]] * 3)), r"ids\[1, 0\].*found 3"),
    "id too small": (dict(ids=np.array([[0, -2]] + [[0, 0]] * 4)), r"ids\[0, 1\].*found -2"),
    "ids int32": (dict(ids=np.zeros((5, 2), np.int32)), "ids: expected 2 dimensions of int64"),
    "ids transposed": (dict(ids=np.zeros((2, 5), np.int64).T), "ids: expected a C-contiguous"),
    "weights shape": (dict(weights=np.zeros((5, 3), np.float32)), r"ids and weights.*\(5, 3\)"),
}


@pytest.mark.parametrize("wrong", WRONG_LINEAR)
def test_linear_refuses(case: Case, wrong: str) -> None:
    changed, message = WRONG_LINEAR[wrong]
    y_TN = changed.get("y", np.full((TOKENS, ROWS), 7, np.float32))
    before = y_TN.copy()
    with pytest.raises((ValueError, TypeError), match=message):
        case.linear(**({"y": y_TN} | changed))
    assert np.array_equal(y_TN, before)


@pytest.mark.parametrize("wrong", WRONG_MOE)
def test_moe_refuses(case: Case, wrong: str) -> None:
    changed, message = WRONG_MOE[wrong]
    y_TD = np.full((TOKENS, COLS), 7, np.float32)
    with pytest.raises((ValueError, TypeError), match=message):
        case.moe(y=y_TD, **changed)
    assert (y_TD == 7).all()


def test_shared_memory_is_refused(case: Case) -> None:
    room = np.zeros((TOKENS, ROWS + COLS), np.float32)
    room[:, ROWS:] = case.x_TD
    with pytest.raises(ValueError, match="share memory"):
        case.linear(x=room[:, :COLS], y=room[:, :ROWS])
    beside = case.linear(x=room[:, ROWS:], y=room[:, :ROWS])
    assert np.array_equal(beside, case.linear())


def aligned(nbytes: int) -> np.ndarray:
    room = np.zeros(nbytes + 64, np.uint8)
    return room[(-room.ctypes.data) % 64 :][:nbytes]


RAW = aligned(64 * 64 * 4)
WRONG_MATRIX = [
    ((RAW, "f31", "packed", 1, 64, 64), "unknown format 'f31'; known: f32, "),
    ((RAW, "f32", "tiles", 1, 64, 64), "unknown layout 'tiles'; known: ggml_blocks, packed"),
    ((RAW, "f32", "packed", 0, 64, 64), "expected at least 1 expert"),
    ((RAW, "f32", "packed", 2, 64, 64), "does not fit into the buffer's 16384 bytes"),
    ((RAW, "q4_k", "ggml_blocks", 1, 1, 100), "q4_k has no form for 100 columns"),
    ((RAW, "f32", "ggml_blocks", 2**40, 2**40, 32), "does not fit|no form"),
    ((RAW[32:], "f32", "packed", 1, 32, 64), "multiple of 64 bytes.*found 32"),
    ((RAW[::2], "f32", "ggml_blocks", 1, 1, 64), "C-contiguous"),
    ((RAW.reshape(64, -1), "f32", "ggml_blocks", 1, 64, 64), "expected 1 dimension of uint8"),
    ((RAW.view(np.float32), "f32", "ggml_blocks", 1, 64, 64), "1 dimension of uint8.*'f'"),
    ((RAW, "f32", "ggml_blocks", 2, 32, 64, 100), "expert_stride=100 does not fit"),
]


@pytest.mark.parametrize("arguments, message", WRONG_MATRIX)
def test_matrices_refused(native: ModuleType, arguments: tuple, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        native.Matrix(*arguments)


def test_pools_refused(native: ModuleType) -> None:
    for wrong in (dict(threads=0), dict(threads=10**6), dict(threads=2, cpus=[10**6])):
        with pytest.raises(ValueError, match="expected 1 to 1024 threads and cpu numbers that"):
            native.Pool(**wrong)


def test_a_set_without_the_format(case: Case) -> None:
    with pytest.raises(ValueError, match="has no kernel for f32; usable: serial"):
        case.linear(isa="amx_int8_emulated")
    with pytest.raises(ValueError, match="has no kernel for f32; usable: serial"):
        case.moe(isa="amx_int8_emulated")


def test_changes_refused(native: ModuleType, case: Case) -> None:
    needed = EXPERTS * native.packed_bytes("f32", ROWS, COLS)
    packed = aligned(needed)
    with pytest.raises(ValueError, match=f"out: expected {needed} bytes, found {needed - 64}"):
        native.pack(case.pool, case.gate, packed[:-64])
    with pytest.raises(ValueError, match="multiple of 64 bytes, found it 1 bytes past"):
        native.pack(case.pool, case.gate, aligned(needed + 1)[1:])
    native.pack(case.pool, case.gate, packed)
    matrix = native.Matrix(packed, "f32", "packed", EXPERTS, ROWS, COLS)
    with pytest.raises(ValueError, match="pack: expected ggml_blocks, found Matrix"):
        native.pack(case.pool, matrix, packed)
    with pytest.raises(ValueError, match="unpack: expected packed, found Matrix"):
        native.unpack(case.pool, case.gate, np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="convert to q8_0: this operation does not exist"):
        out = np.zeros(EXPERTS * ROWS * native.row_bytes("q8_0", COLS), np.uint8)
        native.convert(case.pool, case.gate, "q8_0", out)


# ---- what is accepted ----------------------------------------------------------------------------


def test_linear_and_moe_are_what_they_say(case: Case) -> None:
    judge_TN = case.x_TD.astype(float) @ case.gate_EFD[1].astype(float).T
    np.testing.assert_allclose(case.linear(), judge_TN, rtol=1e-4, atol=1e-4)
    judge_TD = np.zeros((TOKENS, COLS))
    for t, k in np.ndindex(TOKENS, TOP_K):
        expert = case.ids_TK[t, k]
        if expert >= 0:
            gate_F = case.gate_EFD[expert].astype(float) @ case.x_TD[t]
            hidden_F = gate_F / (1 + np.exp(-gate_F)) * gate_F
            judge_TD[t] += case.weights_TK[t, k] * (case.down_EDF[expert] @ hidden_F)
    np.testing.assert_allclose(case.moe(), judge_TD, rtol=1e-3, atol=1e-2)


def test_bfloat16_is_read_as_its_value(case: Case) -> None:
    bits_TD = (case.x_TD.view(np.uint32) >> 16).astype(np.uint16)
    rounded_TD = (bits_TD.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(case.linear(x=bits_TD), case.linear(x=rounded_TD))


def test_zero_tokens(case: Case) -> None:
    assert case.linear(x=case.x_TD[:0], y=np.zeros((0, ROWS), np.float32)).shape == (0, ROWS)
    nobody = np.zeros((0, TOP_K))
    case.moe(
        x=case.x_TD[:0],
        ids=nobody.astype(np.int64),
        weights=nobody.astype(np.float32),
        y=np.zeros((0, COLS), np.float32),
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_activations_stay_in_their_row(case: Case, bad: float) -> None:
    x_TD = case.x_TD.copy()
    x_TD[2, 5] = bad
    y_TN, clean_TN = case.linear(x=x_TD), case.linear()
    assert not np.isfinite(y_TN[2]).all()
    others = [0, 1, 3, 4]
    assert np.array_equal(y_TN[others], clean_TN[others])


def test_a_matrix_keeps_its_read_only_buffer(native: ModuleType, tmp_path: Path) -> None:
    values_NK = np.arange(8 * 32, dtype=np.float32).reshape(8, 32)
    values_NK.tofile(tmp_path / "weights")
    mapped = np.memmap(tmp_path / "weights", np.uint8, mode="r")
    matrix = native.Matrix(mapped, "f32", "ggml_blocks", 1, 8, 32)
    assert matrix.buffer is mapped
    del mapped
    out_NK = np.zeros((3, 32), np.float32)
    native.dequantize(matrix, 0, 4, out_NK)
    assert np.array_equal(out_NK, values_NK[4:7])
    with pytest.raises(ValueError, match="rows: expected a part of 0 to 8, found 6 to 9"):
        native.dequantize(matrix, 0, 6, out_NK)
    assert repr(matrix) == "Matrix(f32, ggml_blocks, 1 x 8 x 32)"


# ---- packed headers ------------------------------------------------------------------------------


def test_headers(native: ModuleType) -> None:
    total = native.HEADER_BYTES + 4 * native.packed_bytes("q6_k", 33, 512)
    raw = native.header_write("q6_k", 4, 33, 512, "ab12")
    assert len(raw) == native.HEADER_BYTES and raw[:8] == b"KTLPACK\0"
    assert native.header_read(raw, total) == ("q6_k", 4, 33, 512, "ab12")
    whole = np.zeros(total, np.uint8)
    whole[: len(raw)] = np.frombuffer(raw, np.uint8)
    assert native.header_read(whole).experts == 4
    for changed, size, message in (
        (raw[:100], None, "expected 192 bytes, found 100"),
        (raw, total + 1, "bytes of data for the shape"),
        (b"GGUF" + raw[4:], total, "expected the magic KTLPACK"),
        (raw[:8] + b"\2" + raw[9:], total, "expected version 1, found 2; pack again"),
        (raw[:40] + b"\1" + raw[41:], total, "expected checksum"),
    ):
        with pytest.raises(ValueError, match=message):
            native.header_read(changed, size)
    for wrong in (("q6_k", 4, 33, 100), ("q6_j", 4, 33, 512), ("f32", 1, 2**62, 2**62)):
        with pytest.raises(ValueError, match="expected a known format and a shape that it has"):
            native.header_write(*wrong)
    with pytest.raises(ValueError, match="source: expected at most 63 bytes"):
        native.header_write("q6_k", 4, 33, 512, "a" * 64)


# ---- what it costs -------------------------------------------------------------------------------


def test_a_call_is_cheap(case: Case) -> None:
    """Checks and conversions, measured where the C core has nothing to do: zero tokens."""
    x_TD, y_TD = case.x_TD[:0], np.zeros((0, COLS), np.float32)
    ids_TK, weights_TK = case.ids_TK[:0], case.weights_TK[:0]
    calls, best_s = 2000, np.inf
    for _ in range(7):
        begin = time.perf_counter()
        for _ in range(calls):
            case.native.moe(
                case.pool,
                "serial",
                4,
                case.gate,
                case.gate,
                case.down,
                x_TD,
                ids_TK,
                weights_TK,
                y_TD,
            )
        best_s = min(best_s, (time.perf_counter() - begin) / calls)
    print(f"a call of moe costs {best_s * 1e6:.2f} us beside the kernel")
    # Measured 1.0 us; five times that would be felt in a decode step of dozens of calls.
    assert best_s < 5e-6


def test_ceilings_are_plausible(native: ModuleType) -> None:
    pool = native.Pool(1)
    fma = native.peak_fma(pool, 0.05)
    assert 1e8 < fma < 1e13
    for isa, reason in native.isas().items():
        if reason:
            with pytest.raises(ValueError, match=f"{isa} cannot be used"):
                native.peak_ops(pool, isa, 0.05)
        elif "emulated" in isa:
            assert native.peak_ops(pool, isa, 0.05) == 0.0
        else:
            peak = native.peak_ops(pool, isa, 0.05)
            assert 1e7 < peak < 1e14
            loading = native.peak_ops(pool, isa, 0.05, True)
            assert 1e7 < loading < 1e14 if "amx" in isa else loading == 0.0
    assert 1e7 < native.peak_read(pool, np.ones(1 << 24, np.uint8), 0.05) < 1e13
    with pytest.raises(ValueError, match="at least 1 MiB, found 100"):
        native.peak_read(pool, np.ones(100, np.uint8))
