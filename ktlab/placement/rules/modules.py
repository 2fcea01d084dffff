"""A model as the tree of modules that rule files speak of: Hugging Face's names and classes.

Names are transformers' (`model.layers.3.mlp.experts`), classes those of its modeling files and of
KTransformers' copies of them. A rule file names one of the two DeepSeek files, so a module answers
to both. What is ours of a module hangs on it: a bank, an attention, matrices.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ktlab.attention.mla import MLAWeights
from ktlab.errors import nearest
from ktlab.kernels.linear import Linear
from ktlab.model.block import Layer, MoEBlock
from ktlab.model.model import Model


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one architecture's classes are called; `prefixes` times the words below."""

    prefixes: tuple[str, ...]
    moe: tuple[str, ...]
    gates: tuple[str, ...]
    """Classes of the router's module."""
    ropes: tuple[str, ...]
    yarn_ropes: tuple[str, ...] = ()
    """Where the context is extended by yarn: subclasses of those above."""
    rope_in_attention: bool = False

    def classes(self, *words: str) -> tuple[str, ...]:
        """ "Attention" -> DeepseekV2Attention, DeepseekV3Attention."""
        return tuple(prefix + word for prefix in self.prefixes for word in words)


FAMILIES: Mapping[str, Family] = {
    "deepseek2": Family(
        prefixes=("DeepseekV2", "DeepseekV3"),
        moe=("MoE", "Moe"),
        gates=("MoEGate", "DeepseekV2MoEGate", "DeepseekV2TopkRouter", "DeepseekV3TopkRouter"),
        ropes=("DeepseekV2RotaryEmbedding", "DeepseekV3RotaryEmbedding"),
        yarn_ropes=("DeepseekV2YarnRotaryEmbedding", "DeepseekV3YarnRotaryEmbedding"),
        rope_in_attention=True,
    ),
    "qwen3moe": Family(
        prefixes=("Qwen3Moe",),
        moe=("SparseMoeBlock",),
        gates=("torch.nn.Linear", "Qwen3MoeTopKRouter"),
        # KTransformers' rule file for Qwen3 names the class that its module takes from Qwen2.
        ropes=("Qwen3MoeRotaryEmbedding", "Qwen2MoeRotaryEmbedding"),
    ),
    "olmoe": Family(
        prefixes=("Olmoe",),
        moe=("SparseMoeBlock",),
        gates=("torch.nn.Linear", "OlmoeTopKRouter"),
        ropes=("OlmoeRotaryEmbedding",),
    ),
}
_WORDS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "Experts", "MLP", "RMSNorm")
_PACKAGES = ("ktransformers.models.", "transformers.models.")
LINEAR, EMBEDDING, LIST, ACTIVATION = (
    f"torch.nn.{name}" for name in ("Linear", "Embedding", "ModuleList", "SiLU")
)
_MATRICES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def _known_names() -> frozenset[str]:
    found: set[str] = set()
    for family in FAMILIES.values():
        found.update(family.classes(*_WORDS, *family.moe))
        found.update((*family.gates, *family.ropes, *family.yarn_ropes))
    return frozenset(name for name in found if "." not in name)


KNOWN_NAMES = _known_names()


def known_class(dotted: str) -> bool:
    """Whether a class could match anything: a module of torch, or one of a modeling file.

    The class's name counts, not its file, which KTransformers renamed between releases. Classes of
    models that we don't have are fine if their file says so: such a rule matches nothing.
    """
    module, _, name = dotted.rpartition(".")
    if dotted.startswith("torch.nn."):
        found = getattr(torch.nn, name, None)
        return isinstance(found, type) and issubclass(found, torch.nn.Module)
    if not module.startswith(_PACKAGES):
        return False
    return name in KNOWN_NAMES or not _is_ours(module)


def _is_ours(module: str) -> bool:
    """Whether a modeling file is that of an architecture that we have."""
    file = module.rpartition(".")[2].removeprefix("custom_").removeprefix("modeling_")
    return file.replace("_", "") in ("deepseek", "deepseekv2", "deepseekv3", "qwen3moe", "olmoe")


def nearest_class(dotted: str) -> str:
    """'; did you mean ...' for an unknown class, by its own name first."""
    module, _, name = dotted.rpartition(".")
    if dotted.startswith("torch."):
        return nearest(dotted, [f"torch.nn.{each}" for each in dir(torch.nn) if each[0].isupper()])
    if not module.startswith(_PACKAGES):
        module = f"{_PACKAGES[0]}modeling_deepseek_v3"
    return nearest(name, KNOWN_NAMES) and nearest(
        f"{module}.{name}", [f"{module}.{known}" for known in KNOWN_NAMES]
    )


@dataclass(frozen=True, kw_only=True)
class Module:
    """One node. `kind` is what a replacement must stand for to fit: experts, matrix, ..."""

    name: str
    kind: str
    stage: str
    """Our word for it."""
    classes: frozenset[str]
    """What it answers to: torch's classes dotted, modeling files' by name."""
    layer: int | None = None
    ours: Any = None
    """The router, the bank, the attention, or a tuple of `Linear`."""
    block: Layer | None = None
    """The layer that has it, of a router, experts and attention."""
    below: Callable[[], "Iterator[Module]"] = field(default=lambda: iter(()), repr=False)

    def is_a(self, dotted: str) -> bool:
        """Whether an instance check by this class would hold."""
        if dotted.startswith("torch.nn."):
            name = "torch.nn." + dotted.rpartition(".")[2]
            return name == "torch.nn.Module" or name in self.classes
        return dotted.rpartition(".")[2] in self.classes


def modules(model: Model) -> Module:
    """The root, with an empty name; everything else hangs below it, made when it is asked for."""
    return _Tree(model).root()


@dataclass(frozen=True)
class _Tree:
    model: Model

    @property
    def family(self) -> Family:
        return FAMILIES[self.model.config.architecture]

    def root(self) -> Module:
        def below() -> Iterator[Module]:
            yield self.body()
            yield self.matrix("lm_head", "output", None, (self.model.output,))

        return self.node("", "whole", "the whole model", self.family.classes("ForCausalLM"), below)

    def body(self) -> Module:
        def layers() -> Iterator[Module]:
            return map(self.layer, self.model.layers)

        def below() -> Iterator[Module]:
            yield self.node("model.embed_tokens", "embedding", "embedding", [EMBEDDING])
            yield self.node("model.layers", "list", "layers", [LIST], layers)
            yield self.norm("model.norm", None)
            if not self.family.rope_in_attention:
                yield self.rope("model.rotary_emb", None)

        return self.node("model", "model", "model", self.family.classes("Model"), below)

    def layer(self, block: Layer) -> Module:
        name, index = f"model.layers.{block.index}", block.index

        def below() -> Iterator[Module]:
            yield self.attention(f"{name}.self_attn", block)
            yield self.feed_forward(f"{name}.mlp", block)
            yield self.norm(f"{name}.input_layernorm", index)
            yield self.norm(f"{name}.post_attention_layernorm", index)

        return self.node(name, "layer", "layer", self.family.classes("DecoderLayer"), below, index)

    def attention(self, name: str, block: Layer) -> Module:
        attention, index = block.attention, block.index
        w = attention.weights

        def below() -> Iterator[Module]:
            named: dict[str, tuple[Linear, ...]]
            if isinstance(w, MLAWeights):
                if w.q_a is None:
                    named = {"q_proj": (w.q_b,)}
                else:
                    named = {"q_a_proj": (w.q_a,), "q_b_proj": (w.q_b,)}
                    yield self.norm(f"{name}.q_a_layernorm", index)
                named |= {"kv_a_proj_with_mqa": (w.kv_a,), "kv_b_proj": (w.k_b, w.v_b)}
                yield self.norm(f"{name}.kv_a_layernorm", index)
            else:
                named = {"q_proj": (w.q,), "k_proj": (w.k,), "v_proj": (w.v,)}
                if w.q_norm is not None:
                    yield self.norm(f"{name}.q_norm", index)
                    yield self.norm(f"{name}.k_norm", index)
            for matrix, linears in {**named, "o_proj": (w.output,)}.items():
                yield self.matrix(f"{name}.{matrix}", "attention matrix", index, linears)
            if self.family.rope_in_attention:
                yield self.rope(f"{name}.rotary_emb", index)

        classes = self.family.classes("Attention")
        return self.node(name, "attention", "attention", classes, below, index, attention, block)

    def feed_forward(self, name: str, block: Layer) -> Module:
        if not isinstance(block, MoEBlock):
            return self.mlp(name, "dense", block.index, block.mlp.linears)

        def below() -> Iterator[Module]:
            yield self.experts(f"{name}.experts", block)
            yield self.node(
                f"{name}.gate", "router", "router", self.family.gates, None, block.index,
                block.router, block,
            )  # fmt: skip
            if block.shared is not None:
                shared = block.shared.linears
                yield self.mlp(f"{name}.shared_experts", "shared experts", block.index, shared)

        classes = self.family.classes(*self.family.moe)
        return self.node(name, "moe", "MoE layer", classes, below, block.index)

    def experts(self, name: str, block: MoEBlock) -> Module:
        """One by one below their list, though they are one bank here."""

        def below() -> Iterator[Module]:
            for expert in range(block.experts.num_experts):
                yield self.mlp(f"{name}.{expert}", "one expert", block.index, None)

        classes = [LIST, *self.family.classes("Experts")]
        bank = block.experts
        return self.node(name, "experts", "experts", classes, below, block.index, bank, block)

    def mlp(
        self, name: str, stage: str, layer: int, linears: Mapping[str, Linear] | None
    ) -> Module:
        def below() -> Iterator[Module]:
            for theirs, ours in _MATRICES.items():
                if linears is None:
                    where = f"{name}.{theirs}"
                    yield self.node(where, "expert matrix", "one expert", [LINEAR], None, layer)
                else:
                    yield self.matrix(
                        f"{name}.{theirs}", f"{stage} matrix", layer, (linears[ours],)
                    )
            yield self.node(f"{name}.act_fn", "activation", "activation", [ACTIVATION], None, layer)

        kind = "mlp" if linears is not None else "expert"
        return self.node(name, kind, stage, self.family.classes("MLP"), below, layer)

    def matrix(
        self, name: str, stage: str, layer: int | None, linears: tuple[Linear, ...]
    ) -> Module:
        return self.node(name, "matrix", stage, [LINEAR], None, layer, linears)

    def norm(self, name: str, layer: int | None) -> Module:
        return self.node(name, "norm", "norm", self.family.classes("RMSNorm"), None, layer)

    def rope(self, name: str, layer: int | None) -> Module:
        family = self.family
        extended = family.yarn_ropes if self.model.config.yarn is not None else ()
        return self.node(name, "rope", "RoPE", (*family.ropes, *extended), None, layer)

    @staticmethod
    def node(
        name: str,
        kind: str,
        stage: str,
        classes: Sequence[str],
        below: Callable[[], Iterator[Module]] | None = None,
        layer: int | None = None,
        ours: Any = None,
        block: Layer | None = None,
    ) -> Module:
        children = below or (lambda: iter(()))
        return Module(
            name=name, kind=kind, stage=stage, classes=frozenset(classes), layer=layer, ours=ours,
            block=block, below=children,
        )  # fmt: skip
