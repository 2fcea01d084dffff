"""A model's speeds here, predicted from the machine's kernels and measured, in turn.

A machine that others use changes from minute to minute: each round measures the machine, then runs
the model, and what counts is the median of the rounds' ratios.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log
from os import PathLike, fspath
from statistics import median
from typing import Any

import numpy as np

from ktlab.errors import SettingError
from ktlab.kernels import native
from ktlab.measurement.model_bench import run
from ktlab.measurement.provenance import Provenance
from ktlab.model.load import load
from ktlab.placement.machine import Kernel, Machine, this_machine
from ktlab.placement.measuring import Probes, measured
from ktlab.placement.predict import PHASES, predict
from ktlab.record import Record

NEAR = 0.2
"""Predicted and measured agree within so much."""


@dataclass(frozen=True, kw_only=True)
class Round(Record):
    """The machine around a round, and the speeds in it."""

    machine: Machine
    """Geometric means of the rates before and after."""
    prefill_tokens_per_s: tuple[float, ...]
    """For each number of experts."""
    decode_tokens_per_s: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class PredictedHere(Record):
    """Predicted beside measured, on this machine."""

    model: str
    top_k: tuple[int, ...]
    prompt: int
    generate: int
    rounds: tuple[Round, ...]
    provenance: dict[str, Any]

    def errors(self, path: "str | PathLike[str]") -> dict[str, dict[int, float]]:
        """{phase: {k: predicted over measured, less one: the median of the rounds}}.

        `path` is where the model lies; its header is enough."""
        found: dict[str, dict[int, float]] = {phase: {} for phase in PHASES}
        for place, k in enumerate(self.top_k):
            ratios: dict[str, list[float]] = {phase: [] for phase in PHASES}
            for one in self.rounds:
                said = predict(
                    path,
                    machine=replace(one.machine, devices=this_machine().devices),
                    engine="ktlab",
                    top_k=k,
                    prompt=self.prompt,
                    generate=self.generate,
                )
                ratios["prefill"].append(
                    said.prefill_tokens_per_s / one.prefill_tokens_per_s[place]
                )
                ratios["decode"].append(said.decode_tokens_per_s / one.decode_tokens_per_s[place])
            for phase, values in ratios.items():
                found[phase][k] = median(values) - 1
        return found

    def text(self, path: "str | PathLike[str]") -> str:
        """A line for each number of experts."""
        errors = self.errors(path)
        lines = [f"{self.model}: {self.prompt} tokens of prompt, {self.generate} of answer"]
        for place, k in enumerate(self.top_k):
            prefill = median(one.prefill_tokens_per_s[place] for one in self.rounds)
            decode = median(one.decode_tokens_per_s[place] for one in self.rounds)
            lines.append(
                f"  {k} experts: prefill {prefill:.4g} tokens/s measured, "
                f"{100 * errors['prefill'][k]:+.0f} % predicted; decode {decode:.4g}, "
                f"{100 * errors['decode'][k]:+.0f} %"
            )
        return "\n".join(lines)


def predicted_here(
    path: "str | PathLike[str]",
    *,
    top_k: Sequence[int] = (8, 6, 4),
    prompt: int = 256,
    generate: int = 24,
    rounds: int = 3,
    seed: int = 0,
) -> PredictedHere:
    """Measure machine and model in turn. SettingError without native kernels, or for a bad k."""
    if why := native.unavailable():
        raise SettingError(f"the machine's kernels are not measured: {why}")
    model = load(fspath(path))
    generator = np.random.default_rng(seed)
    ids = generator.integers(model.config.vocab_size, size=prompt + generate).tolist()
    parts = (ids[:prompt], ids[prompt:])
    for k in top_k:
        with model.override(top_k=k):
            run(model, *parts)  # maps the file's pages, packs, compiles
    probes = Probes()
    machines, speeds = [measured(probes, 1)], []
    for _ in range(rounds):
        found = []
        for k in top_k:
            with model.override(top_k=k):
                one = run(model, *parts)
            found.append((prompt / one.prefill_s, len(one.decode_s) / sum(one.decode_s)))
        speeds.append(found)
        machines.append(measured(probes, 1))
    return PredictedHere(
        model=model.name,
        top_k=tuple(top_k),
        prompt=prompt,
        generate=generate,
        rounds=tuple(
            Round(
                machine=_between(machines[turn], machines[turn + 1]),
                prefill_tokens_per_s=tuple(prefill for prefill, _ in found),
                decode_tokens_per_s=tuple(decode for _, decode in found),
            )
            for turn, found in enumerate(speeds)
        ),
        provenance=Provenance.collect(model=model.name, seed=seed).to_dict(),
    )


def _between(before: Machine, after: Machine) -> Machine:
    """Both measurements as one: geometric means of what was measured."""
    assert before.processor is not None and after.processor is not None
    assert before.bandwidth is not None and after.bandwidth is not None
    other = after.processor.peaks
    peaks = {isa: _mean(rate, other[isa]) for isa, rate in before.processor.peaks.items()}
    return replace(
        before,
        processor=replace(before.processor, peaks=peaks),
        bandwidth=_mean(before.bandwidth, after.bandwidth),
        kernels=tuple(map(_kernel, before.kernels, after.kernels)),
        token_s=_mean(before.token_s or 0.0, after.token_s or 0.0),
        prompt_layer_s=_mean(before.prompt_layer_s or 0.0, after.prompt_layer_s or 0.0),
    )


def _kernel(before: Kernel, after: Kernel) -> Kernel:
    return replace(
        before,
        operations_per_s=_mean(before.operations_per_s, after.operations_per_s),
        bytes_per_s=_mean(before.bytes_per_s, after.bytes_per_s),
    )


def _mean(one: float, other: float) -> float:
    return exp((log(one) + log(other)) / 2) if one > 0 and other > 0 else max(one, other)
