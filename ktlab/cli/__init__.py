"""The command line: doctor, info, plan, predict, machine, generate, compare, trace, chat, eval,
rules, synthesize, bench.

Results go to standard output, remarks to standard error. Exit code 2 and one line for what a user
can put right, 130 after Ctrl-C, 0 when the reader of a pipe has had enough.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import ktlab
from ktlab import html
from ktlab.cli import bench, chat, eval, machine, plan, predict, rules, synthesize
from ktlab.cli.arguments import add_model, add_text, check_output, loaded, texts_of
from ktlab.errors import KtlabError, RuleError, SettingError
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

    predict.add_arguments(
        command("predict", predict.run, "what speed to expect there, and why; published speeds")
    )

    machine.add_arguments(
        command("machine", machine.run, "processors, memories, GPUs and links: measured or listed")
    )

    generate = command("generate", _generate, "write text, token by token")
    add_model(generate)
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--top-k", type=int, metavar="K", help="routed experts a token")
    generate.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help=EXAMPLES)
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    generate.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="default: 0, greedy"
    )
    generate.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="default: 1, all tokens"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")

    compare = command("compare", _compare, "what setting b costs and buys against setting a")
    add_model(compare)
    for side in ("a", "b"):
        compare.add_argument(
            f"--{side}", nargs="+", default=[], metavar="NAME=VALUE", help=EXAMPLES
        )
    add_text(compare)
    compare.add_argument(
        "--max-tokens", type=int, default=8192, metavar="N", help="in all; default: 8192"
    )
    compare.add_argument(
        "--window", type=int, default=256, metavar="N", help="tokens; default: 256"
    )
    compare.add_argument("--no-speed", action="store_true", help="measure quality only")
    compare.add_argument("--json", action="store_true", help="print JSON")

    trace = command("trace", _trace, "run a text and keep every router's decision")
    add_model(trace)
    add_text(trace)
    trace.add_argument("--out", required=True, type=Path, metavar="FILE.npz")
    trace.add_argument("--names", nargs="+", metavar="GLOB", help='such as "layers.3.*"')
    trace.add_argument(
        "--max-tokens", type=int, default=8192, metavar="N", help="in all; default: 8192"
    )

    chat.add_arguments(command("chat", chat.run, "talk to a model; /help lists commands"))
    eval.add_arguments(command("eval", eval.run, "perplexity of a text, and KL against a baseline"))
    rules.add_commands(command("rules", rules.run, "what a rule file would do to a model"))
    synthesize.add_arguments(
        command("synthesize", synthesize.run, "a model file of true size with synthetic weights")
    )
    bench.add_commands(command("bench", bench.run, "how fast it is, beside the ceiling and peers"))
    return parser


def _doctor(options: argparse.Namespace) -> int:
    report = ktlab.doctor()
    print(report.to_json() if options.json else report)
    return 0 if report.ok else 1


def _info(options: argparse.Namespace) -> int:
    model = loaded(options)
    context = min(512, model.config.context_length)
    print(model)
    print(html.wrapped(repr(model.checkpoint)))
    print("\n".join(["Sizes", *_fields(model.config)]))
    print("A stage: operations, weights read, cache moved, operations for each byte")
    print(model.cost(1, context))
    print(model.cost(context, context))
    return 0


def _fields(sizes: Any) -> Iterator[str]:
    """A line for each field; those of a part, such as the attention, among them."""
    for field in fields(sizes):
        value = getattr(sizes, field.name)
        if is_dataclass(value):
            yield from _fields(value)
        else:
            yield f"  {field.name:20} {value}"


def _generate(options: argparse.Namespace) -> int:
    model = loaded(options)
    changes = settings(options.set)
    if options.top_k is not None:
        changes["top_k"] = options.top_k
    with model.override(**changes):
        print(options.prompt, end="", flush=True)
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
    model = loaded(options)
    comparison = ktlab.compare(
        model,
        texts_of(options),
        a=a,
        b=b,
        max_tokens=options.max_tokens,
        window=options.window,
        speed=not options.no_speed,
    )
    print(comparison.to_json() if options.json else comparison)
    return 0


def _trace(options: argparse.Namespace) -> int:
    from ktlab.measurement.provenance import Provenance
    from ktlab.measurement.windows import encoded

    if options.max_tokens < 1:
        raise SettingError(f"--max-tokens {options.max_tokens}: expected 1 or more")
    check_output(options.out, ".npz")
    texts = texts_of(options)
    model = loaded(options)
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


def _one_line(error: BaseException) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"the text is not UTF-8: {error.reason} at byte {error.start}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    said = str(error)
    if isinstance(error, RuleError):
        said = said.replace("\n", ": ", 1)  # what is wrong begins in a line of its own
    return " ".join(said.split())
