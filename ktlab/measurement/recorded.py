"""Measurements kept as data: what `ktlab bench experts --peers` printed on a machine, and which.

data/measurements/expert_kernels.json holds runs: the command, the machine in words, the cases.
"""

import json
from dataclasses import dataclass

from ktlab.checkpoint.embedded import data_path
from ktlab.measurement.bench import KernelCase
from ktlab.record import Record

FILE = ("measurements", "expert_kernels.json")


@dataclass(frozen=True, kw_only=True)
class RecordedRun(Record):
    """One run of the benchmark."""

    command: str
    machine: str
    """Widths, processor, instruction sets, versions, revision, seed and time."""
    cases: tuple[KernelCase, ...]

    def rows(self) -> list[str]:
        """A line of a Markdown table for each contender: medians in ms by number of tokens."""
        lines: dict[tuple[str, ...], dict[int, str]] = {}
        for case in self.cases:
            who = "ktlab" if case.backend == "native" else case.backend
            key = (case.shape, case.format, who, case.isa)
            digits = 0 if case.median_s >= 0.1 else 1
            lines.setdefault(key, {})[case.tokens] = f"{1e3 * case.median_s:.{digits}f}"
        return [
            f"| {shape} | {format} | {who}, {isa} | {' | '.join(medians.values())} |"
            for (shape, format, who, isa), medians in lines.items()
        ]


def recorded_runs() -> tuple[RecordedRun, ...]:
    """All runs of the file, in its order."""
    table = json.loads(data_path(*FILE).read_text(encoding="utf-8"))
    return tuple(RecordedRun.from_dict(run) for run in table["runs"])
