"""Measure the embedded model on its held-out texts and write its model card.

    python data/recipe/card.py [--model tiny] [--log .build/train/log.jsonl]

writes `data/MODEL_CARD.md`, and every figure of it with its interval to `data/model_card.json`.
All of it comes from running the GGUF file with ktlab; nothing is copied from the training run but
its log, whose curve is shown.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import ktlab
from ktlab.interval import Interval
from ktlab.measurement.provenance import Provenance
from ktlab.measurement.quality import Quality, measure_quality, summarize
from ktlab.measurement.tokens import BaselineCache, TokenComparison
from ktlab.model.model import Model
from ktlab.model.trace import Trace

T = TypeVar("T")
DATA = Path(__file__).resolve().parent.parent
WINDOW = 512
KS = range(1, 13)
PROMPTS = {
    "english": "The old house stood at the end of the road, and",
    "dictionary": "small bird, songbird (noun):",
    "python": "def read_lines(path):\n",
    "c": "static int parse_number(const char *s)\n{\n",
    "german": "Um eine Tabelle einzufügen,",
    "russian": "Чтобы вставить таблицу,",
    "chinese": "春風",
}


def plain(interval: Interval) -> dict[str, float]:
    return {k: round(getattr(interval, k), 6) for k in ("value", "low", "high")}


def present(value: T | None) -> T:
    assert value is not None, "bits per byte need a tokenizer"
    return value


def windows(model: Model, text: str, tokens: int) -> list[list[int]]:
    """Stretches of WINDOW tokens behind BOS, spread evenly over a text: `tokens` in all."""
    ids, bos = model.tokenizer.encode(text), model.tokenizer.bos_id
    assert bos is not None
    count = max(1, tokens // WINDOW)
    last = len(ids) - WINDOW - 1
    starts = [round(i * last / max(1, count - 1)) for i in range(count)]
    return [[bos, *ids[start + 1 : start + WINDOW + 1]] for start in starts]


def bits_per_byte(model: Model, texts: dict[str, str], tokens: int) -> dict[str, Any]:
    """Of each domain, on `tokens` held-out tokens each, and their plain mean."""
    each: dict[str, Quality] = {}
    for name, text in texts.items():
        parts = {str(i): ids for i, ids in enumerate(windows(model, text, tokens))}
        measured = measure_quality(model, parts, a={}, b={}, window=WINDOW)
        assert measured is not None
        pooled, by_window = measured
        in_order = [present(by_window[key].per_token) for key in parts]
        # As one text: its blocks are what varies, windows as strata would hide that they differ.
        each[name] = summarize(
            [TokenComparison.join(in_order)],
            total_tokens=pooled.tokens,
            windows=len(parts),
            label_a="",
            label_b="",
            seconds=pooled.seconds,
            method=pooled.method,
        )
        print(f"{name}: {each[name].bits_per_byte_a}", flush=True)
    intervals = {name: present(quality.bits_per_byte_a) for name, quality in each.items()}
    macro = sum(map(float, intervals.values())) / len(each)
    # The domains' texts are independent, so their errors add in squares.
    margin = math.sqrt(sum(i.half_width**2 for i in intervals.values())) / len(each)
    return {
        "window": WINDOW,
        "tokens": {name: quality.tokens for name, quality in each.items()},
        "domains": {name: plain(interval) for name, interval in intervals.items()},
        "macro": round(macro, 4),
        "macro_margin": round(margin, 4),
    }


def quality_row(pooled: Quality, each: dict[str, Quality]) -> dict[str, Any]:
    figures = ("kl_mean", "top1_agreement", "perplexity_ratio", "bits_per_byte_change")
    row: dict[str, Any] = {name: plain(getattr(pooled, name)) for name in figures}
    row["domains"] = {name: plain(present(q.bits_per_byte_change)) for name, q in each.items()}
    return row


def quality_by_k(model: Model, texts: dict[str, str], tokens: int) -> dict[str, Any]:
    """k = 1..12 against the trained k, paired over the same tokens."""
    cache, rows = BaselineCache(max_bytes=4 << 30), {}
    for k in KS:
        measured = measure_quality(
            model, texts, a={}, b={"top_k": k}, window=WINDOW, max_tokens=tokens, baseline=cache
        )
        assert measured is not None
        rows[str(k)] = quality_row(*measured)
        print(f"k = {k}: bits per byte {rows[str(k)]['bits_per_byte_change']}", flush=True)
    return {"window": WINDOW, "tokens": tokens, "rows": rows}


def routing(model: Model, texts: dict[str, str], tokens: int) -> dict[str, Any]:
    """Evenness of the load and how far the domains' histograms are apart, by layer."""
    traces = []
    for name, text in texts.items():
        ids = model.tokenizer.encode(text)
        for start in range(0, tokens, WINDOW):
            window = [model.tokenizer.bos_id or 0, *ids[start + 1 : start + WINDOW]]
            traces.append(model.trace(window, names="layers.*.router.ids", domain=name))
    trace: Trace = traces[0].merge(*traces[1:])
    statistics = trace.routing
    divergence = statistics.domain_divergence()
    rows = {}
    for index, layer in enumerate(statistics.layers):
        load = statistics.load(layer)
        rows[str(layer)] = {
            "entropy_bits": round(float(statistics.entropy(layer)), 4),
            "hottest_over_even": round(float(load.max() / load.mean()), 3),
            "coldest_over_even": round(float(load.min() / load.mean()), 3),
            "domain_divergence_bits": plain(divergence.mean_L[index]),
            "divergence_by_chance_bits": round(divergence.chance_L[index], 4),
        }
    return {"tokens_per_domain": tokens, "layers": rows}


def samples(model: Model) -> dict[str, str]:
    """One continuation a domain, sampled with a fixed seed."""
    return {
        name: str(model.generate(prompt, max_new_tokens=90, temperature=0.7, top_p=0.9, seed=0))
        for name, prompt in PROMPTS.items()
    }


def curve(log: Path) -> list[dict[str, float]]:
    """Tokens seen and held-out bits per byte along the training run."""
    points, tokens = [], 0
    for line in map(json.loads, log.read_text().splitlines()):
        tokens = line.get("tokens", tokens)
        if "bits_per_byte" in line:
            points.append({"step": line["step"], "tokens": tokens, **line["bits_per_byte"]})
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--log", type=Path, default=Path(".build/train/log.jsonl"))
    parser.add_argument("--tokens", type=int, default=32768, help="held-out tokens a domain")
    parser.add_argument("--sweep-tokens", type=int, default=8192, help="the same, for each k")
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument(
        "--again", nargs="*", default=[], help="sections to measure again for the same model"
    )
    args = parser.parse_args()
    model, texts = ktlab.load(args.model), dict(ktlab.domain_texts())
    count, path = len(texts), args.out / "model_card.json"
    identity = {"fingerprint": model.identity.fingerprint, "bytes": model.nbytes}
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("model") != identity:
        known = {}
    measure: dict[str, Callable[[], Any]] = {
        "bits_per_byte": lambda: bits_per_byte(model, texts, args.tokens),
        "quality_by_k": lambda: quality_by_k(model, texts, args.sweep_tokens * count),
        "routing": lambda: routing(model, texts, args.sweep_tokens),
        "samples": lambda: samples(model),
        "curve": lambda: curve(args.log) if args.log.exists() else [],
    }
    card: dict[str, Any] = {"model": identity}
    for name, section in measure.items():
        card[name] = known[name] if name in known and name not in args.again else section()
    card["provenance"] = asdict(Provenance.collect(model=model.name, seed=0))
    path.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (args.out / "MODEL_CARD.md").write_text(page(model, card), encoding="utf-8")
    print(f"macro {card['bits_per_byte']['macro']} bits a byte")


def page(model: Model, card: dict[str, Any]) -> str:
    """The card as Markdown."""
    c = model.config
    size = card["model"]["bytes"]
    parameters = sum(model.checkpoint.tensor(n).size for n in model.checkpoint.names())
    lines = [
        "# The embedded model: ktlab tiny",
        "",
        "Written by `python data/recipe/card.py` from the GGUF file itself; every figure with its "
        "interval is in `model_card.json`. Intervals are 95 %, by block jackknife over "
        "neighbouring tokens (`ktlab/measurement/intervals.py`).",
        "",
        "## What it is",
        f"- Architecture of DeepSeek-V3 (`{c.architecture}`): {c.num_layers} layers, of which "
        f"{c.first_dense_layers} dense; {c.num_experts} routed experts of width {c.expert_size}, "
        f"top {c.top_k}, and {c.num_shared_experts} shared; {c.topk_group} of {c.n_group} expert "
        f"groups; {c.gating} gate with `e_score_correction_bias`, normalised weights times "
        f"{c.routed_scaling_factor:g}.",
        f"- MLA: hidden {c.hidden_size}, {str(c.mla).removeprefix('MLA, ')}; vocabulary "
        f"{c.vocab_size}, byte-level BPE with DeepSeek-V3's pre-tokenizer.",
        f"- {parameters / 1e6:.1f} M parameters, {size / 1e6:.1f} MB in the file's formats.",
        "- Trained from scratch by `data/recipe/train.py`; texts and licences: `SOURCES.md`. "
        f"Contexts of up to {WINDOW} tokens were trained; longer ones run but are not good.",
        "- For looking into routing, quantization and attention on a small machine. Its text is "
        "recognisable, not true: it knows nothing.",
        "",
        "## Held-out bits per byte",
        f"Windows of {WINDOW} tokens spread over `data/texts/`, none of which was trained on.",
        "",
        "| domain | bits per byte | 95 % interval | tokens |",
        "|---|---|---|---|",
    ]
    bits = card["bits_per_byte"]
    for name, i in bits["domains"].items():
        lines.append(
            f"| {name} | {i['value']:.3f} | {i['low']:.3f} to {i['high']:.3f} | "
            f"{bits['tokens'][name]:,} |"
        )
    lines += [
        f"| **mean of domains** | **{bits['macro']:.3f}** | ± {bits['macro_margin']:.3f} | |",
        "",
    ]
    paired = card["quality_by_k"]["tokens"]
    lines += [
        "## Quality against the number of experts",
        f"Against k = {c.top_k}, paired over the same {paired:,} tokens, the first of all domains. "
        "KL divergence in nats a token.",
        "",
        "| k | KL, mean | same top-1 % | perplexity ratio | change in bits a byte |",
        "|---|---|---|---|---|",
    ]
    for k, row in card["quality_by_k"]["rows"].items():
        cells = [
            f"{row[name]['value']:.{digits}f} [{row[name]['low']:.{digits}f}, "
            f"{row[name]['high']:.{digits}f}]"
            for name, digits in (
                ("kl_mean", 4), ("top1_agreement", 1),
                ("perplexity_ratio", 4), ("bits_per_byte_change", 4),
            )
        ]  # fmt: skip
        lines.append(f"| {k} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Load and specialisation by layer",
        f"{card['routing']['tokens_per_domain']:,} tokens of each domain. Entropy of the load, at "
        f"most {c.num_experts.bit_length() - 1} bits; the divergence is the mean Jensen-Shannon "
        "divergence between pairs of domains' histograms.",
        "",
        "| layer | entropy, bits | hottest / even | coldest / even | divergence, bits | by chance |"
        "",
        "|---|---|---|---|---|---|",
    ]
    for layer, row in card["routing"]["layers"].items():
        apart = row["domain_divergence_bits"]
        lines.append(
            f"| {layer} | {row['entropy_bits']:.3f} | {row['hottest_over_even']:.2f} | "
            f"{row['coldest_over_even']:.2f} | {apart['value']:.3f} [{apart['low']:.3f}, "
            f"{apart['high']:.3f}] | {row['divergence_by_chance_bits']:.3f} |"
        )
    lines += [
        "",
        "## Training curve",
        "Bits per byte on a small held-out sample during training.",
        "",
        "| tokens seen, M | mean of domains |",
        "|---|---|",
    ]
    points = card["curve"]
    for point in points[:: max(1, len(points) // 16)]:
        lines.append(f"| {point['tokens'] / 1e6:.1f} | {point['macro']:.3f} |")
    lines += ["", "## Samples"]
    lines += ["Prompts in each domain's own form; temperature 0.7, top-p 0.9, seed 0, one try.", ""]
    for name, sample in card["samples"].items():
        lines += [f"**{name}**", "", "```text", sample.replace("```", "'''"), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
