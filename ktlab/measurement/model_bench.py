"""A whole model's prefill and decode speed, beside the ceiling and beside llama.cpp.

Everybody computes the same ids: a prompt in one go, then the following ones one by one, with the
logits of each last token. Contenders take turns, round by round, after a round that does not count
(it maps the file's pages, packs, compiles); the ceiling is measured in between, in this process.
"""

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktlab import hardware, html
from ktlab.errors import ContextError, SettingError
from ktlab.kernels import ceilings, native
from ktlab.kernels.threads import default_threads
from ktlab.measurement.peers import client
from ktlab.measurement.peers.client import Generated
from ktlab.measurement.placed_run import PlacedRun, logits_of, placed_run
from ktlab.measurement.provenance import Provenance
from ktlab.measurement.rounds import CACHES, LARGEST_BUFFER, LEAST_BUFFER, Progress, scatter
from ktlab.measurement.synthetic import check_seed
from ktlab.probe import Recorder
from ktlab.record import Record

if TYPE_CHECKING:
    from ktlab.attention.cache import Cache
    from ktlab.model.model import Model

CHUNK = 512
PLACING = ("placement", "stand_in", "dtype", "nodes")
"""Settings that change where and in which format, and nothing that a model should compute."""


@dataclass(frozen=True, kw_only=True)
class ModelCase(Record):
    """One contender on one model file."""

    who: str
    """"ktlab", or a peer and its method."""
    what: str
    """Kernels, or version."""
    prefill_tokens_per_s: float
    """Median over the rounds."""
    prefill_spread: float
    """Distance of the quartiles over the median."""
    decode_tokens_per_s: float
    """Of all tokens but the prompt's; median over the rounds."""
    decode_spread: float
    prefill_samples: tuple[float, ...]
    """Tokens/s of each round."""
    decode_samples: tuple[float, ...]
    same_next_id: float
    """Share of steps after which it would have gone on with ktlab's id."""


@dataclass(frozen=True, kw_only=True)
class ModelBench(Record):
    """One run of the benchmark: ktlab's case first, then the peers'."""

    model: str
    prompt: int
    generate: int
    threads: int
    rounds: int
    prefill_tokens_per_s: float
    prefill_spread: float
    decode_tokens_per_s: float
    decode_spread: float
    prefill_ceiling: str
    """What bounds it, with its measured rate."""
    prefill_ceiling_share: float
    """Least time that the ceiling allows over the median, 0..1."""
    decode_ceiling: str
    decode_ceiling_share: float
    prefill_stages_s: dict[str, float]
    """Seconds of one watched run by kind of stage; "other" is what lies between the stages."""
    decode_stages_s: dict[str, float]
    """The same of one token."""
    glue_share: float
    """Of decoding: time of a token while the native kernels return at once, over a token's time.
    So it is what Python, torch's operations and calls take; the interpreter alone takes less."""
    load_s: float
    model_bytes: int
    peak_resident_bytes: int
    """Of this process, mapped pages of the file included."""
    cases: tuple[ModelCase, ...]
    ratios: dict[str, dict[str, float]]
    """{peer: {"prefill": ..., "decode": ...}}: ktlab over the peer, median over the rounds."""
    skipped: dict[str, str]
    provenance: Provenance
    context: int = 0
    """Positions that were cached before the prompt."""
    placed: PlacedRun | None = None
    """Where `settings` had a placement: what it gave."""

    def __str__(self) -> str:
        before = f" after {self.context:,} cached positions" if self.context else ""
        lines = [f"{self.model}: {self.prompt} tokens of prompt{before}, then {self.generate}"]
        for case in self.cases:
            rounds = len(case.prefill_samples)
            prefill = f"{case.prefill_tokens_per_s:.4g} {scatter(case.prefill_spread, rounds)}"
            decode = f"{case.decode_tokens_per_s:.4g} {scatter(case.decode_spread, rounds)}"
            lines.append(f"  {case.who:18} prefill {prefill:14} decode {decode:14} tokens/s")
        lines += [
            f"  prefill at {100 * self.prefill_ceiling_share:.0f} % of {self.prefill_ceiling}, "
            f"decode at {100 * self.decode_ceiling_share:.0f} % of {self.decode_ceiling}",
            f"  prefill: {_stages(self.prefill_stages_s)}",
            f"  a token: {_stages(self.decode_stages_s)}; glue {100 * self.glue_share:.0f} %",
            f"  loaded in {self.load_s:.2f} s; {self.model_bytes / 1e9:.2f} GB of weights, "
            f"{self.peak_resident_bytes / 1e9:.2f} GB resident at most",
        ]
        lines += [f"  {self.placed}"] if self.placed else []
        lines += [
            f"  {100 * ratio['prefill']:.0f} % of the prefill and {100 * ratio['decode']:.0f} % of "
            f"the decoding speed of {who}"
            for who, ratio in self.ratios.items()
        ]
        lines += [f"  without {name}: {why}" for name, why in self.skipped.items()]
        return html.wrapped("\n".join(lines))


def bench_model(
    load: "Callable[[], Model]",
    *,
    prompt: int = 512,
    generate: int = 32,
    context: int = 0,
    threads: int | None = None,
    settings: Mapping[str, Any] | None = None,
    rounds: int = 5,
    peers: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ModelBench:
    """Measure the model that `load` gives.

    context   positions that are cached before the prompt: noise, which is made in no time
    settings  overrides as in `Model.override`, such as {"layout": "packed"} or
              {"placement": p, "dtype": "int4"}
    peers     None: none; (): llama.cpp in all its ways; or names such as "llama.cpp/cpu"
    seed      of the ids

    `SettingError` or `ContextError` on anything impossible, before anything long is done.
    """
    if min(prompt, generate, rounds) < 1:
        raise SettingError(
            f"prompt={prompt}, generate={generate}, rounds={rounds}: expected at least 1 of each"
        )
    if context < 0:
        raise SettingError(f"context={context}: expected a context of 0 or more positions")
    if context and peers is not None:
        raise SettingError("peers read a prompt, not noise in a cache: leave out context or peers")
    methods = () if peers is None else client.choose_for_models(peers)
    for method in methods:
        client.python_of(method.peer)
    check_seed(seed)
    threads = threads or default_threads()
    say = progress or (lambda text: None)
    start = perf_counter()
    model = load()
    load_s = perf_counter() - start
    if context + prompt + generate > model.config.context_length:
        raise ContextError(
            f"{context + prompt} tokens of context and prompt and {generate} more do not fit the "
            f"context of {model.name}, {model.config.context_length}; ask for fewer"
        )
    if methods and model.checkpoint.path is None:
        raise SettingError(f"{model.name} has no file that a peer could read; leave out --peers")
    generator = np.random.default_rng(seed)
    ids = generator.integers(model.config.vocab_size, size=prompt + generate).tolist()
    parts = (ids[:prompt], ids[prompt:])
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        wanted = {"threads": threads, **(settings or {})}
        # Without a placement they are words of a rule set, which computes otherwise, too.
        words = [word for word in PLACING if word in wanted] if "placement" in wanted else []
        placing = {word: wanted.pop(word) for word in words}
        stack.enter_context(model.override(**wanted))
        on_cpu = logits_of(model, parts[0]) if placing else None
        stack.enter_context(model.override(**placing))
        contenders: dict[str, Callable[[], Generated]] = {
            "ktlab": lambda: run(model, *parts, context)
        }
        descriptions = {"ktlab": str(model.moe_blocks[-1].experts.kernel)}
        for method in methods:
            say(f"{method.label} loads")
            file = model.checkpoint.path
            assert file is not None
            try:
                peer = client.ModelPeer(method, file, threads=threads, context=len(ids))
            except client.PeerError as error:
                skipped[method.label] = str(error)
                continue
            stack.callback(peer.close)
            contenders[method.label] = lambda peer=peer: peer.generate(*parts)  # type: ignore[misc]
            descriptions[method.label] = peer.description["version"]
        rates, peak = _Rates(model, threads), 0
        found: dict[str, list[Generated]] = {who: [] for who in contenders}
        for turn in range(rounds + 1):
            for who, contender in contenders.items():
                if who in skipped:
                    continue
                say(f"{who}, " + (f"round {turn} of {rounds}" if turn else "warm-up"))
                try:
                    found[who].append(contender())
                except client.PeerError as error:
                    skipped[who] = str(error)
            peak = max(peak, _peak_bytes())
            rates.measure()
            _begin_peak()
        samples = {who: runs[1:] for who, runs in found.items() if who not in skipped}
        say("stages")
        placed = None if on_cpu is None else placed_run(model, parts[0], on_cpu)
        stages = _watched(model, *parts, context)
        glue_s = _glue(model, *parts, context)
        peak = max(peak, _peak_bytes())
    cases = [_case(who, descriptions[who], samples, prompt) for who in samples]
    own, prefill_s, decode_s = cases[0], *_seconds(samples["ktlab"])
    prefill_ceiling = rates.bound(model, prompt, min(CHUNK, prompt), context + prompt)
    decode_ceiling = rates.bound(model, 1, 1, context + prompt + generate // 2)
    return ModelBench(
        model=model.name,
        prompt=prompt,
        generate=generate,
        context=context,
        threads=threads,
        rounds=rounds,
        prefill_tokens_per_s=own.prefill_tokens_per_s,
        prefill_spread=own.prefill_spread,
        decode_tokens_per_s=own.decode_tokens_per_s,
        decode_spread=own.decode_spread,
        prefill_ceiling=prefill_ceiling[1],
        prefill_ceiling_share=prefill_ceiling[0] / prefill_s,
        decode_ceiling=decode_ceiling[1],
        decode_ceiling_share=decode_ceiling[0] / decode_s,
        prefill_stages_s=stages[0],
        decode_stages_s=stages[1],
        glue_share=min(1.0, glue_s / decode_s),
        load_s=load_s,
        model_bytes=model.nbytes,
        peak_resident_bytes=peak,
        cases=tuple(cases),
        ratios={
            case.who: {
                "prefill": _ratio(own.prefill_samples, case.prefill_samples),
                "decode": _ratio(own.decode_samples, case.decode_samples),
            }
            for case in cases[1:]
        },
        skipped=skipped,
        provenance=Provenance.collect(model=model.name, seed=seed),
        placed=placed,
    )


def run(
    model: "Model", prompt: Sequence[int], following: Sequence[int], context: int = 0
) -> Generated:
    """ktlab's turn: what a peer's `generate` does, after `context` positions of noise."""
    cache = _filled(model, context, len(prompt) + len(following))
    start = perf_counter()
    logits_V = model.next_logits(np.array([prompt]), cache, chunk=CHUNK)[0]
    prefill_s = perf_counter() - start
    ids, seconds = [int(logits_V.argmax())], []
    for token in following:
        start = perf_counter()
        logits_V = model.next_logits(np.array([[token]]), cache)[0]
        seconds.append(perf_counter() - start)
        ids.append(int(logits_V.argmax()))
    return Generated(prefill_s=prefill_s, decode_s=tuple(seconds), ids=tuple(ids))


def _filled(model: "Model", context: int, more: int) -> "Cache":
    """A cache with `context` positions of noise and room for `more`."""
    cache = model.new_cache(context=context + more)
    for layer in cache.layers:
        for values in (layer.keys, layer.values):
            if context and values is not None:
                values.normal_(generator=torch.Generator(values.device).manual_seed(0))
    cache.lengths_B.fill_(context)
    return cache


class _Rates:
    """Reading and arithmetic of this process' own threads; the best of the rounds counts."""

    def __init__(self, model: "Model", threads: int) -> None:
        self.threads = threads
        kernel = model.moe_blocks[-1].experts.kernel
        self.isa = kernel.isa if kernel.backend == "native" else ""
        wanted = max(LEAST_BUFFER, CACHES * (hardware.cache_bytes() or 0))
        # A model that fits the cache is read from there.
        size = min(wanted, LARGEST_BUFFER, max(1 << 20, model.nbytes))
        self._buffer_bytes = size
        self.read = self.operations = 0.0

    def measure(self) -> None:
        if native.unavailable():
            return
        buffer = np.ones(self._buffer_bytes, np.uint8)  # not kept: it is no memory of the model's
        self.read = max(self.read, ceilings.reading(buffer, self.threads))
        if self.isa and ceilings.usable(self.isa):
            rate = ceilings.operations(self.isa, self.threads)
        else:
            rate = ceilings.float32(self.threads)
        self.operations = max(self.operations, rate)

    def bound(self, model: "Model", tokens: int, chunk: int, context: int) -> tuple[float, str]:
        """(least seconds, the ceiling in words); 0 where it cannot be measured."""
        if not self.read:
            return 0.0, "unknown (no native kernels)"
        work = model.cost(tokens, context)
        reading_s = -(-tokens // chunk) * work.bytes / self.read
        computing_s = work.flop / self.operations
        if reading_s >= computing_s:
            return reading_s, f"read {self.read / 1e9:.3g} GB/s"
        return computing_s, f"{self.isa or 'float32'} {self.operations / 1e9:.4g} GFLOP/s"


def _seconds(runs: Sequence[Generated]) -> tuple[float, float]:
    """Medians of a prefill and of one token."""
    return (
        median(found.prefill_s for found in runs),
        median(sum(found.decode_s) / len(found.decode_s) for found in runs),
    )


def _case(
    who: str, what: str, samples: Mapping[str, Sequence[Generated]], prompt: int
) -> ModelCase:
    runs, own = samples[who], samples["ktlab"][0].ids
    prefill = [prompt / found.prefill_s for found in runs]
    decode = [len(found.decode_s) / sum(found.decode_s) for found in runs]
    same = [a == b for a, b in zip(own, runs[0].ids, strict=True)]
    return ModelCase(
        who=who,
        what=what,
        prefill_tokens_per_s=median(prefill),
        prefill_spread=_spread(prefill),
        decode_tokens_per_s=median(decode),
        decode_spread=_spread(decode),
        prefill_samples=tuple(prefill),
        decode_samples=tuple(decode),
        same_next_id=sum(same) / len(same),
    )


def _spread(samples: Sequence[float]) -> float:
    low, high = np.quantile(samples, (0.25, 0.75))
    return float(high - low) / median(samples)


def _ratio(own: Sequence[float], other: Sequence[float]) -> float:
    return median(a / b for a, b in zip(own, other, strict=True))


def _watched(
    model: "Model", prompt: Sequence[int], following: Sequence[int], context: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by kind of stage of the prompt and of one token after it."""
    cache = _filled(model, context, len(prompt) + len(following))
    found = []
    for ids in (prompt, following[:1]):
        recorder = Recorder()
        start = perf_counter()
        model.next_logits(np.array([ids]), cache, probe=recorder, chunk=CHUNK)
        total = perf_counter() - start
        kinds: dict[str, float] = {}
        for name, seconds in recorder.seconds.items():
            kind = name.rpartition(".")[2]
            kinds[kind] = kinds.get(kind, 0.0) + seconds
        found.append({**kinds, "other": max(0.0, total - sum(kinds.values()))})
    return found[0], found[1]


def _glue(model: "Model", prompt: Sequence[int], following: Sequence[int], context: int) -> float:
    """Seconds of a token while the native kernels do nothing; 0 where there are none."""
    if native.unavailable():
        return 0.0
    cache = _filled(model, context, len(prompt) + len(following))
    with native.idle():
        model.next_logits(np.array([prompt]), cache, chunk=CHUNK)
        seconds = []
        for token in following:
            start = perf_counter()
            model.next_logits(np.array([[token]]), cache)
            seconds.append(perf_counter() - start)
    return median(seconds)


def _peak_bytes() -> int:
    """Largest resident size of this process so far, or since `_begin_peak`."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _begin_peak() -> None:
    """Counts the largest size anew from here on, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _stages(seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values()) or 1.0
    largest = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {100 * s / total:.0f} %" for name, s in largest)
