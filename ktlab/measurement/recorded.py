"""Measurements kept as data: what `ktlab bench ... --peers` printed on a machine, and which.

data/measurements/ holds runs: of expert_kernels.json the command, the machine in words, the cases;
of whole_models.json the command and all that it printed, and so of decoding.json, without peers:
far into a text, and the embedded model.
"""

import json
from dataclasses import dataclass

from ktlab.checkpoint.embedded import data_path
from ktlab.measurement.bench import KernelCase
from ktlab.measurement.model_bench import ModelBench
from ktlab.record import Record

FILE = ("measurements", "expert_kernels.json")
MODELS_FILE = ("measurements", "whole_models.json")
DECODING_FILE = ("measurements", "decoding.json")


@dataclass(frozen=True, kw_only=True)
class RecordedRun(Record):
    """One run of the benchmark."""

    command: str
    machine: str
    """Widths, processor, instruction sets, versions, revision, seed and time."""
    cases: tuple[KernelCase, ...]

    @property
    def processor(self) -> str:
        """As the system names it, without its marks."""
        return _short(self.machine.partition(" on ")[2].partition(",")[0])

    def rows(self) -> list[str]:
        """A line of a Markdown table for each contender: medians in ms by number of tokens."""
        lines: dict[tuple[str, ...], dict[int, str]] = {}
        for case in self.cases:
            who = "ktlab" if case.backend == "native" else case.backend
            key = (case.shape, case.format, who, case.isa)
            digits = 0 if case.median_s >= 0.1 else 1
            lines.setdefault(key, {})[case.tokens] = f"{1e3 * case.median_s:.{digits}f}"
        return [
            f"| {shape} | {format} | {self.processor} | {who}, {isa} | "
            f"{' | '.join(medians.values())} |"
            for (shape, format, who, isa), medians in lines.items()
        ]


@dataclass(frozen=True, kw_only=True)
class RecordedModel(Record):
    """One run of the benchmark of whole models."""

    command: str
    result: ModelBench

    def rows(self) -> list[str]:
        """Lines of the README's table: model, processor, layout, who, tokens/s of both phases."""
        layout = "packed" if "layout=packed" in self.command else "ggml_blocks"
        return [
            f"| {self.result.model} | {_short(self.result.provenance.cpu)} | "
            f"{layout if case.who == 'ktlab' else ''} | "
            f"{case.who.partition('/')[0]} | {case.prefill_tokens_per_s:.3g} | "
            f"{case.decode_tokens_per_s:.3g} |"
            for case in self.result.cases
        ]


def _short(processor: str) -> str:
    return processor.replace("(R)", "").replace(" Processor", "")


def recorded_models() -> tuple[RecordedModel, ...]:
    """All runs of the file of whole models, in its order."""
    return _models(MODELS_FILE)


def recorded_decoding() -> tuple[RecordedModel, ...]:
    """All runs of the file of decoding without peers, in its order."""
    return _models(DECODING_FILE)


def _models(file: tuple[str, str]) -> tuple[RecordedModel, ...]:
    table = json.loads(data_path(*file).read_text(encoding="utf-8"))
    return tuple(RecordedModel.from_dict(run) for run in table["runs"])


def recorded_runs() -> tuple[RecordedRun, ...]:
    """All runs of the file, in its order."""
    table = json.loads(data_path(*FILE).read_text(encoding="utf-8"))
    return tuple(RecordedRun.from_dict(run) for run in table["runs"])
