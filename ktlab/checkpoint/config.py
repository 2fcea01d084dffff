"""The hyper-parameters of a DeepSeek-architecture model, in DeepSeek's own terms."""

from dataclasses import dataclass
from typing import Literal

from ktlab.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN context extension, as DeepSeek's configuration writes it (DeepSeek-V2 paper, 3.1.4)."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything the stages need to know; nothing else is read from a file later.

    Sizes are counts of elements. `q_lora_rank` is 0 where queries are not compressed
    (DeepSeek-V2-Lite). `n_group` of 1 means that expert groups are off.
    Sources: DeepSeek-V2 (arXiv 2405.04434) 2.1-2.2, DeepSeek-V3 (2412.19437) 2.1.
    """

    name: str = "unnamed"
    vocab_size: int
    hidden_size: int
    num_layers: int
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
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_dim: int
    qk_rope_dim: int
    v_dim: int
    rms_eps: float
    rope_theta: float
    yarn: YarnScaling | None = None
    gating: Literal["softmax", "sigmoid"]
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
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
        if self.qk_rope_dim % 2:
            problems.append(f"qk_rope_dim {self.qk_rope_dim} is odd; RoPE turns pairs")
        if problems:
            raise CheckpointError(f"{self.name}: impossible configuration: " + "; ".join(problems))

    @property
    def qk_dim(self) -> int:
        """Length of one head's query: the part without position and the part with RoPE."""
        return self.qk_nope_dim + self.qk_rope_dim

    @property
    def selectable_experts(self) -> int:
        """How many experts one token can reach: those of `topk_group` groups."""
        return self.num_experts // self.n_group * self.topk_group

    @property
    def moe_layers(self) -> range:
        """Indices of the layers that have a router."""
        return range(self.first_dense_layers, self.num_layers)
