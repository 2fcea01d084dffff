"""What was written is read back, bit for bit; older forms of the same model too."""

import errno
import shutil
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktlab.checkpoint import (
    Checkpoint,
    MemoryCheckpoint,
    ModelConfig,
    open_checkpoint,
    write_gguf,
)
from ktlab.checkpoint.config import YarnScaling
from ktlab.checkpoint.metadata import Field, config_from_metadata, metadata_from_config
from ktlab.checkpoint.names import expected_tensors
from ktlab.checkpoint.synthesis import (
    TINY_TEST_CONFIG,
    TINY_V2_CONFIG,
    TINY_V2_GROUPS_CONFIG,
    TINY_YARN_CONFIG,
    synthesize,
)
from ktlab.errors import CheckpointError
from tests.checkpoint.conftest import save

CONFIGS = [TINY_TEST_CONFIG, TINY_V2_CONFIG, TINY_V2_GROUPS_CONFIG, TINY_YARN_CONFIG]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_round_trip(config: ModelConfig, tmp_path: Path) -> None:
    written = synthesize(config, seed=3, formats={"*_exps*": "q4_k", "*shexp*": "q8_0"})
    read = open_checkpoint(save(written, tmp_path / "model.gguf"))
    assert isinstance(read, Checkpoint) and isinstance(written, Checkpoint)
    assert read.config == config
    assert read.names() == written.names()
    assert read.nbytes == written.nbytes
    for name in written.names():
        a, b = written.tensor(name), read.tensor(name)
        assert (a.format, a.shape, b.source) == (b.format, b.shape, "model.gguf")
        np.testing.assert_array_equal(a.blocks, b.blocks)
        assert not b.blocks.flags.writeable


def test_tensors_are_views_of_the_file(gguf_path: Path) -> None:
    checkpoint = open_checkpoint(gguf_path)
    blocks = checkpoint.tensor("blk.1.ffn_up_exps.weight").blocks
    assert not blocks.flags.owndata
    again = checkpoint.tensor("blk.1.ffn_up_exps.weight").blocks
    assert np.shares_memory(blocks, again)


def test_read_by_gguf_itself(checkpoint: MemoryCheckpoint, gguf_path: Path) -> None:
    """The shapes and values that another reader of the format sees."""
    reader = gguf.GGUFReader(gguf_path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == list(expected_tensors(checkpoint.config))
    keys = tensors["blk.1.attn_k_b.weight"]
    assert keys.shape.tolist() == [32, 32, 4]  # ggml order: nope, kv_lora_rank, heads
    ours = checkpoint.tensor("blk.1.ffn_down_exps.weight")
    theirs = tensors["blk.1.ffn_down_exps.weight"]
    np.testing.assert_array_equal(
        gguf.dequantize(theirs.data, theirs.tensor_type), ours.dequantize()
    )


def test_keys_are_those_of_llama_cpp(gguf_path: Path) -> None:
    fields = open_checkpoint(gguf_path).metadata
    expected = {
        "general.architecture": "deepseek2",
        "general.quantization_version": 2,
        "deepseek2.attention.head_count": 4,
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.key_length": 48,
        "deepseek2.attention.value_length": 32,
        "deepseek2.attention.key_length_mla": 48,
        "deepseek2.attention.value_length_mla": 32,
        "deepseek2.attention.layer_norm_rms_epsilon": 1e-6,
        "deepseek2.expert_gating_func": 2,
        "deepseek2.expert_weights_norm": True,
        "deepseek2.expert_weights_scale": 2.5,
        "deepseek2.leading_dense_block_count": 1,
        "tokenizer.ggml.model": "gpt2",
    }
    assert {key: fields[key] for key in expected} == expected


def test_extra_metadata(checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    extra = {"general.license": "MIT", "ktlab.steps": 7, "ktlab.mix": ["a", "b"], "ktlab.no": ""}
    path = write_gguf(tmp_path / "m.gguf", checkpoint.config, tensors, metadata=extra)
    read = open_checkpoint(path)
    assert read.tokenizer is None
    assert read.metadata["general.license"] == "MIT"
    assert (read.metadata["ktlab.steps"], read.metadata["ktlab.mix"]) == (7, ["a", "b"])
    assert "ktlab.no" not in read.metadata
    for key, value in (("deepseek2.expert_count", 3), ("x", {"a": 1})):
        with pytest.raises(CheckpointError, match=key):
            write_gguf(tmp_path / "n.gguf", checkpoint.config, tensors, metadata={key: value})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]


def test_write_refuses_wrong_tensors(checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    del tensors["output_norm.weight"]
    tensors["output.weight"] = tensors["output.weight"][:5]
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        write_gguf(tmp_path / "m.gguf", checkpoint.config, tensors)
    assert "output_norm.weight is missing" in str(caught.value)
    assert "output.weight has shape (5, 64), expected (272, 64)" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file(
    checkpoint: MemoryCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(checkpoint, tmp_path / "m.gguf")
    before = path.read_bytes()

    def fail(path: str, mode: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.chmod", fail)
    with pytest.raises(OSError, match="disk full"):
        save(checkpoint, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_without_room(
    checkpoint: MemoryCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str, mode: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.chmod", full)
    with pytest.raises(CheckpointError, match="m.gguf: the disk became full .No space left on"):
        save(checkpoint, tmp_path / "m.gguf")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 50_000))
    with pytest.raises(CheckpointError, match=r"m.gguf needs .* KiB free; make room"):
        save(checkpoint, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------- configuration
def plain(fields: Mapping[str, Field]) -> dict[str, object]:
    return {"general.architecture": "deepseek2"} | {
        key: value for key, (value, _) in fields.items()
    }


@given(
    groups=st.integers(1, 4),
    per_group=st.integers(2, 5),
    q_lora=st.integers(0, 64),
    nope=st.integers(1, 128),
    gating=st.sampled_from(["softmax", "sigmoid"]),
    yarn=st.none() | st.floats(1, 64),
    data=st.data(),
)
@settings(max_examples=50)
def test_configuration_round_trip(
    groups: int,
    per_group: int,
    q_lora: int,
    nope: int,
    gating: str,
    yarn: float | None,
    data: st.DataObject,
) -> None:
    used = data.draw(st.integers(1, groups))
    mscale = data.draw(st.sampled_from([0.707, 1.0]))
    scaling = yarn and YarnScaling(
        factor=yarn, original_context=4096, mscale=mscale, mscale_all_dim=mscale
    )
    changes: dict[str, object] = dict(
        name="unnamed",
        num_experts=groups * per_group,
        n_group=groups,
        topk_group=used,
        top_k=data.draw(st.integers(1, used * per_group)),
        attention=replace(TINY_TEST_CONFIG.mla, q_lora_rank=q_lora, qk_nope_dim=nope),
        gating=gating,
        score_correction=gating == "sigmoid",
        yarn=scaling,
    )
    config = replace(TINY_TEST_CONFIG, **changes)  # type: ignore[arg-type]
    assert config_from_metadata("unnamed.gguf", plain(metadata_from_config(config))) == config


def test_yarn_without_mscale() -> None:
    config = replace(TINY_YARN_CONFIG, yarn=YarnScaling(factor=4.0, original_context=64))
    fields = metadata_from_config(config)
    assert "deepseek2.rope.scaling.yarn_log_multiplier" not in fields
    assert config_from_metadata("x.gguf", plain(fields)).yarn == config.yarn
    uneven = YarnScaling(factor=4.0, original_context=64, mscale=1.0, mscale_all_dim=0.7)
    with pytest.raises(CheckpointError, match="no place for mscale 1.0 beside"):
        metadata_from_config(replace(config, yarn=uneven))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("expert_gating_func", 7, "expected 1 \\(softmax\\) or 2"),
        ("rope.scaling.type", "linear", "expected 'yarn' or 'none'"),
        ("attention.layer_norm_rms_epsilon", float("nan"), "expected a number >= 0"),
        ("attention.head_count", [4, 4], "expected a whole number from 1"),
        ("expert_count", True, "expected a whole number from 1"),
        ("expert_count", 2**40, "expected a whole number from 1"),
        ("expert_weights_norm", 1, "expected true or false"),
        ("attention.key_length_mla", 16, "more than rope.dimension_count, which is 16"),
    ],
)
def test_odd_values(key: str, value: object, expected: str) -> None:
    fields = plain(metadata_from_config(TINY_TEST_CONFIG)) | {f"deepseek2.{key}": value}
    with pytest.raises(CheckpointError, match=expected) as caught:
        config_from_metadata("x.gguf", fields)
    assert f"deepseek2.{key}" in str(caught.value)


# ------------------------------------------------------------------------- memory, repr
def test_memory_checkpoint(checkpoint: MemoryCheckpoint) -> None:
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    with pytest.raises(CheckpointError, match='no tensor "blk.1.ffn_up.weight"; did you mean'):
        checkpoint.tensor("blk.1.ffn_up.weight")
    del tensors["blk.1.exp_probs_b.bias"]
    with pytest.raises(CheckpointError, match="blk.1.exp_probs_b.bias is missing"):
        MemoryCheckpoint(checkpoint.config, tensors)


def test_shows_itself(checkpoint: MemoryCheckpoint, gguf_path: Path) -> None:
    read = open_checkpoint(gguf_path)
    for shown in (checkpoint, read):
        text = repr(shown)
        assert "3 layers, 16 experts, top 4; 52 tensors, q8_0 204.0 KiB" in text
        html = shown._repr_mimebundle_()["text/html"]  # type: ignore[attr-defined]
        assert "blk.1.ffn_gate_exps.weight" in html and "2 of 4 groups" in html


@pytest.mark.parametrize("name", ["", "漢", "blk.9.attn_kv_b.weight", "blk.99.attn_norm.weight"])
def test_unknown_tensor(gguf_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="there is no tensor"):
        open_checkpoint(gguf_path).tensor(name)


def test_synthesis_repeats_by_seed() -> None:
    first, again, other = (synthesize(TINY_TEST_CONFIG, seed=seed) for seed in (5, 5, 6))
    name = "blk.2.ffn_gate_exps.weight"
    np.testing.assert_array_equal(first.tensor(name).blocks, again.tensor(name).blocks)
    assert not np.array_equal(first.tensor(name).blocks, other.tensor(name).blocks)


def test_synthesis_keeps_small_and_delicate_tensors_in_f32(checkpoint: MemoryCheckpoint) -> None:
    formats = {name: checkpoint.tensor(name).format.name for name in checkpoint.names()}
    assert formats["blk.1.ffn_gate_inp.weight"] == formats["blk.0.attn_norm.weight"] == "f32"
    assert formats["blk.1.ffn_up_exps.weight"] == "q8_0"
    assert formats["output.weight"] == "q5_0", "rows of 64 are too short for q4_k"
