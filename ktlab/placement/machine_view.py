"""How a machine is shown: its ceilings as text and as a card of HTML."""

from typing import TYPE_CHECKING, Any

from ktlab import html
from ktlab.placement.timeline_view import seconds

if TYPE_CHECKING:
    from ktlab.placement.machine import Machine


def rows(of: "Machine") -> list[tuple[str, str]]:
    """What there is, and how much of it."""
    found = [
        (device.name, str(device).removeprefix(device.name).strip(" ()")) for device in of.devices
    ]
    chip = of.processor
    if chip is not None:
        count = f"{of.sockets} x " if of.sockets > 1 else ""
        clock = f", {chip.clock_hz / 1e9:.3g} GHz" if chip.clock_hz else ""
        found.append(("processor", f"{count}{chip.name}, {chip.cores} cores{clock}"))
        unit = {"float32": "FLOP/s"}
        found += [
            (isa, html.quantity(rate * of.sockets, unit.get(isa, "OP/s")))
            for isa, rate in chip.peaks.items()
        ]
        if chip.l2_bytes:
            found.append(("cache of a core", html.byte_size(chip.l2_bytes)))
        if chip.l3_bytes:
            found.append(("last cache", html.byte_size(chip.l3_bytes)))
    if of.bandwidth is not None:
        nodes = f", on each of {of.sockets} sockets" if of.sockets > 1 else ""
        found.append(("memory", f"{of.bandwidth / 1e9:.4g} GB/s{nodes}"))
    for gpu in of.gpus:
        found.append(
            (
                gpu.name,
                f"{gpu.flop_per_s / 1e12:.4g} TFLOP/s, {gpu.bandwidth / 1e9:.4g} GB/s, "
                f"{html.decimal_bytes(gpu.vram)}",
            )
        )
    found += [(name, f"{rate / 1e9:.3g} GB/s each way") for name, rate in of.links.items()]
    found += [
        (
            f"{one.kind}, {html.quantity(one.weights)} weights, {one.format}",
            f"{one.tokens} token{'s' * (one.tokens > 1)}: "
            f"{html.quantity(one.operations_per_s, 'OP/s')}"
            + (f", {one.bytes_per_s / 1e9:.3g} GB/s" if one.bytes_per_s else ""),
        )
        for one in of.kernels
    ]
    if of.token_s is not None:
        found.append(("beside kernels", f"{seconds(of.token_s)} a token of decode"))
    return found


def title(of: "Machine") -> str:
    """One line."""
    how = "measured" if of.measured else "listed" if of.sources else ""
    if how in of.about.split():
        how = ""
    return ", ".join(part for part in (f"machine {of.name}", of.about, how) if part)


def text(of: "Machine") -> str:
    """Ceilings, then where they come from."""
    lines = [title(of)]
    width = max(len(name) for name, _ in rows(of))
    lines += [f"  {name:{width}}  {value}" for name, value in rows(of)]
    lines += [f"  {what}: {source}" for what, source in of.sources.items()]
    return html.wrapped("\n".join(lines))


def bundle(of: "Machine") -> dict[str, Any]:
    """Text, and a card."""
    sources = html.details("where the values come from", html.pairs(of.sources))
    return html.mimebundle(text(of), html.card(title(of), html.table(rows(of)), sources))
