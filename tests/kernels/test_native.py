"""Every native kernel against the float64 product of the dequantized weights.

Outputs are poisoned before each run. E experts, N rows, K columns, T tokens, D hidden, F width.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import cycle, product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ktlab.kernels import native, packing, reference, switch
from ktlab.kernels.request import EMULATED, NATIVE_ISAS, PACKED
from ktlab.kernels.weights import Weights
from ktlab.quantization import QTensor, fallback_format, get_format

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())

FORMATS = native.formats()
IN_PAIRS = " in pairs"
"""Some instruction sets have two ways of scaling, of which one is used; both run here."""
ISAS = [isa for isa in NATIVE_ISAS if not native.isas().get(isa, "not built")]
TWO_WAYS = [isa for isa in ISAS if isa in switch.PAIRS]
ISAS += [isa + IN_PAIRS for isa in TWO_WAYS]
SOME = ("q8_0", "q4_k", "q6_k", "int8_channel", "bf16", "f32")
SHAPES = [(48, 256), (33, 512), (17, 288), (5, 1408), (7, 33), (1, 1)]
TOKENS = (1, 2, 3, 7, 16, 33, 256)
SLOW_ISAS = ("serial", *EMULATED)
"""Slow ones compute at most 96 tokens of a layer."""
BOUND = {"f32": 1e-5, "f16": 1e-3, "bf16": 1e-2}
"""Relative error allowed; 8-bit activations may lose 1 % everywhere else."""
LONG = ("int8_channel", "int4_group128")
MOE_BOUND = BOUND | dict.fromkeys(LONG, 0.025)
"""Of a whole expert: two products, SwiGLU and a third. Long groups of columns lose more."""
MANY = 10**6


def skin(isa: str = "") -> Any:
    import ktlab_ext

    assert ktlab_ext.native is not None
    if isa:
        ktlab_ext.native.set_pairs(isa.endswith(IN_PAIRS))
    return ktlab_ext.native


@pytest.fixture(autouse=True)
def the_makers_way() -> Iterator[None]:
    yield
    skin().set_pairs(None)


def plain(isa: str) -> str:
    return isa.removesuffix(IN_PAIRS)


def computes(isa: str, *formats: str) -> bool:
    return all(native.computes(plain(isa), format) for format in formats)


PAIRS = [(isa, format) for isa in ISAS for format in FORMATS if computes(isa, format)]


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_every_instruction_set_is_tested_or_said_to_be_left_out(isa: str) -> None:
    if reason := native.isas()[isa]:
        pytest.skip(f"{isa}: {reason}; none of its kernels is tested here")
    assert any(format for tested, format in PAIRS if plain(tested) == isa)


def make(format: str, *shape: int, seed: int = 0) -> QTensor:
    """Random weights; formats that cannot be encoded here are made of random blocks."""
    generator = np.random.default_rng(seed)
    known = get_format(format)
    if known.can_quantize:
        values = generator.standard_normal(shape, dtype=np.float32) / np.sqrt(shape[-1])
        return QTensor.from_array("w", values, known)
    blocks = generator.integers(0, 256, (*shape[:-1], known.row_bytes(shape[-1])), dtype=np.uint8)
    scales = np.float16(generator.uniform(0.5, 1, (*shape[:-1], 1)) / 2000).view(np.uint8)
    for start in range(0, blocks.shape[-1], known.block_bytes):
        blocks[..., start : start + 2] = scales
    return QTensor(name="w", format=known, shape=shape, blocks=blocks)


def laid_out(tensor: QTensor, layout: str) -> Weights:
    weights = packing.blocks(tensor)
    return packing.pack(weights) if layout == PACKED else weights


def linear(
    weights: Weights, isa: str, x: NDArray[np.float32], *, few: int = 4, threads: int = 1
) -> NDArray[np.float32]:
    y = np.full((len(x), weights.rows), np.nan, np.float32)
    skin(isa).linear(native.pool(threads), plain(isa), few, native.matrix(weights), 0, x, y)
    return y


def moe(
    bank: list[Weights], isa: str, call: tuple, *, few: int = 4, threads: int = 1
) -> NDArray[np.float32]:
    y = np.full((len(call[0]), bank[2].rows), np.nan, np.float32)
    skin(isa).moe(native.pool(threads), plain(isa), few, *map(native.matrix, bank), *call, y)
    return y


def rms(values: NDArray) -> float:
    return float(np.sqrt(np.square(values).mean()))


def relative(found: NDArray, expected: NDArray, scale: float = 0.0) -> float:
    """Error over the size of what is expected, or over `scale` where a few values are small by
    chance; the largest value found where nothing but zeros is expected."""
    size = max(scale, rms(expected))
    return rms(found - expected) / size if size else float(np.abs(found).max())


def activations(tokens: int, cols: int, seed: int = 1) -> NDArray[np.float32]:
    x = np.random.default_rng(seed).standard_normal((tokens, cols), dtype=np.float32)
    return x * np.float32(1 + seed % 3)


@lru_cache(maxsize=256)
def linear_case(format: str, rows: int, cols: int):
    """{layout: weights}, activations and their exact products."""
    tensor, x = make(format, rows, cols), activations(max(TOKENS), cols)
    weights = {layout: laid_out(tensor, layout) for layout in ("ggml_blocks", "packed")}
    return weights, x, x.astype(np.float64) @ tensor.dequantize().astype(np.float64).T


@pytest.mark.parametrize(("isa", "format"), PAIRS)
def test_linear(isa: str, format: str) -> None:
    threads = cycle((1, 2, 3, 4))
    for rows, cols in SHAPES:
        if cols % get_format(format).block_size:
            continue
        weights, x, expected = linear_case(format, rows, cols)
        for layout, tokens in product(weights, TOKENS):
            for few in (0, MANY) if tokens in (2, 16) else (4,):
                found = linear(weights[layout], isa, x[:tokens], few=few, threads=next(threads))
                error = relative(found, expected[:tokens], rms(expected))
                assert error < BOUND.get(format, 0.01), (rows, cols, layout, tokens, few, error)


def routings(tokens: int, experts: int) -> dict[str, NDArray[np.int64]]:
    """(T, 3) ids in every skew."""
    generator = np.random.default_rng(tokens)
    spread = generator.random((tokens, experts)).argsort(axis=1)[:, :3].astype(np.int64)
    some = np.where(generator.random(spread.shape) < 0.3, -1, spread)
    return {
        "spread": spread,
        "some to nobody": some,
        "all to one": np.full((tokens, 3), 2, np.int64),
        "first half of the experts": spread % (experts // 2),  # ids repeat, experts have none
        "nobody": np.full((tokens, 3), -1, np.int64),
    }


def bank_of(gate: str, up: str = "", down: str = "", experts: int = 6) -> list[QTensor]:
    """gate, up (E, F, D) and down (E, D, F), with odd sizes where the formats have them."""
    formats = (gate, up or gate, down or gate)
    blocks = [get_format(format).block_size for format in formats]
    hidden, width = {256: (256, 256), 128: (256, 128)}.get(max(blocks), (288, 96))
    if max(blocks) == 1:
        hidden, width = 100, 33
    shapes = ((experts, width, hidden), (experts, width, hidden), (experts, hidden, width))
    return [make(f, *s, seed=i) for f, s, i in zip(formats, shapes, range(3), strict=True)]


@lru_cache(maxsize=64)
def moe_case(formats: tuple[str, str, str], tokens: int = max(TOKENS)):
    """{layout: bank}, activations (T, D) and every expert's exact output (E, T, D)."""
    tensors = bank_of(*formats)
    x_TD = activations(tokens, tensors[0].shape[-1])
    gate, up, down = (tensor.dequantize().astype(np.float64) for tensor in tensors)
    x = x_TD.astype(np.float64)
    matrices = zip(gate, up, down, strict=True)
    exact_ETD = [(reference.silu(x @ g.T) * (x @ u.T)) @ d.T for g, u, d in matrices]
    banks = {layout: [laid_out(t, layout) for t in tensors] for layout in ("ggml_blocks", "packed")}
    return banks, x_TD, np.stack(exact_ETD)


def weighted(exact_ETD: NDArray, ids: NDArray, weights: NDArray) -> NDArray:
    """What `moe` should give, from every expert's output."""
    tokens = np.arange(len(ids))[:, None]
    chosen_TKD = exact_ETD[ids, tokens] * (ids >= 0)[..., None]
    return (chosen_TKD * weights[..., None]).sum(1)


def moe_bound(isa: str, *formats: str) -> float:
    """Of all cases; one by itself is of few numbers and may lose a fifth more. AMX has one integer
    sum for 32 columns, so no scale for every 16 of `down`'s."""
    whole = 0.015 if isa.startswith("amx_int8") else 0.01
    return max(MOE_BOUND.get(format, whole) for format in formats)


@pytest.mark.parametrize(("isa", "format"), PAIRS)
def test_moe(isa: str, format: str) -> None:
    banks, x, exact_ETD = moe_case((format, format, format))
    weights = np.random.default_rng(7).random((len(x), 3), dtype=np.float32)
    threads = cycle((1, 2, 3, 4))
    scale = {n: rms(weighted(exact_ETD, i, weights)) for n, i in routings(len(x), 6).items()}
    errors = []
    for tokens in (*TOKENS[:-1], 96 if isa in SLOW_ISAS else TOKENS[-1]):
        for (name, ids), layout in product(routings(tokens, 6).items(), banks):
            if tokens > 33 and name in ("some to nobody", "nobody"):
                continue
            call = (x[:tokens], ids, weights[:tokens])
            found = moe(banks[layout], isa, call, threads=next(threads))
            error = relative(found, weighted(exact_ETD, ids, weights[:tokens]), scale[name])
            assert error <= 1.2 * moe_bound(isa, format), (tokens, name, layout, error)
            errors.append(error)
    assert rms(np.array(errors)) <= moe_bound(isa, format)


MIXES = [("q4_k", "q4_k", "q6_k"), ("q8_0", "bf16", "q5_0"), ("int8_channel", "q3_k", "f32")]


@pytest.mark.parametrize(
    ("isa", "formats"),
    [(isa, mix) for isa in ISAS for mix in MIXES if computes(isa, *mix)],
)
def test_gate_up_and_down_may_differ_in_format_and_layout(isa: str, formats) -> None:
    banks, x, exact_ETD = moe_case(formats, tokens=40)
    blocks, packed = banks["ggml_blocks"], banks["packed"]
    for tokens in (1, 9, 40):
        ids, weights = routings(tokens, 6)["spread"], np.ones((tokens, 3), np.float32)
        found = moe([blocks[0], *packed[1:]], isa, (x[:tokens], ids, weights), threads=2)
        error = relative(found, weighted(exact_ETD, ids, weights))
        assert error < 1.2 * moe_bound(isa, *formats)


INT8 = [isa for isa in ISAS if isa != "serial" and "_bf16" not in isa]


@pytest.mark.parametrize("isa", INT8)
@pytest.mark.parametrize("tokens", [1, 40])
def test_q8_0_keeps_16_bits_unless_gate_and_up_have_lost_them(isa: str, tokens: int) -> None:
    ids, weights = routings(tokens, 6)["spread"], np.ones((tokens, 3), np.float32)
    errors = []
    for formats in (("q8_0", "q8_0", "q8_0"), ("q4_k", "q4_k", "q8_0")):
        banks, x, exact_ETD = moe_case(formats, tokens=40)
        found = moe(banks["packed"], isa, (x[:tokens], ids, weights), few=8, threads=2)
        errors.append(relative(found, weighted(exact_ETD, ids, weights)))
    words = tokens > 8 and plain(isa) in switch.WORDS  # 12 bits of the largest of 256 columns
    assert errors[0] < (2e-3 if words else 3e-4) and 3e-3 < errors[1] < 0.02, errors


@pytest.mark.parametrize(
    ("isa", "format"),
    [(isa, format) for isa, formats in switch.WORDS.items() if isa in ISAS for format in formats],
)
def test_words_lose_a_tenth_of_what_eight_bits_lose(isa: str, format: str) -> None:
    """Also with an activation in each 256 that is 30 times the others."""
    weights, x, expected = linear_case(format, 33, 512)
    few = relative(linear(weights["packed"], isa, x[:40], few=MANY), expected[:40])
    for layout in weights:
        assert relative(linear(weights[layout], isa, x[:40], few=0), expected[:40]) < 1e-3
    if format != "q8_0":  # which has two terms there
        assert few > 3e-3
    outlier = x[:40].copy()
    outlier[:, 7::256] *= 30
    exact = outlier.astype(np.float64) @ make(format, 33, 512).dequantize().astype(np.float64).T
    assert relative(linear(weights["packed"], isa, outlier, few=0), exact) < 3e-3


@pytest.mark.parametrize(("isa", "format"), [p for p in PAIRS if p[1] in SOME])
def test_bits_do_not_depend_on_the_run_the_threads_or_the_neighbours(isa, format) -> None:
    tensor = make(format, 80, 512)
    for layout in ("ggml_blocks", "packed"):
        weights = laid_out(tensor, layout)
        for few in (0, MANY):
            # Under amx_* few tokens go to avx512, which itself changes path after five.
            x = activations(5 if few and isa.startswith(("amx", "avx512_bf16")) else 40, 512)
            first = linear(weights, isa, x, few=few)
            for threads in (1, 2, 3, 4, 16):
                assert np.array_equal(linear(weights, isa, x, few=few, threads=threads), first)
            alone = np.concatenate([linear(weights, isa, row[None], few=few) for row in x])
            assert np.array_equal(alone, first), (layout, few)


@pytest.mark.parametrize(("isa", "format"), PAIRS)
def test_a_row_has_the_same_bits_in_a_whole_panel_and_in_the_last_rows(isa, format) -> None:
    cols = 1408 if get_format(format).block_size <= 32 else 512
    panel = make(format, 16, cols)
    twice = np.concatenate([panel.blocks, panel.blocks[:5]])
    tensor = QTensor(name="w", format=panel.format, shape=(21, cols), blocks=twice)
    x = activations(9, cols)
    for layout in ("ggml_blocks", "packed"):
        found = linear(laid_out(tensor, layout), isa, x, few=0)
        assert np.array_equal(found[:, 16:], found[:, :5]), layout


@pytest.mark.parametrize("isa", [isa for isa, format in PAIRS if format == "q8_0"])
def test_moe_has_the_same_bits_at_every_thread_count(isa: str) -> None:
    bank = [laid_out(tensor, "packed") for tensor in bank_of("q8_0")]
    call = (activations(50, 288), routings(50, 6)["first half of the experts"],
            np.random.default_rng(0).random((50, 3), dtype=np.float32))  # fmt: skip
    first = moe(bank, isa, call)
    for threads in (1, 2, 3, 4, 16):
        assert np.array_equal(moe(bank, isa, call, threads=threads), first)


@pytest.mark.parametrize(("isa", "format"), [p for p in PAIRS if p[1] in SOME])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_row(isa: str, format: str, bad: float) -> None:
    weights = laid_out(make(format, 33, 256), "packed")
    for tokens in (3, 40):
        clean = activations(tokens, 256)
        dirty = clean.copy()
        dirty[1, 5] = bad
        for few in (0, MANY):
            found = linear(weights, isa, dirty, few=few)
            assert not np.isfinite(found[1]).any()
            others = np.arange(tokens) != 1
            expected = linear(weights, isa, clean, few=few)[others]
            assert np.array_equal(found[others], expected)


SHORT = [f for f in FORMATS if f not in BOUND and f not in LONG]


@pytest.mark.parametrize(("isa", "format"), list(product(TWO_WAYS, SHORT)))
def test_sums_in_pairs_are_those_of_single_ones(isa: str, format: str) -> None:
    """Also the largest that there can be: all codes at one end, all activations at theirs."""
    cols = max(get_format(format).block_size, 96)
    usual, ends = make(format, 33, cols), []
    for byte in (0x00, 0xFF):
        blocks = np.full_like(usual.blocks, byte)
        size = get_format(format).block_bytes
        for start in range(0, blocks.shape[-1], size):  # scales and minima that are numbers
            known = usual.blocks[..., start : start + size]
            where = scale_bytes(format)
            blocks[..., start : start + size][..., where] = known[..., where]
        ends.append(QTensor(name="w", format=usual.format, shape=usual.shape, blocks=blocks))
    one, errors = np.ones((20, cols), np.float32), []
    for tensor, x in product((usual, *ends), (activations(20, cols), one, -one)):
        weights = laid_out(tensor, "packed")
        single, pairs = (linear(weights, isa + how, x, few=0) for how in ("", IN_PAIRS))
        size = np.sqrt(np.square(x) @ np.square(tensor.dequantize()).T)  # of a sum of chance signs
        errors.append(relative(pairs, single, rms(size)))
    assert max(errors) < (1.5e-3 if format == "q2_k" else 8e-4), errors  # of its minima, 12 bits


@pytest.mark.parametrize("isa", TWO_WAYS)
@pytest.mark.parametrize(
    "formats",
    [
        *((format,) * 3 for format in ("q8_0", "q4_k", "iq4_nl", "int8_channel", "bf16")),
        *((gate, "q8_0", down) for gate in ("q8_0", "q4_k") for down in ("q8_0", "q5_0")),
        ("q8_0", "q8_0", "int8_channel"),
        ("bf16", "bf16", "q8_0"),
    ],
)
def test_sums_are_in_pairs_where_the_reason_says_so(isa: str, formats: tuple[str, ...]) -> None:
    banks, x, _ = moe_case(formats, tokens=40)
    call = (x[:40], routings(40, 6)["spread"], np.ones((40, 3), np.float32))
    single, pairs = (moe(banks["packed"], isa + how, call, few=0) for how in ("", IN_PAIRS))
    assert np.array_equal(single, pairs) != switch.in_pairs(isa, formats)


def scale_bytes(format: str) -> NDArray[np.int64]:
    """Where a block has its scales and minima (gguf, constants and quants)."""
    places = {
        "q2_k": [*range(16), *range(80, 84)], "q3_k": range(96, 110), "q4_k": range(16),
        "q5_k": range(16), "q6_k": range(192, 210), "iq4_xs": range(8),
    }  # fmt: skip
    return np.array(list(places.get(format, range(2))))


def test_no_tokens_give_no_rows() -> None:
    weights = laid_out(make("q8_0", 4, 32), "packed")
    assert linear(weights, "serial", np.zeros((0, 32), np.float32)).shape == (0, 4)
    bank = [laid_out(tensor, "packed") for tensor in bank_of("q8_0")]
    call = (
        np.zeros((0, 288), np.float32),
        np.zeros((0, 3), np.int64),
        np.zeros((0, 3), np.float32),
    )
    assert moe(bank, "serial", call).shape == (0, 288)


@pytest.mark.parametrize("expert", [6, -2, 2**40])
def test_ids_out_of_range_are_refused_before_anything_is_written(expert: int) -> None:
    bank = [laid_out(tensor, "ggml_blocks") for tensor in bank_of("q8_0")]
    ids = np.array([[0, 1], [expert, 2]], np.int64)
    y = np.full((2, 288), 7, np.float32)
    call = (activations(2, 288), ids, np.ones((2, 2), np.float32), y)
    with pytest.raises(ValueError, match=rf"ids\[1, 0\]: expected 0 to 5, or -1.*found {expert}"):
        skin().moe(native.pool(1), "serial", 4, *map(native.matrix, bank), *call)
    assert (y == 7).all()


@pytest.mark.parametrize("format", [f for f in FORMATS if f not in ("f32", "f16", "bf16")])
@pytest.mark.skipif("amx_int8" not in ISAS, reason=native.isas().get("amx_int8", "not built"))
def test_amx_agrees_with_its_emulation_bit_for_bit(format: str) -> None:
    block = get_format(format).block_size
    tensor = make(format, 40, max(512, block))
    for layout in ("ggml_blocks", "packed"):
        weights = laid_out(tensor, layout)
        for tokens in (1, 16, 33):
            x = activations(tokens, tensor.shape[-1])
            real, emulated = (
                linear(weights, isa, x, few=0) for isa in ("amx_int8", "amx_int8_emulated")
            )
            assert np.array_equal(real, emulated)


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_gives_the_exact_values_in_both_layouts(format: str) -> None:
    block = get_format(format).block_size
    tensor = make(format, 2, 21, block * 3 if block > 1 else 77)
    expected = tensor.dequantize()
    for layout in ("ggml_blocks", "packed"):
        matrix = native.matrix(laid_out(tensor, layout))
        found = np.full((21, tensor.shape[-1]), np.nan, np.float32)
        for expert in range(2):
            skin().dequantize(matrix, expert, 0, found)
            assert np.array_equal(found, expected[expert]), layout


def test_int8_channel_is_no_worse_than_its_format_and_the_activations_rounding() -> None:
    stored = make("bf16", 96, 512)
    made = packing.convert(stored, "int8_channel")
    exact = stored.dequantize().astype(np.float64)
    x = activations(64, 512)
    expected = x.astype(np.float64) @ exact.T
    own = relative(x.astype(np.float64) @ made.dequantize().astype(np.float64).T, expected)
    for isa in ISAS:
        if computes(isa, "int8_channel"):
            found = relative(linear(laid_out(made, "packed"), isa, x), expected)
            assert found < own + 0.015


def test_unfitting_rows_fall_back_before_they_reach_a_kernel() -> None:
    assert fallback_format("q4_k", 1408).name in FORMATS
