"""Which kernels the control room offers, which one runs and why, and what the twin is to follow."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ktlab import html
from ktlab.html import Raw, text
from ktlab.kernels import dispatch
from ktlab.kernels.dispatch import Explanation
from ktlab.kernels.request import (
    AUTO,
    BACKENDS,
    ISAS,
    LAYOUTS,
    NATIVE_ISAS,
    REQUEST_WORDS,
    Request,
)
from ktlab.measurement.synthetic import MIXES, shapes
from ktlab.measurement.twin import Side
from ktlab.model.components import component_stages, products_of
from ktlab.placement.presets import PRESETS, stand_ins
from ktlab.quantization import fallback_format

if TYPE_CHECKING:
    from ktlab.model.model import Model
    from ktlab.notebook.control_room_choice import Choice

STORED = "as stored"
WORDS = {"layout": LAYOUTS, "backend": BACKENDS, "isa": ISAS}
"""The switches that name a kernel, and every value they know."""
OFF = "off"
TWINS = (OFF, *sorted(shapes(), reverse=True))
assert set(WORDS) <= set(REQUEST_WORDS)

Formats = tuple[str, ...]


def request_of(choice: "Choice") -> Request:
    """What a setting asks of every matrix; what was named last counts (`Request.with_`)."""
    return Request(backend=choice.backend, isa=choice.isa, layout=choice.layout)


def expert_formats(model: "Model", choice: "Choice") -> Formats:
    """Formats of gate, up and down under a setting; instant, nothing is requantized."""
    bank = model.moe_blocks[0].experts
    if choice.experts == STORED:
        return bank.formats
    return tuple(fallback_format(choice.experts, s.shape[-1]).name for s in bank.stacks)


def all_formats(model: "Model", choice: "Choice") -> list[Formats]:
    """The formats of everything that one kernel must compute, without repetition."""
    found: dict[Formats, None] = {expert_formats(model, choice): None}
    for component, holder, name in component_stages(model):
        if component != "experts" or choice.experts == STORED:
            found.update(dict.fromkeys(p.formats for p in products_of(getattr(holder, name))))
    return list(found)


def offers(model: "Model", choice: "Choice") -> dict[str, tuple[list[str], dict[str, str]]]:
    """Of each switch: the values that work for the setting's formats, and the rest with reasons.

    A value counts if some kernel with it computes every matrix; naming it frees an older word that
    cannot stand beside it.
    """
    groups = [list(dispatch.candidates(formats)) for formats in all_formats(model, choice)]
    # The candidates come in the same order for any formats: one reject of the matrices counts.
    tried = [
        (row[0], next((c.reject for c in row if c.reject), "")) for row in zip(*groups, strict=True)
    ]
    found = {}
    for kind, known in WORDS.items():
        able = {getattr(c, kind) for c, reject in tried if not reject}
        rejected = {
            getattr(c, kind): reject
            for c, reject in reversed(tried)
            if getattr(c, kind) in known and getattr(c, kind) not in able
        }
        found[kind] = ([v for v in known if v == AUTO or v in able], rejected)
    return found


def explained(model: "Model", choice: "Choice", tokens: int = 1) -> Explanation:
    """What computes the experts under a setting, and why everything else does not."""
    formats = expert_formats(model, choice)
    request = model.moe_blocks[0].experts.settled(request_of(choice), formats)
    return dispatch.explain(request, formats, tokens)


def tooltip(kind: str, rejected: dict[str, str]) -> str:
    """What hovering over a switch says: the values that are not on offer, with the reason."""
    lines = [f"{value}: {why}" for value, why in rejected.items()]
    return "\n".join(
        [f"not on offer as {kind}:", *lines] if lines else [f"{kind}: all usable here"]
    )


def kernel_line(model: "Model", choice: "Choice") -> str:
    """The chosen kernel; its reason, and every other one with its verdict, behind a click."""
    found = explained(model, choice)
    chosen = found.chosen
    formats = "+".join(dict.fromkeys(expert_formats(model, choice)))
    counts = {s: sum(v.status == s for v in found) for s in ("usable", "rejected")}
    rows = [
        (v.backend, v.isa, v.layout, Raw(f'<b class="cr-{v.status}">{v.status}</b>'), v.reason)
        for v in found
    ]
    table = html.table(rows, ("backend", "isa", "layout", "verdict", "why"))
    name = f"{chosen.backend} {chosen.isa}" if chosen.isa in NATIVE_ISAS else chosen.backend
    return (
        f'<div class="cr-kernel" data-kernel="{text(name)}" data-layout="{text(chosen.layout)}">'
        f'<details class="cr-explain"><summary title="{text(chosen.reason)}">experts in '
        f"<b>{text(formats)}</b> run on <b>{text(name)}</b>, {text(chosen.layout)}: why, and "
        f"{counts['usable']} more usable, {counts['rejected']} rejected</summary>{table}</details>"
        f"{_placed(choice)}</div>"
    )


def _placed(choice: "Choice") -> str:
    """Where the setting puts the rest, and whose speed is measured then."""
    if choice.placement == "cpu":
        return ""
    real = "" if not stand_ins() else (
        "; torch on this CPU stands in for the GPU, so the quality is a GPU's in bf16, the speed "
        "is not"
    )  # fmt: skip
    return f'<div class="cr-placed">placed: {text(PRESETS[choice.placement])}{real}</div>'


def twin_sides(model: "Model", baseline: "Choice", choice: "Choice") -> tuple[Side, Side]:
    """The two settings as the twin can follow them: top_k, format, layout, backend, isa.

    Where both are the same, three quarters of the experts stand against them, so that there is
    something to compare.
    """
    a, b = _side(model, baseline), _side(model, choice)
    if a == b:
        b = _side(model, choice.with_(top_k=max(1, round(0.75 * choice.top_k))))
    return a, b


def _side(model: "Model", choice: "Choice") -> Side:
    formats = expert_formats(model, replace(choice, experts=STORED))
    stored = next((name for name, mix in MIXES.items() if mix == formats), formats[0])
    plain = replace(choice, rule="fixed k", attention="absorbed")
    return Side(
        label=plain.label,
        top_k=choice.top_k,
        format=stored if choice.experts == STORED else choice.experts,
        request=request_of(choice),
    )


def twin_names() -> Sequence[tuple[str, str]]:
    """(label, value) of the layers on offer."""
    sizes = ((f"{name}: {s.hidden} x {s.width}", name) for name, s in shapes().items())
    return [(OFF, OFF), *sorted(sizes, reverse=True)]
