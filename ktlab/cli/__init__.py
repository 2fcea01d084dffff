"""The command line: doctor, info, plan, generate, chat, compare, eval, trace, synthesize, bench.

Results go to standard output, remarks to standard error. Exit code 2 and one line for what a user
can put right, 130 after Ctrl-C, 0 when the reader of a pipe has had enough.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ktlab
from ktlab.cli import chat, eval, plan, synthesize
from ktlab.cli.arguments import add_model, add_text, texts_of
from ktlab.errors import KtlabError, SettingError
from ktlab.model.words import EXAMPLES, settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # Idle OpenMP threads sleep, as under make: on a busy 2-core machine the tiny model decoded 64
    # tokens/s so and 5 with threads that spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
        sys.stdout.flush()  # here, where a closed pipe is still ours to handle
        return code
    except BrokenPipeError:
        # Python flushes at exit and would complain then: give it somewhere to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\nktlab: interrupted", file=sys.stderr)
        return 130
    except (KtlabError, OSError, UnicodeError) as error:
        print(f"ktlab: {_one_line(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ktlab", description="Look inside mixture-of-experts inference and measure changes."
    )
    parser.add_argument("--version", action="version", version=f"ktlab {ktlab.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    doctor = command("doctor", _doctor, "what this machine can do, and why")
    doctor.add_argument("--json", action="store_true", help="print JSON")

    info = command("info", _info, "what a model is and what a token costs")
    add_model(info)

    plan.add_arguments(
        command("plan", plan.run, "will it fit, and where would it go? from the header alone")
    )

    generate = command("generate", _generate, "write text, token by token")
    add_model(generate)
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--top-k", type=int, metavar="K", help="routed experts a token")
    generate.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help=EXAMPLES)
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="X")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P")
    generate.add_argument("--seed", type=int, default=0)

    compare = command("compare", _compare, "what setting b costs and buys against setting a")
    add_model(compare)
    for side in ("a", "b"):
        compare.add_argument(
            f"--{side}", nargs="+", default=[], metavar="NAME=VALUE", help=EXAMPLES
        )
    add_text(compare)
    compare.add_argument("--max-tokens", type=int, default=8192, metavar="N", help="in all")
    compare.add_argument("--window", type=int, default=256, metavar="N", help="tokens of context")
    compare.add_argument("--no-speed", action="store_true", help="measure quality only")
    compare.add_argument("--json", action="store_true", help="print JSON")

    trace = command("trace", _trace, "run a text and keep every router's decision")
    add_model(trace)
    add_text(trace)
    trace.add_argument("--out", required=True, type=Path, metavar="FILE.npz")
    trace.add_argument("--names", nargs="+", metavar="GLOB", help='such as "layers.3.*"')
    trace.add_argument("--max-tokens", type=int, default=8192, metavar="N", help="in all")

    chat.add_arguments(command("chat", chat.run, "talk to a model; /help lists commands"))
    eval.add_arguments(command("eval", eval.run, "perplexity of a text, and KL against a baseline"))
    synthesize.add_arguments(
        command("synthesize", synthesize.run, "a model file of true size with synthetic weights")
    )
    _add_bench(command("bench", _bench, "how fast the expert kernels are, beside the ceiling"))
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["experts"], help="one MoE layer, synthetic weights")
    parser.add_argument(
        "--shape",
        default="deepseek-v3",
        metavar="NAME",
        help="deepseek-v3, kimi-k2, qwen3-30b-a3b, ... or HIDDENxWIDTHxEXPERTSxTOP_K",
    )
    parser.add_argument("--experts", type=int, metavar="N", help="in memory; default: 1 GB of them")
    parser.add_argument("--format", default="q4_k_m", metavar="NAME", help="such as q8_0, q4_k_m")
    for word in ("layout", "backend", "isa"):
        parser.add_argument(f"--{word}", default="auto", metavar="NAME")
    parser.add_argument("--tokens", default="1,8,32,512", metavar="N,N,...", help="a call")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one a core")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="each in turn, N times")
    parser.add_argument(
        "--peers",
        nargs="*",
        metavar="PEER",
        help="kt-kernel and llama.cpp beside ktlab (make peers installs them), as they compute "
        "this format; or names: kt-kernel is all its methods, kt-kernel/amxint8 one",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line and case")


def _doctor(options: argparse.Namespace) -> int:
    report = ktlab.doctor()
    print(report.to_json() if options.json else report)
    return 0 if report.ok else 1


def _info(options: argparse.Namespace) -> int:
    model = ktlab.load(options.model)
    context = min(512, model.config.context_length)
    print(model)
    print(model.config)
    print(model.cost(1, context))
    print(model.cost(context, context))
    return 0


def _generate(options: argparse.Namespace) -> int:
    model = ktlab.load(options.model)
    changes = settings(options.set)
    if options.top_k is not None:
        changes["top_k"] = options.top_k
    print(options.prompt, end="", flush=True)
    with model.override(**changes):
        for token in model.stream(
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        ):
            print(token.text, end="", flush=True)
    print()
    return 0


def _compare(options: argparse.Namespace) -> int:
    a, b = settings(options.a), settings(options.b)
    model = ktlab.load(options.model)
    comparison = ktlab.compare(
        model,
        texts_of(options),
        a=a,
        b=b,
        max_tokens=options.max_tokens,
        window=options.window,
        speed=not options.no_speed,
        progress=_progress if sys.stderr.isatty() else None,
    )
    print(comparison.to_json() if options.json else comparison)
    return 0


def _trace(options: argparse.Namespace) -> int:
    from ktlab.measurement.provenance import Provenance
    from ktlab.measurement.windows import encoded

    model = ktlab.load(options.model)
    texts = texts_of(options)
    each, traces = max(1, options.max_tokens // len(texts)), []
    for name, text in texts.items():
        ids_T = encoded(model, text, name, limit=each)
        # A text longer than the context is traced in pieces, each from an empty cache.
        for piece_T in ids_T.split(model.config.context_length):
            traces.append(model.trace(piece_T, names=options.names, domain=name))
    trace = traces[0].merge(*traces[1:]) if len(traces) > 1 else traces[0]
    trace = replace(trace, provenance=Provenance.collect(model=model.name).to_dict())
    path = trace.save(options.out)
    print(trace)
    print(f"saved to {path}", file=sys.stderr)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from ktlab.measurement.bench import bench_experts

    result = bench_experts(
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
    _remark("")
    if options.json:
        for case in result.cases:
            print(case.to_json(indent=None))
        for name, why in result.skipped.items():
            print(f"without {name}: {why}", file=sys.stderr)
    else:
        print(result)
    print(result.provenance, file=sys.stderr)
    return 0


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise SettingError(f"{name} {text}: expected whole numbers, such as 1,8,32") from None


def _remark(text: str) -> None:
    """On one line that the next remark takes over; kept quiet where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _progress(done: int, total: int) -> None:
    print(f"\r{done:,} of {total:,} tokens", end="\n" if done >= total else "", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"the text is not UTF-8: {error.reason} at byte {error.start}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
