"""The measurements behind the control room, each a function from a model to plain results.

B texts, T tokens, V vocabulary, L layers with a router, E experts, U pieces of text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ktlab.measurement.pace import Pace
from ktlab.measurement.quality import Quality, summarize
from ktlab.measurement.tokens import Prediction, TokenComparison
from ktlab.measurement.windows import TokenBytes
from ktlab.model.model import Model
from ktlab.notebook.control_room_choice import Choice
from ktlab.notebook.control_room_results import (
    STAGES,
    WHICH,
    Generations,
    Histogram,
    Marked,
    Stages,
    StageTimes,
)
from ktlab.probe import Recorder
from ktlab.routing import intervals

ROUTER_IDS = ("layers.*.router.ids",)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is measured. Sizes in tokens."""

    preview_tokens: int = 24
    """Of the first answer: what can be on the page within 150 ms of a press."""
    max_tokens: int = 8192
    window: int = 256
    stage_tokens: int = 256
    stage_steps: int = 6
    stage_repeats: int = 6
    """As `repeats`: fewer give an interval that holds less than 95 %."""
    repeats: int = 6
    """Of the speed measurement; 6 are the fewest that hold a 95 % interval of the median."""
    speed_prompt: int = 256
    speed_decode: int = 32
    prompt_tokens: int = 24
    new_tokens: int = 48
    twin_rounds: int = 6
    twin_tokens: int = 256
    """Of the twin's prefill, fewer where a call would take long."""
    read_s: float = 12.0
    """A setting's text, its stages, its speed beside the baseline's, and what it writes take about
    so long at the most: with a slow model, sizes are smaller."""
    stages_s: float = 15.0
    speed_s: float = 24.0
    write_s: float = 5.0

    def within(self, quick: Pace) -> "Options":
        """These options with the sizes that a model of this pace has time for."""
        both = 2  # baseline and setting
        stage_tokens = min(quick.tokens, self.stage_tokens)
        stage_s = both * (2 * quick.seconds(stage_tokens) + self.stage_steps * quick.token_s)
        stage_repeats = quick.times(self.stages_s, stage_s, self.stage_repeats, least=2)
        stage_s = self.stages_s / both / stage_repeats
        run_s = self.speed_s / both / (self.repeats + 1)
        return replace(
            self,
            max_tokens=quick.read(self.read_s, self.max_tokens, least=min(128, self.max_tokens)),
            stage_tokens=quick.read(0.4 * stage_s, self.stage_tokens, least=16),
            stage_steps=quick.write(0.2 * stage_s, self.stage_steps, least=2),
            stage_repeats=stage_repeats,
            speed_prompt=quick.read(run_s / 2, self.speed_prompt, least=16),
            speed_decode=quick.write(run_s / 2, self.speed_decode, least=4),
            new_tokens=quick.write(self.write_s, self.new_tokens, least=8),
        )

    def smaller_than(self, asked: "Options") -> str:
        """What is read and timed of it, in words; "" where that is all that was `asked`."""
        if replace(self, stage_repeats=asked.stage_repeats) == asked:
            return ""
        return (
            f"sized to this model's pace: up to {self.max_tokens:,} of {asked.max_tokens:,} tokens "
            f"of text, speed of {self.speed_prompt} + {self.speed_decode} tokens instead of "
            f"{asked.speed_prompt} + {asked.speed_decode}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Glance:
    """One setting on the first few tokens of each text."""

    predictions: tuple[Prediction, ...]
    targets: tuple[NDArray[np.int64], ...]
    counts_ULE: NDArray[np.int64]


def glance(model: Model, choice: Choice, texts: Mapping[str, Sequence[int]]) -> Glance:
    """Run `choice` once over the texts side by side; they are cut to the shortest."""
    length = min(len(ids) for ids in texts.values())
    ids_BT = torch.tensor([list(ids[:length]) for ids in texts.values()])
    recorder = Recorder(ROUTER_IDS)
    with model.override(**choice.overrides()):
        logits_BTV = model.forward(ids_BT[:, :-1], probe=recorder)
    targets_BT = ids_BT[:, 1:]
    return Glance(
        predictions=tuple(map(Prediction.of, logits_BTV, targets_BT)),
        targets=tuple(row.numpy() for row in targets_BT),
        counts_ULE=_counts(model, recorder, _pieces(targets_BT)),
    )


def first_answer(
    model: Model, before: Glance, after: Glance, labels: tuple[str, str], seconds: float
) -> tuple[Quality, Histogram]:
    """The preliminary quality and histogram from two glances at the same tokens."""
    bytes_of = TokenBytes(model)
    compared = [
        TokenComparison.of(a, b, ids, bytes_of(ids))
        for a, b, ids in zip(before.predictions, after.predictions, before.targets, strict=True)
    ]
    tokens = sum(map(len, compared))
    quality = summarize(
        compared,
        identical=before is after,
        total_tokens=tokens,
        windows=len(compared),
        label_a=labels[0],
        label_b=labels[1],
        seconds=seconds,
        method=f"preliminary: the first {tokens} tokens only",
    )
    counts = (before.counts_ULE, after.counts_ULE)
    unit_T = _pieces(torch.from_numpy(np.stack(before.targets)))
    return quality, histogram(model, *counts, unit_T, preliminary=True)


def histogram(
    model: Model,
    before_ULE: NDArray[np.int64],
    after_ULE: NDArray[np.int64],
    unit_T: NDArray[np.int64],
    *,
    preliminary: bool,
) -> Histogram:
    """Counts of two settings as one object."""
    return Histogram(
        layers=tuple(block.index for block in model.moe_blocks),
        before_ULE=before_ULE,
        after_ULE=after_ULE,
        tokens_U=np.bincount(unit_T),
        preliminary=preliminary,
    )


def stages(
    model: Model,
    before: Choice,
    after: Choice,
    texts: Mapping[str, Sequence[int]],
    options: Options,
) -> tuple[StageTimes, Histogram]:
    """Time by stage of prefill and decode in alternation, and the router's counts meanwhile."""
    share = max(2, options.stage_tokens // len(texts))
    length = min(share, *(len(ids) for ids in texts.values()))
    ids_BT = torch.tensor([list(ids[:length]) for ids in texts.values()])
    context = min(ids_BT.shape[1], model.config.context_length - options.stage_steps)
    choices = {"before": before} if before == after else {"before": before, "after": after}
    runs: dict[str, dict[str, list[Stages]]] = {
        phase: {which: [] for which in choices} for phase in ("prefill", "decode")
    }
    unit_T = _pieces(ids_BT)
    counts: dict[str, NDArray[np.int64]] = {}
    for _ in range(options.stage_repeats):
        for which, choice in choices.items():
            with model.override(**choice.overrides()):
                prefill, recorder = _timed(model, ids_BT)
                counts[which] = _counts(model, recorder, unit_T)
                cache = model.new_cache(context=context + options.stage_steps)
                model.next_logits(ids_BT[:1, :context], cache)
                decode, _ = _timed(model, ids_BT[:1, :1], cache, options.stage_steps)
            runs["prefill"][which].append(prefill)
            runs["decode"][which].append(decode)
    times = StageTimes(
        runs={
            phase: {which: tuple(found.get(which, found["before"])) for which in WHICH}
            for phase, found in runs.items()
        },
        prefill_tokens=ids_BT.numel(),
        decode_tokens=options.stage_steps,
        context=context,
    )
    pair = (counts["before"], counts.get("after", counts["before"]))
    return times, histogram(model, *pair, unit_T, preliminary=False)


def _timed(
    model: Model, ids_BT: torch.Tensor, cache: Any = None, steps: int = 1
) -> tuple[Stages, Recorder]:
    """Milliseconds a token by stage over `steps` calls, and what the router chose."""
    recorder = Recorder(ROUTER_IDS)
    start = perf_counter()
    for _ in range(steps):
        model.forward(ids_BT, cache, probe=recorder)
    total = perf_counter() - start
    found = dict.fromkeys(STAGES, 0.0)
    for name, seconds in recorder.seconds.items():
        stage = name.rsplit(".", 1)[-1]
        if stage in found:
            found[stage] += seconds
    found["other"] = max(0.0, total - sum(found.values()))
    per_token = 1e3 / (steps * ids_BT.numel())
    return {k: v * per_token for k, v in found.items() if v}, recorder


def _pieces(ids_BT: torch.Tensor) -> NDArray[np.int64]:
    """Which piece of text each of the B * T tokens belongs to."""
    return intervals.units(np.repeat(np.arange(len(ids_BT)), ids_BT.shape[1]))


def _counts(model: Model, recorder: Recorder, unit_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """(U, L, E) how often each expert was selected in each piece of text."""
    joined = recorder.joined()
    experts, pieces = model.config.num_experts, int(unit_T[-1]) + 1
    first_T1 = torch.from_numpy(unit_T * experts)[:, None]
    rows = [
        torch.bincount((ids_TK + first_T1)[ids_TK >= 0], minlength=pieces * experts)
        for block in model.moe_blocks
        for ids_TK in [joined[f"layers.{block.index}.router.ids"]]
    ]
    if not rows:
        return np.zeros((pieces, 0, experts), np.int64)
    return torch.stack(rows).reshape(-1, pieces, experts).transpose(0, 1).numpy()


def written(
    model: Model, choice: Choice, prompt: Sequence[int], tokens: int
) -> Iterator[tuple[int, ...]]:
    """Greedy continuation of `prompt` by `choice`: all ids so far, after every few tokens."""
    ids: list[int] = []
    tokens = min(tokens, model.config.context_length - len(prompt))
    with model.override(**choice.overrides()):
        for token in model.stream(prompt, max_new_tokens=tokens):
            ids.append(token.id)
            if len(ids) % 8 == 0:
                yield tuple(ids)
    yield tuple(ids)


def continuation(
    model: Model, choice: Choice, prompt: Sequence[int], ids: Sequence[int]
) -> Prediction:
    """What `choice` predicts at each place of a continuation that is given to it."""
    both = torch.tensor([*prompt, *ids])
    with model.override(**choice.overrides()):
        logits_TV = model.forward(both[:-1])
    return Prediction.of(logits_TV[len(prompt) - 1 :], both[len(prompt) :])


def marked(
    model: Model,
    prompt: Sequence[int],
    before: Sequence[int],
    predicted: tuple[Prediction, Prediction],
    after: Sequence[int],
    *,
    done: bool,
) -> Generations:
    """Both continuations with the tokens marked at which the change shows."""
    a, b = predicted
    tokenizer, ids_T = model.tokenizer, np.asarray(before)
    compared = TokenComparison.of(a, b, ids_T, np.zeros_like(ids_T))
    chosen_T = b.top1_T.tolist()
    first = []
    for i, piece in enumerate(tokenizer.pieces(before)):
        other = tokenizer.decode([chosen_T[i]], special=True)
        changed = chosen_T[i] != before[i]
        p_a, p_b = np.exp([compared.logprob_a_T[i], compared.logprob_b_T[i]])
        note = f"baseline p = {p_a:.2f}, now p = {p_b:.2f}, KL {compared.kl_T[i]:.3g} nats"
        if changed:
            note = f"now it would write {other!r}; {note}"
        first.append(Marked(text=piece, changed=changed, kl=float(compared.kl_T[i]), note=note))
    kept: set[int] = set()
    matcher = SequenceMatcher(None, list(before), list(after), autojunk=False)
    for block in matcher.get_matching_blocks():
        kept.update(range(block.b, block.b + block.size))
    second = [
        Marked(
            text=piece,
            changed=i not in kept,
            note="also in the baseline's text" if i in kept else "not in the baseline's text",
        )
        for i, piece in enumerate(tokenizer.pieces(after))
    ]
    return Generations(
        prompt=tokenizer.decode(prompt),
        before=tuple(first),
        after=tuple(second),
        done=done,
    )
