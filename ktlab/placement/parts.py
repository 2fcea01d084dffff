"""A model taken apart: components of layers, with their bytes, their work and what a token reads.

FLOP count a multiply and an add as two, for one token of decode after a context of S tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.facts import ModelFacts, TensorFacts
from ktlab.record import Record

COMPONENTS = (
    "embedding", "attention", "cache", "router", "experts", "shared", "dense", "output", "norms",
    "nextn",
)  # fmt: skip
"""In the order in which a token meets them; "cache" is what attention remembers, "nextn" layers for
next-token prediction, which are in the file and not run."""

_RULES = (
    (re.compile(r"token_embd\."), "embedding"),
    (re.compile(r"output\.weight"), "output"),
    (re.compile(r".*norm\.weight"), "norms"),
    (re.compile(r".*\.(ffn_gate_inp|exp_probs_b)\."), "router"),
    (re.compile(r".*\.ffn_\w+_exps\."), "experts"),
    (re.compile(r".*\.ffn_\w+_shexp\."), "shared"),
    (re.compile(r".*\.ffn_(gate|up|down)\."), "dense"),
    (re.compile(r".*\.attn_"), "attention"),
)
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Part(Record):
    """One component of one layer as it is stored; `layer` is None outside of layers."""

    layer: int | None
    component: str
    formats: tuple[str, ...]
    """The largest first."""
    parameters: int
    bytes: int
    flop_per_token: float
    bytes_per_token: float
    """Weights or cache that one token of decode reads."""

    @property
    def intensity(self) -> float:
        """FLOP per byte that a token reads."""
        return self.flop_per_token / self.bytes_per_token if self.bytes_per_token else 0.0

    @property
    def use(self) -> float:
        """FLOP of a token per number stored: KTransformers' measure of what belongs on a GPU, 0.075
        for DeepSeek-V2's experts (doc/en/deepseek-v2-injection.md)."""
        return self.flop_per_token / self.parameters if self.parameters else 0.0


def component_of(tensor: str, config: ModelConfig) -> tuple[int | None, str]:
    """(layer, component) of a tensor that the model uses, by its name in a GGUF."""
    found = _LAYER.match(tensor)
    layer = int(found[1]) if found else None
    if layer is not None and layer >= config.num_layers:
        return layer, "nextn"
    return layer, next(name for rule, name in _RULES if rule.match(tensor))


def grouped(facts: ModelFacts) -> dict[tuple[int | None, str], list[TensorFacts]]:
    """The tensors by (layer, component)."""
    groups: dict[tuple[int | None, str], list[TensorFacts]] = {}
    for tensor in facts.tensors:
        groups.setdefault(component_of(tensor.name, facts.config), []).append(tensor)
    return groups


def part(
    config: ModelConfig, layer: int | None, component: str, tensors: Sequence[TensorFacts]
) -> Part:
    """The tensors of one component of one layer, added up."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.format] = sizes.get(tensor.format, 0) + tensor.nbytes
    parameters, stored = sum(t.size for t in tensors), sum(t.nbytes for t in tensors)
    share = _share_of_a_token(config, component)
    matrices = sum(t.size for t in tensors if len(t.shape) > 1)
    computes = component not in ("embedding", "nextn")
    return Part(
        layer=layer,
        component=component,
        formats=tuple(sorted(sizes, key=lambda name: -sizes[name])),
        parameters=parameters,
        bytes=stored,
        flop_per_token=2.0 * matrices * share * computes,
        bytes_per_token=stored * share,
    )


def cache_part(
    config: ModelConfig, layer: int, *, form: str, context: int, element_bytes: int, format: str
) -> Part:
    """What attention of one layer remembers of `context` tokens, in one form."""
    elements = config.attention.cache_elements[form]
    size = elements * context
    return Part(
        layer=layer,
        component="cache",
        formats=(format,),
        parameters=size,
        bytes=size * element_bytes,
        flop_per_token=float(config.attention.flop_per_pair[form] * context),
        bytes_per_token=float((elements + size) * element_bytes),
    )


def _share_of_a_token(config: ModelConfig, component: str) -> float:
    """Which share of a component's weights one token reads."""
    shares = {
        "experts": config.top_k / config.num_experts,
        "embedding": 1 / config.vocab_size,
        "nextn": 0.0,
    }
    return shares.get(component, 1.0)
