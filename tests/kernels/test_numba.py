"""Numba's kernels against float64 products of exactly decoded weights: formats, layouts, routing.

Letters: T tokens, D hidden, E experts, K selected or columns, N rows, F expert width.
"""

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ktlab.errors import FormatError, SettingError
from ktlab.kernels import codings, numba_kernels, numba_pack, numba_workers
from ktlab.kernels.codings import CODINGS
from ktlab.kernels.numba_jit import fingerprint
from ktlab.kernels.weights import GGML_BLOCKS, LAYOUTS, PACKED, Weights, aligned_bytes
from ktlab.quantization import get_format

FORMATS = sorted(numba_kernels.FORMATS)
TOKENS = (1, 2, 3, 7, 16, 33)
FUSED, DECODED = 1 << 30, 0
"""Values of `few` that force one path."""
ERROR = 1e-5
"""Largest error, relative to the sum of magnitudes: that of float32 sums."""

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bank = tuple[Weights, Weights, Weights]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allocated without a value starts as NaN, or as 255 where it is bytes."""
    allocate = np.empty

    def empty(*args, **kwargs):
        array = allocate(*args, **kwargs)
        array.reshape(-1).view(np.uint8)[:] = 255
        return array

    monkeypatch.setattr(np, "empty", empty)


def some_cols(format: str) -> int:
    """An odd row length: whole chunks and a rest, where the format allows."""
    return {256: 768, 128: 640, 32: 352, 1: 301}[codings.block_size(format)]


def random_weights(format: str, experts: int, rows: int, cols: int, seed: int = 0) -> Weights:
    """Every code, every small scale, scales of either sign; values of the size of 1/sqrt(K)."""
    generator = np.random.default_rng(seed)
    shape = (experts, rows, cols)
    unit = 1 / np.sqrt(cols)
    if format in codings.FLOATS:
        blocks = get_format(format).quantize(generator.standard_normal(shape) * unit)
        return Weights.from_blocks(format, shape, blocks)
    coding = CODINGS[format]
    size = codings.row_bytes(format, cols)
    blocks = generator.integers(0, 256, (experts, rows, size), dtype=np.uint8)
    if coding.scales == "row":
        scales = generator.uniform(-unit, unit, (experts, rows, 1)).astype(np.float32) / 127
        blocks[..., :4] = scales.view(np.uint8)
        return Weights.from_blocks(format, shape, blocks)
    parts = blocks.reshape(experts, rows, -1, coding.block_bytes)
    largest = unit / (1 << coding.base_bits + coding.high_bits) / (32 if coding.scale_bytes else 1)
    for at in (coding.d_offset, coding.dmin_offset):
        if at >= 0:
            scale = generator.uniform(-largest, largest, (*parts.shape[:-1], 1))
            parts[..., at : at + 2] = scale.astype(np.float16).view(np.uint8)
    return Weights.from_blocks(format, shape, blocks)


def in_layout(weights: Weights, layout: str) -> Weights:
    return numba_pack.pack(weights) if layout == PACKED else weights


def exact(weights: Weights) -> Doubles:
    """(E, N, K) by the format's own decoder, which is not Numba's."""
    rows = weights.data.reshape(weights.experts, weights.rows, weights.row_bytes)
    return get_format(weights.format).dequantize(rows).astype(np.float64)


def activations(tokens: int, cols: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal((tokens, cols)).astype(np.float32)


def check(found: Floats, expected: Doubles, magnitude: Doubles) -> None:
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.isfinite(found).all()
    worst = (np.abs(found - expected) / magnitude).max(initial=0.0)
    assert worst < ERROR


def silu(x: Doubles) -> Doubles:
    return x / (1 + np.exp(-x))


def moe_judge(
    bank: list[Doubles], hidden: Floats, ids: NDArray[np.int64], weights: Floats
) -> tuple[Doubles, Doubles]:
    """One token and slot at a time: the sum, and the sum of magnitudes."""
    gate, up, down = bank
    found = np.zeros((len(hidden), down.shape[1]))
    magnitude = np.full_like(found, 1e-30)
    for t, row in enumerate(ids):
        for k, e in enumerate(row):
            if e >= 0:
                x = hidden[t].astype(np.float64)
                inner = silu(gate[e] @ x) * (up[e] @ x)
                found[t] += weights[t, k] * (down[e] @ inner)
                magnitude[t] += weights[t, k] * (np.abs(down[e]) @ np.abs(inner))
    return found, magnitude


def make_bank(
    layout: str, formats: tuple[str, ...], experts: int = 5, hidden: int = 256, width: int = 288
) -> tuple[Bank, list[Doubles]]:
    """Gate, up and down in a layout, and their exact values."""
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    blocks = [
        random_weights(format, experts, *shape, seed=i)
        for i, (format, shape) in enumerate(zip(formats, shapes, strict=True))
    ]
    gate, up, down = (in_layout(w, layout) for w in blocks)
    return (gate, up, down), [exact(w) for w in blocks]


# ---- products ----------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS)
def test_linear_at_odd_shapes(format: str, layout: str) -> None:
    cols = some_cols(format)
    for rows in (1, 37, 80):
        blocks = random_weights(format, 2, rows, cols, seed=rows)
        weights, values = in_layout(blocks, layout), exact(blocks)[1]
        for tokens in TOKENS:
            x = activations(tokens, cols)
            expected, magnitude = x @ values.T, np.abs(x) @ np.abs(values).T
            for few in (FUSED, DECODED):
                check(numba_kernels.linear(weights, x, few=few, expert=1), expected, magnitude)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS)
def test_decoding_is_exact(format: str, layout: str) -> None:
    """Bit for bit what the file format means, float16 subnormals and infinities included."""
    cols = some_cols(format)
    generator = np.random.default_rng(7)
    size = codings.row_bytes(format, cols)
    raw = generator.integers(0, 256, (2, 35, size), dtype=np.uint8)
    if format != "f32" and CODINGS.get(format) is not CODINGS["int8_channel"]:
        raw[0, :, :] &= 0x83  # small exponents, so that half floats are subnormal
    blocks = Weights.from_blocks(format, (2, 35, cols), raw)
    with np.errstate(all="ignore"):
        expected = get_format(format).dequantize(raw)
    weights = in_layout(blocks, layout)
    for expert, first, last in ((0, 0, 35), (1, 3, 33), (1, 16, 17)):
        found = numba_pack.dequantize(weights, expert, first, last)
        np.testing.assert_array_equal(found, expected[expert, first:last])


def test_long_rows_and_the_switch() -> None:
    """DeepSeek-V2-Lite's 1408 columns, no multiple of 256, on both sides of the default `few`."""
    blocks = random_weights("q5_0", 1, 50, 1408)
    values = exact(blocks)[0]
    for weights in (blocks, numba_pack.pack(blocks)):
        for tokens in (numba_kernels.FEW, numba_kernels.FEW + 1):
            x = activations(tokens, 1408)
            check(numba_kernels.linear(weights, x), x @ values.T, np.abs(x) @ np.abs(values).T)


ROUTINGS = {
    "one each": lambda generator, tokens: np.argsort(generator.random((tokens, 5)), axis=1)[:, :3],
    "all to one": lambda generator, tokens: np.full((tokens, 1), 3),
    "repeated": lambda generator, tokens: np.full((tokens, 2), 1),
    "nobody": lambda generator, tokens: np.full((tokens, 2), -1),
    "gaps": lambda generator, tokens: generator.integers(-1, 2, (tokens, 4)) * 4,
    "no slots": lambda generator, tokens: np.zeros((tokens, 0), np.int64),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_moe_routing(routing: str, layout: str) -> None:
    bank, values = make_bank(layout, ("q8_0", "q5_0", "q8_0"))
    generator = np.random.default_rng(3)
    for tokens in (0, *TOKENS):
        ids = np.maximum(ROUTINGS[routing](generator, tokens), -1).astype(np.int64)
        weights = generator.random(ids.shape).astype(np.float32)
        hidden = activations(tokens, 256)
        expected, magnitude = moe_judge(values, hidden, ids, weights)
        for few in (numba_kernels.FEW, FUSED, DECODED):
            check(numba_kernels.moe(*bank, hidden, ids, weights, few), expected, magnitude)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS)
def test_moe_formats(format: str, layout: str) -> None:
    """Each format as gate; up and down are others, as in files of mixed formats."""
    bank, values = make_bank(layout, (format, "q6_k", "q4_k"), experts=3, width=256)
    generator = np.random.default_rng(5)
    for tokens in (1, 9):
        ids = np.argsort(generator.random((tokens, 3)), axis=1)[:, :2].astype(np.int64)
        weights = generator.random(ids.shape).astype(np.float32)
        hidden = activations(tokens, 256)
        expected, magnitude = moe_judge(values, hidden, ids, weights)
        check(numba_kernels.moe(*bank, hidden, ids, weights), expected, magnitude)


def test_experts_may_lie_in_both_layouts_and_apart() -> None:
    """Gate packed, up and down in blocks, with room between up's experts."""
    (gate, up, down), values = make_bank(GGML_BLOCKS, ("q4_0", "iq4_nl", "f16"))
    stride = up.matrix_bytes + 100
    data = np.full(up.experts * stride, 255, np.uint8)
    for e in range(up.experts):
        data[e * stride : e * stride + up.matrix_bytes] = up.expert(e)
    apart = Weights(
        format=up.format, layout=up.layout, experts=up.experts, rows=up.rows, cols=up.cols,
        data=data, expert_stride=stride,
    )  # fmt: skip
    data.flags.writeable = False  # as a mapped file
    hidden, ids = activations(4, 256), np.array([[0, 4], [4, 2], [1, 0], [3, 3]])
    weights = np.ones((4, 2), np.float32)
    expected, magnitude = moe_judge(values, hidden, ids, weights)
    found = numba_kernels.moe(numba_pack.pack(gate), apart, down, hidden, ids, weights)
    check(found, expected, magnitude)


# ---- threads -----------------------------------------------------------------------------------
@pytest.fixture
def _shared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even small work is cut and shared."""
    monkeypatch.setattr(numba_kernels, "SERIAL", 0)
    monkeypatch.setattr(numba_kernels, "ROWS_AT_ONCE", 16)


@pytest.mark.usefixtures("_shared_at_once")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bit_identical_for_any_number_of_threads(layout: str) -> None:
    bank, values = make_bank(layout, ("q8_0", "q8_0", "q8_0"))
    hidden, generator = activations(33, 256), np.random.default_rng(2)
    ids = np.argsort(generator.random((33, 5)), axis=1)[:, :3].astype(np.int64)
    weights = generator.random(ids.shape).astype(np.float32)
    first = numba_kernels.moe(*bank, hidden, ids, weights, threads=1)
    check(first, *moe_judge(values, hidden, ids, weights))
    for threads in (1, 2, 3, 4, 4):
        again = numba_kernels.moe(*bank, hidden, ids, weights, threads=threads)
        np.testing.assert_array_equal(again, first)
        y = numba_kernels.linear(bank[0], hidden, threads=threads)
        np.testing.assert_array_equal(y, numba_kernels.linear(bank[0], hidden, threads=1))


@pytest.mark.usefixtures("_shared_at_once")
def test_calls_from_several_threads_at_once() -> None:
    bank, _ = make_bank(PACKED, ("q8_0", "q8_0", "q8_0"))
    calls = []
    for seed in range(6):
        ids = np.random.default_rng(seed).integers(0, 5, (9, 2))
        calls.append((activations(9, 256, seed), ids, np.ones((9, 2), np.float32)))
    alone = [numba_kernels.moe(*bank, *call, threads=2) for call in calls]
    together: list[Floats | None] = [None] * len(calls)

    def run(i: int) -> None:
        together[i] = numba_kernels.moe(*bank, *calls[i], threads=2)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert other is not None
        np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("_shared_at_once")
def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    weights, x = random_weights("q8_0", 1, 200, 64), activations(3, 64)
    expected = numba_kernels.linear(weights, x, threads=2)
    child = os.fork()
    if not child:
        same = np.array_equal(numba_kernels.linear(weights, x, threads=2), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_worker_s_error_reaches_the_caller() -> None:
    def work(pieces: Iterator[int]) -> None:
        for piece in pieces:
            if piece == 5:
                raise ValueError("five")

    with pytest.raises(ValueError, match="five"):
        numba_workers.share(3, range(9), work)


# ---- unusual numbers ---------------------------------------------------------------------------
@pytest.mark.parametrize("few", [FUSED, DECODED])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", ["q8_0", "q4_k", "int8_channel", "bf16"])
def test_nan_and_infinity_spoil_their_own_token_only(format: str, layout: str, few: int) -> None:
    weights = in_layout(random_weights(format, 1, 35, 512), layout)
    clean = activations(7, 512)
    expected = numba_kernels.linear(weights, clean, few)
    spoilt = clean.copy()
    spoilt[1, 500], spoilt[4, 0], spoilt[5, 31] = np.nan, np.inf, -np.inf
    found = numba_kernels.linear(weights, spoilt, few)
    assert np.isnan(found[1]).all()
    assert not np.isfinite(found[4]).any() and not np.isfinite(found[5]).any()
    np.testing.assert_array_equal(found[[0, 2, 3, 6]], expected[[0, 2, 3, 6]])


def test_a_nan_passes_through_an_expert() -> None:
    bank, _ = make_bank(GGML_BLOCKS, ("q8_0", "q8_0", "q8_0"))
    hidden, ids = activations(2, 256), np.array([[0, 1], [1, 2]])
    hidden[0, 3] = np.nan
    found = numba_kernels.moe(*bank, hidden, ids, np.ones((2, 2), np.float32))
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


def test_large_gates_do_not_overflow() -> None:
    """silu(-1000) is 0 and silu(1000) is 1000, though exp(1000) is not finite."""
    shape = (1, 32, 32)
    matrices = [np.eye(32, dtype=np.float32).reshape(shape) * s for s in (1000, 1, 1)]
    gate, up, down = (Weights.from_blocks("f32", shape, m.view(np.uint8)) for m in matrices)
    hidden = np.ones((1, 32), np.float32)
    hidden[0, :16] = -1
    found = numba_kernels.moe(
        gate, up, down, hidden, np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32)
    )
    np.testing.assert_array_equal(found[0], np.repeat([0, 1000], 16).astype(np.float32))


def before_a_wall(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy whose last byte is the last one that may be read."""
    pages = -(-data.size // mmap.PAGESIZE)
    room = np.frombuffer(mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE), np.uint8)
    wall = room.ctypes.data + pages * mmap.PAGESIZE
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(wall), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = room[pages * mmap.PAGESIZE - data.size : pages * mmap.PAGESIZE]
    copy[:] = data
    return copy


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system to forbid a page")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_read_beyond_the_weights(format: str) -> None:
    for layout in LAYOUTS:
        weights = in_layout(random_weights(format, 1, 35, some_cols(format)), layout)
        x = activations(3, weights.cols)
        expected = [numba_kernels.linear(weights, x, few) for few in (FUSED, DECODED)]
        child = os.fork()
        if not child:
            moved = replace(weights, data=before_a_wall(weights.data))
            found = [numba_kernels.linear(moved, x, few) for few in (FUSED, DECODED)]
            os._exit(0 if np.array_equal(found, expected) else 1)
        assert os.waitpid(child, 0)[1] == 0, layout


# ---- layouts and conversions -------------------------------------------------------------------
@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("format", FORMATS)
def test_packing_and_back(format: str, rows: int) -> None:
    blocks = random_weights(format, 3, rows, some_cols(format))
    packed = numba_pack.pack(blocks)
    assert packed.data.ctypes.data % codings.ALIGN == 0
    assert packed.data.size == 3 * codings.packed_bytes(format, rows, blocks.cols)
    np.testing.assert_array_equal(numba_pack.unpack(packed).data, blocks.data)
    for threads in (1, 3):
        out = aligned_bytes(packed.data.size)
        out[:] = threads
        np.testing.assert_array_equal(numba_pack.pack(blocks, out, threads).data, packed.data)
        np.testing.assert_array_equal(out, packed.data)


def test_where_a_packed_code_lies() -> None:
    """Q6_K by the words of packed.h: row 21, column 300 is row 5 of panel 1, column 44 of chunk 1,
    column 12 of group 1; so byte 4 * 5 + 0 of code vector 3."""
    blocks = random_weights("q6_k", 1, 32, 512)
    panel = numba_pack.pack(blocks).data.reshape(2, 2, -1)[1, 1]
    group = panel[64 * (4 + 2) :]
    low = group[64 * 1 + 20] >> 4
    high = group[64 * 4 + 64 * 0 + 20] >> 6 & 3
    d = panel[8 * 384 + 256 :][10:12].view(np.float16)[0]
    scale = panel[8 * 384 :][16 * (44 // 16) + 5].view(np.int8)
    value = np.float32(d) * np.float32(scale) * (int(low | high << 4) - 32)
    assert value == exact(blocks)[0, 21, 300]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", ["bf16", "q4_k", "f32"])
@pytest.mark.parametrize("format", numba_pack.CONVERTIBLE)
def test_conversion_by_its_definition(format: str, source: str, layout: str) -> None:
    blocks = random_weights(source, 2, 21, 256)
    if source == "f32":
        blocks.data.view(np.float32)[256:512] = 0  # a row without a scale
    found = numba_pack.convert(in_layout(blocks, layout), format)
    assert found.format == format and found.layout == GGML_BLOCKS
    values = numba_pack.dequantize(found, 1)
    for row, x in zip(values, exact(blocks)[1].astype(np.float32), strict=True):
        if format == "int8_channel":
            scale = np.abs(x).max() / np.float32(127)
            codes = np.rint(x / scale) if scale else 0 * x
            np.testing.assert_array_equal(row, scale * codes.astype(np.float32))
            continue
        size = int(format.removeprefix("int4_group"))
        for start in range(0, len(x), size):
            part = x[start : start + size]
            m = part[np.abs(part).argmax()]
            d = np.float32(np.float16(m / np.float32(-8)))
            codes = np.clip(np.floor(part / d + np.float32(8.5)), 0, 15) if d else 8 + 0 * part
            np.testing.assert_array_equal(row[start : start + size], d * (codes - 8))


# ---- bad input ---------------------------------------------------------------------------------
def test_bad_input_is_refused_with_what_was_found() -> None:
    (gate, up, down), _ = make_bank(GGML_BLOCKS, ("q8_0", "q8_0", "q8_0"))
    hidden, ids, weights = activations(2, 256), np.zeros((2, 1), np.int64), np.ones((2, 1), "f4")
    for wrong, message in (
        ((gate, up, down, hidden[:, :99], ids, weights), r"\(tokens, 256\), found \(2, 99\)"),
        ((gate, up, down, hidden, ids + 5, weights), "ids from -1 .* to 4, found 5"),
        ((gate, up, down, hidden, ids - 2, weights), "found -2"),
        ((gate, up, down, hidden, ids[:1], weights), r"found \(1, 1\) and \(2, 1\)"),
        ((gate, up, gate, hidden, ids, weights), r"down of \(experts, hidden, width\), found"),
    ):
        with pytest.raises(SettingError, match=message):
            numba_kernels.moe(*wrong)
    with pytest.raises(FormatError, match="expert 5 of 5"):
        numba_kernels.linear(gate, hidden, expert=5)
    with pytest.raises(FormatError, match="expected weights in packed"):
        numba_pack.unpack(gate)
    with pytest.raises(FormatError, match="q4_k is not made at load"):
        numba_pack.convert(gate, "q4_k")
    with pytest.raises(FormatError, match="128 columns, found 288"):
        numba_pack.convert(down, "int4_group128")


def test_weights_that_cannot_be() -> None:
    data = np.zeros(1000, np.uint8)
    shape: dict[str, Any] = dict(experts=2, rows=3, cols=64, data=data, expert_stride=204)
    assert Weights(format="q8_0", layout=GGML_BLOCKS, **shape).nbytes == 408
    for changed, message in (
        (dict(format="q8_O"), 'did you mean "q8_0"'),
        (dict(layout="packt"), 'did you mean "packed"'),
        (dict(cols=65), "multiple of 32 columns, found 65"),
        (dict(rows=-1), "no negative size"),
        (dict(expert_stride=203), "has 204 bytes, but the next expert starts after 203"),
        (dict(experts=9), "need 1836 bytes, found 1000"),
        (dict(data=data[::2]), "contiguous uint8"),
    ):
        with pytest.raises(FormatError, match=message):
            Weights(**(dict(format="q8_0", layout=GGML_BLOCKS) | shape | changed))


WITHOUT_THE_CORE = """
import ktlab_ext
ktlab_ext.native, ktlab_ext.reason = None, "taken away for a test"
import sys, torch, ktlab
model, ids = ktlab.load("tiny"), list(range(40, 72))
assert all("numba" in kernel for kernel in model.settings.kernel.values()), model.settings.kernel
expected = model.forward(ids)
for words in ({"backend": "torch"}, {"layout": "packed", "threads": 1}, {"backend": "numpy"}):
    with model.override(**words):
        torch.testing.assert_close(model.forward(ids), expected, rtol=1e-3, atol=2e-3)
with model.override(top_k=4, quantize="int8_channel"):
    assert model.forward(ids).isfinite().all()
for words in ({"isa": "avx2"}, {"numa": 0}):
    try:
        with model.override(**words):
            raise AssertionError(words)
    except ktlab.errors.SettingError as error:
        assert "taken away for a test" in str(error), error
report = model.pack(cache=sys.argv[1])
assert not report.left, report
again = ktlab.load("tiny")
assert {t.how for t in again.pack(cache=sys.argv[1]).tensors} == {"mapped from the cache"}
torch.testing.assert_close(again.forward(ids), expected, rtol=1e-3, atol=2e-3)
assert "taken away for a test" in str(ktlab.doctor())
text = ktlab.domain_texts()["english"][:2000]
found = ktlab.compare(again, text, a=dict(), b=dict(top_k=4), max_tokens=256, speed=False)
print(found)
"""


@pytest.mark.slow
def test_everything_works_without_the_core(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_CORE, str(tmp_path)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0 and "KL" in done.stdout, done.stdout + done.stderr


def test_changed_sources_are_compiled_anew() -> None:
    assert fingerprint([b"a", b"b"]) == fingerprint([b"a", b"b"])
    assert len({fingerprint(t) for t in ([b"a", b"b"], [b"a", b"c"], [b"ab"], [b"b", b"a"])}) == 4
