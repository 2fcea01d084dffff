"""Formats: encode and decode agree with `gguf`, sizes are right, bad input is named."""

import pickle
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ktlab.errors import FormatError
from ktlab.quantization import FORMATS, Format, fallback_format, float8, get_format

WRITABLE = [name for name, format in FORMATS.items() if format.can_quantize]
READ_ONLY = [name for name in FORMATS if name not in WRITABLE]
GGML = [name for name, format in FORMATS.items() if format.ggml_type is not None]
MEMORY_ONLY = ["int8_channel", "int4_group32", "int4_group128", "fp8_e4m3"]

# Largest error of one element, as a share of the largest magnitude in the row's block.
BOUND = {
    "f32": 0,
    "f16": 2**-11,
    "bf16": 2**-8,
    "q8_0": 0.005,
    "q6_k": 0.035,
    "q5_k": 0.065,
    "q5_1": 0.034,
    "q5_0": 0.064,
    "q4_k": 0.13,
    "q4_1": 0.068,
    "q4_0": 0.126,
    "q3_k": 0.26,
    "q2_k": 0.6,
    "iq4_nl": 0.14,
    "iq4_xs": 0.15,
    "mxfp4": 0.26,
    "tq2_0": 0.51,
    "tq1_0": 0.51,
    "int8_channel": 0.004,
    "int4_group32": 0.126,
    "int4_group128": 0.126,
    "fp8_e4m3": 2**-4,
}


def random_blocks(format: Format, rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(
        0, 256, (rows, format.row_bytes(2 * format.block_size)), dtype=np.uint8
    )


def test_every_format_that_gguf_decodes_is_registered() -> None:
    decodable = {type.name.lower() for type in gguf.quants._type_traits} | {"f32", "f16"}
    assert set(GGML) == decodable
    assert set(FORMATS) == decodable | set(MEMORY_ONLY)


@pytest.mark.parametrize("name", GGML)
def test_blocks_are_those_of_ggml(name: str) -> None:
    format = FORMATS[name]
    assert format.ggml_type is not None
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[format.ggml_type]
    assert (format.block_size, format.block_bytes) == (block_size, block_bytes)
    assert format.bits_per_weight == 8 * block_bytes / block_size
    assert format.row_head_bytes == 0
    assert get_format(format.ggml_type) is format


@pytest.mark.parametrize("name", FORMATS)
def test_describes_itself(name: str) -> None:
    format = FORMATS[name]
    assert format.source
    assert str(format) == name and name in repr(format)
    assert get_format(name.upper()) is format is get_format(format)
    assert pickle.loads(pickle.dumps(format)) is format


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales may be infinite
@pytest.mark.parametrize("name", GGML)
def test_decodes_as_gguf_does(name: str) -> None:
    format = FORMATS[name]
    assert format.ggml_type is not None
    blocks = random_blocks(format, 6)
    expected = gguf.dequantize(blocks, format.ggml_type)
    found = format.dequantize(blocks.reshape(2, 3, -1))
    assert found.shape == (2, 3, 2 * format.block_size)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.reshape(6, -1), expected)


@pytest.mark.parametrize("name", WRITABLE)
@settings(max_examples=12)
@given(data=st.data())
def test_round_trip_stays_within_the_bound(name: str, data: st.DataObject) -> None:
    format = FORMATS[name]
    row = max(format.block_size, 32) * data.draw(st.integers(1, 2))
    elements = st.floats(-1e3, 1e3, width=32, allow_nan=False)
    values = data.draw(hnp.arrays(np.float32, (2, row), elements=elements))
    scale = np.float32(2.0 ** data.draw(st.integers(-6, 5)))
    values = values * scale
    decoded = format.dequantize(format.quantize(values))
    assert decoded.shape == values.shape
    assert np.isfinite(decoded).all()
    blocks = values.reshape(-1, format.block_size if format.block_size > 1 else row)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    # float16 scales have a smallest step of their own
    allowed = BOUND[name] * largest + (1e-4 if name != "f32" else 0)
    assert (np.abs(decoded.reshape(blocks.shape) - blocks) <= allowed).all()


@pytest.mark.parametrize("name", WRITABLE)
def test_zeros_stay_zeros(name: str) -> None:
    values = np.zeros((1, 256), np.float32)
    np.testing.assert_array_equal(FORMATS[name].dequantize(FORMATS[name].quantize(values)), values)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", WRITABLE)
def test_values_too_small_for_a_scale_become_zero_without_a_warning(name: str) -> None:
    format = FORMATS[name]
    values = np.full((1, 256), 1e-42, np.float32)
    assert np.abs(format.dequantize(format.quantize(values))).max() < 1e-30


@pytest.mark.parametrize("name", WRITABLE)
def test_no_rows_give_no_bytes(name: str) -> None:
    blocks = FORMATS[name].quantize(np.zeros((0, 256), np.float32))
    assert blocks.shape == (0, FORMATS[name].row_bytes(256))
    assert FORMATS[name].dequantize(blocks).shape == (0, 256)


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(FormatError, match='unknown format "q4_km"; did you mean "q4_k"'):
        get_format("q4_km")


def test_row_that_does_not_divide_names_the_fallback() -> None:
    with pytest.raises(FormatError, match="256 elements, but a row here has 96.*q5_0"):
        FORMATS["q4_k"].quantize(np.zeros((2, 96), np.float32))


@pytest.mark.parametrize("name", READ_ONLY)
def test_formats_without_an_encoder_say_so(name: str) -> None:
    with pytest.raises(FormatError, match="can be read here but not written.*q8_0"):
        FORMATS[name].quantize(np.zeros((1, 256), np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_values_out_of_range_are_refused(value: float) -> None:
    values = np.zeros((1, 256), np.float32)
    values[0, 3] = value
    for name in ("q8_0", "q4_k", "q4_0"):
        with pytest.raises(FormatError, match="cannot hold these values"):
            FORMATS[name].quantize(values)
    FORMATS["bf16"].quantize(values)


def test_f16_keeps_infinity_but_does_not_make_it() -> None:
    f16 = FORMATS["f16"]
    assert np.isinf(f16.dequantize(f16.quantize(np.array([[np.inf, 1]], np.float32)))[0, 0])
    with pytest.raises(FormatError, match="f16 cannot hold"):
        f16.quantize(np.array([[1e5, 1]], np.float32))


def test_wrong_bytes_are_refused() -> None:
    with pytest.raises(FormatError, match="multiple of 34 bytes"):
        FORMATS["q8_0"].dequantize(np.zeros((1, 33), np.uint8))
    with pytest.raises(FormatError, match="uint8"):
        FORMATS["q8_0"].dequantize(np.zeros((1, 34), np.int8))


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("q4_k", 512, "q4_k"),
        ("q4_k", 96, "q5_0"),
        ("q5_k", 96, "q5_1"),
        ("q6_k", 96, "q8_0"),
        ("q2_k", 64, "q4_0"),
        ("iq1_s", 64, "iq4_nl"),
        ("tq1_0", 32, "q4_0"),
        ("q4_k", 100, "f16"),
        ("q8_0", 33, "f16"),
        ("f32", 7, "f32"),
        ("int4_group128", 96, "int4_group32"),
        ("int4_group128", 48, "int8_channel"),
        ("fp8_e4m3", 96, "bf16"),
    ],
)
def test_fallback_is_that_of_llama_cpp_and_ours(name: str, row: int, expected: str) -> None:
    assert fallback_format(name, row).name == expected


def test_int8_channel_by_hand() -> None:
    format = FORMATS["int8_channel"]
    rows = np.array([[1.27, -0.634, 0.0], [0.0, 0.0, 0.0]], np.float32)
    blocks = format.quantize(rows)
    assert blocks.shape == (2, 7) == (2, format.row_bytes(3))
    np.testing.assert_allclose(blocks[0, :4].view(np.float32), 0.01, rtol=1e-6)
    assert blocks[:, 4:].view(np.int8).tolist() == [[127, -63, 0], [0, 0, 0]]
    np.testing.assert_allclose(format.dequantize(blocks)[0], [1.27, -0.63, 0], rtol=1e-6)
    assert format.row_length(7) == 3
    with pytest.raises(FormatError, match="rows of 4 bytes and a multiple of 1 bytes, found 3"):
        format.dequantize(np.zeros((1, 3), np.uint8))


def test_int8_channel_takes_any_row_and_any_finite_float32() -> None:
    format = FORMATS["int8_channel"]
    huge = np.array([[3e38, -1e38, 5.0]], np.float32)
    np.testing.assert_allclose(format.dequantize(format.quantize(huge)), huge, atol=2e36)
    for value in (np.nan, np.inf):
        with pytest.raises(FormatError, match="cannot hold these values"):
            format.quantize(np.full((1, 3), value, np.float32))


@pytest.mark.parametrize("group", [32, 128])
def test_int4_groups_by_hand(group: int) -> None:
    format = FORMATS[f"int4_group{group}"]
    values = np.zeros((1, 2 * group), np.float32)
    # The first group's extreme is positive, so its scale is negative; the second group is empty.
    values[0, [0, 1, group // 2, group - 1]] = 4.0, -3.5, 1.0, -0.2
    block = format.quantize(values)[0, : 2 + group // 2]
    assert float(block[:2].view(np.float16)[0]) == -0.5
    codes = np.concatenate([block[2:] & 15, block[2:] >> 4])
    assert codes[[0, 1, group // 2, group - 1, 2]].tolist() == [0, 15, 6, 8, 8]
    found = format.dequantize(format.quantize(values))
    assert found[0, [0, 1, group // 2, group - 1]].tolist() == [4.0, -3.5, 1.0, 0.0]
    assert not found[0, group:].any()


def test_fp8_is_torchs_e4m3() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    values = every.view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(float8.E4M3, values)
    rows = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    groups = rows.reshape(-1, 128)
    scale = np.abs(groups).max(1, keepdims=True) / np.float32(448)
    codes = torch.from_numpy(groups / scale).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    blocks = FORMATS["fp8_e4m3"].quantize(rows)
    np.testing.assert_array_equal(blocks.reshape(-1, 132)[:, 4:], codes)
    joined = float8.join_scales(codes.reshape(3, 256), scale.reshape(3, 2))
    np.testing.assert_array_equal(joined, blocks)


@pytest.mark.parametrize("name", MEMORY_ONLY)
def test_formats_of_memory_cannot_be_written_to_a_file(name: str, tmp_path) -> None:
    from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
    from ktlab.checkpoint.writer import write_gguf
    from ktlab.errors import CheckpointError

    config = replace(TINY_TEST_CONFIG, expert_size=128)
    checkpoint = synthesize(config, formats={"blk.1.ffn_down_exps*": name})
    tensors = {n: checkpoint.tensor(n) for n in checkpoint.names()}
    with pytest.raises(CheckpointError, match=f"ffn_down_exps.weight is {name}.*memory only; GGUF"):
        write_gguf(tmp_path / "x.gguf", config, tensors)
    assert not list(tmp_path.iterdir())
