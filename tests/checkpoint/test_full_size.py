"""Files of true shape with synthetic weights: formats, bytes, resuming, and disks that fill up."""

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ktlab
from ktlab import cli
from ktlab.checkpoint import full_size, part_file
from ktlab.checkpoint.full_size import sliced, synthesize_file
from ktlab.checkpoint.gguf_file import GGUFCheckpoint
from ktlab.checkpoint.mixtures import mixture
from ktlab.checkpoint.names import expected_tensors
from ktlab.checkpoint.part_file import Piece, write_in_pieces
from ktlab.checkpoint.published import published_model
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG
from ktlab.errors import CheckpointError
from ktlab.probe import Recorder
from ktlab.progress import ProgressBar, duration

CONFIG = replace(
    TINY_TEST_CONFIG, name="small", num_layers=12, hidden_size=256, expert_size=96, vocab_size=4200
)


@pytest.fixture(scope="module", autouse=True)
def _small_pools() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_size, "POOL_WEIGHTS", 1 << 18)
        full_size._pool.cache_clear()
        yield
    full_size._pool.cache_clear()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize_file(tmp_path_factory.mktemp("full") / "small.gguf", CONFIG, "q4_k_m")


def test_the_file_has_the_formats_of_its_type_and_a_full_vocabulary(file: Path) -> None:
    found = GGUFCheckpoint(file)
    wanted = mixture("q4_k_m", expected_tensors(CONFIG), CONFIG)
    assert {n: found.tensor(n).format for n in found.names()} == wanted
    assert {"q4_k", "q6_k", "q5_0", "q8_0", "f32"} == {f.name for f in wanted.values()}
    assert found.config == CONFIG and found.tokenizer is not None
    assert found.tokenizer.vocab_size == CONFIG.vocab_size
    assert found.tokenizer.decode(found.tokenizer.encode("def f(x):")).endswith("def f(x):")


def test_activations_stay_near_one_through_all_layers(file: Path) -> None:
    recorder = Recorder(("layers.*.hidden", "logits"))
    ids_T = torch.randint(CONFIG.vocab_size, (64,), generator=torch.Generator().manual_seed(0))
    ktlab.load(file).forward(ids_T, probe=recorder)
    sizes = {n: float(v.square().mean().sqrt()) for n, v in recorder.joined().items()}
    assert len(sizes) == CONFIG.num_layers + 1
    assert all(0.5 < size < 8 for size in sizes.values()), sizes


def test_weights_have_the_variance_of_their_inputs_and_rows_differ(file: Path) -> None:
    experts = GGUFCheckpoint(file).tensor("blk.5.ffn_up_exps.weight")
    values_EFD = experts.dequantize()
    assert values_EFD.std() == pytest.approx(256**-0.5, rel=0.02)
    rows = experts.blocks.reshape(-1, experts.blocks.shape[-1])
    assert len(np.unique(rows, axis=0)) > 0.4 * len(rows)
    other = GGUFCheckpoint(file).tensor("blk.6.ffn_up_exps.weight")
    assert not np.array_equal(experts.blocks, other.blocks)


@pytest.mark.parametrize("kept", [100, 0.3, 0.77, 1.0])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    file: Path, tmp_path: Path, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_size, "PIECE_BYTES", 20_000)  # or all would be one piece a tensor
    whole = synthesize_file(tmp_path / "whole.gguf", CONFIG, "q4_k_m").read_bytes()
    part = tmp_path / "again.gguf.part"
    part.write_bytes(whole[: int(kept if kept > 1 else kept * len(whole))])
    # The torn end of what a killed process wrote must not survive.
    with part.open("r+b") as torn:
        torn.seek(-min(50, part.stat().st_size), os.SEEK_END)
        torn.write(b"\xff" * min(50, part.stat().st_size) if kept < 1 else b"")
    first: list[float] = []
    again = synthesize_file(
        tmp_path / "again.gguf", CONFIG, "q4_k_m", progress=lambda done, total: first.append(done)
    )
    assert again.read_bytes() == whole and not part.exists()
    assert first[-1] == len(whole)
    if kept < 1:
        assert (kept - 0.1) * len(whole) < first[0] <= kept * len(whole), "began from the start"


def test_what_is_left_of_another_recipe_is_not_gone_on_with(tmp_path: Path) -> None:
    other = synthesize_file(tmp_path / "a.gguf", CONFIG, "q4_k_m", seed=1)
    shutil.copy(other, tmp_path / "b.gguf.part")
    path = synthesize_file(tmp_path / "b.gguf", CONFIG, "q4_k_m", seed=2)
    assert path.read_bytes() != other.read_bytes()
    fresh = synthesize_file(tmp_path / "c.gguf", CONFIG, "q4_k_m", seed=2)
    assert path.read_bytes() == fresh.read_bytes()


def test_too_small_a_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 50_000))
    with pytest.raises(CheckpointError, match=r"needs .* free; make room, choose another"):
        synthesize_file(tmp_path / "big.gguf", CONFIG, "q4_k_m")
    assert not list(tmp_path.iterdir())
    (tmp_path / "big.gguf.part").write_bytes(b"begun before")
    with pytest.raises(CheckpointError, match=r"needs .* free"):
        synthesize_file(tmp_path / "big.gguf", CONFIG, "q4_k_m")
    assert (tmp_path / "big.gguf.part").exists()


def test_a_disk_that_fills_up_keeps_what_is_there_and_never_the_final_name(tmp_path: Path) -> None:
    def full() -> np.ndarray:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "x.gguf"
    good = [Piece(offset=8 + 4 * i, nbytes=4, make=lambda: np.full(4, 7, np.uint8)) for i in (0, 1)]
    bad = Piece(offset=16, nbytes=4, make=full)
    with pytest.raises(CheckpointError, match=r"disk is full after .* run the same command again"):
        write_in_pieces(path, b"8 bytes.", [*good, bad], 24)
    assert not path.exists() and (tmp_path / "x.gguf.part").exists()
    mended = [*good, replace(bad, make=lambda: np.full(4, 9, np.uint8))]
    write_in_pieces(path, b"8 bytes.", mended, 24)
    assert path.read_bytes() == b"8 bytes." + b"\x07" * 8 + b"\x09" * 4 + bytes(4)
    with pytest.raises(CheckpointError, match="there already; remove it"):
        write_in_pieces(path, b"8 bytes.", mended, 24)


@pytest.mark.skipif(part_file.fcntl is None, reason="no file locks on this system")
def test_two_writers_of_one_file_are_told_apart(tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "x.gguf.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="being written by another process"):
            write_in_pieces(tmp_path / "x.gguf", b"", [], 0)


def test_slices_keep_the_widths_and_have_layers_with_experts() -> None:
    v3 = published_model("deepseek-v3").config
    small = sliced(v3, layers=3, experts=32)
    assert (small.first_dense_layers, small.num_layers, small.num_experts) == (1, 3, 32)
    assert (small.hidden_size, small.n_group, small.topk_group) == (7168, 8, 4)
    assert "3 layers" in small.name and "32 experts" in small.name
    # In half of 8 groups of one expert a token would reach four, and it selects eight.
    assert (sliced(v3, experts=8).n_group, sliced(v3, experts=16).n_group) == (1, 8)
    with pytest.raises(CheckpointError, match=r"layers=0.*experts=4"):
        sliced(v3, layers=0, experts=4)


def test_the_command_writes_a_file_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(published_model("deepseek-v2-lite"), config=CONFIG)
    monkeypatch.setattr("ktlab.checkpoint.published.published_model", lambda name: small)
    out = tmp_path / "cut.gguf"
    command = ["synthesize", "deepseek-v2-lite", "--format", "q8_0", "--layers", "2"]
    assert cli.main([*command, "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert ktlab.load(out).config.num_layers == 2
    assert cli.main([*command, "--out", str(out)]) == 2
    assert "there already" in capsys.readouterr().err
    command[3] = "int8_channel"
    assert cli.main([*command, "--out", str(tmp_path / "no.gguf")]) == 2
    said = capsys.readouterr().err
    assert said.count("int8_channel") == 1 and "more tensors are int8_channel, which exists" in said


def test_an_interrupted_command_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(published_model("deepseek-v2-lite"), config=CONFIG)
    monkeypatch.setattr("ktlab.checkpoint.published.published_model", lambda name: small)

    def interrupt(*_: object) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(full_size, "_rows", interrupt)
    out = tmp_path / "cut.gguf"
    assert cli.main(["synthesize", "deepseek-v2-lite", "--out", str(out)]) == 130
    assert f"{out}.part stays: the same command goes on from there" in capsys.readouterr().err


def test_the_progress_bar_judges_the_time_left_by_what_this_run_did() -> None:
    import io

    bar = ProgressBar("x.gguf", io.StringIO())
    assert bar.line(60, 100, 10.0, 20).endswith("60 %, 20 s left")
    assert bar.line(100, 100, 65.0, 60).endswith("100 %, took 1 min 5 s")
    assert duration(7300) == "2 h 1 min"


def test_what_is_quickly_done_draws_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from ktlab import progress

    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    quick, slow = (io.StringIO() for _ in range(2))
    for stream, step_s in ((quick, 0.5), (slow, 2.0)):
        bar = ProgressBar("read", stream, shown=True, after_s=3.0)
        for done in range(1, 5):
            now[0] += step_s
            bar(done, 4)
    assert not quick.getvalue()
    assert "50 %" in slow.getvalue() and slow.getvalue().endswith("100 %, took 8 s\n")
    assert "25 %" not in slow.getvalue()
