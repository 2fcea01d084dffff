"""Packing and back, native against Numba, files that lie, killed runs, models packed in place."""

import ast
import errno
import gc
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ktlab
from ktlab.checkpoint.metadata import metadata_from_config
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.checkpoint.writer import write_gguf
from ktlab.errors import CheckpointError, FormatError, SettingError
from ktlab.kernels import codings, native, numba_backend, packed_file, packing
from ktlab.kernels.packed_file import HEADER_BYTES, Header, PackCache, open_packed
from ktlab.kernels.request import BLOCKS, PACKED
from ktlab.kernels.stack import Stack
from ktlab.kernels.weights import aligned_bytes
from ktlab.model.load import FloatCopies
from ktlab.model.model import Model
from ktlab.quantization import QTensor, get_format
from tests.checkpoint.test_forms import arrays, write_raw
from tests.model.peer import transformers_model

FORMATS = sorted(codings.FORMATS)
MADE = ("int8_channel", "int4_group32", "int4_group128")
IDS = list(range(40))
needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())


def random_tensor(format: str, rows: int = 33, experts: int = 2) -> QTensor:
    """Random bytes: every code and every scale that a format can hold, NaN included."""
    known = get_format(format)
    cols = {256: 512, 128: 384}.get(known.block_size, 288) if known.block_size > 1 else 77
    shape = (experts, rows, cols)
    generator = np.random.default_rng(3)
    blocks = generator.integers(0, 256, (*shape[:-1], known.row_bytes(cols)), dtype=np.uint8)
    return QTensor(name="w", format=known, shape=shape, blocks=blocks)


@pytest.mark.parametrize("format", FORMATS)
def test_packed_and_back_is_bit_exact(format: str) -> None:
    tensor = random_tensor(format)
    packed = packing.pack(packing.blocks(tensor))
    assert packed.data.ctypes.data % 64 == 0 and packed.expert_stride % 64 == 0
    back = packing.unpack_tensor(packed, "w", tensor.shape)
    np.testing.assert_array_equal(back.blocks, tensor.blocks)


LAYOUT = {
    "bf16": "ab98c72bd3181cba",
    "f16": "ab98c72bd3181cba",
    "f32": "d66c28ea781ffe2e",
    "int4_group128": "2920d124231e3f7b",
    "int4_group32": "51473d5379e6d349",
    "int8_channel": "12cf28924a772a87",
    "iq4_nl": "d53ad6ae274a36dc",
    "iq4_xs": "1dd68e38f1ec73fa",
    "q2_k": "189b30bdd549f504",
    "q3_k": "e484b0b551bff463",
    "q4_0": "51473d5379e6d349",
    "q4_k": "e647b80fee80bb9b",
    "q5_0": "fb9407d4f1977a30",
    "q5_k": "f567d47a4e38c696",
    "q6_k": "a0f8aad5476c0430",
    "q8_0": "5a7436b219728c43",
}
"""Format -> the first digits of a sha256 over the packed bytes of `counted_tensor`, version 1."""


def counted_tensor(format: str) -> QTensor:
    """Bytes that no library's generator decides."""
    known, cols = get_format(format), random_tensor(format).shape[-1]
    count = 2 * 33 * known.row_bytes(cols)
    blocks = (np.arange(count, dtype=np.uint32) * np.uint32(2654435761) >> 13).astype(np.uint8)
    return QTensor(name="w", format=known, shape=(2, 33, cols), blocks=blocks.reshape(2, 33, -1))


def test_a_changed_layout_has_another_version() -> None:
    found = {
        format: hashlib.sha256(packing.pack(packing.blocks(counted_tensor(format))).data.tobytes())
        for format in FORMATS
    }
    assert packed_file._VERSION == 1
    assert {format: sha.hexdigest()[:16] for format, sha in found.items()} == LAYOUT, (
        "the packed layout changed: raise KTL_PACK_VERSION (csrc/ktl.h) and _VERSION "
        "(packed_file.py), or caches of earlier versions give wrong numbers; then take over these"
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of random scales
@pytest.mark.parametrize("format", [*FORMATS, "mxfp4", "fp8_e4m3"])
def test_rows_are_decoded_to_the_same_bits(format: str) -> None:
    tensor = random_tensor(format)[0]
    found = packing.rows(tensor)
    np.testing.assert_array_equal(found, tensor.dequantize())
    found[0] = 0  # a copy of one's own, also of f32


@needs_native
@pytest.mark.parametrize("format", FORMATS)
def test_native_and_numba_pack_the_same_bytes(format: str) -> None:
    weights = packing.blocks(random_tensor(format))
    sizes = packing.packed_size(format, (weights.experts, weights.rows, weights.cols))
    ours, theirs = aligned_bytes(sizes), aligned_bytes(sizes)
    ours[:], theirs[:] = 1, 2
    native.pack(weights, ours, 3, None)
    numba_backend.pack(weights, theirs, 2, None)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("stored", ["bf16", "q8_0", "q6_k", "iq4_nl", "f32"])
def test_conversion_gives_the_bytes_of_requantize(stored: str, made: str) -> None:
    values = np.random.default_rng(0).standard_normal((2, 5, 512), dtype=np.float32)
    values[0, 1] = 0
    tensor = QTensor.from_array("w", values, stored)
    expected = tensor.requantize(made)
    found = packing.convert(tensor, made)
    np.testing.assert_array_equal(found.blocks, expected.blocks)
    assert (found.format, found.shape, found.source) == (made_format(made), tensor.shape,
                                                         f"requantized from {stored}")  # fmt: skip
    by_numba = np.empty(found.nbytes, np.uint8)
    numba_backend.convert(packing.blocks(tensor), made, by_numba, 2, None)
    np.testing.assert_array_equal(by_numba, expected.blocks.reshape(-1))


def made_format(name: str):
    return get_format(name)


def test_formats_without_kernels_cannot_be_packed_but_converted() -> None:
    tensor = QTensor.from_array("w", np.ones((3, 32), np.float32), "q5_1")
    with pytest.raises(FormatError, match="q5_1"):
        packing.pack(packing.blocks(tensor))
    assert packing.convert(tensor, "int8_channel").format.name == "int8_channel"


# Stacks ------------------------------------------------------------------------------------------


def test_a_stack_lets_its_blocks_go_and_brings_them_back() -> None:
    tensor = QTensor.from_array("w", np.random.default_rng(0).standard_normal((48, 64)), "q4_0")
    blocks = tensor.blocks.copy()
    stack = Stack(tensor)
    stack.release()
    assert stack.tensor is tensor, "nothing is let go before it is packed"
    stack.weights("packed")
    stack.release()
    assert stack.tensor is tensor, "somebody else holds it: not unpacked again"
    del tensor
    gc.collect()
    np.testing.assert_array_equal(stack.tensor.blocks, blocks)
    assert stack.tensor.source == "unpacked"
    assert set(stack.operand_bytes) == {"packed"}


def test_a_requantized_copy_is_not_held_twice() -> None:
    tensor = QTensor.from_array("w", np.random.default_rng(0).standard_normal((48, 64)), "q4_0")
    blocks, nbytes = tensor.blocks.copy(), tensor.nbytes
    copied, loaded = Stack(tensor, as_loaded=False), Stack(tensor)
    del tensor
    for stack in (copied, loaded):
        stack.weights(BLOCKS)
        stack.weights(PACKED)
    assert (copied.block_bytes, loaded.block_bytes) == (0, nbytes)
    assert copied.operands == {PACKED}
    np.testing.assert_array_equal(copied.weights(BLOCKS).data, blocks.reshape(-1))


def test_a_stack_takes_only_its_own_packed_weights() -> None:
    stack = Stack(QTensor.from_array("w", np.ones((3, 32)), "q8_0"))
    other = packing.pack(packing.blocks(QTensor.from_array("o", np.ones((4, 32)), "q8_0")))
    with pytest.raises(
        FormatError, match=r"w is q8_0 \(1, 3, 32\), the packed weights are q8_0 \(1, 4"
    ):
        stack.adopt(other)


# Files -------------------------------------------------------------------------------------------


HEADER = Header("q4_k", 2, 33, 512, "ab" * 24)


@needs_native
def test_both_writers_and_readers_of_the_header_agree(monkeypatch) -> None:
    by_c = packed_file.write_header(HEADER)
    assert by_c == packed_file.plain_header(HEADER) and len(by_c) == HEADER_BYTES
    total = HEADER_BYTES + packing.packed_size("q4_k", (2, 33, 512))
    assert packed_file.read_plain_header(by_c, total) == HEADER
    assert packed_file.read_header(np.frombuffer(by_c, np.uint8), total) == HEADER


def read_either(plain: bool, raw: bytes, total: int) -> Header:
    if plain:
        return packed_file.read_plain_header(raw, total)
    return packed_file.read_header(np.frombuffer(raw, np.uint8), total)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, 1),
        (8, 99),
        (12, 1),
        (16, 0x7A),
        (32, 200),
        (40, 7),
        (48, 255),
        (56, 3),
        (130, 1),
        (185, 9),
    ],
)
def test_a_header_that_lies_is_refused(plain, at, value) -> None:
    if not plain and native.unavailable():
        pytest.skip(native.unavailable())
    raw = bytearray(packed_file.plain_header(HEADER))
    raw[at] ^= value
    total = HEADER_BYTES + packing.packed_size("q4_k", (2, 33, 512))
    with pytest.raises(ValueError, match="expected|checksum|format"):
        read_either(plain, bytes(raw), total)


def fnv1a(data: bytes) -> int:
    """A second one, for headers whose checksum fits what else is wrong with them."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


@needs_native
def test_both_readers_refuse_the_same_headers() -> None:
    generator = np.random.default_rng(5)
    places = [(0, 8), (8, 4), (12, 4), (16, 16), (32, 24), (56, 8), (64, 64), (128, 56)]
    refused = 0
    for format, cols in (("q4_k", 512), ("q8_0", 288), ("f16", 77), ("int8_channel", 40)):
        size = packing.packed_size(format, (2, 33, cols))
        whole = packed_file.plain_header(Header(format, 2, 33, cols, "ab"))
        for turn in range(120):
            raw, (start, room) = bytearray(whole), places[turn % len(places)]
            value = generator.choice([0, 1, 9, 32, 48, 101, 127, 200, 255])
            raw[start + int(generator.integers(room))] = value
            if turn % 24 > 16:  # sizes that belong together
                rows, cols_ = (int(n) for n in generator.integers(0, 520, 2))
                size = packing.packed_size(format, (2, rows, cols_ // 32 * 32))
                raw[40:64] = np.array([rows, cols_, size], np.int64).tobytes()
            raw[184:] = fnv1a(bytes(raw[:184])).to_bytes(8, "little")
            answers: list[Header | None] = []
            for plain in (True, False):
                try:
                    answers.append(read_either(plain, bytes(raw), HEADER_BYTES + size))
                except ValueError:
                    answers.append(None)
            assert answers[0] == answers[1], (format, turn, bytes(raw))
            refused += answers[0] is None
    assert 300 < refused < 480


def stored(cache: PackCache, name: str = "blk.0.w", source: str = "s1") -> Path:
    weights = packing.blocks(random_tensor("q8_0"))
    header = Header("q8_0", 2, 33, 288, source)
    cache.store(name, header, lambda out: packing.pack(weights, None, out))
    return cache.path(name, "q8_0")


def test_a_cached_tensor_is_mapped_and_computes(tmp_path) -> None:
    cache = PackCache(tmp_path / "new" / "folder")
    path = stored(cache)
    weights = cache.load("blk.0.w", "q8_0", "s1")
    assert weights is not None and not weights.data.flags.writeable
    expected = packing.pack(packing.blocks(random_tensor("q8_0")))
    np.testing.assert_array_equal(weights.data, expected.data)
    header, _ = open_packed(path)
    assert header == Header("q8_0", 2, 33, 288, "s1")
    assert cache.load("another", "q8_0", "s1") is None


def test_another_models_file_is_ignored_with_a_warning(tmp_path) -> None:
    cache = PackCache(tmp_path)
    stored(cache)
    with pytest.warns(UserWarning, match="packed from another model"):
        assert cache.load("blk.0.w", "q8_0", "s2") is None


@pytest.mark.parametrize("damage", ["truncated", "longer", "version", "empty", "not ours"])
def test_a_damaged_file_is_ignored_by_the_cache_and_refused_when_opened(tmp_path, damage) -> None:
    cache = PackCache(tmp_path)
    path = stored(cache)
    raw = bytearray(path.read_bytes())
    damaged = {
        "truncated": raw[:-64],
        "longer": raw + b"\0" * 64,
        "version": raw[:8] + b"\7" + raw[9:],
        "empty": bytearray(),
        "not ours": b"GGUF" + raw[4:],
    }[damage]
    path.write_bytes(bytes(damaged))
    with pytest.raises(CheckpointError, match="no packed tensor that can be used.*pack again"):
        open_packed(path)
    with pytest.warns(UserWarning, match="no packed tensor that can be used"):
        assert cache.load("blk.0.w", "q8_0", "s1") is None
    stored(cache)
    assert cache.load("blk.0.w", "q8_0", "s1") is not None, "replaced by a good one"


def test_a_failed_packing_leaves_nothing(tmp_path) -> None:
    cache = PackCache(tmp_path)

    def broken(out) -> None:
        out[:] = 1
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        cache.store("w", Header("q8_0", 1, 1, 32, "s"), broken)
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, time
from ktlab.kernels.packed_file import Header, PackCache
def slow(out):
    out[:1000] = 1
    print("writing", flush=True)
    time.sleep(60)
PackCache(sys.argv[1]).store("w", Header("q8_0", 1, 33, 288, "s"), slow)
"""


def test_what_a_killed_run_leaves_is_ignored_and_removed_at_the_next_start(tmp_path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    (partial,) = tmp_path.iterdir()
    cache = PackCache(tmp_path)
    assert partial.exists(), "the run is alive: its file is left alone"
    assert cache.load("w", "q8_0", "s") is None
    process.kill()
    process.wait()
    PackCache(tmp_path)
    assert not partial.exists() and not list(tmp_path.iterdir())


def test_threads_that_store_one_tensor_do_not_meet(tmp_path) -> None:
    both = threading.Barrier(2)

    def fill(out) -> None:
        both.wait(20)  # both files are open now
        packing.pack(packing.blocks(random_tensor("q8_0")), None, out)
        both.wait(20)

    def store(cache: PackCache) -> None:
        cache.store("blk.0.w", Header("q8_0", 2, 33, 288, "s1"), fill)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(store, [PackCache(tmp_path), PackCache(tmp_path)]))
    found = PackCache(tmp_path).load("blk.0.w", "q8_0", "s1")
    expected = packing.pack(packing.blocks(random_tensor("q8_0")))
    assert found is not None
    np.testing.assert_array_equal(found.data, expected.data)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_in_a_files_place_is_no_lack_of_space(tmp_path) -> None:
    cache = PackCache(tmp_path)
    cache.path("blk.0.w", "q8_0").mkdir()
    with pytest.raises(CheckpointError, match="Is a directory; name another folder or pack with"):
        stored(cache)


def test_a_full_disk_says_how_much_to_free(tmp_path, monkeypatch) -> None:
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match="No space left on device; free 1 MiB or pack"):
        stored(PackCache(tmp_path))


def test_a_folder_that_cannot_be_used_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be used.*name a folder"):
        PackCache(tmp_path / "file" / "below")


# Models ------------------------------------------------------------------------------------------


@pytest.fixture
def gguf(tmp_path) -> Path:
    checkpoint = synthesize(TINY_TEST_CONFIG, seed=2, formats={"*ffn_down*": "q5_0", "*": "q8_0"})
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    return write_gguf(tmp_path / "m.gguf", TINY_TEST_CONFIG, tensors, checkpoint.tokenizer)


def test_a_packed_model_gives_the_same_tokens_and_comes_back_from_its_cache(gguf, tmp_path) -> None:
    model = ktlab.load(gguf)
    with model.override(layout="packed"):
        expected = model.forward(IDS)
    first = ktlab.load(gguf)
    report = first.pack(cache=tmp_path / "cache")
    assert {t.how for t in report.tensors} == {"packed"} and not report.left
    assert report.gb_per_s > 0 and "GB/s" in repr(report)
    assert torch.equal(first.forward(IDS), expected)
    assert first.settings.to_dict()["layout"] == "packed"

    second = ktlab.load(gguf)
    report = second.pack(cache=tmp_path / "cache")
    assert {t.how for t in report.tensors} == {"mapped from the cache"} and report.gb_per_s == 0
    assert torch.equal(second.forward(IDS), expected)
    assert {t.how for t in second.pack().tensors} == {"was packed already"}
    for words in ({"layout": "ggml_blocks"}, {"backend": "torch"}):
        with second.override(**words), model.override(**words):
            assert torch.equal(second.forward(IDS), model.forward(IDS)), "blocks as they were"


def test_a_changed_model_file_is_packed_again(gguf, tmp_path) -> None:
    ktlab.load(gguf).pack(cache=tmp_path / "cache")
    later = time.time() + 100
    os.utime(gguf, (later, later))
    with pytest.warns(UserWarning, match="packed from another model"):
        report = ktlab.load(gguf).pack(cache=tmp_path / "cache")
    assert {t.how for t in report.tensors} == {"packed"}


def test_a_changed_shard_is_packed_again(tmp_path) -> None:
    checkpoint = synthesize(TINY_TEST_CONFIG, seed=2)
    fields = metadata_from_config(checkpoint.config)
    (tmp_path / "model").mkdir()
    write_raw(tmp_path / "model" / "m.gguf", fields, arrays(checkpoint), shard_size=20)
    first, second, _ = sorted((tmp_path / "model").iterdir())
    for turn, convert in enumerate(({}, {"f32": "q8_0"})):
        cache = tmp_path / f"cache{turn}"
        ktlab.load(first, convert=convert).pack(cache=cache)
        report = ktlab.load(first, convert=convert).pack(cache=cache)
        assert {t.how for t in report.tensors} == {"mapped from the cache"}
        later = time.time() + 100 * (1 + turn)
        os.utime(second, (later, later))
        with pytest.warns(UserWarning, match="packed from another model"):
            report = ktlab.load(first, convert=convert).pack(cache=cache)
        assert {t.how for t in report.tensors} == {"packed"}


def test_a_cache_may_lie_in_the_models_folder(tmp_path) -> None:
    transformers_model(synthesize(TINY_TEST_CONFIG)).bfloat16().save_pretrained(tmp_path)
    assert {t.how for t in ktlab.load(tmp_path).pack(cache=tmp_path).tensors} == {"packed"}
    report = ktlab.load(tmp_path).pack(cache=tmp_path)
    assert {t.how for t in report.tensors} == {"mapped from the cache"}


def test_what_was_packed_at_its_first_use_is_stored_too(gguf, tmp_path) -> None:
    model, cache = ktlab.load(gguf), tmp_path / "cache"
    model.experts.use(format="int8_channel")
    expected = model.forward(IDS)
    assert any(stack.packed for bank in model.experts for stack in bank.stacks)
    report = model.pack(cache=cache)
    assert "was packed already" in {t.how for t in report.tensors}
    assert len(list(cache.iterdir())) == len(report.tensors)
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert {t.how for t in model.pack(cache=cache).tensors} == {"was packed already"}
    assert before == {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    again = ktlab.load(gguf)
    again.experts.use(format="int8_channel")
    report = again.pack(cache=cache)
    assert {t.how for t in report.tensors} == {"mapped from the cache"}
    assert torch.equal(again.forward(IDS), expected)


def test_settings_that_cannot_be_are_refused_before_anything_is_packed(gguf) -> None:
    model = ktlab.load(gguf)
    refused: tuple[Any, ...] = (0, -1, 2.5)
    for threads in refused:
        with pytest.raises(SettingError, match=f"threads = {threads}: expected a whole number"):
            model.pack(threads=threads)
        with pytest.raises(SettingError, match=f"threads = {threads}: expected a whole number"):
            model.experts[0].pack(threads=threads)
    with pytest.raises(SettingError, match="cache='' names no folder"):
        model.pack(cache="")
    assert not any(stack.packed for bank in model.experts for stack in bank.stacks)


def test_requantized_experts_are_packed_under_their_format(gguf, tmp_path) -> None:
    model = ktlab.load(gguf)
    model.experts.use(format="int8_channel")
    model.pack(cache=tmp_path)
    names = {path.name for path in tmp_path.glob("*.ktlpack")}
    assert "blk.1.ffn_down_exps.weight.int8_channel.ktlpack" in names
    again = ktlab.load(gguf)
    again.experts.use(format="int8_channel")
    assert {t.how for t in again.pack(cache=tmp_path).tensors} == {"mapped from the cache"}
    assert torch.equal(again.forward(IDS), model.forward(IDS))


def test_matrices_without_a_kernel_are_left_and_said_so() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG, formats={"*exps*": "q5_1", "*": "q8_0"}))
    report = model.pack()
    assert all("exps" in name for name in report.left) and report.left
    assert "q5_1" in next(iter(report.left.values()))
    assert "left as they are" in repr(report)
    assert model.forward(IDS).isfinite().all()
    assert model.experts[0].kernel.backend == "torch"
    assert report._repr_mimebundle_()["text/plain"] == repr(report)


def test_packing_never_holds_two_copies_of_requantized_experts() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG, formats="q8_0"))
    model.experts.use(format="int8_channel")
    model.pack()
    gc.collect()
    for bank in model.experts:
        for stack in bank.stacks:
            assert set(stack.operand_bytes) == {"packed"} and stack._tensor is None


def test_pages_of_a_mapped_file_are_given_back(tmp_path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(np.arange(1 << 20, dtype=np.uint32).tobytes())
    mapped = np.memmap(path, np.uint8, mode="r")
    before = mapped.copy()
    assert packing.drop_pages(np.asarray(mapped)[100:-100].reshape(2, -1))
    np.testing.assert_array_equal(mapped, before)
    assert not packing.drop_pages(np.zeros(10, np.uint8))
    assert not packing.drop_pages(np.memmap(path, np.uint8, mode="c")), "it may hold changes"


def test_what_was_packed_gives_its_mapped_pages_back(tmp_path, monkeypatch) -> None:
    dropped: list[np.ndarray] = []
    monkeypatch.setattr(packing, "drop_pages", dropped.append)
    stack = Stack(random_tensor("q8_0"))
    stack.weights(BLOCKS)
    assert not dropped
    stack.weights(PACKED)
    stack.weights(PACKED)
    assert len(dropped) == 1 and dropped[0] is stack.tensor.blocks


# Conversion at load ------------------------------------------------------------------------------


def test_formats_can_be_converted_while_loading(gguf) -> None:
    model = ktlab.load(gguf, convert={"q5_0": "int8_channel", "Q8_0": "q4_0"})
    formats = model.settings.formats
    assert formats["experts"] == "q4_0+int8_channel" and formats["output"] == "q4_0"
    assert model.layers[1].router.weight_ED.dtype == torch.float32
    assert model.forward(IDS).isfinite().all()
    name = "blk.1.ffn_down_exps.weight"
    assert model.checkpoint.tensor(name) is model.experts[0].down, "converted once"
    assert repr(model.checkpoint).startswith("ConvertedCheckpoint(m.gguf")
    for wrong in ({"q5_0": "iq1_m"}, {"q5_9": "q8_0"}):
        with pytest.raises(FormatError, match="can be read here but not written|unknown format"):
            ktlab.load(gguf, convert=wrong)


def test_float_copies_are_said_at_load_with_the_way_out(gguf, tmp_path) -> None:
    checkpoint = synthesize(TINY_TEST_CONFIG, formats={"*down_exps*": "q5_1", "*": "q8_0"})
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    path = write_gguf(tmp_path / "five.gguf", TINY_TEST_CONFIG, tensors, checkpoint.tokenizer)
    with pytest.warns(FloatCopies, match="tiny-test: no fast kernel computes q5_1; torch") as said:
        model = ktlab.load(path)
    (hint,) = re.findall(r"load\(\.\.\., convert=(\{.*?\})\)", str(said[0].message))
    assert model.experts[0].kernel.backend == "torch" and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", FloatCopies)
        ktlab.load(gguf)
        converted = ktlab.load(path, convert=ast.literal_eval(hint))
    assert converted.experts[0].kernel.backend != "torch"


def test_a_model_in_a_format_without_kernels_says_what_to_do() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG, formats="q4_1"))
    assert model.experts[0].kernel.backend == "torch"
    with pytest.raises(SettingError, match=r"load\(\.\.\., convert=\{'q4_1': 'q8_0'\}\)"):
        with model.override(backend="numba"):
            pass
