"""The compiled encoders give the bytes of the NumPy ones, for every kind of weights and source."""

from time import perf_counter

import numpy as np
import pytest
from numpy.typing import NDArray

from ktlab.errors import FormatError
from ktlab.kernels import numba_backend, packing
from ktlab.kernels.encodings import ENCODED
from ktlab.quantization import FORMATS, QTensor, get_format

RNG = np.random.default_rng(5)
ROWS, COLS = 5, 768  # an odd number of super-blocks in all: the last unit is not full
NORMAL = RNG.standard_normal((ROWS, COLS)).astype(np.float32)
POWERS = (2.0 ** RNG.integers(-24, 12, (ROWS, COLS // 32))).astype(np.float32)


def with_zeros(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """A row of zeros, one of zeros but one, a super-block that is half zeros, both zeros."""
    values = values.copy()
    values[0] = 0
    values[1, np.arange(COLS) != 77] = 0
    values[2, 128:384] = 0
    values[3, ::2] = -0.0
    return values


WEIGHTS = {
    "normal": 0.02 * NORMAL,
    "heavy tails": RNG.standard_t(2, NORMAL.shape).astype(np.float32),
    "sizes from 1e-7 to 1e4": NORMAL * np.repeat(POWERS, 32, axis=1),
    "all above 0": 10 + np.abs(NORMAL),
    "all below 0": -10 - np.abs(NORMAL),
    "zeros": with_zeros(NORMAL),
    "ties": np.round(4 * NORMAL),
    "nearly equal": np.float32(-3e-4) * (1 + np.float32(1e-6) * NORMAL),
    "below what is kept": NORMAL * np.float32(1e-30),
    "as large as can be": np.clip(20000 * NORMAL, -65504, 65504),
}


def encoded(tensor: QTensor, name: str, threads: int = 1) -> NDArray[np.uint8]:
    out = np.full((*tensor.shape[:-1], get_format(name).row_bytes(tensor.shape[-1])), 90, np.uint8)
    numba_backend.encode(tensor, name, out.reshape(-1, out.shape[-1]), threads)
    return out


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ENCODED)
def test_bytes_are_those_of_numpy(name: str, weights: str) -> None:
    values = WEIGHTS[weights].astype(np.float32)
    found = encoded(QTensor.from_array("w", values), name)
    np.testing.assert_array_equal(found, FORMATS[name].quantize(values))


@pytest.mark.parametrize("name", ["q8_0", "q4_k", "q6_k"])
@pytest.mark.parametrize("source", ["f16", "bf16", "fp8_e4m3", "q8_0", "int8_channel"])
def test_from_any_format_and_on_any_number_of_threads(source: str, name: str) -> None:
    values = RNG.standard_normal((3, 40, 256)).astype(np.float32)
    tensor = QTensor.from_array("w", values, source)
    expected = FORMATS[name].quantize(tensor.dequantize())
    for threads in (1, 3):
        np.testing.assert_array_equal(encoded(tensor, name, threads), expected)


def test_short_rows_and_rows_apart() -> None:
    """One block in all; every second row of a larger array."""
    one = NORMAL[:1, :32]
    np.testing.assert_array_equal(
        encoded(QTensor.from_array("w", one), "q5_0"), FORMATS["q5_0"].quantize(one)
    )
    blocks = NORMAL.view(np.uint8)[::2]
    tensor = QTensor(name="w", format=FORMATS["f32"], shape=(3, COLS), blocks=blocks)
    np.testing.assert_array_equal(encoded(tensor, "q4_k"), FORMATS["q4_k"].quantize(NORMAL[::2]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
def test_values_out_of_range_are_refused_in_the_same_words(value: float) -> None:
    values = NORMAL.copy()
    values[4, 700] = value
    for name in ("q8_0", "q4_k", "q6_k"):
        with pytest.raises(FormatError) as expected:
            FORMATS[name].quantize(values)
        with pytest.raises(FormatError) as found:
            encoded(QTensor.from_array("w", values), name, threads=2)
        assert str(found.value) == str(expected.value)


def test_every_code_of_8_bit_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "FEW_WEIGHTS", 0)
    blocks = np.empty((2, 132), np.uint8)
    blocks[:, :4] = np.array([[1.0], [0.3]], np.float32).view(np.uint8)
    blocks[:, 4:] = np.arange(256, dtype=np.uint8).reshape(2, 128)
    tensor = QTensor(name="w", format=FORMATS["fp8_e4m3"], shape=(2, 128), blocks=blocks)
    np.testing.assert_array_equal(packing.floats(tensor).dequantize(), tensor.dequantize())


def test_large_tensors_are_encoded_so_and_small_ones_by_numpy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensor = QTensor.from_array("w", NORMAL, "bf16")
    calls, encode = [], numba_backend.encode

    def counted(tensor: QTensor, format: str, out: NDArray[np.uint8], threads: int) -> None:
        calls.append(format)
        encode(tensor, format, out, threads)

    monkeypatch.setattr(numba_backend, "encode", counted)
    for few, name in ((NORMAL.size, "q4_k"), (NORMAL.size + 1, "q4_k"), (0, "iq4_nl")):
        monkeypatch.setattr(packing, "FEW_WEIGHTS", few)
        found, expected = packing.convert(tensor, name), tensor.requantize(name)
        np.testing.assert_array_equal(found.blocks, expected.blocks)
        assert (found.format, found.shape, found.source) == (
            expected.format, expected.shape, expected.source
        )  # fmt: skip
    assert calls == ["q4_k"]


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "FEW_WEIGHTS", 0)
    monkeypatch.setattr(numba_backend, "unavailable", lambda: "numba is not installed")
    tensor = QTensor.from_array("w", NORMAL, "fp8_e4m3")
    np.testing.assert_array_equal(
        packing.convert(tensor, "q4_k").blocks, tensor.requantize("q4_k").blocks
    )
    np.testing.assert_array_equal(packing.floats(tensor).dequantize(), tensor.dequantize())


@pytest.mark.alone
def test_ten_times_as_fast_as_numpy() -> None:
    """One thread against NumPy's one; measured 20 to 30 times."""
    values = RNG.standard_normal((64, 4096)).astype(np.float32)
    tensor = QTensor.from_array("w", values)
    encoded(tensor, "q4_k")

    def seconds() -> tuple[float, float]:
        start = perf_counter()
        encoded(tensor, "q4_k")
        middle = perf_counter()
        FORMATS["q4_k"].quantize(values)
        return middle - start, perf_counter() - middle

    fast, slow = np.median([seconds() for _ in range(5)], axis=0)
    assert slow > 10 * fast, f"{values.size / fast / 1e6:.0f} and {values.size / slow / 1e6:.0f}"
