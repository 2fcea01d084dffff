"""Our encoders against `gguf`'s decoders: the error is that of a good quantizer."""

import numpy as np
import pytest

from ktlab.quantization import QTensor, get_format

RNG = np.random.default_rng(7)
NORMAL = RNG.standard_normal((64, 512)).astype(np.float32)
HEAVY = RNG.standard_t(4, (64, 512)).astype(np.float32)
UNEVEN = NORMAL * np.repeat(2.0 ** RNG.integers(-4, 4, (64, 16)), 32, axis=1).astype(np.float32)

# Relative rmse on normally distributed weights: (least plausible, most allowed).
NORMAL_ERROR = {
    "q6_k": (0.014, 0.019),
    "q5_k": (0.030, 0.038),
    "q4_k": (0.060, 0.075),
    "q3_k": (0.13, 0.16),
    "q2_k": (0.24, 0.29),
    "iq4_nl": (0.070, 0.080),
    "iq4_xs": (0.070, 0.082),
}


def relative(values: np.ndarray, name: str) -> float:
    return QTensor.from_array("w", values).error(name).relative_rmse


@pytest.mark.parametrize("name", NORMAL_ERROR)
def test_error_on_normal_weights(name: str) -> None:
    least, most = NORMAL_ERROR[name]
    assert least < relative(NORMAL, name) < most


@pytest.mark.parametrize("values", [NORMAL, HEAVY, UNEVEN], ids=["normal", "heavy", "uneven"])
def test_more_bits_are_better(values: np.ndarray) -> None:
    errors = [relative(values, name) for name in ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k")]
    assert errors == sorted(errors)


@pytest.mark.parametrize("values", [NORMAL, HEAVY], ids=["normal", "heavy"])
def test_beats_the_simple_format_of_equal_size(values: np.ndarray) -> None:
    assert relative(values, "q4_k") < relative(values, "q4_0")
    assert relative(values, "q5_k") < relative(values, "q5_0")
    assert relative(values, "iq4_nl") < relative(values, "q4_0")
    assert relative(values, "iq4_xs") < relative(values, "q4_0")


@pytest.mark.parametrize("name", NORMAL_ERROR)
def test_scaling_the_weights_scales_the_result(name: str) -> None:
    """By powers of two nothing changes but exponents."""
    format = get_format(name)
    once = format.dequantize(format.quantize(NORMAL))
    np.testing.assert_array_equal(format.dequantize(format.quantize(NORMAL * 4)), once * 4)


@pytest.mark.parametrize("name", ["q6_k", "q3_k", "iq4_nl", "iq4_xs"])
def test_symmetric_formats_do_not_care_about_the_sign(name: str) -> None:
    format = get_format(name)
    once = format.dequantize(format.quantize(NORMAL))
    np.testing.assert_array_equal(format.dequantize(format.quantize(-NORMAL)), -once)


@pytest.mark.parametrize("name", ["q5_k", "q4_k", "q2_k"])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_weights(name: str, sign: int) -> None:
    values = sign * (10 + np.abs(NORMAL))
    assert relative(values, name) < (0.08 if name == "q2_k" else 0.03)


@pytest.mark.parametrize("name", NORMAL_ERROR)
def test_blocks_do_not_depend_on_their_neighbours(name: str) -> None:
    format = get_format(name)
    together = format.quantize(HEAVY)
    alone = np.stack([format.quantize(row[None])[0] for row in HEAVY[:3]])
    np.testing.assert_array_equal(together[:3], alone)


@pytest.mark.parametrize("name", ["q6_k", "q4_k"])
def test_single_outlier_survives(name: str) -> None:
    values = np.zeros((1, 256), np.float32)
    values[0, 77] = -3.5
    decoded = get_format(name).dequantize(get_format(name).quantize(values))
    assert decoded[0, 77] == pytest.approx(-3.5, rel=0.01)
    assert np.abs(np.delete(decoded[0], 77)).max() < 0.02


@pytest.mark.parametrize("name", ["q5_k", "q4_k", "q2_k"])
@pytest.mark.parametrize("spread", [0, 1e-6, 1e-3, 1e-2])
@pytest.mark.parametrize("value", [54.58278, -54.58278, 1.0, -3e-4])
def test_nearly_constant_weights(name: str, value: float, spread: float) -> None:
    """The least-squares fit is nearly singular here."""
    assert relative((value * (1 + spread * NORMAL[:8])).astype(np.float32), name) < (
        0.035 if name == "q2_k" else 0.02
    )
