"""Arguments that several commands share: a model, a text."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import ktlab
from ktlab.errors import SettingError, nearest


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help='"tiny", a GGUF file (any shard), or a folder')


def add_text(parser: argparse.ArgumentParser) -> None:
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE", help='a text file; "-" is standard input')
    text.add_argument("--domain", metavar="NAME", help="one of the texts that come with ktlab")


def texts_of(options: argparse.Namespace) -> Mapping[str, str]:
    """Text by name: a file, a domain, or every domain that comes with ktlab."""
    if options.text == "-":
        return {"standard input": sys.stdin.read()}
    if options.text:
        return {Path(options.text).stem: Path(options.text).read_text(encoding="utf-8")}
    texts = ktlab.domain_texts()
    if not options.domain:
        return texts
    if options.domain not in texts:
        raise SettingError(
            f"no domain {options.domain!r}; there are {', '.join(texts)}"
            f"{nearest(options.domain, texts)}"
        )
    return {options.domain: texts[options.domain]}
