"""QTensor: shapes, slices, errors with hand-computed values, what it shows of itself."""

import math

import numpy as np
import pytest

from ktlab.errors import FormatError
from ktlab.quantization import FORMATS, QTensor
from ktlab.quantization import qtensor as module

VALUES = np.random.default_rng(3).standard_normal((4, 8, 64)).astype(np.float32)


def test_from_array_and_back() -> None:
    tensor = QTensor.from_array("w", VALUES)
    assert (tensor.shape, tensor.size, tensor.nbytes) == ((4, 8, 64), 2048, 8192)
    assert (tensor.bits_per_weight, tensor.source, len(tensor)) == (32, "memory", 4)
    np.testing.assert_array_equal(tensor.dequantize(), VALUES)


def test_indexing_takes_experts_without_decoding() -> None:
    tensor = QTensor.from_array("w", VALUES, "q8_0")
    decoded = tensor.dequantize()
    assert tensor[2].shape == (8, 64) and tensor[2].name == "w[2]"
    assert np.shares_memory(tensor[2].blocks, tensor.blocks)
    np.testing.assert_array_equal(tensor[2].dequantize(), decoded[2])
    np.testing.assert_array_equal(tensor[1:3].dequantize(), decoded[1:3])
    np.testing.assert_array_equal(tensor[np.array([3, 0])].dequantize(), decoded[[3, 0]])
    np.testing.assert_array_equal(tensor[2][5].dequantize(), decoded[2, 5])
    with pytest.raises(FormatError, match="one axis"):
        tensor[2][5][0]


def test_requantize() -> None:
    q8 = QTensor.from_array("w", VALUES, "q8_0")
    q4 = q8.requantize("q4_0")
    assert q4.format is FORMATS["q4_0"] and q4.source == "requantized from q8_0"
    expected = FORMATS["q4_0"].quantize(q8.dequantize())
    np.testing.assert_array_equal(q4.blocks, expected)
    assert q8.requantize("q8_0") is q8


def test_requantize_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = QTensor.from_array("w", VALUES)
    whole, error = tensor.requantize("q5_0"), tensor.error("q5_0")
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 130)
    np.testing.assert_array_equal(tensor.requantize("q5_0").blocks, whole.blocks)
    assert tensor.error("q5_0").rmse == pytest.approx(error.rmse)


def test_error_by_hand() -> None:
    a = QTensor.from_array("a", np.array([[3.0, 4.0]], np.float32))
    b = QTensor.from_array("b", np.array([[3.0, 3.5]], np.float32))
    error = a.error(b)
    assert error.rmse == pytest.approx(math.sqrt(0.125))
    assert error.relative_rmse == pytest.approx(0.1)
    assert error.max_abs == 0.5
    assert error.snr_db == pytest.approx(20.0)
    assert (error.bytes, error.bits_per_weight) == (8, 32)
    assert "20.0 dB" in repr(error)


def test_error_of_nothing_and_against_zero() -> None:
    tensor = QTensor.from_array("w", VALUES)
    same = tensor.error("f32")
    assert (same.rmse, same.relative_rmse, same.snr_db) == (0, 0, math.inf)
    zero = QTensor.from_array("z", np.zeros((1, 32), np.float32))
    assert zero.error("q8_0").relative_rmse == 0
    ones = QTensor.from_array("o", np.ones((1, 32), np.float32))
    assert zero.error(ones).relative_rmse == math.inf


def test_error_needs_equal_shapes() -> None:
    tensor = QTensor.from_array("w", VALUES)
    with pytest.raises(FormatError, match=r"w is \(4, 8, 64\)"):
        tensor.error(tensor[0])


def test_wrong_blocks_are_refused() -> None:
    with pytest.raises(FormatError, match=r"needs uint8 \(2, 34\)"):
        QTensor(name="w", format=FORMATS["q8_0"], shape=(2, 32), blocks=np.zeros((2, 32), np.uint8))
    with pytest.raises(FormatError, match="at least one axis"):
        QTensor(name="w", format=FORMATS["f32"], shape=(), blocks=np.zeros(4, np.uint8))


def test_read_only_bytes_work() -> None:
    blocks = FORMATS["q8_0"].quantize(VALUES)
    blocks.flags.writeable = False
    tensor = QTensor(name="w", format=FORMATS["q8_0"], shape=VALUES.shape, blocks=blocks)
    assert tensor.dequantize().shape == VALUES.shape
    assert tensor.error("q4_0").relative_rmse > 0


def test_shows_itself() -> None:
    tensor = QTensor.from_array("<w>", VALUES, "q8_0")
    assert repr(tensor) == "QTensor(<w>, q8_0, 4×8×64, 2.1 KiB, memory)"
    html = tensor._repr_mimebundle_()["text/html"]
    assert "&lt;w&gt;" in html and "<w>" not in html and "8.5 bits a weight" in html
