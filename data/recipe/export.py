"""Write a checkpoint of the tiny model as a GGUF file, architecture `deepseek2`.

    python data/recipe/export.py .build/train/last.pt --out data/tiny.gguf --format q8_0

The layout is the one llama.cpp reads: attention in its absorbed form, where all heads share the
latent as one key-value head and the up-projection is split into `attn_k_b` and `attn_v_b`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from model import Config
from numpy.typing import NDArray
from torch import Tensor

DESCRIPTION = (
    "A small mixture-of-experts language model in the architecture of DeepSeek-V3, trained from "
    "scratch on English, German, Russian, Chinese, Python and C text, to study routing on."
)
FILE_TYPES = {
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
}


def write_sizes(writer: gguf.GGUFWriter, c: Config) -> None:
    writer.add_vocab_size(c.vocab)
    writer.add_block_count(c.layers)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.hidden)
    writer.add_feed_forward_length(c.dense_width)
    writer.add_leading_dense_block_count(c.dense_layers)
    writer.add_layer_norm_rms_eps(c.eps)

    writer.add_head_count(c.heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(c.kv_rank + c.rope)
    writer.add_value_length(c.kv_rank)
    writer.add_key_length_mla(c.nope + c.rope)
    writer.add_value_length_mla(c.value)
    writer.add_q_lora_rank(c.q_rank)
    writer.add_kv_lora_rank(c.kv_rank)
    writer.add_rope_dimension_count(c.rope)
    writer.add_rope_freq_base(c.theta)

    writer.add_expert_count(c.experts)
    writer.add_expert_used_count(c.chosen)
    writer.add_expert_shared_count(c.shared_experts)
    writer.add_expert_feed_forward_length(c.expert_width)
    writer.add_expert_group_count(c.groups)
    writer.add_expert_group_used_count(c.chosen_groups)
    writer.add_expert_weights_scale(c.routed_scale)
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], vocab: int) -> None:
    """Byte-level BPE; ids 0, 1 and 2 begin a text, end it, and pad."""
    words = {index: word for word, index in tokenizer["model"]["vocab"].items()}
    words |= {special["id"]: special["content"] for special in tokenizer["added_tokens"]}
    control = {special["id"] for special in tokenizer["added_tokens"]}
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_list([words[index] for index in range(vocab)])
    writer.add_token_types(
        [
            gguf.TokenType.CONTROL if index in control else gguf.TokenType.NORMAL
            for index in range(vocab)
        ]
    )
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def tensors(model: dict[str, Tensor], c: Config) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in the file."""
    yield "token_embd.weight", model["embedding"]
    yield "output_norm.weight", model["norm.weight"]
    yield "output.weight", model["head"]
    for index in range(c.layers):
        ours, block = f"layers.{index}.", f"blk.{index}."
        attention, feed = ours + "attention.", ours + "feed_forward."
        yield block + "attn_norm.weight", model[ours + "attention_norm.weight"]
        yield block + "attn_q_a.weight", model[attention + "q_a"]
        yield block + "attn_q_a_norm.weight", model[attention + "q_a_norm.weight"]
        yield block + "attn_q_b.weight", model[attention + "q_b"]
        yield block + "attn_kv_a_mqa.weight", model[attention + "kv_a"]
        yield block + "attn_kv_a_norm.weight", model[attention + "kv_a_norm.weight"]
        kv_HdL = model[attention + "kv_b"].view(c.heads, c.nope + c.value, c.kv_rank)
        # Keys are absorbed into the query, which multiplies by the transpose.
        yield block + "attn_k_b.weight", kv_HdL[:, : c.nope].transpose(1, 2)
        yield block + "attn_v_b.weight", kv_HdL[:, c.nope :]
        yield block + "attn_output.weight", model[attention + "out"]
        yield block + "ffn_norm.weight", model[ours + "feed_forward_norm.weight"]
        if index < c.dense_layers:
            yield from feed_forward(model, feed, block, "")
            continue
        yield block + "ffn_gate_inp.weight", model[feed + "router"]
        yield block + "exp_probs_b.bias", model[feed + "bias_E"]
        yield from feed_forward(model, feed, block, "_exps")
        yield from feed_forward(model, feed + "shared.", block, "_shexp")


def feed_forward(
    model: dict[str, Tensor], ours: str, block: str, suffix: str
) -> Iterator[tuple[str, Tensor]]:
    gate, up = model[ours + "gate_up"].chunk(2, -2)
    yield f"{block}ffn_gate{suffix}.weight", gate
    yield f"{block}ffn_up{suffix}.weight", up
    yield f"{block}ffn_down{suffix}.weight", model[ours + "down"]


def stored_type(name: str, values: NDArray[np.float32], wanted: Type) -> Type:
    """Vectors and the router stay float32; rows that no Q8_0 block divides become float16."""
    if values.ndim == 1 or "ffn_gate_inp" in name:
        return Type.F32
    if wanted == Type.Q8_0 and values.shape[-1] % 32:
        return Type.F16
    return wanted


def export(checkpoint: Path, tokenizer: Path, out: Path, form: str) -> None:
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    c, (wanted, file_type) = Config(**saved["config"]), FILE_TYPES[form]
    writer = gguf.GGUFWriter(out, "deepseek2")
    writer.add_name("ktlab tiny")
    writer.add_description(DESCRIPTION)
    writer.add_license("apache-2.0")
    writer.add_languages(["en", "de", "ru", "zh"])
    writer.add_size_label(f"{c.experts}x0.5M")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_sizes(writer, c)
    write_tokenizer(writer, json.loads(tokenizer.read_text()), c.vocab)
    for name, tensor in tensors(saved["model"], c):
        values = tensor.float().contiguous().numpy()
        kind = stored_type(name, values, wanted)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path("data/tiny.gguf"))
    parser.add_argument("--tokenizer", type=Path, default=Path(".build/corpus/tokenizer.json"))
    parser.add_argument("--format", choices=FILE_TYPES, default="q8_0")
    args = parser.parse_args()
    export(args.checkpoint, args.tokenizer, args.out, args.format)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
