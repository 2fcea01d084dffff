"""One model in the forms that files have: fused or split, in shards, old and new, with extras."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import ktlab
from ktlab.checkpoint import Checkpoint, MemoryCheckpoint, ModelConfig, open_checkpoint
from ktlab.checkpoint.gathered import GatheredTensor
from ktlab.checkpoint.gguf_file import GGUFCheckpoint
from ktlab.checkpoint.metadata import Field, metadata_from_config
from ktlab.checkpoint.synthesis import (
    TINY_OLMOE_CONFIG,
    TINY_QWEN3MOE_CONFIG,
    TINY_TEST_CONFIG,
    TINY_V2_CONFIG,
    synthesize,
)
from ktlab.checkpoint.tokenizer import byte_tokenizer
from ktlab.errors import CheckpointError
from ktlab.model.model import Model
from tests.checkpoint.conftest import save

Arrays = dict[str, np.ndarray]


def write_raw(
    path: Path,
    fields: Mapping[str, Field],
    tensors: Mapping[str, np.ndarray],
    *,
    shard_size: int = 0,
    family: ModelConfig = TINY_TEST_CONFIG,
) -> Path:
    """A file, or shards of so many tensors, as another program would write them; uint8 is Q8_0."""
    writer = gguf.GGUFWriter(path, family.architecture, split_max_tensors=shard_size)
    for key, (value, kind) in fields.items():
        writer.add_key_value(key, value, kind)
    for name, values in tensors.items():
        is_bytes = values.dtype == np.uint8
        raw_dtype = gguf.GGMLQuantizationType.Q8_0 if is_bytes else None
        writer.add_tensor(name, values, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def arrays(checkpoint: Checkpoint) -> Arrays:
    return {name: np.array(checkpoint.tensor(name).dequantize()) for name in checkpoint.names()}


def same_logits(a: Checkpoint, b: Checkpoint) -> None:
    ids = torch.arange(20, 50)
    found = [Model(c).forward(ids) for c in (a, b)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------- MLA's up-projection
@pytest.fixture(scope="module")
def split() -> MemoryCheckpoint:
    return synthesize(TINY_TEST_CONFIG)


def fused(split: Checkpoint, quantized: bool = False) -> Arrays:
    """With attn_kv_b in place of attn_k_b and attn_v_b."""
    tensors, sizes = arrays(split), split.config.mla
    for layer in range(split.config.num_layers):
        keys_HCN = tensors.pop(f"blk.{layer}.attn_k_b.weight")
        values_HVC = tensors.pop(f"blk.{layer}.attn_v_b.weight")
        both = np.concatenate([keys_HCN.transpose(0, 2, 1), values_HVC], axis=1)
        both = both.reshape(-1, sizes.kv_lora_rank)
        if quantized:
            both = gguf.quantize(both, gguf.GGMLQuantizationType.Q8_0)
        tensors[f"blk.{layer}.attn_kv_b.weight"] = both
    return tensors


def old_fields(split: Checkpoint) -> dict[str, Field]:
    """As before llama.cpp absorbed MLA: true head sizes in the plain keys."""
    fields, sizes = metadata_from_config(split.config), split.config.mla
    u32 = gguf.GGUFValueType.UINT32
    for key, value in (("key_length", sizes.qk_dim), ("value_length", sizes.v_dim)):
        del fields[f"deepseek2.attention.{key}_mla"]
        fields[f"deepseek2.attention.{key}"] = (value, u32)
    fields["deepseek2.attention.head_count_kv"] = (sizes.num_heads, u32)
    fields["general.name"] = (split.config.name, gguf.GGUFValueType.STRING)
    return fields


@pytest.mark.parametrize("quantized", [False, True])
def test_fused_keys_and_values(split: MemoryCheckpoint, tmp_path: Path, quantized: bool) -> None:
    path = write_raw(tmp_path / "fused.gguf", old_fields(split), fused(split, quantized))
    read = open_checkpoint(path)
    assert read.config == split.config
    for name in read.names():
        found = read.tensor(name)
        expected = split.tensor(name).dequantize()
        assert found.shape == expected.shape
        np.testing.assert_allclose(found.dequantize(), expected, atol=0.02 * quantized)
    values = read.tensor("blk.2.attn_v_b.weight")
    assert values.format.name == ("q8_0" if quantized else "f32")
    assert values.source == "fused.gguf, split from attn_kv_b"
    assert "attn_kv_b" in read._repr_mimebundle_()["text/html"]  # type: ignore[attr-defined]
    if not quantized:
        same_logits(read, split)


def test_building_from_a_fused_file_decodes_nothing(
    split: MemoryCheckpoint, tmp_path: Path
) -> None:
    path = write_raw(tmp_path / "fused.gguf", old_fields(split), fused(split, quantized=True))
    model = Model(open_checkpoint(path))
    keys = [block.attention.linears["k_b"].weight for block in model.layers]
    assert all(isinstance(k, GatheredTensor) and not k.gathered for k in keys)
    model.forward([1, 2, 3])
    assert all(isinstance(k, GatheredTensor) and k.gathered for k in keys)


def test_the_fused_matrix_is_made_from_a_split_file(
    split: MemoryCheckpoint, tmp_path: Path
) -> None:
    read = open_checkpoint(save(split, tmp_path / "split.gguf"))
    name = "blk.1.attn_kv_b.weight"
    np.testing.assert_array_equal(read.tensor(name).dequantize(), fused(split)[name])
    assert read.tensor(name).source.endswith("from attn_k_b and attn_v_b")


def test_heads_kept_in_one_matrix(split: MemoryCheckpoint, tmp_path: Path) -> None:
    """attn_k_b as (H C, N): the first files after the split, and ik_llama.cpp's."""
    tensors = {
        name: values.reshape(-1, values.shape[-1]) if "k_b" in name or "v_b" in name else values
        for name, values in arrays(split).items()
    }
    read = open_checkpoint(
        write_raw(tmp_path / "2d.gguf", metadata_from_config(split.config), tensors)
    )
    assert read.tensor("blk.0.attn_k_b.weight").shape == (4, 32, 32)
    same_logits(read, split)


# ------------------------------------------------------------------------- versions, keys, extras
def test_version_2(split: MemoryCheckpoint, tmp_path: Path) -> None:
    path = save(split, tmp_path / "v2.gguf")
    content = bytearray(path.read_bytes())
    assert content[4] == 3
    content[4] = 2
    path.write_bytes(content)
    same_logits(open_checkpoint(path), split)


def test_shared_embedding_and_unused_tensors(tmp_path: Path) -> None:
    model = synthesize(TINY_V2_CONFIG)
    tensors = arrays(model)
    del tensors["output.weight"]
    # of a type that nothing computes, which is no fault of a tensor that nobody needs
    tensors["rope_order.weight"] = np.ones(8, np.int32)
    fields = metadata_from_config(model.config)
    for key in ("vocab_size", "expert_gating_func", "expert_group_count", "expert_weights_scale"):
        del fields[f"deepseek2.{key}"]
    read = open_checkpoint(write_raw(tmp_path / "old.gguf", fields, tensors))
    expected = replace(model.config, name="old", tied_output=True)
    assert read.config == expected, "softmax, no groups, unscaled"
    assert "output.weight" not in read.names()
    embedding = model.tensor("token_embd.weight").dequantize()
    np.testing.assert_array_equal(Model(read).output.weight.dequantize(), embedding)
    assert read.unused == ["rope_order.weight"]  # type: ignore[attr-defined]
    assert "not used: rope_order.weight" in repr(read)
    assert "rope_order" in read._repr_mimebundle_()["text/html"]  # type: ignore[attr-defined]
    plan = ktlab.plan(tmp_path / "old.gguf")
    said = "tensors that the model does not use, 32 B, are not read: rope_order.weight"
    assert plan.stored_bytes == read.nbytes - 32 and said in plan.notes
    assert not any("next-token" in note for note in plan.notes)


@pytest.mark.parametrize("config", [TINY_V2_CONFIG, TINY_QWEN3MOE_CONFIG], ids=lambda c: c.name)
def test_tensors_without_which_the_answers_are_wrong(config: Any, tmp_path: Path) -> None:
    model = synthesize(config)
    extra: Arrays = {f"blk.{layer}.attn_output.bias": np.ones(64, np.float32) for layer in range(3)}
    extra |= {"output.scale": np.ones(1, np.float32), "blk.1.ffn_up.weight": np.ones((64, 64))}
    extra["blk.1.attn_rot_embd.weight"] = np.ones(8, np.float32)
    fields = metadata_from_config(config)
    path = write_raw(tmp_path / "more.gguf", fields, arrays(model) | extra, family=config)
    expected = (
        "3 problems; .*\n  blk.0.attn_output.bias and 2 more like it have no place in a model of "
        "this kind\n  output.scale has no place .*\n  blk.1.ffn_up.weight has no place"
    )
    for read in (open_checkpoint, ktlab.plan):
        with pytest.raises(CheckpointError, match=expected):
            read(path)


def test_both_forms_of_keys_and_values(split: MemoryCheckpoint, tmp_path: Path) -> None:
    """Some files keep the fused matrix beside its parts."""
    path = write_raw(
        tmp_path / "both.gguf", metadata_from_config(split.config), arrays(split) | fused(split)
    )
    read = open_checkpoint(path)
    same_logits(read, split)
    assert len(read.unused) == 3  # type: ignore[attr-defined]
    assert "and 2 more" in "".join(ktlab.plan(path).notes)


def test_a_needed_tensor_of_a_type_that_nothing_computes(
    split: MemoryCheckpoint, tmp_path: Path
) -> None:
    tensors = arrays(split)
    for name in ("token_embd.weight", "output.weight"):
        tensors[name] = tensors[name].astype(np.int32)
    path = write_raw(tmp_path / "ints.gguf", metadata_from_config(split.config), tensors)
    expected = (
        "token_embd.weight and 1 more tensors: I32, which no kernel here computes; usable: F32"
    )
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(path)


def test_a_vocabulary_larger_than_the_embedding(split: MemoryCheckpoint, tmp_path: Path) -> None:
    fields = metadata_from_config(split.config)
    tokens = [f"token{i}" for i in range(273)]
    fields["tokenizer.ggml.tokens"] = (tokens, gguf.GGUFValueType.ARRAY)
    path = write_raw(tmp_path / "words.gguf", fields, arrays(split))
    with pytest.raises(CheckpointError, match="has 273 tokens, the embedding only 272 rows"):
        open_checkpoint(path)


def test_a_tokenizer_that_cannot_be_right(split: MemoryCheckpoint, tmp_path: Path) -> None:
    """Told when the file is opened, all of it, and not at the first text."""
    fields, array = metadata_from_config(split.config), gguf.GGUFValueType.ARRAY
    fields["tokenizer.ggml.tokens"] = ([f"token{i}" for i in range(272)], array)
    fields["tokenizer.ggml.token_type"] = ([1] * 9, array)
    fields["tokenizer.ggml.eos_token_id"] = (272, gguf.GGUFValueType.UINT32)
    path = write_raw(tmp_path / "words.gguf", fields, arrays(split))
    expected = "token_type has 9 items for 272 tokens\n.*eos_token_id is 272, expected 0 to 271"
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(path)


def test_a_vocabulary_smaller_than_the_embedding(split: MemoryCheckpoint, tmp_path: Path) -> None:
    """It is padded, as a converter does it: the model may choose any row."""
    fields = metadata_from_config(split.config)
    own, array = byte_tokenizer(260), gguf.GGUFValueType.ARRAY
    fields["tokenizer.ggml.model"] = ("gpt2", gguf.GGUFValueType.STRING)
    fields["tokenizer.ggml.pre"] = ("gpt-2", gguf.GGUFValueType.STRING)
    fields["tokenizer.ggml.tokens"] = (own.tokens, array)
    fields["tokenizer.ggml.token_type"] = (own.types, array)
    tokenizer = open_checkpoint(write_raw(tmp_path / "few.gguf", fields, arrays(split))).tokenizer
    assert tokenizer is not None and tokenizer.vocab_size == 272
    assert tokenizer.decode([*own.encode("text", bos=False), *range(260, 272)]) == "text"
    assert tokenizer.pieces([260, 271]) == ["[PAD260]", "[PAD271]"]
    assert tokenizer.encode("[PAD260]", special=True, bos=False) == own.encode(
        "[PAD260]", bos=False
    )


@pytest.mark.parametrize("value", [None, 0, 1])
def test_a_gate_of_no_stated_kind_is_softmax(
    split: MemoryCheckpoint, tmp_path: Path, value: int | None
) -> None:
    fields = metadata_from_config(split.config)
    key = "deepseek2.expert_gating_func"
    del fields[key]
    if value is not None:
        fields[key] = (value, gguf.GGUFValueType.UINT32)
    config = open_checkpoint(write_raw(tmp_path / "gate.gguf", fields, arrays(split))).config
    assert (config.gating, config.score_correction) == ("softmax", True)


@pytest.mark.parametrize("counted", [True, False])
def test_layers_for_next_token_prediction_are_listed_not_run(
    split: MemoryCheckpoint, tmp_path: Path, counted: bool
) -> None:
    fields, tensors = metadata_from_config(split.config), arrays(split)
    extra = {n.replace("blk.2.", "blk.3."): v for n, v in tensors.items() if n.startswith("blk.2.")}
    extra["blk.3.nextn.eh_proj.weight"] = np.ones((64, 128), np.float32)
    u32 = gguf.GGUFValueType.UINT32
    if counted:
        fields["deepseek2.block_count"] = (4, u32)
        fields["deepseek2.nextn_predict_layers"] = (1, u32)
    read = open_checkpoint(write_raw(tmp_path / "nextn.gguf", fields, tensors | extra))
    assert isinstance(read, GGUFCheckpoint)
    assert (read.config.num_layers, read.config.num_nextn_layers) == (3, 1)
    assert read.nextn == list(extra) and read.unused == []
    assert "1 for next-token prediction, not run" in read._repr_mimebundle_()["text/html"]
    same_logits(read, split)


@pytest.mark.parametrize("config", [TINY_QWEN3MOE_CONFIG, TINY_OLMOE_CONFIG], ids=lambda c: c.name)
def test_other_families_round_trip(config: Any, tmp_path: Path) -> None:
    written = synthesize(config, formats={"*_exps*": "q4_k", "*": "q8_0"})
    read = open_checkpoint(save(written, tmp_path / "family.gguf"))
    assert read.config == config and read.names() == written.names()
    same_logits(read, written)
    norms = "blk.0.attn_q_norm.weight"
    assert read.tensor(norms).shape == ((32,) if config is TINY_QWEN3MOE_CONFIG else (64,))


# ------------------------------------------------------------------------- shards
@pytest.fixture(scope="module")
def shards(split: MemoryCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    fields = metadata_from_config(split.config)
    write_raw(folder / "model.gguf", fields, arrays(split), shard_size=20)
    return sorted(folder.iterdir())


def copied(shards: list[Path], folder: Path) -> list[Path]:
    return [Path(shutil.copy(path, folder)) for path in shards]


@pytest.mark.parametrize("pick", [lambda p: p[0], lambda p: p[2], lambda p: p[0].parent])
def test_any_shard_or_the_folder_names_the_model(
    shards: list[Path], split: MemoryCheckpoint, pick: Callable[[list[Path]], Path]
) -> None:
    read = open_checkpoint(pick(shards))
    assert isinstance(read, GGUFCheckpoint)
    assert len(shards) == 3 and read.files == tuple(shards) and read.name == "model.gguf"
    assert {read.tensor(n).source for n in read.names()} == {path.name for path in shards}
    assert read.fingerprint == split.fingerprint
    same_logits(read, split)


def test_missing_shards_are_named(shards: list[Path], tmp_path: Path) -> None:
    first, second, third = copied(shards, tmp_path)
    second.unlink()
    for named in (first, second, third, tmp_path):
        with pytest.raises(CheckpointError, match=f"3 shards, of which {second.name} is not in"):
            open_checkpoint(named)


@pytest.mark.parametrize("name", ["00000-of-00000", "00001-of-00000", "00004-of-00003"])
def test_a_number_that_no_shard_has(shards: list[Path], tmp_path: Path, name: str) -> None:
    path = tmp_path / f"model-{name}.gguf"
    shutil.copy(shards[0], path)
    for named in (path, tmp_path):
        with pytest.raises(CheckpointError, match=f"{path.name}: its name says shard {name[4]} of"):
            open_checkpoint(named)
        with pytest.raises(CheckpointError, match="its name says shard"):
            ktlab.plan(named)


def test_shards_of_different_models(shards: list[Path], tmp_path: Path) -> None:
    first, second, _ = copied(shards, tmp_path)
    other = synthesize(TINY_V2_CONFIG)
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    fields = metadata_from_config(other.config)
    write_raw(elsewhere / "model.gguf", fields, arrays(other), shard_size=19)
    shutil.copy(sorted(elsewhere.iterdir())[1], second)
    with pytest.raises(CheckpointError, match="not one model's"):
        open_checkpoint(first)
    shutil.copy(shards[2], second)
    with pytest.raises(CheckpointError, match="says it is shard 3 of 3, expected 2 of 3"):
        open_checkpoint(first)
