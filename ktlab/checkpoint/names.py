"""Which tensors a mixture-of-experts model has, under which names, in which shapes.

Names are GGUF's (llama.cpp, gguf-py `constants.py`); shapes are NumPy's, the reverse of what a
GGUF file writes. Which there are follows from the configuration alone, not from its architecture's
name. Letters: D hidden, V vocabulary, E experts, F expert width, H heads, G key heads, C
kv_lora_rank, R rope, N nope, d head_dim.
"""

from ktlab.checkpoint.config import GQASizes, MLASizes, ModelConfig

Shape = tuple[int, ...]


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor that a model of this configuration must have: {name: shape}, in file order."""
    D, V = config.hidden_size, config.vocab_size
    tensors: dict[str, Shape] = {
        "token_embd.weight": (V, D),
        "output_norm.weight": (D,),
    }
    if not config.tied_output:
        tensors["output.weight"] = (V, D)
    for layer in range(config.num_layers):
        for part, shape in layer_tensors(config, layer).items():
            tensors[f"blk.{layer}.{part}"] = shape
    return tensors


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """The tensors of one layer, without their `blk.{layer}.` prefix."""
    is_dense = layer < config.first_dense_layers
    mlp = _dense_tensors(config) if is_dense else _moe_tensors(config)
    return {"attn_norm.weight": (config.hidden_size,)} | _attention_tensors(config) | mlp


def _attention_tensors(config: ModelConfig) -> dict[str, Shape]:
    sizes = config.attention
    if isinstance(sizes, MLASizes):
        return _latent_tensors(sizes, config.hidden_size)
    return _grouped_tensors(sizes, config.hidden_size)


def _latent_tensors(sizes: MLASizes, D: int) -> dict[str, Shape]:
    H, C, R, N = sizes.num_heads, sizes.kv_lora_rank, sizes.qk_rope_dim, sizes.qk_nope_dim
    query: dict[str, Shape]
    if sizes.q_lora_rank:
        query = {
            "attn_q_a.weight": (sizes.q_lora_rank, D),
            "attn_q_a_norm.weight": (sizes.q_lora_rank,),
            "attn_q_b.weight": (H * sizes.qk_dim, sizes.q_lora_rank),
        }
    else:
        query = {"attn_q.weight": (H * sizes.qk_dim, D)}
    return query | {
        "attn_kv_a_mqa.weight": (C + R, D),
        "attn_kv_a_norm.weight": (C,),
        "attn_k_b.weight": (H, C, N),
        "attn_v_b.weight": (H, sizes.v_dim, C),
        "attn_output.weight": (D, H * sizes.v_dim),
    }


def _grouped_tensors(sizes: GQASizes, D: int) -> dict[str, Shape]:
    H, G, d = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    tensors: dict[str, Shape] = {
        "attn_q.weight": (H * d, D),
        "attn_k.weight": (G * d, D),
        "attn_v.weight": (G * d, D),
        "attn_output.weight": (D, H * d),
    }
    if sizes.qk_norm != "none":
        whole = sizes.qk_norm == "projection"
        tensors["attn_q_norm.weight"] = (H * d,) if whole else (d,)
        tensors["attn_k_norm.weight"] = (G * d,) if whole else (d,)
    return tensors


def _dense_tensors(config: ModelConfig) -> dict[str, Shape]:
    D, width = config.hidden_size, config.intermediate_size
    return {"ffn_norm.weight": (D,)} | _swiglu(D, width, "")


def _moe_tensors(config: ModelConfig) -> dict[str, Shape]:
    D, E, F = config.hidden_size, config.num_experts, config.expert_size
    tensors: dict[str, Shape] = {"ffn_norm.weight": (D,), "ffn_gate_inp.weight": (E, D)}
    if config.score_correction:
        tensors["exp_probs_b.bias"] = (E,)
    tensors |= {
        "ffn_gate_exps.weight": (E, F, D),
        "ffn_up_exps.weight": (E, F, D),
        "ffn_down_exps.weight": (E, D, F),
    }
    if config.num_shared_experts:
        tensors |= _swiglu(D, config.num_shared_experts * F, "_shexp")
    return tensors


def _swiglu(D: int, width: int, suffix: str) -> dict[str, Shape]:
    return {
        f"ffn_gate{suffix}.weight": (width, D),
        f"ffn_up{suffix}.weight": (width, D),
        f"ffn_down{suffix}.weight": (D, width),
    }


def fused_kv_b(sizes: MLASizes) -> Shape:
    """Shape of `attn_kv_b.weight`, which older files have in place of attn_k_b and attn_v_b."""
    rows = sizes.num_heads * (sizes.qk_nope_dim + sizes.v_dim)
    return (rows, sizes.kv_lora_rank)


def is_quantizable(name: str, shape: Shape) -> bool:
    """Whether llama.cpp would store this tensor in fewer than 32 bits.

    Norms and biases (one axis) and the router's gate always stay float32.
    """
    return len(shape) > 1 and "ffn_gate_inp" not in name
