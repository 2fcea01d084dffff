"""The panel of generated text: the same prompt continued by both settings, changes coloured."""

from ktlab.html import text
from ktlab.notebook.control_room_html import EMPTY, panel_title
from ktlab.notebook.control_room_results import Generations, Marked, Results


def generated(results: Results | None) -> str:
    """Both continuations with the tokens that the change altered."""
    found = results.generations if results else None
    if results is None or found is None:
        note = "both settings continue the text greedily; what differs is coloured"
        return f'<div class="cr-text">{panel_title("text", note)}{EMPTY}</div>'
    note = f"greedy, after {len(found.prompt):,} characters of {results.text}"
    return (
        f'<div class="cr-text" data-setting="{text(results.choice.label)}">'
        f"{panel_title('text', note, '' if found.done else 'writing')}"
        f"{_continuation(results.baseline.label, found, found.before, _count(found, results))}"
        + (
            ""
            if results.is_baseline
            else _continuation(
                results.choice.label, found, found.after, "coloured: not in the above"
            )
        )
        + "</div>"
    )


def _count(found: Generations, results: Results) -> str:
    if results.is_baseline:
        return "the baseline's own text"
    changed = sum(token.changed for token in found.before)
    return (
        f"coloured: {results.choice.label}, reading the same, would write something else here "
        f"({changed} of {len(found.before)}); stronger: larger KL"
    )


def _continuation(name: str, found: Generations, tokens: tuple[Marked, ...], note: str) -> str:
    body = "".join(_token(token) for token in tokens)
    return (
        f'<div class="cr-grey"><b>{text(name)}</b> writes ({text(note)})</div>'
        f'<div class="cr-tokens"><span class="cr-prompt">{text(found.prompt)}</span>{body}</div>'
    )


def _token(token: Marked) -> str:
    if not token.changed:
        return f'<span title="{text(token.note)}">{text(token.text)}</span>'
    strength = 100 if token.kl is None else min(100, round(35 + 65 * token.kl / 0.5))
    return (
        f'<span class="cr-changed" style="--strength:{strength}%" title="{text(token.note)}">'
        f"{text(token.text)}</span>"
    )
