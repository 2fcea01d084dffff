"""Which safetensors files make up a model, and which tensor lies in which of them."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from ktlab.checkpoint.checkpoint import together
from ktlab.checkpoint.safetensors_file import StoredTensors, read_header, read_json
from ktlab.errors import CheckpointError, nearest, short

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_JSON = 100_000_000
"""Bytes; DeepSeek-V3's index has 9 million."""
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors$")
_SPACE = " \t\r\n"
_MORE = 3
"""Tensors named in one line of a message."""


def safetensors_folder(path: Path) -> Path | None:
    """The folder of a model in Hugging Face form that `path` names: itself, or a file of its.

    None where it names something else. Only file names are looked at.
    """
    if path.is_file():
        named = path.suffix == ".safetensors" or path.name in (CONFIG, INDEX)
        return path.parent if named else None
    if not path.is_dir() or any(path.glob("*.gguf")):
        return None
    return path if any(path.glob("*.safetensors")) or (path / INDEX).exists() else None


def read_folder(folder: Path) -> StoredTensors:
    """Every tensor of the model by its name in the files; all problems in one CheckpointError.

    With an index it decides what belongs to the model, without one all of the folder's files do.
    """
    index = folder / INDEX
    if index.exists():
        return _by_index(folder, index)
    single = folder / SINGLE
    paths = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: no *.safetensors and no {INDEX} in this folder")
    problems = _missing_numbers(paths)
    parts: list[StoredTensors] = []
    where: dict[str, str] = {}
    for path in paths:
        inside = _header(path, problems)
        for name in where.keys() & inside.keys():
            problems.append(f"{name} is in {where[name]} and in {path.name}")
        where |= dict.fromkeys(inside, path.name)
        parts.append(inside)
    _refuse(folder, problems)
    return StoredTensors.joined(parts)


def read_json_object(path: Path) -> dict[str, object]:
    """A JSON object from a file; CheckpointError if it is missing, too large, or something else."""
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= LARGEST_JSON else b""
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; copy it from where the weights are from"
        ) from None
    if size > LARGEST_JSON:
        raise CheckpointError(f"{path} has {size} bytes, expected at most {LARGEST_JSON}")
    content = read_json(raw, path.name)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def _by_index(folder: Path, index: Path) -> StoredTensors:
    if (found := _as_listed(folder, index)) is not None:
        return found
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index.name}: weight_map is missing (expected {{tensor: file}})")
    by_file: dict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        by_file[file if isinstance(file, str) else short(file)].append(name)
    problems: list[str] = []
    parts: list[StoredTensors] = []
    for file, names in by_file.items():
        path = folder / file
        if path.name != file:  # a path could lead anywhere
            problems.append(
                f"{index.name}: {_some(names)} would be in {file!r}, expected a file beside it"
            )
        elif not path.is_file():
            problems.append(
                f"{file} is missing ({len(names)} of {len(weight_map)} tensors: {_some(names)})"
            )
        elif inside := _header(path, problems):
            absent = [name for name in names if name not in inside]
            if absent:
                problems.append(
                    f"{file} lacks {len(absent)} tensors that {index.name} lists in it: "
                    f"{_some(absent)}{nearest(absent[0], inside)}"
                )
            parts.append(inside.only(name for name in names if name in inside))
    _refuse(folder, problems)
    return StoredTensors.joined(parts)


def _as_listed(folder: Path, index: Path) -> StoredTensors | None:
    """All tensors, where the index, as JSON is mostly written, lists exactly what the folder's
    files hold; None otherwise, which takes JSON and words: twice the time."""
    if index.stat().st_size > LARGEST_JSON:
        return None
    start, key, words = index.read_bytes().partition(b'"weight_map": {')
    # Four pieces a tensor: what separates it from the one before, its name, a colon, its file.
    pieces = words.decode("utf-8", errors="replace").split('"')
    names, files, between = pieces[1::4], pieces[3::4], pieces[4:-1:4]
    try:
        json.loads(start.decode("utf-8") + '"weight_map": {}}')
    except (ValueError, RecursionError):
        return None
    if not key or len(pieces) != 4 * len(names) + 1 or b"\\" in words:
        return None
    if pieces[0].strip(_SPACE) or "".join(pieces[-1].split()) != "}}":
        return None
    if pieces[2::4] != [": "] * len(names) or between != between[:1] * len(between):
        return None
    if between and between[0].strip(_SPACE) != ",":
        return None
    listed = dict(zip(names, files, strict=True))
    parts = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            inside = read_header(path)
        except (CheckpointError, OSError):
            return None
        if list(map(listed.get, inside.kinds)).count(path.name) != len(inside):
            return None
        parts.append(inside)
    tensors = StoredTensors.joined(parts)
    return tensors if len(tensors) == len(listed) == len(names) else None


def _header(path: Path, problems: list[str]) -> StoredTensors:
    """The file's tensors, or what is wrong with it among `problems`."""
    try:
        return read_header(path)
    except CheckpointError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror or error}")
    return StoredTensors.joined([])


def _missing_numbers(paths: list[Path]) -> list[str]:
    """Files that model-00001-of-00003.safetensors and its like say there should be."""
    names = {path.name for path in paths}
    missing: dict[str, None] = {}
    for name in sorted(names):
        if match := _NUMBERED.match(name):
            stem, digits, total = match[1], len(match[2]), match[3]
            for number in range(1, min(int(total), 10_000) + 1):
                expected = f"{stem}-{number:0{digits}}-of-{total}.safetensors"
                if expected not in names:
                    missing[expected] = None
    return [f"{name} is missing" for name in missing]


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(together(str(folder), problems, "copy or download what is wrong"))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MORE} more" if len(names) > _MORE else ""
    return ", ".join(names[:_MORE]) + more
