"""Predicted beside measured on the machine where both were recorded, and the measuring itself."""

import json
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch

import ktlab
from ktlab import hardware
from ktlab.checkpoint.embedded import data_path
from ktlab.checkpoint.full_size import sliced
from ktlab.checkpoint.mixtures import mixture
from ktlab.checkpoint.names import expected_tensors
from ktlab.checkpoint.published import published_model
from ktlab.checkpoint.writer import TensorSpec, gguf_header
from ktlab.cli import main
from ktlab.errors import SettingError
from ktlab.kernels import native
from ktlab.measurement import predicted
from ktlab.measurement.predicted import NEAR, PredictedHere, predicted_here
from ktlab.placement import gpu_rates, measuring
from ktlab.placement.machine import Machine
from ktlab.placement.predict import PHASES

RECORDED = [
    PredictedHere.from_dict(one)
    for one in json.loads(data_path("measurements", "predicted_speeds.json").read_text("utf-8"))
]
NAMES = ("ktlab tiny", "deepseek-v2-lite", "deepseek-v3")
"""On an AVX-512 machine, then on one with AVX2 alone."""
IDS = [f"{one.model.split(',')[0]} on {one.provenance['cpu']}" for one in RECORDED]


def header_only(folder: Path, record: PredictedHere) -> str:
    """Where the model lies: "tiny", or a file of the slice's true size without its weights."""
    name = record.model.split(",")[0]
    if name == "ktlab tiny":
        return "tiny"
    config = sliced(published_model(name).config, layers=3, experts=32)
    shapes = expected_tensors(config)
    formats = mixture("q4_k_m", shapes, config)
    specs = [TensorSpec(name=n, format=formats[n], shape=shape) for n, shape in shapes.items()]
    header = gguf_header(f"{name}.gguf", config, specs, None, {})
    path = folder / f"{name}.gguf"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.padded_bytes for spec in specs))
    return str(path)


@pytest.mark.parametrize("record", RECORDED, ids=IDS)
def test_predicted_within_a_fifth_of_measured(record: PredictedHere, tmp_path: Path) -> None:
    """Prefill and decode at 8, 6 and 4 experts: medians over the rounds."""
    assert record.top_k == (8, 6, 4)
    errors = record.errors(header_only(tmp_path, record))
    found = {(phase, k): errors[phase][k] for phase in PHASES for k in record.top_k}
    assert all(abs(error) <= NEAR for error in found.values()), found


def test_what_was_recorded_can_be_told() -> None:
    assert [record.model.split(",")[0] for record in RECORDED] == 2 * list(NAMES)
    isa = ["avx512_vnni" in record.provenance["isa"] for record in RECORDED]
    assert isa == [True] * 3 + [False] * 3
    text = RECORDED[0].text("tiny")
    assert "8 experts: prefill" in text and "% predicted" in text
    assert all(one.machine.kernels for record in RECORDED for one in record.rounds)


def test_machine_and_model_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = RECORDED[0].rounds[0].machine
    turns: list[int] = []

    def measured(probes: object, rounds: int) -> Machine:
        turns.append(rounds)
        return machine

    monkeypatch.setattr(predicted, "Probes", lambda: None)
    monkeypatch.setattr(predicted, "measured", measured)
    found = predicted_here("tiny", top_k=(4, 2), prompt=16, generate=3, rounds=2)
    assert turns == [1, 1, 1]
    assert len(found.rounds) == 2
    assert found.rounds[0].machine.bandwidth == pytest.approx(machine.bandwidth)
    assert found.errors("tiny").keys() == {"prefill", "decode"}
    assert PredictedHere.from_json(found.to_json()) == found


@pytest.mark.alone
@pytest.mark.skipif(bool(native.unavailable()), reason="no native kernels here")
def test_a_machine_is_measured_in_twenty_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start = perf_counter()
    Machine.measure()
    assert perf_counter() - start < 20


def test_the_machine_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured once, then from the cache; it predicts, and a file of it does too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if native.unavailable():
        with pytest.raises(SettingError, match="native kernels"):
            Machine.measure()
        return
    monkeypatch.setattr(measuring, "ROUND_S", 0.01)
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    monkeypatch.setattr(measuring, "FORMATS", {"q4_k_m": ("q4_k", "q4_k", "q6_k")})
    monkeypatch.setattr(measuring, "EXPERTS", 8)
    monkeypatch.setattr(measuring, "MATRIX_ROWS", 2048)
    monkeypatch.setattr(measuring, "BUFFER_BYTES", 32 << 20)
    first = Machine.measure()
    assert first.measured and first.bandwidth and first.token_s is not None
    assert first.processor is not None and first.processor.l2_bytes == hardware.cache_bytes(2)
    assert {kernel.kind for kernel in first.kernels} == {"experts", "matrix", "attention"}
    assert all(kernel.operations_per_s > 0 for kernel in first.kernels)
    monkeypatch.setattr(measuring, "measured", None)  # a second measurement would fail
    assert Machine.measure().kernels == first.kernels
    assert main(["machine", "--json"]) == 0
    file = tmp_path / "mine.json"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["predict", "tiny", "--machine", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["engine"] == "ktlab" and said["decode_tokens_per_s"] > 0
    assert ktlab.predict("deepseek-v2-lite").prefill_tokens_per_s > 0
    assert main(["machine"]) == 0
    assert "measured" in capsys.readouterr().out
    assert main(["machine", "h100-host"]) == 0
    assert "H100" in capsys.readouterr().out


def test_ktlab_on_a_machine_that_was_not_measured() -> None:
    """Shares of its ceilings: between its memory and its arithmetic."""
    found = ktlab.predict("deepseek-v2-lite", machine="epyc-9654+4090", engine="ktlab")
    assert 10 < found.decode_tokens_per_s < 300
    assert found.memory.keys() == {"cpu"}
    assert "experts" in found.times["prefill"]


def test_a_gpus_rates_on_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code on the CPU: no GPU here gives none, and rates are rates."""
    device = torch.device("cpu")
    assert gpu_rates.product_rate(device, torch.float32, 64) > 1e6
    assert gpu_rates.copy_rate(device, 1 << 20) > 1e6
    assert gpu_rates.link_rate(device, 1 << 20) > 1e6
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_rates.measured_gpus() == ((), {})


def test_a_gpus_cache_is_no_slower_than_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that takes less than its launch tells the rate of launches."""
    size = SimpleNamespace(name="a GPU", total_memory=1 << 30, multi_processor_count=8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: size)
    monkeypatch.setattr(gpu_rates, "product_rate", lambda *_: 1e12)
    monkeypatch.setattr(gpu_rates, "link_rate", lambda _: 1e10)
    rates = {gpu_rates.LARGE_BYTES: 2e12, gpu_rates.SMALL_BYTES: 1e12}
    monkeypatch.setattr(gpu_rates, "copy_rate", lambda _, nbytes: rates[nbytes])
    (gpu,), _ = gpu_rates.measured_gpus()
    assert gpu.bandwidth == gpu.cache_bandwidth == 2e12
