"""Arguments that several commands share: a model, a text."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ktlab
from ktlab.errors import SettingError, nearest

if TYPE_CHECKING:
    from ktlab.model.model import Model


def add_model(parser: argparse.ArgumentParser, more: str = "") -> None:
    """The model, and how to load it."""
    known = ", ".join(filter(None, ('"tiny", a GGUF file (any shard), or a folder', more)))
    parser.add_argument("model", help=known)
    parser.add_argument(
        "--quantize", nargs="+", default=[], metavar="FORMAT", help="floats while loading: "
        'int8_channel, q8_0, q4_k; or by name: "*_exps*=int4_group128" "*=q8_0"',
    )  # fmt: skip


def loaded(options: argparse.Namespace) -> "Model":
    """The model that was asked for; a bar shows how far quantizing is."""
    from ktlab.checkpoint.published import published_models

    name = options.model
    if name.lower() in published_models() and not Path(name).exists():
        raise SettingError(
            f"{name} is a published shape, which has no weights to load: see ktlab plan {name} and "
            f"ktlab predict {name}, or make a file of it with ktlab synthesize {name}"
        )
    return ktlab.load(options.model, quantize=_quantization(options.quantize))


def _quantization(words: Sequence[str]) -> str | dict[str, str] | None:
    """One format for all, or {glob over tensor names: format}."""
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    pairs = [word.rsplit("=", 1) for word in words]
    if wrong := [word for word, pair in zip(words, pairs, strict=True) if len(pair) < 2]:
        raise SettingError(
            f"--quantize {' '.join(words)}: expected one format, or NAME=FORMAT each, such as "
            f'"*_exps*=int4_group128" "*=q8_0"; found {wrong[0]!r}'
        )
    return dict(pairs) or None


def add_text(parser: argparse.ArgumentParser) -> None:
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE", help='a text file; "-" is standard input')
    text.add_argument("--domain", metavar="NAME", help="one of the texts that come with ktlab")


def texts_of(options: argparse.Namespace) -> Mapping[str, str]:
    """Text by name: a file, a domain, or every domain that comes with ktlab."""
    if options.text == "-":
        return {"standard input": sys.stdin.read()}
    if options.text:
        return {Path(options.text).stem: _read(Path(options.text))}
    texts = ktlab.domain_texts()
    if not options.domain:
        return texts
    if options.domain not in texts:
        raise SettingError(
            f"no domain {options.domain!r}; there are {', '.join(texts)}"
            f"{nearest(options.domain, texts)}"
        )
    return {options.domain: texts[options.domain]}


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingError(
            f"{path}: expected text in UTF-8, found something else at byte {error.start}"
        ) from error
    if not text:
        raise SettingError(f"{path}: expected a text, found an empty file")
    return text


def check_output(path: Path, suffix: str) -> None:
    """Before anything long is done: a name that ends in `suffix`, in a folder that is there."""
    problems = []
    if path.suffix != suffix:
        found = path.suffix or "no suffix"
        problems.append(f"expected a name that ends in {suffix}, found {found}")
    if not path.parent.is_dir():
        problems.append(f"there is no folder {path.parent}")
    if problems:
        raise SettingError(f"{path}: {'; '.join(problems)}")
