"""`ktlab bench experts`: the figures are what they say, contenders take turns, peers stay apart."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from ktlab import cli, hardware
from ktlab.errors import SettingError
from ktlab.kernels import native
from ktlab.measurement import rounds
from ktlab.measurement.bench import KernelCase, bench_experts
from ktlab.measurement.peers import client
from ktlab.measurement.peers.kt_kernel import NOT_BUILT
from ktlab.measurement.rounds import scatter
from ktlab.measurement.synthetic import (
    ROUTINGS,
    MoeShape,
    SyntheticExperts,
    expert_bytes,
    formats_of,
    get_shape,
    shapes,
)

KEYS = (
    "shape experts top_k format layout backend isa tokens threads median_s spread gflops gb_s "
    "ceiling ceiling_share relative_error kernel reason"
).split()
SMALL = "256x96x6x2"
BACKENDS = ["numpy", "torch", *([] if native.unavailable() else ["native"])]


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at the bandwidth here; reading 400 MB in every round would take long."""
    monkeypatch.setattr(rounds, "LARGEST_BUFFER", 16 << 20)


def by_hand(experts: SyntheticExperts, tokens: int) -> np.ndarray:
    """The layer computed from the stacked tensors alone, in float64."""
    inputs = experts.inputs(tokens)
    gate, up, down = (w.dequantize().astype(np.float64) for w in experts.weights.values())
    output_TD = np.zeros(inputs.hidden_TD.shape)
    for token, x_D in enumerate(inputs.hidden_TD.astype(np.float64)):
        for expert, weight in zip(
            inputs.ids_VTK[0, token], inputs.weights_VTK[0, token], strict=True
        ):
            gate_F = gate[expert] @ x_D
            inner_F = gate_F / (1 + np.exp(-gate_F)) * (up[expert] @ x_D)
            output_TD[token] += weight * (down[expert] @ inner_F)
    return output_TD


# Synthetic layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["q4_k_m", "q8_0", "bf16", "int8_channel", "int4_group32"])
def test_exact_output_is_that_of_the_tensors(format: str) -> None:
    shape = get_shape(SMALL)
    experts = SyntheticExperts(shape, formats_of(format, shape), seed=3)
    assert np.allclose(
        experts.exact(experts.inputs(5), 5), by_hand(experts, 5), rtol=1e-9, atol=1e-12
    )
    assert experts.expert_bytes * shape.experts == sum(w.nbytes for w in experts.weights.values())


def test_experts_differ_and_a_seed_repeats_them() -> None:
    shape = get_shape(SMALL)
    first, same, other = (
        SyntheticExperts(shape, formats_of("q4_k_m", shape), seed) for seed in (1, 1, 2)
    )
    for name, weight in first.weights.items():
        assert np.array_equal(weight.blocks, same.weights[name].blocks)
        assert not np.array_equal(weight.blocks, other.weights[name].blocks)
        assert len({expert.tobytes() for expert in weight.blocks}) == shape.experts
    assert np.array_equal(first.inputs(3).ids_VTK, same.inputs(3).ids_VTK)


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 64])
def test_routing(tokens: int) -> None:
    shape = MoeShape(name="s", hidden=256, width=32, experts=12, top_k=3)
    inputs = SyntheticExperts(shape, ("q8_0",) * 3, 0).inputs(tokens)
    assert inputs.ids_VTK.shape[1:] == (tokens, 3)
    assert all(len(set(ids)) == 3 for ids in inputs.ids_VTK.reshape(-1, 3).tolist())
    assert inputs.ids_VTK.min() >= 0 and inputs.ids_VTK.max() < shape.experts
    assert np.allclose(inputs.weights_VTK.sum(-1), 1)
    if tokens * 3 * 2 <= shape.experts:  # the second call must not find the first one's experts
        first, second = inputs.ids_VTK[:2]
        assert len(inputs.ids_VTK) == ROUTINGS
        assert not set(first.ravel()) & set(second.ravel())


def test_shapes_are_those_of_the_models() -> None:
    assert {"deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "kimi-k2"} <= set(shapes())
    assert "deepseek-r1" not in shapes(), "V3 by another name"
    v3 = get_shape("deepseek-v3", 16)
    assert (v3.hidden, v3.width, v3.experts, v3.top_k) == (7168, 2048, 16, 8)
    lite = get_shape("deepseek-v2-lite")
    assert (lite.hidden, lite.width, lite.experts, lite.top_k) == (2048, 1408, 64, 6)
    # 1408 is no multiple of 256, so `down` falls back as in llama.cpp's files.
    assert formats_of("q4_k_m", lite) == ("q4_k", "q4_k", "q8_0")
    assert formats_of("q4_k_m", v3) == ("q4_k", "q4_k", "q6_k")
    assert expert_bytes(v3, formats_of("q4_k_m", v3)) == 2048 * 7168 * (2 * 144 + 210) // 256


# Figures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_figures(backend: str) -> None:
    result = bench_experts(
        SMALL, format="q8_0", backend=backend, tokens=(1, 9), threads=1, rounds=3
    )
    assert [case.tokens for case in result.cases] == [1, 9]
    for case in result.cases:
        assert list(case.to_dict()) == KEYS
        assert case.backend == backend and case.threads == 1 and case.experts == 6
        assert len(case.samples_s) == 3
        assert case.min_s <= case.median_s == sorted(case.samples_s)[1]
        operations = 2 * case.tokens * 2 * 3 * 256 * 96
        assert case.gflops == pytest.approx(operations / case.median_s / 1e9)
        assert case.spread >= 0 and case.ceiling_share > 0
        assert 0 <= case.relative_error < 0.02
        assert case.reason and case.kernel
    one = result.cases[0]
    weight_bytes = 4 if backend == "torch" else 34 / 32
    if one.layout != "packed":
        assert one.gb_s == pytest.approx(2 * 3 * 256 * 96 * weight_bytes / one.median_s / 1e9)
    assert result.rates["read"] > 1e8
    assert result.provenance.seed == 0
    assert KernelCase.from_dict(one.to_dict()) == one


def test_the_larger_time_is_the_bound() -> None:
    rates = rounds.Rates(1)
    for number in (1.0, 0.5, 3.0):
        for name, rate in {"read": 10e9, "float32": 100e9, "avx512_vnni": 1000e9}.items():
            rates._note(name, number * rate)
    assert rates.bound(1e9, 1e9, "avx512_vnni") == (0.1, "read 10 GB/s")
    least_s, name = rates.bound(1e6, 1e12, "avx512_vnni")
    assert least_s == pytest.approx(1.0) and name == "avx512_vnni 1000 GFLOP/s"
    least_s, name = rates.bound(1e6, 1e12, "amx_int8")  # not measured here
    assert least_s == pytest.approx(10.0) and name.startswith("float32")
    # A time that the median does not allow: the best round bounds it, and says so.
    assert rates.bound(1e9, 1e9, "avx512_vnni", 0.1) == (0.1, "read 10 GB/s")
    least_s, name = rates.bound(1e9, 1e9, "avx512_vnni", 0.09)
    assert least_s == pytest.approx(1 / 30) and name == "read 30 GB/s at best"
    assert rates.best["read"] == 30e9
    rates.begin()  # earlier rounds bound nothing of later ones
    for name, rate in {"read": 5e9, "float32": 100e9}.items():
        rates._note(name, rate)
    assert rates.bound(1e9, 1e9, "avx512_vnni") == (0.2, "read 5 GB/s")


def test_caches(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "105M", "?")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
        (tmp_path / f"index{index}" / "level").write_text(f"{index + 1}\n")
    assert hardware.cache_bytes(folder=tmp_path) == 105 << 20
    assert hardware.cache_bytes(2, folder=tmp_path) == 2 << 20
    assert hardware.cache_bytes(4, folder=tmp_path) is None
    assert hardware.cache_bytes(folder=tmp_path / "nowhere") is None


# Turns -------------------------------------------------------------------------------------------


@dataclass
class Scripted:
    """A contender that takes the seconds it is told and notes its turns in `journal`."""

    label: str
    group: str
    seconds: float
    journal: list[str]
    fails_at: int = 10**9
    format: str = "q8_0"
    layout: str = ""
    backend: str = ""
    isa: str = ""
    peak_isa: str = ""
    calls: int = field(default=0)

    def expert_bytes(self) -> float:
        return 1.0

    def run(self, tokens: int, repeats: int) -> list[float]:
        self.calls += 1
        if self.calls > self.fails_at:
            raise client.PeerError(f"{self.label} fell over")
        self.journal.append(self.label)
        return [self.seconds] * repeats

    def output(self, tokens: int) -> np.ndarray:
        return np.zeros((tokens, 1), np.float32)

    def kernel(self, tokens_per_expert: float) -> str:
        return self.label

    def reason(self) -> str:
        return ""


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds.Rates, "measure", lambda self, contenders: None)


@pytest.mark.usefixtures("no_clock")
def test_contenders_alternate_and_a_group_sends_its_best() -> None:
    journal: list[str] = []
    contenders = [
        Scripted("ours", "ours", 0.2, journal),
        Scripted("slow", "peer", 0.3, journal),
        Scripted("fast", "peer", 0.25, journal),
        Scripted("hopeless", "peer", 0.9, journal),
    ]
    found = rounds.take_turns(contenders, 8, 3, rounds.Rates(1), {}, lambda text: None)
    assert journal == ["ours", "slow", "fast", "hopeless"] + ["ours", "slow", "fast"] * 3
    assert [(c.label, samples) for c, samples in found] == [
        ("ours", [0.2] * 3),
        ("fast", [0.25] * 3),
    ]


@pytest.mark.usefixtures("no_clock")
@pytest.mark.parametrize("fails_at", [0, 2])
def test_who_falls_over_is_left_out_and_named(fails_at: int) -> None:
    journal: list[str] = []
    contenders = [
        Scripted("ours", "ours", 0.2, journal),
        Scripted("weak", "peer", 0.2, journal, fails_at=fails_at),
    ]
    skipped: dict[str, str] = {}
    found = rounds.take_turns(contenders, 8, 4, rounds.Rates(1), skipped, lambda text: None)
    assert [c.label for c, _ in found] == ["ours"]
    assert skipped == {"weak": "weak fell over"}
    assert journal.count("weak") == fails_at


# Peers -------------------------------------------------------------------------------------------

ADAPTER = """
import os, time
import numpy as np

class Layer:
    def __init__(self, folder, case, method, threads):
        print("noise on standard output")
        if method == "refuses":
            raise ValueError("cannot compute " + case["formats"]["down"])
        self.case, self.method, self.threads = case, method, threads
        self.gate = np.load(folder / "gate.npy")

    def describe(self):
        return {"version": "1", "isa": "avx512_vnni", "kernel": "k", "layout": str(self.threads)}

    def bind(self, hidden, ids, weights, routing):
        def call():
            if self.method == "dies":
                os._exit(7)
            time.sleep(0.001)
            self.out = hidden * ids[:, :1] + routing
        return call

    def output(self):
        return self.out.astype(np.float32)
"""


@pytest.fixture
def fake_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], client.Method]:
    """An environment whose peer is the adapter above."""
    python = tmp_path / "fake" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "fake" / "ready").touch()
    adapter = tmp_path / "adapter.py"
    adapter.write_text(ADAPTER)
    monkeypatch.setenv(client.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setitem(client.ADAPTERS, "fake", str(adapter))
    return lambda name: client.Method(peer="fake", name=name, formats=("q8_0",))


@pytest.fixture
def case_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "case"
    folder.mkdir()
    shape = get_shape(SMALL)
    experts = SyntheticExperts(shape, ("q8_0",) * 3, 0)
    experts.save(folder, bfloat16=True)
    experts.inputs(2).save(folder)
    return folder


def state_of(pid: int) -> str:
    """One letter, as in ps; "T" is suspended."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_peer_runs_apart_and_sleeps_between_turns(
    fake_peer: Callable[[str], client.Method], case_folder: Path
) -> None:
    with client.Peer(fake_peer("works"), case_folder, threads=3) as peer:
        assert peer.description["layout"] == "3"
        assert len(peer.run(2, 4)) == 4
        assert min(peer.run(2, 4)) >= 0.001
        pid = peer._process.pid
        for _ in range(1000):
            if state_of(pid) == "T":
                break
        assert state_of(pid) == "T"
        hidden_TD = np.load(case_folder / "hidden_2.npy")
        ids_VTK = np.load(case_folder / "ids_2.npy")
        found = peer.output(2, case_folder / "output.npy")
        assert np.allclose(found, hidden_TD * ids_VTK[0, :, :1])
    assert not Path(f"/proc/{pid}").exists()


def test_a_peer_that_refuses_or_dies_says_so(
    fake_peer: Callable[[str], client.Method], case_folder: Path
) -> None:
    with pytest.raises(client.PeerError, match="fake/refuses: ValueError: cannot compute q8_0"):
        client.Peer(fake_peer("refuses"), case_folder, threads=1)
    with client.Peer(fake_peer("dies"), case_folder, threads=1) as peer:
        with pytest.raises(client.PeerError, match=r"ended unexpectedly \(exit code 7\)"):
            peer.run(2, 1)


def test_peers_by_format_and_name() -> None:
    def labels(names: list[str], *formats: str) -> list[str]:
        return [m.label for m in client.choose(names, formats)]

    ggml = ["kt-kernel/llamafile", "llama.cpp/cpu", "llama.cpp/repack"]
    assert labels([], "q4_k", "q4_k", "q6_k") == ggml
    assert labels([], "int8_channel") == ["kt-kernel/amxint8"]
    assert labels([], "int4_group32") == ["kt-kernel/amxint4"]
    assert labels([], "iq1_s") == []
    assert labels(["llama.cpp"], "q8_0") == ggml[1:]
    assert labels(["kt-kernel/amxint8"], "q8_0") == ["kt-kernel/amxint8"]
    with pytest.raises(SettingError, match='did you mean "llama.cpp/cpu"'):
        client.choose(["lama.cpp/cpu"], ("q8_0",))


def test_without_environments_the_error_names_make_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(client.FOLDER_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(SettingError, match="make peers"):
        bench_experts(SMALL, format="q8_0", peers=())


@pytest.mark.slow
@pytest.mark.parametrize("format", ["q4_k_m", "int8_channel"])
def test_installed_peers_compute_the_same_layer(format: str) -> None:
    shape = "1024x512x8x4"
    for method in client.choose([], formats_of(format, get_shape(shape))):
        try:
            client.python_of(method.peer)
        except SettingError as error:
            pytest.skip(str(error))
    result = bench_experts(
        shape, format=format, backend="torch", tokens=(1, 16), rounds=1, peers=(), threads=2
    )
    for who, why in result.skipped.items():
        if NOT_BUILT in why:
            pytest.skip(f"{who}: {why}")
    assert not result.skipped
    assert {case.backend for case in result.cases} >= {"torch", "kt-kernel"}
    assert all(case.relative_error < 0.05 for case in result.cases)


# Bad input and the command line ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"shape": "deepseek-v4"}, "unknown shape"),
        ({"shape": "0x96x6x2"}, "unknown shape"),
        ({"shape": "512x256x4x8"}, "no more selected experts than there are, found 8 of 4"),
        ({"experts": 1}, "selects 2 of 6"),
        ({"experts": 7}, "selects 2 of 6"),
        ({"format": "q4_k_x"}, "unknown format 'q4_k_x'"),
        ({"format": "Q4_K_M"}, "unknown format 'Q4_K_M'; did you mean \"q4_k_m\""),
        ({"seed": -1}, "seed=-1: expected 0 or more"),
        ({"tokens": (0,)}, "tokens"),
        ({"tokens": ()}, "tokens"),
        ({"rounds": 0}, "rounds=0"),
        ({"threads": 0}, "threads"),
        ({"backend": "cuda"}, "backend 'cuda'"),
        ({"layout": "tiles"}, "layout 'tiles'"),
        ({"format": "iq1_s", "peers": ()}, "."),
        ({"shape": "65536x65536x64x1", "experts": 64}, "are free"),
    ],
)
def test_impossible_wishes(words: dict, expected: str) -> None:
    with pytest.raises(SettingError, match=expected):
        bench_experts(**{"shape": SMALL, "format": "q8_0", **words})


def test_what_a_row_has_instead_of_the_format_is_said() -> None:
    def measured(format: str) -> KernelCase:
        found = bench_experts(SMALL, format=format, backend="numpy", tokens=(1,), rounds=1)
        return found.cases[0]

    case = measured("q4_k")
    assert case.format == "q4_k"
    assert case.reason.endswith("; down is q5_0: its rows do not divide into blocks of q4_k")
    assert "is q" not in measured("q8_0").reason


def test_few_rounds_have_no_spread() -> None:
    assert [scatter(0.04, rounds) for rounds in (0, 3)] == ["± 2 %"] * 2
    assert [scatter(0.0, rounds) for rounds in (1, 2)] == ["(one round)", "(2 rounds)"]


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"bench experts --shape {SMALL} --format q8_0 --backend numpy --tokens 1,3 --rounds 1"
    assert cli.main([*words.split(), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(line) for line in lines] == [KEYS] * 2
    assert cli.main(words.split()) == 0
    text = capsys.readouterr().out
    assert "GFLOP/s" in text and "ceiling" in text and "numpy" in text
    assert text.count("ms (one round)") == 2 and "±" not in text
    assert cli.main([*words.split(), "--tokens", "many"]) == 2
    assert "expected whole numbers" in capsys.readouterr().err
