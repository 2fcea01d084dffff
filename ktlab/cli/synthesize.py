"""`ktlab synthesize MODEL`: a file of true shape and formats with synthetic weights."""

import argparse
import sys
from pathlib import Path


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

    config = published_model(options.model).config
    config = sliced(config, layers=options.layers, experts=options.experts)
    bar = ProgressBar(options.out.name, sys.stderr)
    try:
        path = synthesize_file(options.out, config, options.format, seed=options.seed, progress=bar)
    except KeyboardInterrupt:
        if (part := part_of(options.out.expanduser())).exists():
            print(f"\n{part} stays: the same command goes on from there", file=sys.stderr)
        raise
    print(path)
    return 0
