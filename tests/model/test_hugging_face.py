"""Folders that transformers wrote: logits equal to its own, tensors equal to those of a GGUF."""

import gc
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import ktlab
from ktlab.checkpoint import ModelConfig, open_checkpoint, write_gguf
from ktlab.checkpoint.hugging_face import SafetensorsCheckpoint
from ktlab.checkpoint.hugging_face_names import origin
from ktlab.checkpoint.names import expected_tensors
from ktlab.checkpoint.synthesis import synthesize
from ktlab.errors import CheckpointError, FormatError
from ktlab.model.model import Model
from ktlab.quantization import get_format
from tests.model.peer import transformers_model
from tests.model.test_parity import CONFIGS, some_ids

NAMES = (
    "v3",
    "v3 without q_lora",
    "v3 with yarn, two mscales",
    "v3 with tied output",
    "v2-lite",
    "v2 with groups",
    "qwen3-moe",
    "qwen3-moe with yarn",
    "olmoe",
    "olmoe, keys shared",
)


@cache
def peer(name: str) -> PreTrainedModel:
    return transformers_model(synthesize(CONFIGS[name], seed=7))


def saved(name: str, folder: Path, dtype: torch.dtype, **options: Any) -> Path:
    """What `save_pretrained` writes of the random model, which stays float32 itself."""
    model = peer(name)
    weights = {k: v.to(dtype) for k, v in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights, **options)
    return folder


def without_unused(config: ModelConfig) -> ModelConfig:
    """Where no layer is dense, the width of dense layers means nothing."""
    return config if config.first_dense_layers else replace(config, intermediate_size=1)


def mean_kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    expected, found = expected.log_softmax(-1), found.log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def check_logits(folder: Path, model: Model) -> None:
    """Against transformers' own reading of the folder, in float32."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = some_ids(model.config, 100)  # beyond the original context of those with yarn
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    with model.override(backend="torch"):
        found = model.forward(ids)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert mean_kl(expected, found) < 1e-6
    # Kernels round activations, which on random weights now and then selects another expert.
    assert mean_kl(expected, model.forward(ids)) < 2e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["one file", "shards", "stacked"])
def test_logits_of_a_saved_model(name: str, layout: str, tmp_path: Path) -> None:
    layouts: dict[str, dict[str, Any]] = {
        "one file": {},
        "shards": {"max_shard_size": "200KB"},
        "stacked": {"save_original_format": False},  # experts as transformers 5 has them in memory
    }
    dtype = torch.float32 if layout == "one file" else torch.bfloat16
    folder = saved(name, tmp_path / "model", dtype, **layouts[layout])
    files = len(list(folder.glob("*.safetensors")))
    assert files > 3 if layout == "shards" else files == 1
    model = ktlab.load(folder)
    assert without_unused(model.config) == without_unused(replace(CONFIGS[name], name="model"))
    assert isinstance(model.checkpoint, SafetensorsCheckpoint)
    formats = set(model.checkpoint.formats)
    assert formats == {"f32"} if dtype == torch.float32 else formats >= {"bf16"}
    check_logits(folder, model)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_rope_on_halves_of_a_head(tmp_path: Path) -> None:
    folder = saved("v3", tmp_path / "model", torch.float32)
    edit_config(folder, rope_interleave=False)
    model = ktlab.load(folder)
    assert model.config.mla.rope_pairs == "halves"
    check_logits(folder, model)


def test_tied_output(tmp_path: Path) -> None:
    folder = saved("v3", tmp_path / "model", torch.bfloat16)
    edit_config(folder, tie_word_embeddings=True)
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    model = ktlab.load(folder)
    assert model.config.tied_output
    check_logits(folder, model)


def test_next_token_prediction_layers_are_listed_and_not_run(tmp_path: Path) -> None:
    folder = saved("v3", tmp_path / "model", torch.bfloat16)

    def add(weights: dict[str, torch.Tensor]) -> None:
        for name in [n for n in weights if n.startswith("model.layers.2.")]:
            weights[name.replace("layers.2", "layers.3")] = weights[name].clone()
        weights["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128)

    edit_weights(folder, add)
    model = ktlab.load(folder)
    assert model.config.num_layers == 3 and model.config.num_nextn_layers == 1
    assert isinstance(model.checkpoint, SafetensorsCheckpoint)
    assert "model.layers.3.eh_proj.weight" in model.checkpoint.unused
    assert all(name.startswith("model.layers.3.") for name in model.checkpoint.unused)
    check_logits(folder, model)


def test_configurations_as_deepseek_and_moonshot_write_them(tmp_path: Path) -> None:
    """`rope_scaling` with `type`, `rope_theta` beside it, the gate spelt out, nulls."""
    name = "v3 with yarn, two mscales"
    folder = saved(name, tmp_path / "model", torch.float32)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    old = {k: v for k, v in rope.items() if k != "rope_type"} | {"type": "yarn"}
    gate = dict(scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, ep_size=1)
    edit_config(folder, rope_parameters=..., rope_theta=theta, rope_scaling=old, **gate)
    check_logits(folder, ktlab.load(folder))  # transformers reads both forms as well
    edit_config(folder, model_type="kimi_k2")
    assert ktlab.load(folder).config == replace(CONFIGS[name], name="model")

    folder = saved("v2-lite", tmp_path / "lite", torch.float32)
    edit_config(folder, rope_parameters=..., rope_scaling=None, rope_theta=10000)
    edit_config(folder, n_group=None, topk_group=1, q_lora_rank=None, scoring_func="softmax")
    assert ktlab.load(folder).config == replace(CONFIGS["v2-lite"], name="lite")


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("format", ["bf16", "f32"])
def test_the_same_tensors_as_from_a_gguf(format: str, stacked: bool, tmp_path: Path) -> None:
    random = synthesize(CONFIGS["v3"], seed=7, formats=format)
    tensors = {name: random.tensor(name) for name in random.names()}
    gguf = open_checkpoint(write_gguf(tmp_path / "m.gguf", random.config, tensors))
    dtype = torch.bfloat16 if format == "bf16" else torch.float32
    folder = tmp_path / "model"
    model = transformers_model(random)
    weights = {
        name: value if value.ndim < 2 or name.endswith("gate.weight") else value.to(dtype)
        for name, value in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=weights, save_original_format=not stacked)
    found = open_checkpoint(folder)
    assert found.names() == gguf.names()
    for name in gguf.names():
        ours, theirs = found.tensor(name), gguf.tensor(name)
        assert (ours.format, ours.shape) == (theirs.format, theirs.shape)
        np.testing.assert_array_equal(ours.blocks, theirs.blocks, err_msg=name)
    # Nothing is copied where the bytes lie in the file as they are needed.
    mapped = [n for n in found.names() if not found.tensor(n).blocks.flags.writeable]
    assert "blk.1.attn_v_b.weight" in mapped and "token_embd.weight" in mapped
    assert ("blk.1.ffn_up_exps.weight" in mapped) == stacked
    assert "blk.1.attn_k_b.weight" not in mapped


# FP8 ---------------------------------------------------------------------------------------------

FP8_CONFIG = replace(
    CONFIGS["v3"],
    hidden_size=256,
    expert_size=160,  # neither its rows nor its columns divide into blocks of 128
    intermediate_size=384,
    attention=replace(CONFIGS["v3"].mla, kv_lora_rank=128, qk_nope_dim=48, v_dim=96),
)


def fp8_folder(folder: Path, config: ModelConfig) -> tuple[Path, Path]:
    """Two folders, FP8 with block scales and the same values in float32."""
    plain, fp8 = folder / "plain", folder / "fp8"
    transformers_model(synthesize(config, seed=3)).save_pretrained(plain)
    weights: dict[str, torch.Tensor] = load_file(plain / "model.safetensors")
    stored = {}
    for name, values in weights.items():
        stored[name] = values
        if not name.endswith("proj.weight") and not name.endswith("mqa.weight"):
            continue
        codes = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
        rows, cols = (-(-n // 128) for n in values.shape)
        scales = torch.empty(rows, cols)
        decoded = torch.empty_like(values)
        for i in range(rows):
            for j in range(cols):
                block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                scales[i, j] = values[block].abs().max() / 448
                codes[block] = (values[block] / scales[i, j]).to(torch.float8_e4m3fn)
                decoded[block] = codes[block].float() * scales[i, j]
        stored[name], stored[f"{name}_scale_inv"] = codes, scales
        weights[name] = decoded
    fp8.mkdir()
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, fp8 / "model.safetensors", metadata={"format": "pt"})
    (fp8 / "config.json").write_text((plain / "config.json").read_text())
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    edit_config(fp8, quantization_config=method | {"activation_scheme": "dynamic"})
    return plain, fp8


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return fp8_folder(tmp_path_factory.mktemp("fp8"), FP8_CONFIG)


def test_fp8_with_block_scales(fp8: tuple[Path, Path]) -> None:
    plain, folder = fp8
    model, floats = ktlab.load(folder), open_checkpoint(plain)
    formats = {}
    for name in floats.names():
        tensor = model.checkpoint.tensor(name)
        formats[name.split(".", 2)[-1]] = tensor.format.name
        np.testing.assert_array_equal(tensor.dequantize(), floats.tensor(name).dequantize(), name)
    assert formats["ffn_up_exps.weight"] == formats["attn_v_b.weight"] == "fp8_e4m3"
    assert formats["ffn_down_exps.weight"] == "f32"  # rows of 160
    assert formats["ffn_gate_inp.weight"] == "f32"
    check_logits(plain, model)


@pytest.mark.parametrize("wanted", ["q8_0", "int8_channel"])
def test_fp8_is_quantized_like_its_values(wanted: str, fp8: tuple[Path, Path]) -> None:
    model, floats = ktlab.load(fp8[1], quantize=wanted), open_checkpoint(fp8[0])
    for name in floats.names():
        tensor, values = model.checkpoint.tensor(name), floats.tensor(name)
        np.testing.assert_array_equal(tensor.blocks, values.requantize(tensor.format).blocks)
    formats = {format for _, format, _, _ in model.checkpoint.listing()}
    assert formats == {wanted, "f32"} | ({"f16"} if wanted == "q8_0" else set())  # k_b: rows of 48


# Quantized while loading -------------------------------------------------------------------------


def random_folder(folder: Path, like: Path, config: ModelConfig) -> Path:
    """A folder of bf16 weights for `config`, experts one by one, in files of two layers."""
    folder.mkdir()
    file = torch.randn(2048, 2048, generator=torch.manual_seed(1)).bfloat16().reshape(-1)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in expected_tensors(config).items():
        made_of = origin(config, name, shape, ())
        for stored in made_of.names:
            size = math.prod(made_of.shape)
            values = (file.repeat(-(-size // len(file)))[:size] / 30).reshape(made_of.shape)
            files.setdefault(name.split(".")[1], {})[stored] = values
    for number, weights in enumerate(files.values()):
        save_file(weights, folder / f"part{number}.safetensors")
    (folder / "config.json").write_text((like / "config.json").read_text())
    edit_config(
        folder,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.expert_size,
        n_routed_experts=config.num_experts,
        num_hidden_layers=config.num_layers,
    )
    return folder


LARGE_CONFIG = replace(
    CONFIGS["v3"], num_layers=2, hidden_size=512, expert_size=512, num_experts=64
)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 million weights, 100 MB."""
    folder = tmp_path_factory.mktemp("large")
    return random_folder(folder / "large", saved("v3", folder / "v3", torch.float32), LARGE_CONFIG)


@pytest.mark.parametrize("wanted", ["int8_channel", "int4_group128"])
def test_never_two_copies_of_a_model(wanted: str, large: Path) -> None:
    process = psutil.Process()
    ktlab.load(large, quantize={"blk.0.*": wanted})  # whatever is loaded once
    stored = sum(f.stat().st_size for f in large.glob("*.safetensors"))
    gc.collect()
    before, seen = process.memory_info().rss, []
    model = ktlab.load(
        large, quantize=wanted, progress=lambda done, total: seen.append(process.memory_info().rss)
    )
    grown = max(seen) - before
    assert stored > 100e6 and model.nbytes < 0.52 * stored
    # The result, and no more of the files' pages than a few experts have.
    assert grown < model.nbytes + 0.2 * stored
    assert model.experts[0].format == wanted


def test_a_folder_is_open_before_anything_is_read(large: Path) -> None:
    process = psutil.Process()
    gc.collect()
    before, start = process.memory_info().rss, perf_counter()
    model = ktlab.load(large)
    assert perf_counter() - start < 1
    assert process.memory_info().rss - before < 20e6
    assert model.nbytes > 100e6


def test_quantized_by_name_with_progress(tmp_path: Path) -> None:
    folder = saved("v3", tmp_path / "model", torch.bfloat16)
    seen: list[tuple[float, float]] = []
    model = ktlab.load(
        folder,
        quantize={"*_exps*": "int4_group32", "*attn*": "q8_0"},
        progress=lambda done, total: seen.append((done, total)),
    )
    plain = open_checkpoint(folder)
    for name in plain.names():
        found, source = model.checkpoint.tensor(name), plain.tensor(name)
        wanted = "int4_group32" if "_exps" in name else "q8_0" if "attn" in name else "bf16"
        if len(source.shape) == 1 or "gate_inp" in name:
            wanted = "f32"
        assert found.format == get_format(wanted)
        np.testing.assert_array_equal(found.blocks, source.requantize(wanted).blocks)
    done, totals = zip(*seen, strict=True)
    assert set(totals) == {done[-1]} and list(done) == sorted(done)
    assert len(seen) > 16 * 6  # expert by expert
    listing = {name: (f, n) for name, f, _, n in model.checkpoint.listing()}
    assert listing["blk.1.ffn_up_exps.weight"] == ("int4_group32", 16 * 32 * 64 * 18 // 32)


def test_a_bar_only_where_somebody_looks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("v3", tmp_path / "model", torch.bfloat16)
    capsys.readouterr()
    ktlab.load(folder, quantize="q8_0")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("ktlab.progress.in_notebook", lambda: True)
    monkeypatch.setattr("ktlab.progress.EVERY_S", 0)
    ktlab.load(folder, quantize="q8_0")
    shown = capsys.readouterr().err
    assert "converting model [" in shown and "left" in shown and "took" in shown


def test_packed_weights_are_cached_for_a_folder(tmp_path: Path) -> None:
    folder = saved("v3", tmp_path / "model", torch.bfloat16)
    for how in ("packed", "mapped from the cache"):
        model = ktlab.load(folder, quantize="int8_channel")
        report = model.pack(cache=tmp_path / "cache")
        assert {tensor.how for tensor in report.tensors} == {how}
    edit_weights(folder, lambda weights: weights["lm_head.weight"].mul_(2))
    with pytest.warns(UserWarning, match="packed from another model"):
        report = ktlab.load(folder, quantize="int8_channel").pack(cache=tmp_path / "cache")
    assert {tensor.how for tensor in report.tensors} == {"packed"}


def test_tokenizer_beside_the_weights(tmp_path: Path) -> None:
    folder = saved("v3", tmp_path / "model", torch.bfloat16)
    assert open_checkpoint(folder).tokenizer is None
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    for size in (264, 272, 300):
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet,
            show_progress=False,
        )  # fmt: skip
        bpe.train_from_iterator(["the theory then thaws, they thought; " * 9] * 9, trainer)
        bpe.save(str(folder / "tokenizer.json"))
        if size == 272:
            tokenizer = ktlab.load(folder).tokenizer
            assert tokenizer.encode("they thaw", bos=False) == bpe.encode("they thaw").ids
        if size == 264:  # DeepSeek's folders have more rows than tokens; any may be chosen
            padded = ktlab.load(folder).tokenizer
            assert padded.tokens[264:] == [f"[PAD{i}]" for i in range(264, 272)]
            assert padded.decode([*bpe.encode("thaw").ids, 264, 271]) == "thaw"
    with pytest.raises(CheckpointError, match="tokenizer has 2.. tokens, the embedding only 272"):
        _ = ktlab.load(folder).tokenizer


def test_stopped_in_the_middle(large: Path) -> None:
    files = sorted(large.iterdir())

    def stop(done: float, total: float) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    with pytest.raises(KeyboardInterrupt):
        ktlab.load(large, quantize="int8_channel", progress=stop)
    gc.collect()
    assert process.memory_info().rss - before < 20e6
    assert sorted(large.iterdir()) == files


@pytest.mark.parametrize(
    ("quantize", "expected"),
    [
        ("q4_km", 'unknown format "q4_km"'),
        ("iq1_m", "can be read here but not written"),
        ({"*expert*": "q8_0"}, r'quantize="\*expert\*" matches no matrix'),
    ],
)
def test_impossible_quantization(quantize: object, expected: str, tmp_path: Path) -> None:
    folder = saved("v3", tmp_path / "model", torch.bfloat16)
    with pytest.raises(FormatError, match=expected):
        ktlab.load(folder, quantize=quantize)  # type: ignore[arg-type]


def test_nothing_to_quantize() -> None:
    with pytest.raises(FormatError, match="tiny: nothing to quantize, its matrices are q8_0"):
        ktlab.load("tiny", quantize="q4_0")
