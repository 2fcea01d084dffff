"""The hyper-parameters of a mixture-of-experts model, in DeepSeek's own terms.

Attention is data, not a name: `MLASizes` for DeepSeek's latent attention, `GQASizes` for the
grouped-query attention of Qwen3-MoE and OLMoE. Whoever builds, counts or draws a model looks at
which of the two it has; `architecture` is for files alone.
"""

from dataclasses import dataclass
from typing import Literal

from ktlab.errors import CheckpointError, StageError

Pairs = Literal["interleaved", "halves"]
"""Which numbers of a head RoPE turns together: (0, 1), (2, 3) ... or (0, R/2), (1, R/2 + 1) ..."""


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN context extension, as DeepSeek's configuration writes it (DeepSeek-V2 paper, 3.1.4)."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def problems(self) -> list[str]:
        """What cannot be; empty if nothing is wrong."""
        found = []
        if not self.factor > 0:
            found.append(f"yarn stretches by {self.factor}, expected more than 0")
        if not self.beta_fast >= self.beta_slow > 0:
            found.append(
                f"yarn blends between {self.beta_fast} and {self.beta_slow} turns, expected "
                "beta_fast >= beta_slow > 0"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class MLASizes:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, 2.1); counts of elements.

    `q_lora_rank` is 0 where queries are not compressed (DeepSeek-V2-Lite).
    """

    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_dim: int
    qk_rope_dim: int
    v_dim: int
    rope_pairs: Pairs = "interleaved"

    @property
    def qk_dim(self) -> int:
        """Length of one head's query: the part without position and the part with RoPE."""
        return self.qk_nope_dim + self.qk_rope_dim

    @property
    def rope_dim(self) -> int:
        """How many numbers of a head RoPE turns."""
        return self.qk_rope_dim

    @property
    def cache_elements(self) -> dict[str, int]:
        """{form: numbers cached per token and layer}: the latent, or every head's key and value."""
        return {
            "absorbed": self.kv_lora_rank + self.qk_rope_dim,
            "naive": self.num_heads * (self.qk_dim + self.v_dim),
        }

    @property
    def flop_per_pair(self) -> dict[str, int]:
        """{form: FLOP of a layer for one query and one cached position}: scores, then mixing."""
        return {
            "absorbed": 2 * self.num_heads * (2 * self.kv_lora_rank + self.qk_rope_dim),
            "naive": 2 * self.num_heads * (self.qk_dim + self.v_dim),
        }

    @property
    def flop_decompressing(self) -> int:
        """Of a layer for one cached position: its key and value for all heads, from the latent."""
        return 2 * self.num_heads * self.kv_lora_rank * (self.qk_nope_dim + self.v_dim)

    @property
    def most_absorbed(self) -> int | None:
        """Most tokens of a call for which the absorbed products over the latent are less work than
        making keys and values of it anew, which the tokens share; None: always."""
        pair = self.flop_per_pair
        saved = pair["absorbed"] - pair["naive"]
        if self.v_dim > self.qk_dim or saved <= 0:  # fused attention pads values to keys' length
            return None
        return self.flop_decompressing // saved

    def problems(self) -> list[str]:
        """What cannot be; empty if nothing is wrong."""
        odd = self.qk_rope_dim % 2
        return [f"qk_rope_dim {self.qk_rope_dim} is odd; RoPE turns pairs"] if odd else []

    def __str__(self) -> str:
        queries = f"q_lora {self.q_lora_rank}, " if self.q_lora_rank else ""
        return (
            f"MLA, {self.num_heads} heads, {queries}kv_lora {self.kv_lora_rank}, nope "
            f"{self.qk_nope_dim}, rope {self.qk_rope_dim}, v {self.v_dim}"
        )


@dataclass(frozen=True, kw_only=True)
class GQASizes:
    """Grouped-query attention (arXiv 2305.13245): `num_heads` queries share `num_kv_heads` keys.

    `qk_norm` says what an RMS norm is taken over before RoPE: each "head" (Qwen3), the whole
    "projection" (OLMoE), or nothing ("none").
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: Literal["none", "head", "projection"] = "none"
    rope_pairs: Pairs = "halves"

    @property
    def qk_dim(self) -> int:
        """Length of one head's query; keys and values are as long."""
        return self.head_dim

    @property
    def rope_dim(self) -> int:
        """How many numbers of a head RoPE turns: all of them."""
        return self.head_dim

    @property
    def cache_elements(self) -> dict[str, int]:
        """{form: numbers cached per token and layer}: the key heads' keys and values."""
        return {"grouped": 2 * self.num_kv_heads * self.head_dim}

    @property
    def flop_per_pair(self) -> dict[str, int]:
        """{form: FLOP of a layer for one query and one cached position}: scores, then mixing."""
        return {"grouped": 4 * self.num_heads * self.head_dim}

    def problems(self) -> list[str]:
        """What cannot be; empty if nothing is wrong."""
        found = []
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            found.append(f"{self.num_heads} heads do not share {self.num_kv_heads} key heads")
        if self.head_dim % 2:
            found.append(f"head_dim {self.head_dim} is odd; RoPE turns pairs")
        return found

    def __str__(self) -> str:
        norm = "" if self.qk_norm == "none" else f", qk norm over each {self.qk_norm}"
        return (
            f"GQA, {self.num_heads} heads over {self.num_kv_heads} key heads of "
            f"{self.head_dim}{norm}"
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything the stages need to know; nothing else is read from a file later.

    Sizes are counts of elements. `n_group` of 1 means that expert groups are off.
    Sources: DeepSeek-V2 (arXiv 2405.04434) 2.1-2.2, DeepSeek-V3 (2412.19437) 2.1,
    Qwen3 (2505.09388), OLMoE (2409.02060).
    """

    name: str = "unnamed"
    vocab_size: int
    hidden_size: int
    num_layers: int
    """Layers that run; next-token-prediction layers come after them and are not counted."""
    first_dense_layers: int
    context_length: int
    intermediate_size: int
    """Width of the dense layers' feed-forward network."""
    num_experts: int
    num_shared_experts: int
    top_k: int
    """Routed experts a token, as trained."""
    expert_size: int
    """Width of one routed expert."""
    attention: MLASizes | GQASizes
    rms_eps: float
    rope_theta: float
    yarn: YarnScaling | None = None
    gating: Literal["softmax", "sigmoid"]
    score_correction: bool = False
    """Whether experts are chosen by score plus a learnt bias (e_score_correction_bias)."""
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    tied_output: bool = False
    """Whether the embedding serves as output matrix too: then there is no output.weight."""
    num_nextn_layers: int = 0
    """Next-token-prediction layers that the file lists behind `num_layers`; they are not run."""
    architecture: str = "deepseek2"

    def __post_init__(self) -> None:
        problems = []
        if self.num_experts % self.n_group:
            problems.append(f"{self.num_experts} experts do not divide into {self.n_group} groups")
        if not 1 <= self.topk_group <= self.n_group:
            problems.append(f"topk_group {self.topk_group} is outside 1..{self.n_group}")
        if not 1 <= self.top_k <= self.selectable_experts:
            problems.append(f"top_k {self.top_k} is outside 1..{self.selectable_experts}")
        if not 0 <= self.first_dense_layers <= self.num_layers:
            problems.append(
                f"{self.first_dense_layers} leading dense layers of {self.num_layers} layers"
            )
        if not self.rope_theta > 1:
            problems.append(f"rope_theta is {self.rope_theta}, expected more than 1")
        problems += self.attention.problems()
        if self.yarn is not None:
            problems += self.yarn.problems()
        if problems:
            raise CheckpointError(f"{self.name}: impossible configuration: " + "; ".join(problems))

    @property
    def num_heads(self) -> int:
        """Query heads of a layer."""
        return self.attention.num_heads

    @property
    def mla(self) -> MLASizes:
        """The sizes of latent attention; `StageError` where the model has another kind."""
        if isinstance(self.attention, MLASizes):
            return self.attention
        raise StageError(f"{self.name} has no latent attention: {self.attention}")

    @property
    def selectable_experts(self) -> int:
        """How many experts one token can reach: those of `topk_group` groups."""
        return self.num_experts // self.n_group * self.topk_group

    @property
    def moe_layers(self) -> range:
        """Indices of the layers that have a router."""
        return range(self.first_dense_layers, self.num_layers)
