"""`doctor()`: what this machine can do and why, and what to do about the rest."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ktlab import html
from ktlab.measurement import checks
from ktlab.measurement.checks import Check
from ktlab.record import Record

MARKS = {"ok": "✓", "warn": "!", "missing": "✗"}
TONES = {"ok": "ok", "warn": "warn", "missing": "bad"}


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
        counts = {v: sum(c.verdict == v for c in self.checks) for v in MARKS}
        state = "ktlab can run here" if self.ok else "ktlab cannot run here"
        return f"{state}: {counts['ok']} ok, {counts['warn']} to note, {counts['missing']} missing"

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines, group = [self.summary], ""
        for check in self.checks:
            if check.group != group:
                group = check.group
                lines += ["", group]
            lines.append(f"  {MARKS[check.verdict]} {check.name:{width}}  {check.found}")
            lines += [f"    {'':{width}}  {note}" for note in (check.why,) if note]
            lines += [f"    {'':{width}}  → {note}" for note in (check.do,) if note]
        return "\n".join(lines)

    __repr__ = __str__

    def to_html(self) -> str:
        """One row a check."""
        rows = [
            (
                html.badge(check.verdict, TONES[check.verdict]),
                check.name,
                check.found,
                " → ".join(part for part in (check.why, check.do) if part),
            )
            for check in self.checks
        ]
        return html.card(self.summary, html.table(rows, ("", "check", "found", "what it means")))

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return html.mimebundle(str(self), self.to_html())


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
