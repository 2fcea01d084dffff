"""`ktlab synthesize MODEL`: a file of true shape and formats with synthetic weights."""

import argparse
import sys
from pathlib import Path

from ktlab.cli.arguments import check_output
from ktlab.html import decimal_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a published shape, such as deepseek-v2-lite")
    parser.add_argument("--format", default="q4_k_m", metavar="NAME", help="such as q4_k_m, q8_0")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.gguf")
    parser.add_argument("--layers", type=int, metavar="N", help="default: all")
    parser.add_argument("--experts", type=int, metavar="N", help="a layer; default: all")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    from ktlab.checkpoint.full_size import sliced, synthesize_file
    from ktlab.checkpoint.part_file import part_of
    from ktlab.checkpoint.published import published_model
    from ktlab.progress import ProgressBar

    check_output(options.out, ".gguf")
    config = published_model(options.model).config
    config = sliced(config, layers=options.layers, experts=options.experts)
    bar, said = ProgressBar(options.out.name, sys.stderr), False

    def progress(done: float, total: float) -> None:
        nonlocal said
        if not said:
            print(f"{options.out}: {decimal_bytes(total)}", file=sys.stderr)
        said = True
        bar(done, total)

    try:
        path = synthesize_file(
            options.out, config, options.format, seed=options.seed, progress=progress
        )
    except KeyboardInterrupt:
        if (part := part_of(options.out.expanduser())).exists():
            print(f"\n{part} stays: the same command goes on from there", file=sys.stderr)
        raise
    print(path)
    return 0
