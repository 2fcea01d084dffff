"""Speeds that are predicted for other machines: physics, published figures, bad input."""

import json
from typing import Any

import pytest

import ktlab
from ktlab.checkpoint.facts import read_facts
from ktlab.cli import main
from ktlab.errors import CheckpointError, SettingError
from ktlab.placement.engines import efficiencies, engines
from ktlab.placement.listed import machine_names
from ktlab.placement.machine import Machine, get_machine
from ktlab.placement.predict import PHASES, Prediction
from ktlab.placement.published import Published, fit, published
from ktlab.placement.touched import chances, padded, touched

V3: dict[str, Any] = {
    "machine": "2x6454s+4090d",
    "engine": "ktransformers-0.2.1",
    "prompt": 500,
    "generate": 300,
}


@pytest.fixture(scope="module")
def table() -> Published:
    return published()


# ------------------------------------------------------------------ the published figures


def test_published_speeds_are_explained(table: Published) -> None:
    """The issue's figures, and fewer free efficiencies than a third of the speeds."""
    errors = table.errors["fitted"]
    assert errors["count"] == 18
    assert errors["median"] <= 0.10
    assert errors["worst"] <= 0.25
    assert 3 * len(table.free) < errors["count"]


def test_speeds_that_no_efficiency_has_seen(table: Published) -> None:
    errors = table.errors["held_out"]
    assert errors["count"] >= 30
    assert errors["median"] <= 0.10
    assert errors["worst"] <= 0.25


def test_fitting_again_gives_the_committed_efficiencies(table: Published) -> None:
    found = fit(table.fitted)
    assert found == pytest.approx(table.free, rel=2e-3)


def test_efficiencies_of_v02_predict_v03(table: Published) -> None:
    """Nothing of V0.3 in the fit: its ratios of 6 to 8 experts, and most of its speeds."""
    found = published(fit([one for one in table.fitted if one.engine != "ktransformers-0.3"]))
    speeds = {
        (one.prompt, one.top_k): one for one in found.fitted if one.engine == "ktransformers-0.3"
    }
    for prompt in {prompt for prompt, _ in speeds}:
        six, eight = speeds[prompt, 6], speeds[prompt, 8]
        ours, theirs = six.predicted / eight.predicted, six.published / eight.published
        assert ours == pytest.approx(theirs, rel=0.06)
        assert ours > 1.02
    assert all(abs(one.error) < 0.25 for one in speeds.values())


def test_sizes_of_memory(table: Published) -> None:
    """Those that were measured; the others are installed memory and an "at least"."""
    measured = [one for one in table.memory if "installed" not in one.includes]
    assert all(abs(one.error) < 0.07 for one in measured if one.device == "cpu")
    assert len(table.memory) == 6


def test_published_to_json_and_back(table: Published) -> None:
    found = json.loads(table.to_json())
    assert found["fitted"][0]["error"] == pytest.approx(table.fitted[0].error)
    assert found["errors"]["held_out"]["worst"] == table.errors["held_out"]["worst"]
    assert len(table.to_frame()) == len(table.fitted) + len(table.held_out)
    text = str(table)
    assert "held out" in text and "not explained" in text
    assert table._repr_mimebundle_()["text/html"].count("<tr>") > 50
    assert len(table.plot().data) == 4


# ------------------------------------------------------------------ physics


def test_distinct_experts_follow_from_the_distribution() -> None:
    assert touched(1, 256, 8) == pytest.approx(8)
    assert touched(10_000, 256, 8) == pytest.approx(256)
    assert touched(32, 256, 8) == pytest.approx(256 * (1 - (1 - 8 / 256) ** 32))
    skewed = [10.0] * 26 + [1.0] * 230
    assert touched(32, 256, 8, skewed) < touched(32, 256, 8)
    greedy = chances(4, 2, [0.9, 0.05, 0.03, 0.02])
    assert greedy[0] == 1
    assert greedy.sum() == pytest.approx(2)
    assert padded(100, 16, 4, None, 1) == 400
    with pytest.raises(ValueError, match="4 shares"):
        chances(4, 2, [1.0, 2.0])


def test_fewer_experts_sockets_and_tokens_cost_less() -> None:
    def speeds(**changes: Any) -> tuple[float, float]:
        found = ktlab.predict("deepseek-v3", **{**V3, **changes})
        return found.prefill_tokens_per_s, found.decode_tokens_per_s

    base = speeds()
    six, one, long = speeds(top_k=6), speeds(machine="1x6454s+4090d"), speeds(prompt=8000)
    assert six[0] > base[0] and six[1] > base[1]
    assert one[0] < base[0] < 2 * one[0] and one[1] < base[1] < 2 * one[1]
    assert long[1] < base[1]
    slow = speeds(changes={"gemv_share": 0.1})
    assert slow[1] < base[1] / 2
    even = ktlab.predict("deepseek-v3", **V3)
    load = [20.0] * 16 + [1.0] * 240
    skewed = ktlab.predict(
        "deepseek-v3", **{**V3, "prompt": 20}, loads={layer: load for layer in range(3, 61)}
    )
    spread = ktlab.predict("deepseek-v3", **{**V3, "prompt": 20})
    assert skewed.prefill_tokens_per_s > spread.prefill_tokens_per_s
    assert even.decode_tokens_per_s == pytest.approx(base[1])


def test_stages_memory_and_timelines() -> None:
    found = ktlab.predict("deepseek-v3", **V3, top_k=6)
    assert found.memory.keys() == {"cpu", "cuda:0"}
    assert found.memory["cpu"] > 700e9
    for phase in PHASES:
        line = found.timelines[phase]
        assert set(line.lanes) == {"CPU", "GPU", "link"}
        stages = found.times[phase]
        assert {"experts", "attention", "scores", "shared", "launch", "transfer"} <= set(stages)
        assert max(stages.values()) < line.seconds < sum(stages.values())
        for stage in found.stages[phase]:
            assert sum(stage.parts.values()) == pytest.approx(stage.seconds)
            assert stage.bound in stage.parts
    assert found.decode_tokens_per_s == pytest.approx(1 / found.timelines["decode"].seconds)
    assert found.times["decode"]["experts"] == pytest.approx(
        6 / 8 * ktlab.predict("deepseek-v3", **V3).times["decode"]["experts"]
    )
    back = Prediction.from_json(found.to_json())
    assert back.times == found.times
    assert "prefill" in str(found) and "<table" in found._repr_mimebundle_()["text/html"]
    assert len(found.to_frame()) == sum(map(len, found.stages.values()))
    assert found.plot("prefill").data


@pytest.mark.parametrize("name", [name for name in machine_names() if name != "this"])
def test_every_listed_machine_has_sources_and_speeds(name: str) -> None:
    machine = get_machine(name)
    assert machine.sources.keys() == {"machine", "processor", "gpu", "bandwidth"}
    assert Machine.from_json(machine.to_json()) == machine
    found = ktlab.predict("deepseek-v2-lite", machine=name, engine="ktransformers-0.2.1")
    assert 5 < found.decode_tokens_per_s < 500
    assert found.prefill_tokens_per_s > found.decode_tokens_per_s


def test_other_models_and_attentions() -> None:
    """Grouped-query attention too; a desktop reads what it has."""
    desktop: dict[str, Any] = {"machine": "i9-14900kf+4090", "engine": "ktransformers-0.2.1"}
    large = ktlab.predict("qwen3-235b-a22b", **desktop)
    small = ktlab.predict("qwen3-30b-a3b", **desktop)
    assert small.decode_tokens_per_s > 2 * large.decode_tokens_per_s
    too_large = ktlab.predict("deepseek-v3", **desktop)
    assert too_large.fits is False
    assert any("does not fit" in note for note in too_large.notes)


def test_every_efficiency_says_what_it_is_and_how_it_was_found() -> None:
    for one in efficiencies().values():
        assert one.meaning and one.how and one.unit and one.value > 0
    assert all(one.source and one.rate in efficiencies() for one in engines().values())


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"machine": "2x6454+4090d"}, SettingError, 'did you mean "2x6454s\\+4090d"'),
        ({"machine": "missing.json"}, SettingError, "No such file"),
        ({"engine": "ktransformer-0.2"}, SettingError, 'did you mean "ktransformers-0.2'),
        ({"machine": "laptop", "engine": "ktransformers-0.3"}, SettingError, "amx_int8"),
        ({"machine": Machine(name="sizes", devices=())}, SettingError, "nothing of its processor"),
        ({"top_k": 300}, SettingError, "1 to 128"),
        ({"prompt": 0, "generate": -1}, SettingError, "prompt=0.*generate=-1"),
        ({"changes": {"gem_share": 1}}, SettingError, 'did you mean "gemv_share"'),
        ({"prompt": 200_000}, SettingError, "163840"),
    ],
)
def test_what_cannot_be_says_so(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"(?s){words}"):
        ktlab.predict("deepseek-v3", **{**V3, **changes})


def test_a_machine_without_a_gpu_and_an_unknown_model() -> None:
    bare = get_machine("2x6454s+4090d")
    bare = Machine.from_dict(
        {**bare.to_dict(), "gpus": (), "devices": bare.to_dict()["devices"][:1]}
    )
    with pytest.raises(SettingError, match="has none"):
        ktlab.predict("deepseek-v3", **{**V3, "machine": bare})
    assert ktlab.predict("deepseek-v3", machine=bare, engine="llama.cpp").decode_tokens_per_s > 1
    with pytest.raises(CheckpointError, match='did you mean "deepseek-v3"'):
        ktlab.predict("deepsek-v3", **V3)


# ------------------------------------------------------------------ the command


def test_predict_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = "predict deepseek-v3 --machine 2x6454s+4090d --engine ktransformers-0.2 --format q4_k_m"
    assert main([*words.split(), *"--top-k 6 --prompt 500 --generate 300 --json".split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prefill_tokens_per_s"] == pytest.approx(97.32, rel=0.25)
    assert found["decode_tokens_per_s"] == pytest.approx(13.69, rel=0.25)
    assert found["memory"]["cuda:0"] < 24e9
    assert found["times"]["decode"]["experts"] > 0
    assert main(["predict", "--published", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["errors"]["fitted"]["count"] == 18
    assert main(["predict"]) == 2
    assert "name a model" in capsys.readouterr().err


# ------------------------------------------------------------------ placements and loads


def test_experts_on_the_gpu_and_apart() -> None:
    """A layer's experts on the GPU leave the CPU; half of them, half; nodes add up."""
    config = read_facts("deepseek-v2-lite", format="q4_k_m").config
    here: dict[str, Any] = {"machine": "2x6454s+4090d", "engine": "ktransformers-0.2.1"}
    base = ktlab.predict("deepseek-v2-lite", **here)
    usual = base.plan.placement
    moved = ktlab.predict(
        "deepseek-v2-lite", **here, placement=usual.put("experts", "cuda:0", layers=[3, 4, 5])
    )
    assert moved.decode_tokens_per_s > base.decode_tokens_per_s
    assert moved.memory["cuda:0"] > base.memory["cuda:0"]
    share = (config.num_layers - 1 - 3) / (config.num_layers - 1)
    cpu, before = moved.times["decode"]["experts"], base.times["decode"]["experts"]
    assert cpu == pytest.approx(share * before, rel=0.1)
    assert moved.times["decode"]["experts on the GPU"] > 0
    half = usual.put("experts", "cuda:0", experts=range(config.num_experts // 2), phase="decode")
    apart = ktlab.predict("deepseek-v2-lite", **here, placement=half)
    assert apart.times["decode"]["experts"] == pytest.approx(before / 2, rel=0.01)
    assert "experts on the GPU" not in apart.times["prefill"]
    nodes = usual.put("experts", "numa:0", experts=range(32)).put(
        "experts", "numa:1", experts=range(32, 64)
    )
    split = ktlab.predict("deepseek-v2-lite", **here, placement=nodes)
    assert split.decode_tokens_per_s == pytest.approx(base.decode_tokens_per_s, rel=0.01)


def test_the_embedded_models_load_is_measured() -> None:
    """Its routers are not even: a short prompt touches fewer experts than even ones would."""
    here: dict[str, Any] = {"machine": "epyc-9654+4090", "engine": "ktlab", "prompt": 16}
    even = {layer: [1.0] * 64 for layer in range(8)}
    measured = ktlab.predict("tiny", **here)
    assert measured.times["prefill"] != ktlab.predict("tiny", **here, loads=even).times["prefill"]
    trace = ktlab.load("tiny").trace("def quicksort(items):")
    assert ktlab.predict("tiny", **here, loads=trace).prefill_tokens_per_s > 0
