"""The files of a GGUF checkpoint: one, or the shards that llama-gguf-split makes.

Any shard names the model, or the folder that holds them. Names and keys are those of llama.cpp,
tools/gguf-split: `model-00002-of-00009.gguf`, `split.no`, `split.count`, `split.tensors.count`.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ktlab.checkpoint.checkpoint import some, together
from ktlab.checkpoint.header import Header, read_header
from ktlab.errors import CheckpointError, nearest

SHARD = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
"""How the name of a shard ends."""


def shard_paths(path: Path) -> list[Path]:
    """Every file of the model that `path` names, in order; CheckpointError for missing ones."""
    if path.is_dir():
        path = _the_one_model(path)
    found = SHARD.search(path.name)
    if found is None:
        return [path]
    stem, number, count = path.name[: found.start()], int(found["number"]), int(found["count"])
    if not 1 <= number <= count:
        raise CheckpointError(
            f"{path.name}: its name says shard {number} of {count}, expected one from 1 to the "
            "number of shards; rename it as it was, or to a name without -of-"
        )
    paths = [path.with_name(f"{stem}-{each:05}-of-{count:05}.gguf") for each in range(1, count + 1)]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path.name}: one of {count} shards, of which {missing[0]}{more} "
            f"{'are' if more else 'is'} not in {path.parent}; put all shards into one folder"
        )
    return paths


def siblings_of(path: Path) -> list[Path]:
    """The shards that are there of the model that `path`, there or not, is a shard of."""
    found = SHARD.search(path.name)
    return sorted(path.parent.glob(f"{path.name[: found.start()]}-*-of-*.gguf")) if found else []


def no_file(path: Path, known: Iterable[str] = ()) -> str:
    """What to say of a path where nothing is: the nearest name there or of `known`, or where a link
    points that leads nowhere."""
    if path.is_symlink():
        return f"no file {path}: it is a link to {path.readlink()}, which is not there"
    siblings = (p.name for p in path.parent.glob("*.gguf")) if path.parent.is_dir() else ()
    return f"no file {path}{nearest(path.name, [*known, *siblings])}"


def _the_one_model(folder: Path) -> Path:
    """The GGUF file in a folder, or the first shard; several models are refused by name."""
    files = sorted(folder.glob("*.gguf"))
    models: dict[str, Path] = {}
    for file in files:
        found = SHARD.search(file.name)
        stem = file.name[: found.start()] if found else file.name
        models.setdefault(f"{stem} in {found['count']} shards" if found else stem, file)
    if not models:
        raise CheckpointError(f"{folder} holds no .gguf file; expected one model in it")
    if len(models) > 1:
        raise CheckpointError(
            f"{folder} holds {len(models)} models ({some(models)}); name a file of the one meant"
        )
    return next(iter(models.values()))


def read_headers(paths: Iterable[Path]) -> list[Header]:
    """The headers of one model's files; refuses shards that do not belong together."""
    headers = [read_header(path) for path in paths]
    first, count = headers[0], len(headers)
    problems = []
    for number, header in enumerate(headers):
        parts, part = header.fields.get("split.count", 1), header.fields.get("split.no", 0)
        if count == 1 and isinstance(parts, int) and parts > 1:
            problems.append(
                f"one of {parts} shards, but its name does not end in -00001-of-{parts:05}.gguf or "
                "the like, so the others cannot be found"
            )
        elif (parts or 1, part) != (count, number):
            problems.append(
                f"{header.path.name} says it is shard {part + 1 if isinstance(part, int) else part}"
                f" of {parts}, expected {number + 1} of {count}"
            )
    names = Counter(entry.name for header in headers for entry in header.entries)
    twice = [name for name, n in names.items() if n > 1]
    if twice:
        more = f" and {len(twice) - 1} more tensors are" if len(twice) > 1 else " is"
        problems.append(f"{twice[0]}{more} in several shards")
    total = first.fields.get("split.tensors.count", len(names))
    if total != len(names):
        problems.append(f"{first.path.name} promises {total} tensors, the files have {len(names)}")
    if problems:
        advice = "these files are not one model's: rename or download them again"
        raise CheckpointError(together(first.path.name, problems, advice))
    return headers
