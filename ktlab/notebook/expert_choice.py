"""Which experts of a layer to take away, and what their absence did to a text. Pure functions.

E experts, T tokens.
"""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ktlab.errors import SettingError
from ktlab.notebook.token_view import Mark, quoted, tokens_html

if TYPE_CHECKING:
    from ktlab.model.generation import Generation

ORDERS = {
    "the hottest": "hottest",
    "the coldest": "coldest",
    "at random": "random",
    "one expert": "one",
}


def pick(
    load_E: ArrayLike, order: str, count: int, *, first: int = 0, seed: int = 0
) -> tuple[int, ...]:
    """`count` experts: hottest or coldest by `load_E`, random, or the one numbered `first`."""
    load = np.asarray(load_E, float)
    if not 0 <= count <= len(load):
        raise SettingError(f"expected 0..{len(load)} experts to take away, found {count}")
    if order == "one":
        if not 0 <= first < len(load):
            raise SettingError(f"expected an expert of 0..{len(load) - 1}, found {first}")
        return (first,) if count else ()
    if order == "random":
        ranked = np.random.default_rng(seed).permutation(len(load))
    elif order in ("hottest", "coldest"):
        ranked = np.argsort(-load if order == "hottest" else load, kind="stable")
    else:
        raise SettingError(f"order {order!r}: expected one of {', '.join(ORDERS.values())}")
    return tuple(sorted(int(e) for e in ranked[:count]))


def most_masked(selectable: int, top_k: int) -> int:
    """How many experts of a layer can be masked so that every token still finds `top_k`."""
    return max(0, selectable - top_k)


def loss_marks(change_T: ArrayLike, full: float = 2.0) -> list[Mark]:
    """Red where the text's token became less likely, blue where more; strongest at `full` nats."""
    return [
        Mark(hue=8 if c < 0 else 210, opacity=min(0.75, 0.75 * abs(float(c)) / full))
        for c in np.asarray(change_T, float)
    ]


def loss_view(
    pieces: Sequence[str], before_T: NDArray, after_T: NDArray, *, what: str, limit: int = 2000
) -> str:
    """A text with each token coloured by what the change did to its log-probability.

    `pieces` has one token more than the log-probabilities: the first is not predicted.
    """
    change_T = np.r_[0.0, np.asarray(after_T, float) - np.asarray(before_T, float)]
    details = [f"{quoted(pieces[0])}\nthe first token: nothing predicts it"]
    details += [
        f"token {t + 1}  {quoted(piece)}\n"
        f"probability before  {np.exp(a):8.2%}\n"
        f"            after   {np.exp(b):8.2%}\n"
        f"log-probability     {b - a:+8.3f} nats"
        for t, (piece, a, b) in enumerate(zip(pieces[1:], before_T, after_T, strict=True))
    ]
    legend = [
        (Mark(hue=8, opacity=0.75), "2 nats less likely, or more"),
        (Mark(hue=8, opacity=0.2), "less likely"),
        (Mark(hue=210, opacity=0.4), "more likely"),
    ]
    return tokens_html(
        pieces, details, loss_marks(change_T), legend=legend, limit=limit,
        hint=f"The text after {what}. Hover a token for its probability before and after.",
    )  # fmt: skip


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """How many leading items two sequences share."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def continuations_html(before: "Generation", after: "Generation") -> str:
    """The same prompt continued greedily without and with the change; what differs is marked."""
    same = common_prefix(before.ids, after.ids)
    kept = common_prefix(before.text, after.text)

    def row(name: str, generation: "Generation", marked: bool) -> str:
        head, tail = generation.text[:kept], generation.text[kept:]
        tone = "changed" if marked else "same"
        return (
            f'<div class="kt-note">{name}</div><div class="kt-text">'
            f'<span class="prompt">{escape(generation.prompt[-80:])}</span>{escape(head)}'
            f'<span class="{tone}">{escape(tail)}</span></div>'
        )

    verdict = (
        "the same greedy continuation"
        if before.ids == after.ids
        else f"greedy continuations part after {same} token{'s' * (same != 1)}"
    )
    return (
        f'<div style="margin-top:8px">{verdict}</div>'
        + row("whole model", before, False)
        + row("experts taken away", after, True)
    )
