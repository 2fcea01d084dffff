"""The picture of a placement: component by layer, coloured by device; experts as shares of a cell.

Pure functions; a cell whose phases differ shows decode above prefill.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktlab import figures, html
from ktlab.placement.parts import COMPONENTS
from ktlab.placement.placement import PHASES, by_kind, kind_of
from ktlab.placement.ranges import write_ranges

if TYPE_CHECKING:
    from ktlab.placement.placement import Placement

_SHADES = {
    "cpu": (figures.BLUE,),
    "numa": (figures.GREEN, figures.SKY),
    "cuda": (figures.ORANGE, figures.VERMILION, figures.PURPLE, figures.YELLOW),
    "disk": (figures.INK,),
}
_STYLE = (
    "<style>.ktlab .grid{overflow-x:auto;padding-right:8px}"
    "div.ktlab.ktlab.ktlab .grid table td,div.ktlab.ktlab.ktlab .grid table th{"
    "padding:1px 2px 1px 0;border:0;font-size:11px;font-weight:400}"
    # Many layers are narrower cells, not a picture that one has to scroll.
    ".ktlab .grid table{table-layout:fixed}.ktlab .grid col:first-child{width:80px}"
    ".ktlab .grid th b{display:block;width:0;overflow:visible;white-space:nowrap;"
    "font-weight:400}"
    ".ktlab .grid i{display:block;height:14px;border-radius:2px;opacity:.85}"
    ".ktlab .grid-key{display:inline-block;width:10px;height:10px;border-radius:2px;"
    "margin:0 5px 0 12px}"
    "</style>"
)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What of a cell is on one device."""

    device: str
    share: float = 1.0
    experts: str = ""
    phases: tuple[str, ...] = PHASES
    about: str = ""


Cells = Mapping[tuple[str, int | None], list[Share]]


def color(device: str) -> str:
    """Of a device, the same everywhere."""
    kind, _, number = device.partition(":")
    shades = _SHADES.get(kind, (figures.PURPLE,))
    return shades[int(number or 0) % len(shades)]


def placement_grid(cells: Cells) -> html.Raw:
    """The table with its key; (component, layer) to what is where."""
    layers = sorted({layer for _, layer in cells if layer is not None})
    present = [name for name in COMPONENTS if any(part == name for part, _ in cells)]
    head = "".join(f"<th><b>{layer if layer % 5 == 0 else ''}</b></th>" for layer in layers)
    body = ""
    for name in present:
        # What is there once, not once a layer, stands before the first.
        once = _cell(name, None, cells.get((name, None)))
        marks = "".join(_cell(name, layer, cells.get((name, layer))) for layer in layers)
        body += f"<tr><td>{name}</td>{once}{marks}</tr>"
    devices = by_kind(share.device for found in cells.values() for share in found)
    key = "".join(
        f'<span class="grid-key" style="background:{color(name)}"></span>{html.text(name)}'
        for name in devices
    )
    differ = any(share.phases != PHASES for found in cells.values() for share in found)
    phases = "; upper half decode, lower half prefill" if differ else ""
    columns = len(layers) + 1
    width = f'style="width:min(100%,{80 + 12 * columns}px);min-width:{80 + 6 * columns}px"'
    cols = f"<colgroup>{'<col>' * (1 + columns)}</colgroup>"
    table = f"<table {width}>{cols}<tr><td></td><th></th>{head}</tr>{body}</table>"
    table = f'<div class="grid">{table}</div>'
    return html.Raw(f"{_STYLE}<div>where each layer's components go:{key}{phases}</div>{table}")


def _cell(component: str, layer: int | None, shares: list[Share] | None) -> str:
    if not shares:
        return "<td></td>"
    name = component if layer is None else f"layer {layer}, {component}"
    about = f"{name}: " + "; ".join(map(_words, shares))
    return f'<td><i title="{html.text(about)}" style="background:{_background(shares)}"></i></td>'


def _words(share: Share) -> str:
    phases = f", {share.phases[0]} only" if share.phases != PHASES else ""
    experts = f" experts {share.experts}" if share.experts else ""
    about = f": {share.about}" if share.about else ""
    return f"{share.device}{experts}{about}{phases}"


def _background(shares: list[Share]) -> str:
    halves = [_stripe([s for s in shares if phase in s.phases]) for phase in PHASES]
    if halves[0] == halves[1]:
        return halves[0]
    upper, lower = halves
    size = "100% 50% no-repeat"
    return f"{_image(upper)} top/{size},{_image(lower)} bottom/{size}"


LEAST_PX = 3
"""Of a cell, which has 6 or more."""


def _stripe(shares: list[Share]) -> str:
    """One colour, or each device's share from left to right, a small one still a line to see."""
    ordered = sorted(shares, key=lambda s: by_kind(x.device for x in shares).index(s.device))
    if len({share.device for share in ordered}) == 1:
        return color(ordered[0].device)
    stops, start, at = [], 0.0, "0%"
    for number, share in enumerate(ordered, 1):
        start += 100 * share.share
        before, behind = LEAST_PX * number, LEAST_PX * (len(ordered) - number)
        end = f"clamp({before}px,{start:.0f}%,calc(100% - {behind}px))" if behind else "100%"
        stops.append(f"{color(share.device)} {at} {end}")
        at = end
    return f"linear-gradient(90deg,{','.join(stops)})"


def _image(background: str) -> str:
    flat = background.startswith("#")
    return f"linear-gradient({background},{background})" if flat else background


def cells_of(placement: "Placement") -> Cells:
    """What is where, without sizes."""
    found: dict[tuple[str, int | None], list[Share]] = {}
    shape = placement.model
    for component in COMPONENTS:
        for layer in shape.layers_of(component):
            cell: dict[tuple[str, tuple[str, ...]], list[int]] = {}
            for expert, (decode, prefill) in enumerate(_devices(placement, component, layer)):
                if decode == prefill:
                    cell.setdefault((decode, PHASES), []).append(expert)
                    continue
                for device, phase in zip((decode, prefill), PHASES, strict=True):
                    cell.setdefault((device, (phase,)), []).append(expert)
            count = shape.experts if component == "experts" else 1
            found[component, layer] = [
                Share(
                    device=device,
                    phases=phases,
                    share=len(ids) / count,
                    experts=write_ranges(ids) if len(ids) < count else "",
                )
                for (device, phases), ids in cell.items()
            ]
    return found


def _devices(
    placement: "Placement", component: str, layer: int | None
) -> Iterable[tuple[str, str]]:
    if component == "experts" and layer is not None:
        decode, prefill = (placement.experts_row(layer, phase) for phase in PHASES)
        return zip(decode, prefill, strict=True)
    decode_at, prefill_at = (placement.device(component, layer=layer, phase=p) for p in PHASES)
    return [(decode_at, prefill_at)]


def bundle(placement: "Placement") -> dict[str, Any]:
    """Text and HTML of a placement."""
    counts = {
        device: sum(
            len(placement.experts(layer=layer, device=device))
            for layer in placement.model.moe_layers
        )
        for device in placement.devices
    }
    total = len(placement.model.moe_layers) * placement.model.experts
    badges = "".join(
        html.badge(f"{device}{f': {n:,} of {total:,} experts' if n else ''}")
        for device, n in counts.items()
    )
    waiting = [device for device in placement.devices if kind_of(device) == "disk"]
    note = "disk: stays in the file and is read when it is used" if waiting else ""
    body = html.card(
        f"Placement of {placement.model.name}",
        html.Raw(badges),
        placement_grid(cells_of(placement)),
        html.Raw(f'<div class="s">{note}</div>'),
    )
    return html.mimebundle(repr(placement), body)
