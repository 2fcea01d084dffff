"""What a forward pass must do and move, stage by stage, from shapes alone: the ceiling's inputs.

T tokens of the call, S cached positions, E experts, K selected.
FLOP count a multiply and an add as two. Bytes are weights read once and cache read and written.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktlab import html
from ktlab.attention.stage import Attention
from ktlab.experts.mlp import MLP
from ktlab.model.block import MoEBlock

if TYPE_CHECKING:
    import pandas as pd

    from ktlab.model.model import Model


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage of one layer (`layer` is None for embedding and output)."""

    layer: int | None
    stage: str
    flop: float
    weight_bytes: float
    cache_bytes: float

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flop / self.bytes if self.bytes else 0.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The stages of a call of `tokens` tokens that leaves `context` positions in the cache."""

    tokens: int
    context: int
    rows: tuple[StageCost, ...]

    @property
    def flop(self) -> float:
        return sum(row.flop for row in self.rows)

    @property
    def bytes(self) -> float:
        return sum(row.bytes for row in self.rows)

    def by_stage(self) -> dict[str, StageCost]:
        """The layers of each stage added up."""
        stages: dict[str, StageCost] = {}
        for row in self.rows:
            sofar = stages.get(row.stage)
            stages[row.stage] = StageCost(
                layer=None,
                stage=row.stage,
                flop=row.flop + (sofar.flop if sofar else 0),
                weight_bytes=row.weight_bytes + (sofar.weight_bytes if sofar else 0),
                cache_bytes=row.cache_bytes + (sofar.cache_bytes if sofar else 0),
            )
        return stages

    def to_frame(self) -> "pd.DataFrame":
        """One row a stage and layer."""
        import pandas as pd

        return pd.DataFrame(
            [{**vars(row), "bytes": row.bytes, "intensity": row.intensity} for row in self.rows]
        )

    def _lines(self) -> list[tuple[object, ...]]:
        rows = [*self.by_stage().values()]
        lines: list[tuple[object, ...]] = [
            (
                row.stage,
                html.quantity(row.flop, "FLOP"),
                html.byte_size(row.weight_bytes),
                html.byte_size(row.cache_bytes),
                f"{row.intensity:.3g}",
            )
            for row in rows
        ]
        weights = sum(row.weight_bytes for row in rows)
        cached = sum(row.cache_bytes for row in rows)
        total = (
            "total",
            html.quantity(self.flop, "FLOP"),
            html.byte_size(weights),
            html.byte_size(cached),
            f"{self.flop / max(self.bytes, 1):.3g}",
        )
        return [*lines, total]

    @property
    def _what(self) -> str:
        return f"{self.tokens} token{'s' * (self.tokens != 1)} at context {self.context}"

    def __repr__(self) -> str:
        head = f"Cost of {self._what}"
        return "\n".join(
            [
                head,
                *(
                    f"  {s:10} {f:>12} {w:>10} {c:>10} {i:>8} FLOP/byte"
                    for s, f, w, c, i in self._lines()
                ),
            ]
        )

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        headers = ("stage", "work", "weights read", "cache moved", "FLOP/byte")
        title = f"cost of {self._what}"
        return html.mimebundle(repr(self), html.card(title, html.table(self._lines(), headers)))


def cost(model: "Model", tokens: int, context: int) -> Cost:
    """Count `model` as it is set now (top_k, attention form, formats)."""
    config = model.config
    context = max(context, tokens)
    rows = [
        StageCost(
            layer=None,
            stage="embedding",
            flop=0,
            weight_bytes=tokens * model.embedding.nbytes / config.vocab_size,
            cache_bytes=0,
        )
    ]
    for block in model.layers:
        rows.append(_attention(block.attention, block.index, tokens, context))
        if isinstance(block, MoEBlock):
            gate = block.router.gate
            size = gate.stack.size  # held as float32, whatever the file has
            rows.append(_stage(block.index, "router", 2 * tokens * size, 4 * size))
            rows.append(_experts(block, tokens))
            if block.shared is not None:
                rows.append(_mlp(block.index, "shared", block.shared, tokens))
        else:
            rows.append(_mlp(block.index, "dense", block.mlp, tokens))
    head = model.output.stack
    rows.append(_stage(None, "output", 2 * tokens * head.size, head.nbytes))
    return Cost(tokens=tokens, context=context, rows=tuple(rows))


def _stage(
    layer: int | None, stage: str, flop: float, weight_bytes: float, cache_bytes: float = 0
) -> StageCost:
    return StageCost(
        layer=layer, stage=stage, flop=flop, weight_bytes=weight_bytes, cache_bytes=cache_bytes
    )


def _mlp(layer: int, stage: str, mlp: MLP, tokens: int) -> StageCost:
    return _stage(layer, stage, 2 * tokens * 3 * mlp.gate.stack.size, mlp.nbytes)


def _experts(block: MoEBlock, tokens: int) -> StageCost:
    """Work of K experts a token; bytes of the experts expected to be touched under even load."""
    bank, k = block.experts, block.router.rule.k_max
    one = 3 * bank.width * bank.hidden_size
    touched = bank.num_experts * (1 - (1 - k / bank.num_experts) ** tokens)
    return _stage(block.index, "experts", 2 * tokens * k * one, touched * bank.expert_bytes)


def _attention(attention: Attention, layer: int, tokens: int, context: int) -> StageCost:
    """What the stage says of its work; every cached position is read, the new ones are written."""
    cached = attention.cache_bytes_per_token() * (context + tokens)
    flop = attention.flop(tokens, context)
    return _stage(layer, "attention", flop, attention.nbytes, cached)
