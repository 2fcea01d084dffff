"""`doctor()`: what this machine can do and why, and what to do about the rest."""

from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from ktlab import html
from ktlab.measurement import checks
from ktlab.measurement.checks import Check
from ktlab.record import Record

ABSENT = "absent"
MARKS = {"ok": "✓", ABSENT: "–", "warn": "!", "missing": "✗"}
TONES = {"ok": "ok", ABSENT: "", "warn": "warn", "missing": "bad"}
NOT_HERE = ("no", "none", "not on this processor")
"""What checks find that nothing is wrong with, where a machine has no such part."""
WIDTH = 80


def mark(check: Check) -> str:
    """The verdict; a part that this machine does not have, and need not have, is neither good nor
    bad."""
    lacking = check.found in NOT_HERE and check.group != "memory"  # no swap is no part that lacks
    return ABSENT if check.verdict == "ok" and lacking else check.verdict


@dataclass(frozen=True, kw_only=True)
class Doctor(Record):
    """All checks; prints as a table, in text and HTML."""

    checks: tuple[Check, ...]

    def __iter__(self) -> Iterator[Check]:
        return iter(self.checks)

    def __getitem__(self, name: str) -> Check:
        """The check of that name; KeyError with all names."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r}; there are {', '.join(c.name for c in self.checks)}")

    @property
    def ok(self) -> bool:
        """Whether everything that ktlab needs is here."""
        return not any(c.required and c.verdict == "missing" for c in self.checks)

    @property
    def summary(self) -> str:
        """One line."""
        counts = {v: sum(mark(c) == v for c in self.checks) for v in MARKS}
        state = "ktlab can run here" if self.ok else "ktlab cannot run here"
        absent = f"{counts[ABSENT]} not on this machine, " if counts[ABSENT] else ""
        return (
            f"{state}: {counts['ok']} ok, {absent}{counts['warn']} to note, "
            f"{counts['missing']} missing"
        )

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines, group = [self.summary], ""
        for check in self.checks:
            if check.group != group:
                group = check.group
                lines += ["", group]
            below = " " * (width + 6)
            do = f"→ {check.do}" if check.do else ""
            head = f"  {MARKS[mark(check)]} {check.name:{width}}  "
            for first, said in ((head, check.found), (below, check.why), (below, do)):
                if said or first is head:
                    lines.append(_hanging(first, below, said))
        return "\n".join(lines)

    __repr__ = __str__

    def to_html(self) -> str:
        """One row a check."""
        rows = [
            (
                html.badge(mark(check), TONES[mark(check)]),
                check.name,
                check.found,
                " → ".join(part for part in (check.why, check.do) if part),
            )
            for check in self.checks
        ]
        return html.card(self.summary, html.table(rows, ("", "check", "found", "what it means")))

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return html.mimebundle(str(self), self.to_html())


def _hanging(first: str, below: str, said: str) -> str:
    """Text beside `first`, and where it is too long for a terminal under its own beginning."""
    return fill(
        said, WIDTH, initial_indent=first, subsequent_indent=below, break_long_words=False,
        break_on_hyphens=False,
    ) or first.rstrip()  # fmt: skip


def doctor() -> Doctor:
    """Look at Python, libraries, processor, kernels, memory, GPU, model, notebook and browser."""
    return Doctor(
        checks=(
            *checks.software(),
            *checks.processor(),
            *checks.kernels(),
            *checks.memory(),
            checks.gpu(),
            *checks.embedded_model(),
            *checks.notebook(),
            checks.browser(),
        )
    )
