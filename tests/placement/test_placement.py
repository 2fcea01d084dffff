"""A placement is a value: changed by making another, compared, written and read, checked whole."""

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktlab.checkpoint.published import published_model
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG as TINY
from ktlab.errors import PlacementError, SettingError
from ktlab.placement.placement import PHASES, PLACEABLE, Placement
from ktlab.placement.placement_file import read_placement
from ktlab.placement.ranges import read_ranges, write_ranges

MOE = range(TINY.first_dense_layers, TINY.num_layers)
CPU = Placement.everywhere(TINY, "cpu")


def test_put_makes_another() -> None:
    some = CPU.put("attention", "cuda:0").put(
        "experts", "cuda:0", layers=[MOE[0]], experts=[0, 5], phase="decode"
    )
    assert CPU.devices == ("cpu",) and some.devices == ("cpu", "cuda:0")
    assert some.device("attention", layer=0) == some.device("cache", layer=0) == "cuda:0"
    assert some.device("experts", layer=MOE[0], expert=5) == "cuda:0"
    assert some.device("experts", layer=MOE[0], expert=5, phase="prefill") == "cpu"
    assert some.experts(layer=MOE[0], device="cuda:0") == (0, 5)
    assert some.experts(layer=MOE[0], device="cuda:0", phase="prefill") == ()
    with pytest.raises(FrozenInstanceError):
        some.decode = CPU.decode  # type: ignore[misc]
    again = CPU.put("experts", "cuda:0", experts={MOE[0]: [5, 0]}, phase="decode")
    assert again.put("attention", "cuda:0") == some != CPU
    assert len({some, again.put("attention", "cuda:0"), CPU}) == 2


def test_norms_and_router_follow_attention_unless_said() -> None:
    layer = MOE[0]
    moved = CPU.put("attention", "cuda:1")
    assert moved.device("router", layer=layer) == moved.device("norms", layer=layer) == "cuda:1"
    assert moved.device("norms") == "cpu", "the last norm goes with the output"
    assert moved.put("output", "cuda:0").device("norms") == "cuda:0"
    said = CPU.put("router", "cpu", layers=layer).put("attention", "cuda:1")
    assert said.device("router", layer=layer) == "cpu"
    assert said.device("router", layer=MOE[-1]) == ("cpu" if MOE[-1] == layer else "cuda:1")


def test_diff_names_what_moved() -> None:
    other = CPU.put("experts", "cuda:0", layers=[MOE[0]], experts=[0, 1, 2, 7], phase="decode")
    (row,) = CPU.diff(other).to_dict("records")
    assert row == {
        "component": "experts",
        "layer": MOE[0],
        "experts": "0-2, 7",
        "phase": "decode",
        "device_a": "cpu",
        "device_b": "cuda:0",
    }
    assert CPU.diff(CPU).empty
    moved = CPU.diff(CPU.put("attention", "cuda:0", layers=0))
    assert set(moved.component) == {"attention", "cache", "norms"}
    assert set(moved.phase) == set(PHASES)


def test_text_of_a_large_model_is_short() -> None:
    config = published_model("deepseek-v3").config
    found = Placement.everywhere(config, "cpu").put("attention", "cuda:0").put("shared", "cuda:0")
    hot = {layer: [layer, 2 * layer, 200] for layer in config.moe_layers}
    found = found.put("experts", "cuda:0", experts=hot, phase="decode").put(
        "norms", "cuda:0", layers=[None]
    )
    text = found.to_yaml()
    assert len(text) < 3000 and "cpu: rest" in text
    assert Placement.from_yaml(text) == found
    assert Placement.from_json(found.to_json()) == found
    assert Placement.from_dict(json.loads(found.to_json())) == found
    assert repr(found).startswith(f"Placement of {found.model.name}, 61 layers\nplaces:")


_DEVICE = st.sampled_from(["cpu", "numa:0", "numa:1", "cuda:0", "disk"])
_PUT = st.tuples(
    st.sampled_from(PLACEABLE),
    _DEVICE,
    st.sets(st.integers(0, TINY.num_experts - 1), min_size=1),
    st.sampled_from([None, *PHASES]),
    st.booleans(),
)


@given(st.lists(_PUT, max_size=6))
def test_whatever_can_be_put_can_be_read(puts: list[tuple]) -> None:
    found = CPU
    for component, device, experts, phase, some in puts:
        only = {"experts": experts, "layers": MOE[:1]} if component == "experts" and some else {}
        found = found.put(component, device, phase=phase, **only)
    assert Placement.from_yaml(found.to_yaml()) == found
    assert Placement.from_json(found.to_json(indent=None)) == found


@given(st.sets(st.integers(0, 300)))
def test_ranges(numbers: set[int]) -> None:
    if numbers:
        assert read_ranges(write_ranges(numbers)) == tuple(sorted(numbers))


# What is wrong, all of it ----------------------------------------------------------------------


def test_put_says_all_that_is_wrong() -> None:
    with pytest.raises(PlacementError) as error:
        CPU.put("expert", "gpu", phase="training")
    said = str(error.value)
    assert "device 'gpu' is unknown; did you mean \"cuda:0\"?" in said
    assert "component 'expert' is unknown; did you mean \"experts\"?" in said
    assert "phase 'training'" in said
    with pytest.raises(PlacementError, match=r"experts \[99\] do not exist; there are 0 to"):
        CPU.put("experts", "cpu", layers=MOE[:1], experts=[99])
    with pytest.raises(PlacementError, match="dense is not in layers"):
        CPU.put("dense", "cpu", layers=[MOE[0]])
    with pytest.raises(PlacementError, match="cache is where attention is"):
        CPU.put("cache", "cuda:0")
    assert issubclass(PlacementError, SettingError)


def test_check_says_all_that_is_wrong() -> None:
    bad = (
        CPU.put("attention", "cuda:0", layers=[0], phase="decode")
        .put("shared", "disk")
        .put("experts", "cuda:7", layers=MOE[:1], experts=[1])
    )
    v3 = published_model("deepseek-v3").config
    with pytest.raises(PlacementError) as error:
        bad.check(v3, ["cpu", "cuda:0"])
    said = str(error.value)
    assert f"made for {TINY.name}, not {v3.name}" in said
    assert "cuda:7 is not there; there are cpu, cuda:0, disk" in said
    assert "attention of layers 0 is on one device in prefill and on another in decode" in said
    assert "shared of layers" in said and "cannot stay on disk" in said
    CPU.put("experts", "disk").check(TINY, [])


def written(change) -> str:
    data = json.loads(CPU.to_json())
    change(data)
    return json.dumps(data)


def test_an_expert_placed_twice() -> None:
    first = MOE[0]
    places = {"cpu": "rest", "cuda:0": {str(first): "0-2"}, "cuda:1": {str(first): "2, 5"}}
    with pytest.raises(PlacementError) as error:
        Placement.from_json(written(lambda d: d["places"].update(experts=places)))
    assert f"expert 2 of layer {first} placed twice, on cuda:0 and cuda:1" in str(error.value)
    text = CPU.put("experts", "cuda:0", layers=[first], experts=[0, 1]).to_yaml()
    assert "0-1" in text
    with pytest.raises(PlacementError, match=f"expert 1 of layer {first} placed twice, on cuda:0"):
        Placement.from_yaml(text.replace("0-1", "0-1, 1"))


def test_a_file_with_many_faults_names_them_all() -> None:
    def spoil(data: dict) -> None:
        data["places"].update(
            attention={"cuda:0": "0-99", "gpu": "0"},
            experts={"cpu": "rest", "cuda:0": "rest"},
            shard="cpu",
            output=3,
        )
        del data["places"]["embedding"]

    with pytest.raises(PlacementError) as error:
        Placement.from_json(written(spoil), source="p.json")
    said = str(error.value)
    for expected in (
        "p.json: ",
        "'shard' is unknown; did you mean \"shared\"?",
        "embedding is missing",
        "do not exist; there are 0 to",
        "device 'gpu' is unknown",
        "cpu and cuda:0 cannot both take the rest",
        "output: expected a device",
    ):
        assert expected in said, said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1", "not YAML: line 1"),
        ("a: &x 1\nb: *x", "anchors"),
        ("model: 3", "expected model and places"),
        ("{}", "expected model and places, found neither"),
        ("- 1", "expected model, places; found"),
        ("model: {layers: 1e9}\nplaces: {}", "missing"),
        (CPU.to_yaml().replace("output: cpu", "output: cpu\n  output: cpu"), "output is there 2"),
        (CPU.to_yaml().replace("embedding: cpu", "embedding: {cpu: 0-3}"), "have no embedding"),
        (CPU.to_yaml().replace("attention: cpu", "attention: {cpu: 0}"), "nothing is said of"),
        (CPU.to_yaml().replace("attention: cpu", "attention: {cpu: 0-}"), "numbers and ranges"),
        (CPU.to_yaml().replace("attention: cpu", "attention: {decode: cpu}"), "prefill missing"),
        ("x: " + "9" * 5000, "not YAML"),
    ],
)
def test_texts_that_are_none(text: str, expected: str) -> None:
    with pytest.raises(PlacementError, match=expected):
        Placement.from_yaml(text)


def test_a_file(tmp_path: Path) -> None:
    some = CPU.put("shared", "cuda:0")
    for name, text in (("p.json", some.to_json()), ("p.yaml", some.to_yaml())):
        (tmp_path / name).write_text(text)
        assert read_placement(tmp_path / name) == some
    with pytest.raises(PlacementError, match=r"none\.yaml: cannot be read"):
        read_placement(tmp_path / "none.yaml")
