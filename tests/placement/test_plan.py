"""Will it fit? Published totals, the largest context, values that go to JSON and back."""

from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch

import ktlab
from ktlab.checkpoint import write_gguf
from ktlab.checkpoint.published import published_model
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.errors import CheckpointError, FormatError, SettingError
from ktlab.placement import Device, Machine, Placement, Plan, plan
from ktlab.placement.ledger import KINDS, cache_bytes
from ktlab.placement.machine import get_machine, this_machine
from tests.placement.big import write_shards

GB = 10**9
V3 = published_model("deepseek-v3").config


@pytest.fixture(scope="module")
def v3_shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(tmp_path_factory.mktemp("v3"), "deepseek-v3", "q4_k_m", 9)


def test_671_billion_parameters_from_headers_in_half_a_second(v3_shards: list[Path]) -> None:
    assert sum(p.stat().st_size for p in v3_shards) > 404 * GB
    assert sum(p.stat().st_blocks * 512 for p in v3_shards) < 20 * 10**6, "nothing big is written"
    spent = []
    for shard in (v3_shards[4], v3_shards[0], v3_shards[0].parent):
        start = perf_counter()
        found = plan(shard, vram="14GB", ram="512GB")
        spent.append(perf_counter() - start)
        assert found.parameters == pytest.approx(671e9, rel=1e-3)
    assert min(spent) < 0.5
    by_shape = plan("deepseek-v3", format="q4_k_m", vram="14GB", ram="512GB")
    assert found.rows == by_shape.rows and found.ledgers == by_shape.ledgers


def test_a_missing_shard_is_named(v3_shards: list[Path], tmp_path: Path) -> None:
    for path in v3_shards:
        if "00003" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match="deepseek-v3-00003-of-00009.gguf is not in"):
        plan(tmp_path / v3_shards[0].name)


def test_shards_of_two_models(v3_shards: list[Path], tmp_path: Path) -> None:
    """One shard stands in for another: told with everything that does not agree."""
    for path in v3_shards:
        (tmp_path / path.name).symlink_to(path)
    second = tmp_path / v3_shards[1].name
    second.unlink()
    second.symlink_to(v3_shards[2])
    with pytest.raises(CheckpointError, match="says it is shard 3 of 9, expected 2 of 9") as error:
        plan(tmp_path)
    said = str(error.value)
    assert "more tensors are in several shards" in said and "promises 1086 tensors" in said


def test_a_folder_with_two_models(v3_shards: list[Path], tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CheckpointError, match="holds 2 models"):
        plan(tmp_path)


# Published totals ------------------------------------------------------------------------------


def test_deepseek_v3_with_experts_on_the_cpu() -> None:
    found = plan("deepseek-v3", format="q4_k_m", ram="512GB", vram="24GB", context=4096)
    assert found["cpu"].needed == pytest.approx(382e9, rel=0.05)
    # "At least 14 GB" there; what makes up the rest is said.
    assert 10e9 < found["cuda:0"].needed < 14e9
    (line,) = [str(k) for k in found.known if k.device == "cuda:0"]
    assert "theirs includes the buffers of a prefill" in line
    assert line in found.verdict


def test_deepseek_v3_as_int8_from_bf16() -> None:
    found = plan("deepseek-v3", quantize="int8_channel", vram="24GB")
    assert found.rows == plan("deepseek-v3", convert={"bf16": "int8_channel"}, vram="24GB").rows
    assert found["cpu"].needed == pytest.approx(644e9, rel=0.05)
    assert found["cpu"].weights == 0, "nothing is used as it lies in the file"
    (known,) = [k for k in found.known if k.device == "cpu"]
    assert abs(known.difference) < 0.05 and "includes" not in str(known)


def test_two_numa_copies() -> None:
    one, two = (
        plan("deepseek-v3", format="q4_k_m", vram="24GB", ram="1TB", numa_copies=n) for n in (1, 2)
    )
    experts = one.by_component()["experts"].bytes
    assert two["cpu"].needed - one["cpu"].needed == two["cpu"].copies == experts
    (known,) = two.known
    assert known.published == 10**12 and "theirs includes the machine's installed" in str(known)


def test_no_more_numa_copies_than_nodes() -> None:
    """Of a machine that is named; without one it is asked what they would need."""
    said = (
        r"numa_copies=2: expected 1 to 1, 1x6454s\+4090d has 1 NUMA node; name a machine with more"
    )
    with pytest.raises(SettingError, match=said):
        plan("deepseek-v3", machine="1x6454s+4090d", numa_copies=2)
    nodes = get_machine("this").numa_nodes
    with pytest.raises(SettingError, match=f"numa_copies={nodes + 1}: expected 1 to {nodes}, this"):
        plan("tiny", machine="this", numa_copies=nodes + 1)
    assert plan("tiny", machine="2x6454s+4090d", numa_copies=2)["cpu"].copies
    assert plan("tiny", numa_copies=2, ram="1TB")["cpu"].copies


def test_deepseek_v2_as_in_its_tutorial() -> None:
    """Attention and output in 16 bits there: then the GPU's weights are those 20.7 GB."""
    half = {"attention": "bf16", "output": "bf16"}
    found = plan("deepseek-v2", format="q4_k_m", ram="192GB", vram="24GB", gpu_formats=half)
    assert found["cpu"].needed == pytest.approx(136e9, rel=0.05)
    assert found["cuda:0"].converted == pytest.approx(20.7e9, rel=0.01)
    assert len(found.known) == 2


def test_intensities_of_the_deepseek_v2_tutorial() -> None:
    """MLA's 512 against the experts' 0.075 at batch 1 (KTransformers, deepseek-v2-injection.md)."""
    found = plan("deepseek-v2", format="q4_k_m").by_component()
    assert found["experts"].use == pytest.approx(0.075)
    # 2 x 128 heads x (512 + 64 scores, 512 values) a latent of 576: they count 512 + 512 a 512.
    assert found["cache"].use == pytest.approx(512, rel=0.06)


# What fits -------------------------------------------------------------------------------------


def test_the_largest_context_fits_and_one_more_does_not() -> None:
    room: dict[str, Any] = dict(ram="500GB", vram="12GB")
    longest = plan("deepseek-v3", format="q4_k_m", **room).largest_context
    assert longest is not None and 8192 < longest < 163840
    assert plan("deepseek-v3", format="q4_k_m", context=longest, **room).fits
    assert not plan("deepseek-v3", format="q4_k_m", context=longest + 1, **room).fits


def test_a_gpu_holds_in_16_bits_what_is_not_multiplied_in_groups() -> None:
    """As `model.place` does, whatever is asked: matrices of single heads, and the embedding."""
    placed = Placement.everywhere(V3, "cuda:0")
    for formats in (None, "int4_group128"):
        found = plan("deepseek-v3", format="q4_k_m", placement=placed, gpu_formats=formats)
        total = found.by_component()
        assert total["embedding"].formats == ("bf16",)
        assert total["embedding"].bytes == 2 * V3.vocab_size * V3.hidden_size
        assert "bf16" in total["attention"].formats
        assert total["output"].formats == ("int4_group128",)


def test_naive_needs_71_times_the_cache_of_absorbed() -> None:
    found = plan("deepseek-v3", format="q4_k_m", context=1000)
    assert found.cache_bytes["naive"] / found.cache_bytes["absorbed"] == 128 * 320 / 576
    naive = plan("deepseek-v3", format="q4_k_m", context=1000, attention="naive")
    assert naive["cpu"].cache == found.cache_bytes["naive"] == naive.by_component()["cache"].bytes


def test_too_small_by_how_much() -> None:
    found = plan("deepseek-v3", format="q4_k_m", ram="128GB")
    host = found["cpu"]
    assert found.fits is False and host.headroom == 128 * GB - host.needed
    assert host.largest_context == 0 and "too much at any context" in host.verdict
    assert found.disk is not None and "could not be measured" in str(found.disk)


def test_without_sizes_there_is_no_verdict() -> None:
    found = plan("olmoe-1b-7b", format="q8_0")
    assert found.fits is None and found.largest_context is None
    assert found.verdict[0].endswith("no limit given")


def test_the_ledger_adds_up() -> None:
    found = plan("deepseek-v2-lite", format="q4_k_m", ram="64GB", vram="8GB", context=2048)
    for one in found.ledgers:
        rows = [row for row in found.rows if row.device == one.device]
        weights = [row for row in rows if row.part.component != "cache"]
        assert one.weights + one.converted == sum(row.bytes for row in weights)
        assert one.needed == sum(getattr(one, kind) for kind in KINDS)
    assert found.stored_bytes == sum(
        row.part.bytes for row in found.rows if row.part.component != "cache"
    )


def test_a_tied_output_works_and_is_there_once(tmp_path: Path) -> None:
    config = replace(TINY_TEST_CONFIG, tied_output=True)
    paths = {}
    for one in (config, TINY_TEST_CONFIG):
        written = synthesize(one)
        tensors = {name: written.tensor(name) for name in written.names()}
        paths[one.tied_output] = write_gguf(tmp_path / f"{one.tied_output}.gguf", one, tensors)
    tied, untied = plan(paths[True]), plan(paths[False])
    matrix = config.vocab_size * config.hidden_size
    assert tied.flop_per_token == untied.flop_per_token
    assert untied["cpu"].weights - tied["cpu"].weights == 4 * matrix
    on_gpu = plan(paths[True], vram="1GB")
    assert on_gpu.by_component()["output"].devices == ("cuda:0",)
    assert on_gpu.by_component()["output"].bytes > 0


def test_host_memory_holds_float32_copies_of_the_matrices_a_head() -> None:
    """As attention on the CPU makes them (Linear.weight_OI), and for what no kernel computes."""
    model = ktlab.load("tiny")
    found = plan("tiny")
    per_head = sum(
        b.attention.linears[m].weight_OI.nbytes for b in model.layers for m in ("k_b", "v_b")
    )  # noqa: E501
    assert found["cpu"].converted == per_head
    assert any("float32 copies" in note for note in found.notes)


def test_a_plan_says_what_the_model_then_is(tmp_path: Path) -> None:
    """Bytes, parameters and work against a loaded model's own counts."""
    written = synthesize(TINY_TEST_CONFIG, formats={"*exps*": "q8_0"})
    tensors = {name: written.tensor(name) for name in written.names()}
    path = write_gguf(tmp_path / "model.gguf", TINY_TEST_CONFIG, tensors)
    model, found = ktlab.load(path), plan(path, context=64)
    assert found.stored_bytes == written.nbytes
    cost, total = model.cost(1, 64).by_stage(), found.by_component()
    for stage in ("router", "experts", "shared", "dense", "output"):
        assert total[stage].flop_per_token == pytest.approx(cost[stage].flop)
    work = total["attention"].flop_per_token + total["cache"].flop_per_token
    assert work == pytest.approx(cost["attention"].flop)
    assert total["experts"].bytes_per_token == pytest.approx(cost["experts"].weight_bytes)
    assert cache_bytes(model.config, "absorbed", 64, 4) == model.new_cache(1, 64).nbytes


# As a value ------------------------------------------------------------------------------------


def test_to_json_and_back() -> None:
    found = plan("deepseek-v2-lite", format="q4_k_m", ram="16GB", vram="8GB")
    assert Plan.from_json(found.to_json()) == found
    assert found != plan("deepseek-v2-lite", format="q4_k_m", ram="16GB")
    with pytest.raises(AttributeError):
        found.context = 1  # type: ignore[misc]


@pytest.mark.parametrize("text", ["{}", "[]", "3", "{", '{"model": 1}'])
def test_json_of_something_else(text: str) -> None:
    with pytest.raises(SettingError, match=r"expected a plan as Plan.to_json writes it, found '.*"
                       r"make it anew: ktlab.plan\(...\).to_json\(\)"):  # fmt: skip
        Plan.from_json(text)


def test_tables_and_picture() -> None:
    found = plan("deepseek-v2-lite", format="q4_k_m", ram="16GB", vram="8GB")
    frame = found.to_frame()
    assert frame.bytes.sum() == sum(row.bytes for row in found.rows)
    assert list(found.ledger_frame().fits) == [True, True]
    figure = found.plot()
    drawn = sum(sum(bar.x) for bar in figure.data if bar.type == "bar")
    assert drawn == pytest.approx(sum(one.needed for one in found.ledgers) / 1e9)
    bundle = found._repr_mimebundle_()
    assert "largest context" in bundle["text/plain"] and "layer 5, experts" in bundle["text/html"]
    devices = "".join(f"<th class=n>{one.device}</th>" for one in found.ledgers)
    assert f"<tr><th>device</th>{devices}</tr>" in bundle["text/html"], "a device is a column"
    moved = found.diff(plan("deepseek-v2-lite", format="q4_k_m", ram="16GB"))
    assert set(moved.component) >= {"attention", "cache"} and "experts" not in set(moved.component)
    assert set(moved.device_a) == {"cuda:0"} and set(moved.device_b) == {"cpu"}


def test_this_machine() -> None:
    found = plan("tiny", machine="this")
    assert found.fits and found["cpu"].capacity


def test_this_machine_has_the_gpus_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: ((i + 1) * GB, 9 * GB))
    # Of the first GPU's memory torch keeps half a GB that came back.
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda i: (1 - i) * 3 * GB // 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda i: (1 - i) * GB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    there = {d.name: (d.capacity, d.about) for d in this_machine().devices[1:]}
    assert there == {"cuda:0": (3 * GB // 2, "GPU 0"), "cuda:1": (2 * GB, "GPU 1")}


def test_a_machine_of_ones_own() -> None:
    lab = Machine(name="lab", devices=(Device(name="cpu", capacity=10 * GB),))
    assert plan("tiny", machine=lab).machine == lab
    assert plan("tiny", machine=lab, vram="1GB")["cuda:0"].fits


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(ram="lots"), SettingError, "ram='lots': expected bytes, or text such as"),
        (dict(vram="14 bananas"), SettingError, "vram='14 bananas'"),
        (dict(ram=-1), SettingError, "is no size of a memory"),
        (dict(ram=True), SettingError, "ram=True"),
        (dict(context=0), SettingError, "1 to 4096 positions"),
        (dict(context="8k"), SettingError, "context='8k': expected a whole number of tokens"),
        (dict(context=1.5), SettingError, "context=1.5: expected a whole number"),
        (dict(context=True), SettingError, "context=True: expected a whole number"),
        (dict(machine="thsi"), SettingError, 'did you mean "this"'),
        (dict(attention="absorbt"), SettingError, 'did you mean "absorbed"'),
        (dict(numa_copies=0, chunk=-1), SettingError, "numa_copies=0.*chunk=-1"),
        (dict(gpu_formats={"atention": "bf16"}), SettingError, 'did you mean "attention"'),
        (dict(convert={"q8_0": "q9"}), FormatError, 'unknown format "q9"'),
        (dict(format="q4_k_n"), FormatError, 'unknown file type "q4_k_n"'),
    ],
)
def test_bad_arguments(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        plan("tiny", **arguments)


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='did you mean "deepseek-v3"'):
        plan("deepseek-v33")
    with pytest.raises(CheckpointError, match="no file"):
        plan(tmp_path / "absent.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(20))
    with pytest.raises(CheckpointError):
        plan(tmp_path / "cut.gguf")
