"""`ktlab bench experts` and `ktlab bench model`: speed beside the ceiling and the peers."""

import argparse
import sys
from functools import partial
from typing import Any

from ktlab import html
from ktlab.cli.arguments import add_model, loaded
from ktlab.errors import SettingError
from ktlab.model.words import EXAMPLES, settings


def add_commands(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="what", required=True, metavar="experts|model")
    text = "one MoE layer, synthetic weights"
    experts = kinds.add_parser("experts", help=text, description=text)
    experts.set_defaults(bench=_experts)
    experts.add_argument(
        "--shape",
        default="deepseek-v3",
        metavar="NAME",
        help="deepseek-v3, kimi-k2, qwen3-30b-a3b, ... or HIDDENxWIDTHxEXPERTSxTOP_K",
    )
    experts.add_argument(
        "--experts", type=int, metavar="N", help="in memory; default: 1 GB of them"
    )
    experts.add_argument("--format", default="q4_k_m", metavar="NAME", help="such as q8_0, q4_k_m")
    for word in ("layout", "backend", "isa"):
        experts.add_argument(f"--{word}", default="auto", metavar="NAME")
    experts.add_argument("--tokens", default="1,8,32,512", metavar="N,N,...", help="a call")
    _add_common(
        experts,
        rounds=7,
        peers="kt-kernel and llama.cpp beside ktlab (make peers installs them), as they compute "
        "this format; or names: kt-kernel is all its methods, kt-kernel/amxint8 one",
    )

    text = "prefill and decode of a whole model"
    model = kinds.add_parser("model", help=text, description=text)
    model.set_defaults(bench=_model)
    add_model(model)
    model.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens")
    model.add_argument("--generate", type=int, default=32, metavar="N", help="tokens")
    model.add_argument(
        "--context", type=int, default=0, metavar="N",
        help="positions that are cached before the prompt, as noise: decoding far into a text",
    )  # fmt: skip
    model.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help=EXAMPLES)
    model.add_argument("--placement", metavar="FILE", help="what goes where; dtype=int4 in --set")
    model.add_argument(
        "--stand-in",
        nargs="+",
        default=[],
        metavar="WORD=DEVICE",
        help="torch's devices in others' stead, such as cuda:0=cpu",
    )
    _add_common(
        model,
        rounds=5,
        peers="llama.cpp beside ktlab on the same file (make peers installs it); or a name: "
        "llama.cpp/cpu computes on the file's blocks, llama.cpp/repack re-tiles what it can",
    )


def _add_common(parser: argparse.ArgumentParser, *, rounds: int, peers: str) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="default: one a core")
    parser.add_argument(
        "--rounds", type=int, default=rounds, metavar="N", help="each in turn, N times"
    )
    parser.add_argument("--peers", nargs="*", metavar="PEER", help=peers)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(options: argparse.Namespace) -> int:
    """Of either kind."""
    result = options.bench(options)
    _remark("")
    if options.json:
        for case in result.cases if options.bench is _experts else (result,):
            print(case.to_json(indent=None))
        for name, why in result.skipped.items():
            print(f"without {name}: {why}", file=sys.stderr)
    else:
        print(result)
    print(html.wrapped(str(result.provenance)), file=sys.stderr)
    return 0


def _experts(options: argparse.Namespace) -> Any:
    from ktlab.measurement.bench import bench_experts

    return bench_experts(
        options.shape,
        experts=options.experts,
        format=options.format,
        layout=options.layout,
        backend=options.backend,
        isa=options.isa,
        tokens=_numbers("--tokens", options.tokens),
        threads=options.threads,
        rounds=options.rounds,
        peers=options.peers,
        seed=options.seed,
        progress=_remark,
    )


def _model(options: argparse.Namespace) -> Any:
    from ktlab.measurement.model_bench import bench_model
    from ktlab.placement import Placement

    words = settings(options.set)
    if options.placement:
        words["placement"] = Placement.read(options.placement)
    if options.stand_in:
        pairs = [text.partition("=") for text in options.stand_in]
        if wrong := [word + equals for word, equals, device in pairs if not device]:
            raise SettingError(f"--stand-in {wrong[0]}: expected WORD=DEVICE, such as cuda:0=cpu")
        words["stand_in"] = {word: device for word, _, device in pairs}
    return bench_model(
        partial(loaded, options),
        prompt=options.prompt,
        generate=options.generate,
        context=options.context,
        threads=options.threads,
        settings=words,
        rounds=options.rounds,
        peers=options.peers,
        seed=options.seed,
        progress=_remark,
    )


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise SettingError(f"{name} {text}: expected whole numbers, such as 1,8,32") from None


def _remark(text: str) -> None:
    """On one line that the next remark takes over; kept quiet where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
