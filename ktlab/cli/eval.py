"""`ktlab eval MODEL`: perplexity of a text, and KL divergence against saved predictions."""

import argparse
import sys
from time import perf_counter
from typing import TYPE_CHECKING

from ktlab.cli.arguments import add_model, add_text, loaded, texts_of
from ktlab.errors import SettingError
from ktlab.model.words import EXAMPLES, settings
from ktlab.progress import ProgressBar

if TYPE_CHECKING:
    from ktlab.measurement.evaluation import Evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_text(parser)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help=EXAMPLES)
    parser.add_argument("--window", type=int, metavar="N", help="tokens; default 256, --half: 512")
    parser.add_argument(
        "--half",
        action="store_true",
        help="score the second half of each window only, as llama-perplexity does",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="default: the whole text")
    parser.add_argument(
        "--save-logits", metavar="FILE", help="predictions, to compare with later; with --half in "
        "llama.cpp's format",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", metavar="FILE", help="saved predictions, also those of llama-perplexity "
        "--kl-divergence-base; needs no --text",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    from ktlab.measurement.evaluation import stream_evaluation
    from ktlab.measurement.logits_file import SavedLogits

    changes = settings(options.set)
    named = options.text or options.domain
    if not named and not options.baseline:
        raise SettingError("expected --text FILE, --domain NAME, or a --baseline with its tokens")
    saved = SavedLogits(options.baseline) if options.baseline else None  # before a long load
    text = next(iter(texts_of(options).values())) if named else None
    model = loaded(options)
    start, last, code = perf_counter(), None, 0
    try:
        for last in stream_evaluation(
            model,
            text,
            settings=changes,
            window=options.window,
            half=options.half,
            max_tokens=options.max_tokens,
            baseline=saved,
            save=options.save_logits,
        ):
            if sys.stderr.isatty():
                print(f"\r\033[K{bar(last, perf_counter() - start)}", end="", file=sys.stderr)
    except KeyboardInterrupt:
        if last is None:
            raise
        code = 130  # what was read so far is still worth showing
    if sys.stderr.isatty():
        print(file=sys.stderr)
    assert last is not None
    print(last.to_json() if options.json else last)
    if options.save_logits and not code:
        print(f"saved to {options.save_logits}", file=sys.stderr)
    return code


def bar(found: "Evaluation", seconds: float) -> str:
    """How far, how long yet, and what is known already with its interval."""
    what = f"{found.tokens:,} of {found.total_tokens:,} tokens"
    line = ProgressBar(what, sys.stderr).line(
        found.tokens, found.total_tokens, seconds, found.tokens
    )
    divergence = f"  KL {found.against.kl_mean}" if found.against is not None else ""
    return f"{line}  perplexity {found.perplexity}{divergence}"
