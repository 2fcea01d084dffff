"""A plan of any placement: every byte on the device where it is, divided experts and phases too."""

import pytest

from ktlab.checkpoint.published import published_model
from ktlab.errors import PlacementError
from ktlab.placement import Placement, Plan, plan
from ktlab.placement.placed import usual

LITE = published_model("deepseek-v2-lite").config
CPU = Placement.everywhere(LITE, "cpu")


def lite(placement: "Placement | Plan | None" = None, **words) -> Plan:
    return plan("deepseek-v2-lite", format="q4_k_m", placement=placement, context=4096, **words)


def experts_bytes(found: Plan, device: str) -> int:
    rows = found.rows
    return sum(r.bytes for r in rows if r.device == device and r.part.component == "experts")


def test_the_rule_is_a_placement_like_any() -> None:
    by_rule = lite(ram="16GB", vram="4GB")
    assert by_rule.placement == usual(LITE, by_rule.machine)
    assert lite(by_rule.placement, ram="16GB", vram="4GB") == by_rule
    assert lite(by_rule, ram="16GB", vram="4GB") == by_rule, "a plan stands for its placement"
    assert Plan.from_json(by_rule.to_json()) == by_rule


def test_every_byte_is_somewhere_once() -> None:
    whole = lite(CPU)
    hot = {layer: range(16) for layer in LITE.moe_layers}
    split = lite(CPU.put("experts", "numa:1", experts=hot), machine=None)
    assert experts_bytes(split, "numa:1") == experts_bytes(whole, "cpu") // 4
    assert sum(one.weights for one in split.ledgers) == whole["cpu"].weights
    assert split.flop_per_token == whole.flop_per_token
    assert split.active_parameters == whole.active_parameters


def test_what_changes_device_between_the_phases_is_on_both() -> None:
    both = lite(CPU.put("experts", "cuda:0", phase="prefill"), gpu_formats="bf16")
    stored = experts_bytes(lite(CPU), "cpu")
    assert experts_bytes(both, "cpu") == stored
    assert experts_bytes(both, "cuda:0") == 26 * 64 * 3 * 2048 * 1408 * 2
    assert both.flop_per_token == lite(CPU).flop_per_token, "decode is computed once"
    once = {"experts", "attention", "cache"}
    assert {r.phases for r in both.rows if r.part.component in once - {"experts"}} == {
        ("decode", "prefill")
    }


def test_the_cache_is_counted_where_attention_is() -> None:
    some = lite(CPU.put("attention", "cuda:0", layers=range(9)))
    per_layer = 576 * 4096
    assert some["cuda:0"].cache == 9 * per_layer * 2 and some["cpu"].cache == 18 * per_layer * 4
    assert some.cache_bytes["absorbed"] == some["cuda:0"].cache + some["cpu"].cache


def test_disk_and_nodes_have_ledgers() -> None:
    found = lite(CPU.put("experts", "disk", layers=[1, 2]), ram="16GB")
    row = next(r for r in found.rows if r.part.component == "experts" and r.part.layer == 1)
    assert row.bytes == 0 and found["disk"].weights == 2 * row.part.bytes
    nodes = lite(CPU.put("experts", "numa:1"), machine=None)
    assert [one.device for one in nodes.ledgers] == ["cpu", "numa:1"]
    with pytest.raises(PlacementError, match="numa:3 is not there; there are cpu, numa:0"):
        lite(CPU.put("experts", "numa:3"), machine="this")


def test_a_budget_too_small_says_by_how_much() -> None:
    found = lite(CPU.put("experts", "cuda:0", layers=range(1, 20)), ram="16GB", vram="4GB")
    missing = -(found["cuda:0"].headroom or 0)
    with pytest.raises(PlacementError) as error:
        found.check()
    assert f"{missing / 1e9:.3g} GB too little" in str(error.value)
    assert "of it are routed experts" in str(error.value)
    with pytest.raises(PlacementError, match="without any of them it would still be .* too little"):
        lite(CPU.put("experts", "cpu"), ram="400MB").check()
    lite(ram="16GB", vram="4GB").check()
    lite(CPU).check()


def test_a_placement_of_another_model() -> None:
    other = Placement.everywhere(published_model("deepseek-v3").config, "cpu")
    with pytest.raises(PlacementError, match="61 layers, not 27"):
        lite(other)
    with pytest.raises(PlacementError, match="cuda:0 is not there"):
        lite(CPU.put("shared", "cuda:0"), machine="this")


def test_diff_of_divided_experts() -> None:
    moved = CPU.put("experts", "cuda:0", layers=[5], experts=[0, 1, 9], phase="decode")
    (row,) = lite(CPU).diff(lite(moved)).to_dict("records")
    assert (row["layer"], row["component"], row["device_a"]) == (5, "experts", "cpu")
    assert (
        "cuda:0: 0-1, 9 (decode)" in row["device_b"] and "cpu: 0-1, 9 (prefill)" in row["device_b"]
    )
    assert row["bytes_b"] > row["bytes_a"], "three experts are there twice"
    assert lite(moved).diff(lite(moved)).empty


def test_the_grid() -> None:
    moved = CPU.put("experts", "cuda:0", layers=[5], experts=range(16)).put(
        "shared", "cuda:1", layers=[6], phase="prefill"
    )
    for shown in (moved, lite(moved)):
        found = shown._repr_mimebundle_()
        page = found["text/html"]
        # 16 of 64 experts, and at least 3 px of a cell.
        assert "layer 5, experts: " in page and "clamp(3px,75%,calc(100% - 3px)) 100%" in page
        assert "experts 0-15" in page
        assert "upper half decode" in page and "cuda:1" in page and "prefill only" in page
        assert found["text/plain"] == repr(shown)
    assert "upper half" not in CPU._repr_mimebundle_()["text/html"]
