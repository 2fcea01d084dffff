"""`Machine.measure()`: the ceilings and kernels of the machine at hand, in less than 20 s.

Kernels run on synthetic experts: a large bank out of memory, and the embedded model's own, which
lie in the cache. What a layer costs beside its kernels is what the embedded model takes longer.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch

from ktlab import hardware
from ktlab.checkpoint.published import published_model
from ktlab.checkpoint.synthesis import synthesize
from ktlab.errors import SettingError
from ktlab.experts.bank import ExpertBank
from ktlab.kernels import ceilings, native
from ktlab.kernels.linear import Linear
from ktlab.kernels.threads import default_threads
from ktlab.model.load import load
from ktlab.model.model import Model
from ktlab.placement.gpu_rates import measured_gpus
from ktlab.placement.machine import Kernel, Machine, Processor, this_machine
from ktlab.placement.touched import chances, touched
from ktlab.probe import Recorder
from ktlab.quantization import QTensor, get_format

RECIPE = 3
"""Goes up when what is measured changes: what was kept is then measured again."""
WIDTHS, INNER, EXPERTS, TOP_K = 2048, 1536, 24, 8
"""Of the large bank: about DeepSeek-V2-Lite's experts, more than most caches hold."""
FORMATS = {"q4_k_m": ("q4_k", "q4_k", "q6_k"), "q8_0": ("q8_0", "q8_0", "q8_0")}
PER_EXPERT = (1, 8, 32, 128)
"""Tokens that each touched expert gets; 1 is measured with a single token."""
MATRIX_FORMAT, MATRIX_ROWS = "q6_k", 65536
PER_MATRIX = (1, 16, 128)
ROUNDS, REPEATS = 3, 5
ROUND_S = 0.15
BUFFER_BYTES = 256 << 20
CALLS = ROUNDS * REPEATS + 1
"""The most that `_seconds` makes."""
PROMPT, DECODED = 256, 32


def measure(*, again: bool = False, folder: Path | None = None) -> Machine:
    """The machine at hand; ceilings and kernels from the cache of an earlier call if it is the same
    processor with the same cores and kernels, memory asked anew. SettingError without kernels."""
    if why := native.unavailable():
        raise SettingError(f"Machine.measure needs the native kernels: {why}")
    kept = (folder or _cache_folder()) / f"machine-{_fingerprint()}.json"
    found = None if again else _read(kept)
    if found is None:
        gpus, links = measured_gpus()
        found = replace(measured(Probes()), gpus=gpus, links=links)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(found.to_json(), encoding="utf-8")
        except OSError:
            pass  # a read-only home: measured again next time
    now = this_machine()
    return replace(found, devices=now.devices, numa_nodes=now.numa_nodes)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ktlab"


def _fingerprint() -> str:
    usable = sorted(isa for isa, why in native.isas().items() if not why)
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    parts = (RECIPE, hardware.cpu_name(), hardware.cores(), default_threads(), usable, gpu)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _read(path: Path) -> Machine | None:
    try:
        return Machine.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None


class Probes:
    """What is timed, made once: banks of experts, a matrix, an attention, the embedded model."""

    def __init__(self) -> None:
        self.tiny = load("tiny")
        block = self.tiny.moe_blocks[-1]
        self.banks = [(name, _large(name), TOP_K) for name in FORMATS]
        self.banks.append((block.experts.format, block.experts, block.router.rule.k_max))
        self.matrix = Linear(_synthetic(MATRIX_FORMAT, (MATRIX_ROWS, WIDTHS)))
        config = replace(
            published_model("deepseek-v2-lite").config,
            num_layers=1,
            first_dense_layers=1,
            intermediate_size=256,
            num_experts=8,
            top_k=1,
            expert_size=256,
            vocab_size=512,
        )
        self.attention = Model(synthesize(config, formats="q4_k"))
        self.buffer = np.ones(BUFFER_BYTES, np.uint8)


def measured(probes: Probes, rounds: int = ROUNDS) -> Machine:
    """Measure now, in so many rounds each; no memory in it."""
    threads = default_threads()
    usable = [isa for isa, why in native.isas().items() if not why and isa != "serial"]
    peaks = {"float32": _best(lambda: ceilings.float32(threads), rounds)}
    for isa in usable:
        if not isa.endswith("_emulated"):
            peaks[isa] = _best(partial(ceilings.operations, isa, threads), rounds)
    kernels = [one for bank in probes.banks for one in _bank_rates(*bank, rounds)]
    kernels += _matrix_rates(probes.matrix, rounds)
    machine = Machine(
        name="this",
        about="measured here",
        devices=(),
        processor=Processor(
            name=hardware.cpu_name(),
            cores=hardware.cores(),
            clock_hz=None,
            peaks={isa: rate for isa, rate in peaks.items() if rate},
            l2_bytes=hardware.cache_bytes(2),
            l3_bytes=hardware.cache_bytes(),
        ),
        bandwidth=_best(lambda: ceilings.reading(probes.buffer, threads), rounds),
        kernels=tuple(kernels),
        measured=True,
        sources={
            "processor": "ktlab.kernels.ceilings, the best of a few rounds",
            "bandwidth": f"read by {threads} threads from {BUFFER_BYTES >> 20} MB",
            "kernels": "median rounds of banks of experts, a matrix and an attention with "
            "synthetic weights",
        },
    )
    machine = replace(
        machine, kernels=(*kernels, _attention_rate(probes.attention, machine, rounds))
    )
    token_s, prompt_layer_s = _glue(probes.tiny, machine, rounds)
    return replace(machine, token_s=token_s, prompt_layer_s=prompt_layer_s)


def _best(rate: Callable[[], float], rounds: int) -> float:
    return max(rate() for _ in range(rounds))


def _large(name: str) -> ExpertBank:
    """A bank of synthetic experts that does not fit the cache."""
    shapes = ((EXPERTS, INNER, WIDTHS), (EXPERTS, INNER, WIDTHS), (EXPERTS, WIDTHS, INNER))
    tensors = [_synthetic(f, shape) for f, shape in zip(FORMATS[name], shapes, strict=True)]
    return ExpertBank(0, *tensors)


def _synthetic(format_name: str, shape: tuple[int, ...]) -> QTensor:
    """Rows of a small codebook in random order: a clock needs true sizes, not true values."""
    generator = np.random.default_rng(0)
    format, columns = get_format(format_name), shape[-1]
    values = generator.standard_normal((64, columns), np.float32) / np.sqrt(columns)
    codebook = format.quantize(values.astype(np.float32))
    order = generator.integers(len(codebook), size=shape[:-1])
    return QTensor(
        name="synthetic", format=format, shape=shape, blocks=codebook[order], source="synthetic"
    )


def _bank_rates(format: str, bank: ExpertBank, k: int, rounds: int) -> Iterator[Kernel]:
    """Rates of a bank at a few numbers of tokens an expert."""
    weights = 3 * bank.width * bank.hidden_size
    generator = np.random.default_rng(1)
    for each in PER_EXPERT:
        tokens = 1 if each == 1 else max(1, each * bank.num_experts // k)
        hidden = torch.from_numpy(generator.standard_normal((tokens, bank.hidden_size), np.float32))
        order = generator.random((8, tokens, bank.num_experts)).argsort(-1)[..., :k]
        choices = torch.from_numpy(np.ascontiguousarray(order))
        shares = torch.full((tokens, k), 1 / k)
        turn = 0

        def run(
            hidden: torch.Tensor = hidden,
            choices: torch.Tensor = choices,
            shares: torch.Tensor = shares,
        ) -> None:
            nonlocal turn
            turn += 1
            bank.forward(hidden, choices[turn % len(choices)], shares)

        seconds = _seconds(run, rounds)
        used = touched(tokens, chances(bank.num_experts, k))
        yield Kernel(
            kind="experts",
            format=format,
            tokens=each,
            weights=weights,
            bits=8 * bank.expert_bytes / weights,
            operations_per_s=2.0 * tokens * k * weights / seconds,
            bytes_per_s=used * bank.expert_bytes / seconds,
        )


def _matrix_rates(linear: Linear, rounds: int) -> Iterator[Kernel]:
    """Rates of one large matrix."""
    nbytes = linear.nbytes
    generator = np.random.default_rng(2)
    for tokens in PER_MATRIX:
        hidden = torch.from_numpy(generator.standard_normal((tokens, WIDTHS), np.float32))
        seconds = _seconds(partial(linear, hidden), rounds)
        weights = MATRIX_ROWS * WIDTHS
        yield Kernel(
            kind="matrix",
            format=MATRIX_FORMAT,
            tokens=tokens,
            weights=weights,
            bits=8 * nbytes / weights,
            operations_per_s=2.0 * tokens * weights / seconds,
            bytes_per_s=nbytes / seconds,
        )


def _attention_rate(model: Model, machine: Machine, rounds: int) -> Kernel:
    """What a prompt's attention makes of the latent, and its scores: the stage's time without its
    projections, which are matrices like others."""
    config = model.config
    ids = np.arange(PROMPT)[None] % config.vocab_size
    seconds = []
    for _ in range(rounds * REPEATS + 1):
        recorder = Recorder()
        model.next_logits(ids, model.new_cache(context=PROMPT), probe=recorder)
        seconds.append(recorder.seconds["layers.0.attention"])
    sizes = config.mla
    made = 2.0 * sizes.kv_lora_rank * sizes.num_heads * (sizes.qk_nope_dim + sizes.v_dim) * PROMPT
    scores = sizes.flop_per_pair["naive"] * PROMPT**2 / 2
    linears = [one.stack.size for one in model.layers[0].attention.linears.values()]
    projections = 2.0 * sum(linears) * PROMPT - made
    matrix = max(k.operations_per_s for k in machine.kernels if k.kind == "matrix")
    rest_s = median(seconds[1:]) - projections / matrix
    return Kernel(
        kind="attention",
        format="float32",
        tokens=PROMPT,
        weights=int(made / 2 / PROMPT),
        bits=32,
        operations_per_s=(made + scores) / max(rest_s, 0.1 * median(seconds[1:])),
        bytes_per_s=0.0,
    )


def _seconds(run: Callable[[], object], rounds: int) -> float:
    """Median of rounds, each the median of a few calls; the first call does not count."""
    run()
    medians = []
    for _ in range(rounds):
        calls: list[float] = []
        start = perf_counter()
        while len(calls) < REPEATS and (not calls or perf_counter() - start < ROUND_S):
            begun = perf_counter()
            run()
            calls.append(perf_counter() - begun)
        medians.append(median(calls))
    return median(medians)


def _glue(model: Model, machine: Machine, rounds: int) -> tuple[float, float]:
    """(what a token of decode takes beside kernels, what a token of a prompt does in each layer):
    of the embedded model with one expert a token, so that little else is in it."""
    from ktlab.placement.predict import predict

    generator = np.random.default_rng(3)
    ids = generator.integers(model.config.vocab_size, size=(1, PROMPT))
    with model.override(top_k=1):

        def prefill() -> None:
            model.next_logits(ids, model.new_cache(context=PROMPT))

        cache = model.new_cache(context=PROMPT + CALLS * DECODED)
        model.next_logits(ids, cache)

        def decode() -> None:
            for place in range(DECODED):  # other tokens go to other experts
                model.next_logits(ids[:, place : place + 1], cache)[0].argmax()

        prompt_s, token_s = _seconds(prefill, rounds), _seconds(decode, rounds) / DECODED
    bare = replace(machine, devices=this_machine().devices, token_s=0.0, prompt_layer_s=0.0)
    least = predict(
        "tiny", machine=bare, engine="ktlab", top_k=1, prompt=PROMPT, generate=CALLS * DECODED
    )
    layers = model.config.num_layers
    rest_s = prompt_s - PROMPT / least.prefill_tokens_per_s
    return (
        max(0.0, token_s - 1 / least.decode_tokens_per_s),
        max(0.0, rest_s) / layers / PROMPT,
    )
