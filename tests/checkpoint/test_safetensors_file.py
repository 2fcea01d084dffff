"""safetensors headers and folders: read as the library writes them, refused when they lie."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ktlab.checkpoint.safetensors_file import DTYPE_BYTES, MappedFile, _regular, read_header
from ktlab.checkpoint.safetensors_folder import INDEX, read_folder
from ktlab.errors import CheckpointError

TENSORS = {
    "a": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "b": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "c": torch.arange(5, dtype=torch.float32),
    "d": torch.arange(8, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(2, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
}
Header = dict[str, Any]
EMPTY = b'{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "small.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    return file


def rewritten(path: Path, change: Callable[[Header], object]) -> Path:
    """The file with another header over the same data."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    raw = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
    return path


def refused(path: Path, *expected: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    for part in (path.name, *expected):
        assert part in message
    return message


def test_reads_what_the_library_wrote(path: Path) -> None:
    entries, file = read_header(path), MappedFile(path)
    assert set(entries) == set(TENSORS)
    for name, tensor in TENSORS.items():
        entry = entries[name]
        assert entry.shape == tuple(tensor.shape)
        assert entry.nbytes == tensor.numel() * DTYPE_BYTES[entry.dtype]
        raw = file.bytes_of(entry)
        assert not raw.flags.writeable
        assert np.array_equal(raw, tensor.reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda h: h["a"].update(shape=[3, 5]), "a is BF16 3×5, 30 bytes, but its offsets span 24"),
        (lambda h: h["a"].update(dtype="Q8"), "a is of type 'Q8', expected one of F64, F32"),
        (lambda h: h["a"].update(dtype=["BF16"]), "a is of type ['BF16']"),
        (lambda h: h["a"].update(shape=[-3, -4]), "a has shape [-3, -4]"),
        (lambda h: h["a"].update(shape=[True] * 2), "a has shape [True, True]"),
        (lambda h: h["a"].update(shape=[2**80]), "bytes, but its offsets span 24"),
        (lambda h: h["a"].update(shape=["x", 10**10]), "a has shape ['x', 10000000000]"),
        (lambda h: h["a"].update(data_offsets=[9, 3]), "a has data_offsets [9, 3]"),
        (lambda h: h["a"].update(data_offsets="24"), "a has data_offsets '24'"),
        (lambda h: h["a"].update(data_offsets=[2**60, 2**60 + 24]), "(truncated?)"),
        (lambda h: h["a"].update(data_offsets=h["b"]["data_offsets"], shape=[1, 6]), "overlaps"),
        (lambda h: h.pop("b"), "leaves 12 bytes after a"),
        (lambda h: h.pop("d"), "bytes after b belong to no tensor"),
        (lambda h: h["a"].pop("shape"), "a is described by"),
        (lambda h: h.update(a=3), "a is described by 3"),
        (lambda h: b"[1, 2]", "no JSON object"),
        (lambda h: b"\xff\xfe", "is no JSON"),
        (lambda h: b"[" * 200_000, "is no JSON"),
        (lambda h: b'{"a": ' + b"1" * 5000 + b"}", "is no JSON"),
        (lambda h: json.dumps(h)[:-1].encode() + b', "a": ' + EMPTY + b"}", "leaves 24 bytes"),
    ],
)
def test_lies_are_refused(path: Path, change: Callable[[Header], object], expected: str) -> None:
    refused(rewritten(path, change), expected)


def test_all_faults_together(path: Path) -> None:
    def change(header: Header) -> None:
        header["a"]["shape"], header["b"]["dtype"] = [7], "F128"

    refused(rewritten(path, change), "2 problems", "a is BF16 7", "b is of type 'F128'")


@pytest.mark.parametrize("length", [0, 10**6, 10**9, 2**40, 2**64 - 1])
def test_absurd_header_lengths_allocate_nothing(path: Path, length: int) -> None:
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    tracemalloc.start()
    refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_anywhere(share: float, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file(TENSORS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_the_header_is_refused_or_harmless(
    data: st.DataObject, tmp_path: Path
) -> None:
    path = tmp_path / "damaged.safetensors"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        entries = read_header(path)
    except CheckpointError:
        return
    assert sum(entry.nbytes for entry in entries.values()) == len(content) - end


def test_a_file_that_changes_is_noticed(path: Path) -> None:
    entries, file = read_header(path), MappedFile(path)
    file.bytes_of(entries["a"])
    save_file({"other": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="not as it was when it was opened"):
        file.bytes_of(entries["a"])


# Folders -----------------------------------------------------------------------------------------


def sharded(folder: Path, *, index: bool = True) -> Path:
    weight_map: dict[str, str] = {}
    for number, names in enumerate((("a", "b"), ("c",), ("d", "scalar")), start=1):
        file = f"model-{number:05}-of-00003.safetensors"
        save_file({name: TENSORS[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def folder_refused(folder: Path, *expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("index", [True, False])
def test_shards_with_and_without_an_index(tmp_path: Path, index: bool) -> None:
    found = read_folder(sharded(tmp_path, index=index))
    assert set(found) == {"a", "b", "c", "d", "scalar"}
    assert found["c"].path.name == "model-00002-of-00003.safetensors"


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "model-00001-of-00003.safetensors").unlink()
    (folder / "model-00003-of-00003.safetensors").unlink()
    first = "model-00001-of-00003.safetensors is missing (2 of 5 tensors: a, b)"
    last = "model-00003-of-00003.safetensors is missing"
    folder_refused(folder, "2 problems", first, last)
    (folder / INDEX).unlink()
    folder_refused(folder, "model-00001-of-00003.safetensors is missing", last)


def test_an_index_that_lies(tmp_path: Path) -> None:
    index = sharded(tmp_path) / INDEX
    content = json.loads(index.read_text())

    def write(**weight_map: object) -> None:
        index.write_text(json.dumps({"weight_map": content["weight_map"] | weight_map}))

    write(cc="model-00002-of-00003.safetensors")
    folder_refused(tmp_path, f"lacks 1 tensors that {INDEX} lists in it: cc")
    write(c="../../secrets.safetensors")
    folder_refused(tmp_path, "c would be in '../../secrets.safetensors'")
    write(c=7)
    folder_refused(tmp_path, "7 is missing (1 of 5 tensors: c)")
    index.write_text("{}")
    folder_refused(tmp_path, "weight_map is missing")
    index.write_text("{")
    folder_refused(tmp_path, INDEX, "is no JSON")


def test_a_tensor_in_two_files_without_an_index(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"a": TENSORS["a"]}, tmp_path / "two.safetensors")
    folder_refused(tmp_path, "a is in one.safetensors and in two.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"F32"', '"F64"', 1),
        lambda text: text.replace("[0,", "[00,", 1),
        lambda text: text.replace('},"', '};"', 1),
        lambda text: text[:-1],
        lambda text: text.replace('"shape":[2,3]', '"shape":[3,3]'),
        lambda text: text.replace('"shape":[2,3]', '"shape":[2,,3]'),
        lambda text: text.replace('"shape":[2,3]', '"shape":[02,3]'),
        lambda text: text.replace('"b"', '"a"'),
        lambda text: text.replace('"b"', '"\x01"'),
    ],
)
def test_the_quick_way_through_a_header_takes_nothing_that_json_would_not(
    change: Callable[[str], str], tmp_path: Path
) -> None:
    """A header as the library writes it is read by pattern, any other as JSON: the same entries."""
    arrays = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    path = tmp_path / "model.safetensors"
    save_file(arrays, path, metadata={"format": "pt"})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    quick = _regular(header, path, len(data))
    assert quick == read_header(path) and quick is not None and set(quick) == {"a", "b"}
    spaced = json.dumps(json.loads(header)).encode()
    assert _regular(spaced, path, len(data)) is None
    path.write_bytes(len(spaced).to_bytes(8, "little") + spaced + data)
    assert [e[:3] for e in read_header(path).values()] == [e[:3] for e in quick.values()]
    changed = change(header.decode().rstrip())
    assert changed != header.decode().rstrip()
    assert _regular(changed.encode(), path, len(data)) is None
