"""The benchmark of whole models: what it reports, taking turns with a peer, what it refuses."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import ktlab
from ktlab import cli
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.checkpoint.writer import write_gguf
from ktlab.errors import ContextError, SettingError
from ktlab.kernels import native
from ktlab.measurement import model_bench
from ktlab.measurement.model_bench import ModelBench, bench_model, run
from ktlab.measurement.peers import client
from ktlab.model.model import Model
from ktlab.placement import Placement

ADAPTER = """
import os

class Model:
    def __init__(self, file, method, threads, context):
        if method == "refuses":
            raise ValueError("cannot read " + os.path.basename(file))
        self.method = method

    def describe(self):
        return {"version": "fake 1"}

    def run(self, prompt, following):
        if self.method == "dies":
            os._exit(7)
        return {"prefill_s": 1e-3 * len(prompt), "decode_s": [0.01] * len(following),
                "ids": [0] * (1 + len(following))}
"""


def test_what_a_placement_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal numbers, bytes beside the allocator's, overlap, and which device it was."""
    place = Placement.everywhere(ktlab.load("tiny").config, "cpu").put("attention", "cuda:0")
    file = tmp_path / "p.yaml"
    file.write_text(place.put("experts", "cuda:0", experts=range(8)).to_yaml())
    words = ["bench", "model", "tiny", "--prompt", "70", "--generate", "2", "--rounds", "1"]
    words += ["--placement", str(file), "--stand-in", "cuda:0=cpu", "--set", "dtype=f32", "--json"]
    assert cli.main(words) == 0
    result = ModelBench.from_json(capsys.readouterr().out)
    placed = result.placed
    assert placed is not None and placed.devices == {"cuda:0": "cpu in its stead, f32"}
    assert 0 < placed.relative_error < 0.02
    assert placed.known_bytes.keys() == {"cpu", "cuda:0"} and placed.known_bytes["cuda:0"] > 1e6
    assert placed.allocated_bytes["cuda:0"] == placed.known_bytes["cuda:0"]
    assert placed.overlap_share is not None and 0 <= placed.overlap_share <= 1
    assert "experts" in str(placed.places) and "off the CPU's numbers" in str(result)
    assert cli.main([*words[:-3], "--stand-in", "cuda:0"]) == 2
    # Other settings are the CPU's, too.
    everywhere = {"placement": place.put("attention", "cpu"), "top_k": 2}
    alike = bench_model(ktlab.load, prompt=9, generate=1, rounds=1, settings=everywhere).placed
    assert alike is not None and alike.relative_error == 0
    rules = {"rules": ktlab.RuleSet.read("gpu-attention"), "stand_in": {"cuda:0": "cpu"}}
    assert bench_model(ktlab.load, prompt=9, generate=1, rounds=1, settings=rules).placed is None
    assert "expected WORD=DEVICE" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _short_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_bench, "LEAST_BUFFER", 1 << 20)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = synthesize(TINY_TEST_CONFIG, formats="q8_0")
    tensors = {name: made.tensor(name) for name in made.names()}
    return write_gguf(tmp_path_factory.mktemp("bench") / "m.gguf", TINY_TEST_CONFIG, tensors)


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "fake" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "fake" / "ready").touch()
    (tmp_path / "adapter.py").write_text(ADAPTER)
    monkeypatch.setenv(client.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setitem(client.MODEL_ADAPTERS, "fake", str(tmp_path / "adapter.py"))
    methods = [client.Method(peer="fake", name=n, formats=()) for n in ("works", "refuses", "dies")]
    monkeypatch.setattr(client, "MODEL_METHODS", tuple(methods))


def test_a_model_beside_peers_that_work_refuse_and_die(file: Path, peers: None) -> None:
    found = bench_model(partial(ktlab.load, file), prompt=20, generate=4, rounds=3, peers=())
    assert [case.who for case in found.cases] == ["ktlab", "fake/works"]
    assert "cannot read m.gguf" in found.skipped["fake/refuses"]
    assert "exit code 7" in found.skipped["fake/dies"]
    own, peer = found.cases
    assert peer.prefill_tokens_per_s == pytest.approx(1000)
    assert peer.decode_tokens_per_s == pytest.approx(100) and peer.decode_spread < 1e-6
    assert own.same_next_id == 1 and 0 <= peer.same_next_id < 0.5
    ratio = np.median([a / b for a, b in zip(own.decode_samples, peer.decode_samples, strict=True)])
    assert found.ratios["fake/works"]["decode"] == pytest.approx(ratio)
    assert found.decode_tokens_per_s == own.decode_tokens_per_s > 0
    assert {"attention", "router", "experts", "shared", "other"} <= found.decode_stages_s.keys()
    assert found.peak_resident_bytes > found.model_bytes > 0
    if not native.unavailable():
        assert 0 < found.glue_share <= 1 and 0 < found.prefill_ceiling_share < 1
    assert ModelBench.from_json(found.to_json()) == found
    assert "of the decoding speed of fake/works" in str(found)


def test_ids_are_those_that_forward_would_choose() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG))
    ids = list(range(30))
    found = run(model, ids[:20], ids[20:])
    assert list(found.ids) == model.forward(ids).argmax(-1)[19:].tolist()
    assert len(found.decode_s) == 10


@pytest.mark.parametrize("form", ["absorbed", "naive"])
def test_a_context_is_noise_in_the_cache_that_decoding_attends_to(form: str) -> None:
    model = Model(synthesize(TINY_TEST_CONFIG))
    with model.override(attention=form):
        cache = model_bench._filled(model, 40, 8)
        assert cache.lengths_B.tolist() == [40] and cache.context == 48
        assert cache.layers[0].keys.abs().min() > 0
        assert run(model, [1, 2], [3, 4], 40).ids != run(model, [1, 2], [3, 4]).ids
    found = bench_model(lambda: model, prompt=2, generate=2, context=40, rounds=1)
    assert found.context == 40 and "after 40 cached positions" in str(found)


@pytest.mark.skipif(bool(native.unavailable()), reason="no native kernels here")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sets its high-water mark back")
def test_the_buffer_that_a_ceiling_reads_is_no_memory_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_a_lot(self: object) -> None:
        assert np.ones(600 << 20, np.uint8)[-1]

    monkeypatch.setattr(model_bench._Rates, "measure", read_a_lot)
    model = ktlab.load("tiny")
    model_bench._begin_peak()
    before = model_bench._peak_bytes()
    found = bench_model(lambda: model, prompt=8, generate=2, rounds=1, threads=1)
    assert found.peak_resident_bytes < before + 300e6


def test_idle_kernels_compute_nothing_and_come_back() -> None:
    bank = Model(synthesize(TINY_TEST_CONFIG)).moe_blocks[0].experts
    call = (torch.ones(1, 64), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    before = bank.forward(*call)
    with native.idle():
        calls: list[str] = []
        assert native._native().linear(calls) is None and native._native().moe() is None
    assert torch.equal(bank.forward(*call), before)


@pytest.mark.parametrize(
    ("words", "error", "match"),
    [
        ({"rounds": 0}, SettingError, "rounds=0: expected at least 1"),
        ({"prompt": 500, "generate": 100}, ContextError, "do not fit the context"),
        ({"context": 500, "prompt": 9}, ContextError, "509 tokens of context and prompt"),
        ({"context": -1}, SettingError, "context of 0 or more"),
        ({"context": 9, "peers": []}, SettingError, "leave out context or peers"),
        ({"peers": ["ollama"]}, SettingError, "runs no whole models"),
    ],
)
def test_what_cannot_be_is_refused(
    words: dict[str, int], error: type[Exception], match: str
) -> None:
    load: Callable[[], Model] = lambda: Model(synthesize(TINY_TEST_CONFIG))  # noqa: E731
    with pytest.raises(error, match=match):
        bench_model(load, **words)  # type: ignore[arg-type]


def test_the_command_prints_one_json_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "model", str(file), "--prompt", "8", "--generate", "2", "--rounds", "1"]
    assert cli.main([*command, "--threads", "1", "--set", "top_k=2", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["prompt"] == 8 and found["threads"] == 1 and len(found["cases"]) == 1
