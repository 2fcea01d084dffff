"""Tokens of a text as HTML, each with a panel that opens while the mouse is on it. No script.

Pure functions from values to strings; everything that comes from a text is escaped.
T tokens, K selected, E experts, G groups.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from ktlab.notebook.css import style

LIMIT = 2000
"""Tokens shown at most: a page with more of them scrolls badly."""

_PICTURES = {c: chr(0x2400 + c) for c in range(32) if c not in (9, 10)} | {127: "\u2421"}


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The colour behind a token: a hue in degrees and an opacity of 0 to 1."""

    hue: float = 210.0
    opacity: float = 0.0


def tokens_html(
    pieces: Sequence[str],
    details: Sequence[str],
    marks: Sequence[Mark],
    *,
    legend: Sequence[tuple[Mark, str]] = (),
    hint: str = "Hover a token, or click into the text and press Tab.",
    limit: int = LIMIT,
    lines: int = 4,
) -> str:
    """Tokens in a box with their marks; `details` are what the panel says about each.

    `lines`: how many the panel has room for where it lies above the text, on a narrow page.
    """
    shown = list(zip(pieces, details, marks, strict=True))[:limit]
    body = "".join(_token(piece, detail, mark) for piece, detail, mark in shown)
    if len(pieces) > limit:
        hint += f" The first {limit:,} of {len(pieces):,} tokens are shown."
    keys = "".join(f"<span><i{_colour(mark)}></i>{escape(name)}</span>" for mark, name in legend)
    return (
        f'{style("token_view")}<div class="kt-tokens-box">'
        f'<div class="kt-tokens" style="--lines:{lines}">'
        f'<div class="text">{body}</div>'
        f'<div class="panel">{escape(hint)}</div><div class="legend">{keys}</div></div></div>'
    )


def token_view(
    pieces: Sequence[str],
    ids_TK: Mapping[int, NDArray],
    weights_TK: Mapping[int, NDArray],
    *,
    layer: int,
    num_experts: int,
    n_group: int = 1,
    expert: int | None = None,
    limit: int = LIMIT,
) -> str:
    """A text whose tokens tell, hovered, which experts each layer sent them to.

    `ids_TK` and `weights_TK` by layer; an id of -1 is an empty place. Tokens are coloured by the
    group of their first choice in `layer`, or by the share that `expert` has of their weight there.
    """
    details = expert_details(pieces[:limit], ids_TK, weights_TK, layer=layer)
    details += [""] * (len(pieces) - len(details))
    share_TK = shares(weights_TK[layer])
    if expert is None:
        marks, legend = _by_group(ids_TK[layer], share_TK, num_experts, n_group)
    else:
        marks, legend = _by_expert(ids_TK[layer], share_TK, expert)
    lines = 2 + len(ids_TK)
    return tokens_html(pieces, details, marks, legend=legend, limit=limit, lines=lines)


def shares(weights_TK: NDArray) -> NDArray[np.float64]:
    """(T, K) weights as shares of each token's sum; 0 where there is none."""
    total_T = np.asarray(weights_TK, float).sum(-1, keepdims=True)
    return np.divide(weights_TK, total_T, out=np.zeros(weights_TK.shape), where=total_T > 0)


def expert_details(
    pieces: Sequence[str],
    ids_TK: Mapping[int, NDArray],
    weights_TK: Mapping[int, NDArray],
    *,
    layer: int,
) -> list[str]:
    """For each token, a line a layer: its experts, heaviest first, with per cent of the weight."""
    rows: list[list[str]] = [
        [f"token {t}  {quoted(piece)}", "layer  expert·% of weight"]
        for t, piece in enumerate(pieces)
    ]
    for index, ids in ids_TK.items():
        share_TK = shares(weights_TK[index])[: len(rows)]
        order_TK = np.argsort(-share_TK, axis=1, kind="stable")
        percent_TK = np.rint(100 * np.take_along_axis(share_TK, order_TK, 1)).astype(int).tolist()
        sorted_TK = np.take_along_axis(np.asarray(ids)[: len(rows)], order_TK, 1).tolist()
        head = f"{'▸' if index == layer else ' '}{index:>3}  "
        for row, experts, percents in zip(rows, sorted_TK, percent_TK, strict=True):
            chosen = [f"{e:>2}·{p:<2}" for e, p in zip(experts, percents, strict=True) if e >= 0]
            row.append(head + _wrapped(chosen))
    return ["\n".join(row) for row in rows]


def quoted(piece: str) -> str:
    """A token's text in quotes, with white space and control characters made visible."""
    return "“" + piece.replace("\n", "⏎").replace("\t", "⇥").translate(_PICTURES) + "”"


def _wrapped(chosen: list[str], each: int = 8) -> str:
    lines = [" ".join(chosen[i : i + each]) for i in range(0, len(chosen), each)]
    return "\n      ".join(lines) or "no expert"


def _token(piece: str, detail: str, mark: Mark) -> str:
    control = piece.startswith("<") and piece.endswith(">") and len(piece) > 3
    text = piece.replace("\n", "⏎\n").translate(_PICTURES) or "·"
    if control:  # "<｜begin▁of▁sentence｜>": few fonts have these bars
        text = f"⟨{re.sub(r'[^a-z0-9]+', ' ', piece.lower()).strip()}⟩"
    about = escape(detail, quote=True).replace("\n", "&#10;")
    kind = ' class="c"' if control or not piece else ""
    return f'<b tabindex="0"{kind}{_colour(mark)} data-t="{about}">{escape(text)}</b>'


def _colour(mark: Mark) -> str:
    if mark.opacity <= 0:
        return ""
    return f' style="--h:{mark.hue:.0f};--a:{min(mark.opacity, 1.0):.2f}"'


def group_hue(group: int, groups: int) -> float:
    """A hue for each group, far from its neighbours'."""
    return (210 + 360 * group / max(1, groups)) % 360


def _by_group(
    ids_TK: NDArray, share_TK: NDArray, num_experts: int, n_group: int
) -> tuple[list[Mark], list[tuple[Mark, str]]]:
    size = num_experts // n_group
    best_T = share_TK.argmax(1)
    rows = np.arange(len(best_T))
    first_T, weight_T = np.asarray(ids_TK)[rows, best_T], share_TK[rows, best_T]
    marks = [
        Mark(hue=group_hue(int(e) // size, n_group), opacity=0.12 + 0.75 * float(w))
        if e >= 0
        else Mark()
        for e, w in zip(first_T, weight_T, strict=True)
    ]
    if n_group == 1:
        return marks, [(Mark(opacity=0.3), "stronger: more weight on the heaviest expert")]
    legend = [
        (Mark(hue=group_hue(g, n_group), opacity=0.5), f"{g * size}–{(g + 1) * size - 1}")
        for g in range(n_group)
    ]
    legend[0] = (legend[0][0], f"heaviest expert in {legend[0][1]}")
    return marks, legend


def _by_expert(
    ids_TK: NDArray, share_TK: NDArray, expert: int
) -> tuple[list[Mark], list[tuple[Mark, str]]]:
    share_T = np.where(np.asarray(ids_TK) == expert, share_TK, 0.0).sum(1)
    marks = [Mark(hue=24, opacity=0.15 + 1.6 * float(s)) if s > 0 else Mark() for s in share_T]
    legend = [
        (Mark(hue=24, opacity=0.15 + 1.6 * s), f"expert {expert} has {100 * s:.0f} % of the weight")
        for s in (0.05, 0.15, 0.4)
    ]
    used = float((share_T > 0).mean()) if len(share_T) else 0.0
    legend.append((Mark(), f"not selected ({1 - used:.0%} of the tokens)"))
    return marks, legend
