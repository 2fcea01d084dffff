"""llama.cpp's and SGLang's command lines: read into placements and written from them."""

import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ktlab.checkpoint.facts import read_facts
from ktlab.checkpoint.names import expected_tensors
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, TINY_V2_CONFIG
from ktlab.errors import PlacementError, SettingError
from ktlab.placement.flags import LlamaCpp, SGLang
from ktlab.placement.flags.llama_cpp_writing import LAST_NORM, TENSORS
from ktlab.placement.flags.shown import shown
from ktlab.placement.parts import component_of
from ktlab.placement.placement import FOLLOW, Placement
from ktlab.placement.plan import Plan
from tests.placement.test_rules import FAMILIES

V3 = read_facts("deepseek-v3").config
CONFIG = replace(TINY_TEST_CONFIG, num_layers=8, first_dense_layers=2)
CPU = Placement.everywhere(CONFIG)
ALL_GPU = Placement.everywhere(CONFIG, "cuda:0").put("embedding", "cpu")


def read(words: str, config=CONFIG) -> Placement:
    return LlamaCpp.parse(words).placement(config)


# Reading llama.cpp's ------------------------------------------------------------------------------


def test_the_output_counts_as_the_layer_behind_the_last() -> None:
    assert read("-ngl 0") == CPU
    assert read("-ngl 1") == CPU.put("output", "cuda:0")
    three = read("-ngl 3")
    assert [three.device("attention", layer=i) for i in range(8)] == ["cpu"] * 6 + ["cuda:0"] * 2
    assert three.device("experts", layer=6) == three.device("norms", layer=7) == "cuda:0"
    for words in ("-ngl 9", "--n-gpu-layers=99", "-ngl all", "-ngl -1", "", "-ngl auto"):
        assert read(words) == ALL_GPU, "the embedding stays on the CPU"
    assert "no -ngl" in LlamaCpp.parse("").notes(CONFIG)[-1]
    further = replace(CONFIG, num_nextn_layers=1)
    assert read("-ngl 3", further).device("attention", layer=6) == "cpu", "counted, not run"


def test_experts_of_the_first_layers() -> None:
    four = read("-ngl 99 --n-cpu-moe 4")
    assert four == ALL_GPU.put("experts", "cpu", layers=[2, 3]), "dense layers count"
    assert read("-ngl 99 --cpu-moe") == read("-ngl 99 -ot exps=CPU")
    assert read("-ngl 99 -cmoe") == ALL_GPU.put("experts", "cpu") == read("-ncmoe 999 -ngl 99")
    assert not LlamaCpp.parse("-ngl 99 --n-cpu-moe 999").notes(CONFIG)
    v3 = read("-ngl 99 -ncmoe 13", V3)  # blk.1 is not blk.13
    assert [i for i in V3.moe_layers if v3.device("experts", layer=i) == "cpu"] == [*range(3, 13)]


def test_the_first_pattern_decides_wherever_it_is_found() -> None:
    words = r"-ngl 99 -ot 'blk\.[4-7]\.ffn_.*_exps=CUDA1,exps=CPU' -ot attn_output=CPU"
    found = read(words)
    assert [found.device("experts", layer=i)[-1] for i in range(2, 8)] == [*"uu1111"]
    assert found.device("attention", layer=0) == "cuda:0", "as a whole, where most of it is"
    notes = "\n".join(LlamaCpp.parse(words).notes(CONFIG))
    assert re.search(
        "attention: attn_q_a attn_.* on cuda:0, attn_output on cpu in layers 0-7; as a w", notes
    )
    assert read("-ngl 99 -ot 'exps=CPU,exps=CUDA0'") == ALL_GPU.put("experts", "cpu")
    shadowed = LlamaCpp.parse(r"-ngl 99 -ot 'exps=CPU,exps=CUDA0,blk\.8\.=CPU'").notes(CONFIG)
    assert [note.split(":")[0] for note in shadowed] == ["exps=CUDA0", r"blk\.8\.=CPU"]
    assert read("-ngl 99 -ot token_embd=CUDA0") == Placement.everywhere(CONFIG, "cuda:0")
    cache = LlamaCpp.parse("-ngl 99 -ot attn_[^n].*[^m].weight=CPU").notes(CONFIG)
    assert any("the cache of layers 0-7 on cuda:0, with the layer" in note for note in cache)


def test_layers_divided_among_gpus() -> None:
    found = read("-ngl 99 -ts 5,4")
    assert [found.device("attention", layer=i)[-1] for i in range(8)] == [*"00000111"]
    assert found.device("output") == "cuda:1"
    thirds = read("-ngl 6 -ts 1/1/1")
    assert [thirds.device("attention", layer=i)[-1] for i in range(8)] == [*"uuu00112"]
    assert read("-ngl 99 -ts 0,1").devices == ("cpu", "cuda:1")
    tied = replace(CONFIG, tied_output=True)
    assert read("-ngl 1", tied).device("output") == "cuda:0"
    assert read("-ngl 1", tied).device("embedding") == "cpu", "there once more, behind the layers"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-nlg 3", r"'-nlg' is unknown; did you mean \"-ngl\"\? \(expected -ngl N, -ts"),
        ("-ngl", "-ngl needs a value"),
        ("-ngl x", "-ngl 'x': expected a whole number of layers"),
        ("--n-cpu-moe -3", "--n-cpu-moe '-3': expected a whole number"),
        ("-ts 0,0", "-ts '0,0': expected shares of the GPUs, such as 3,1"),
        ("-ts nan", "-ts 'nan': expected shares"),
        ("-ot exps", "-ot 'exps': expected PATTERN=BUFFER, such as exps=CPU; a comma ends a pair"),
        ("-ot blk.[0-9]{1,2}=CPU", r"-ot 'blk.\[0-9\]\{1': expected PATTERN=BUFFER"),
        ("-ot '(exps=CPU'", r"no regular expression at character 1: missing \)"),
        ("-ot 'a**=CPU'", "no regular expression at character 3: multiple repeat"),
        ("-ot 'a++=CPU'", r"a?\+\+ at character|multiple repeat"),
        ("-ot '(?i)exps=CPU'", r"\(\? at character 1 is not among what llama.cpp's"),
        ("-ot '[[:digit:]]=CPU'", r"\[\[: at character 1: write out the class, such as \[0-9\]"),
        ("-ot exps=CUAD0", "buffer 'CUAD0' is unknown; did you mean \"CUDA0\""),
        ("-ot exps=cpu", "buffer 'cpu' is unknown; did you mean \"CPU\""),
        ("-ot exps=Vulkan0", "buffer 'Vulkan0' has no counterpart here; there are CPU and CUDA0"),
        (f"-ot {'a' * 2001}=CPU", "a pattern of 2,001 characters; at most 2,000"),
        ("-ot 'exps=CPU", "No closing quotation"),
    ],
)
def test_what_can_be_wrong(words: str, expected: str) -> None:
    with pytest.raises(PlacementError, match=f"(?s)llama.cpp's options: .*{expected}"):
        LlamaCpp.parse(words)


def test_a_pattern_that_backtracks_for_ever_is_given_up() -> None:
    flags = LlamaCpp.parse(r"-ot '(.+)(.+)(.+)(.+)(.+)(.+)(.+)\1[!%]=CPU'")
    with pytest.raises(SettingError, match="takes more than 1 s to look for in"):
        flags.placement(CONFIG)


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(PlacementError) as caught:
        LlamaCpp.parse("-nlg 3 -ot (=CPU,exps=CUAD0 -ts a -ngl")
    assert len(str(caught.value).splitlines()) == 5


# Writing llama.cpp's ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*FAMILIES, V3], ids=lambda c: c.name)
def test_patterns_name_the_tensors_of_their_component(config) -> None:
    tensors = [*expected_tensors(config), "blk.1.ffn_gate_up_exps.weight", "blk.1.attn_kv_b.weight"]
    patterns = {**TENSORS, "norms": rf"{LAST_NORM}|{TENSORS['norms']}"}
    for name in tensors:
        found = [component for component, pattern in patterns.items() if re.search(pattern, name)]
        assert found == [component_of(name, config)[1]], name


def test_the_plainest_words() -> None:
    def written(placement: Placement) -> str:
        assert not LlamaCpp.of(placement).left_out
        return str(LlamaCpp.of(placement))

    assert written(CPU) == "-ngl 0"
    assert written(ALL_GPU) == "-ngl 999"
    assert written(ALL_GPU.put("experts", "cpu")) == "-ngl 999 --cpu-moe"
    some = ALL_GPU.put("experts", "cpu", layers=[2, 3, 4])
    assert written(some) == "-ngl 999 --n-cpu-moe 5"
    assert written(read("-ngl 4")) == "-ngl 4"
    assert written(read("-ngl 99 -ts 5,4 -cmoe")) == "-ngl 999 -ts 5,4 --cpu-moe"
    apart = ALL_GPU.put("shared", "cpu", layers=[3, 5]).put("output", "cpu")
    assert written(apart) == (
        r"-ngl 999 -ot '^output\.=CPU' -ot '^output_norm=CPU' "
        r"-ot 'blk\.(3|5)\.ffn_(gate|up|down)_shexp=CPU'"
    )
    v3 = Placement.everywhere(V3, "cuda:0").put("embedding", "cpu").put("experts", "cpu")
    assert written(v3) == "-ngl 999 --cpu-moe"


def test_what_cannot_be_said() -> None:
    hot = ALL_GPU.put("experts", "cpu").put("experts", "cuda:0", layers=[3], experts=[0, 5])
    written = LlamaCpp.of(hot.put("shared", "numa:1", phase="prefill"))
    assert str(written) == "-ngl 999 --cpu-moe"
    assert [note.partition(":")[0] for note in written.left_out] == [
        "prefill elsewhere than decode; decode is written, llama.cpp has one place",
        "experts one by one in layers 3",
        "numa",
    ]
    assert "put where most are, cpu" in written.left_out[1]
    assert "# left out: experts one by one" in repr(written)
    attention = LlamaCpp.of(ALL_GPU.put("attention", "cpu", layers=[4]))
    assert "attention of layers 4 is put there by pattern; llama.cpp keeps their" in str(
        attention.left_out
    )
    assert LlamaCpp.from_json(attention.to_json()) == attention


devices = st.sampled_from(["cpu", "cuda:0", "cuda:1", "cuda:2"])
layers = st.lists(st.integers(0, 7), unique=True)
moves = st.lists(st.tuples(st.sampled_from([*TENSORS]), devices, layers), max_size=6)


@settings(max_examples=60, deadline=None)
@given(config=st.sampled_from([CONFIG, TINY_V2_CONFIG]), moves=moves, start=devices)
def test_whatever_is_written_reads_back(config, moves, start: str) -> None:
    placement = Placement.everywhere(config, start)
    for component, device, wanted in moves:
        there = placement.model.layers_of(component)
        at = [layer for layer in there if layer is None or layer in wanted]
        placement = placement.put(component, device, layers=at)
    written = LlamaCpp.of(placement)
    again = LlamaCpp.parse(str(written))
    assert again == written
    found = again.placement(config)
    assert [*found.cells()] == [*placement.cells()]
    assert set(FOLLOW) == {"cache", "norms", "router"}


# SGLang's -----------------------------------------------------------------------------------------


def theirs(words: SGLang) -> np.ndarray:
    """Which experts kt-kernel takes to the GPU by these options: written from its description."""
    given = dict(zip(words.args[::2], words.args[1::2], strict=True))
    moe, E = words.moe_layers, words.experts
    if "--kt-gpu-experts-ratio" in given:
        total = int(len(moe) * E * float(given["--kt-gpu-experts-ratio"]))
    else:
        total = int(given["--kt-num-gpu-experts"]) * len(moe)
    seats = [(layer, expert) for layer in moe for expert in range(E)]
    strategy = given["--kt-expert-placement-strategy"]
    if strategy == "uniform":
        seats.sort(key=lambda seat: seat[1])
    if strategy == "frequency":
        seats.sort(key=lambda seat: not words.mask_LE[seat])
    mask_LE = np.zeros((words.layers, E), bool)
    for seat in seats[:total]:
        mask_LE[seat] = True
    return mask_LE


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 7), st.lists(st.integers(0, 15), max_size=16))))
def test_sglang_takes_the_same_experts(chosen) -> None:
    placement = ALL_GPU.put("experts", "cpu")
    for layer, experts in chosen:
        placement = placement.put("experts", "cuda:0", layers=layer, experts=experts)
    words = SGLang.of(placement)
    for layer in CONFIG.moe_layers:
        taken = placement.experts(layer=layer, device="cuda:0")
        assert tuple(np.flatnonzero(words.mask_LE[layer])) == taken
    assert (theirs(words) == words.mask_LE).all()


def test_sglang_words(tmp_path) -> None:
    base = ALL_GPU.put("experts", "cpu")
    words = SGLang.of(base.put("experts", "cuda:0", experts=range(4)), method="AMXINT4",
                      cpu_threads=32, numa_nodes=2, deferred=1)  # fmt: skip
    assert str(words) == (
        "--kt-method AMXINT4 --kt-cpuinfer 32 --kt-threadpool-count 2 --kt-num-gpu-experts 4 "
        "--kt-expert-placement-strategy uniform --kt-max-deferred-experts-per-token 1"
    )
    assert words.left_out == (
        "embedding on cpu: SGLang computes all but routed experts on the GPUs",
    )
    front = base.put("experts", "cuda:0", layers=[2]).put(
        "experts", "cuda:0", layers=[3], experts=[0, 1]
    )
    assert "--kt-num-gpu-experts 3 --kt-expert-placement-strategy front-loading" in str(
        SGLang.of(front)
    )
    hot = SGLang.of(base.put("experts", "cuda:0", layers=[5], experts=[9]))
    assert "frequency --init-expert-location expert-counts.pt" in str(hot)
    counts_LE = torch.load(hot.save(tmp_path / "counts.pt"), weights_only=True)["logical_count"]
    assert counts_LE.shape == (8, 16) and counts_LE.sum() == counts_LE[5, 9] == 1
    assert SGLang.from_json(hot.to_json()) == hot
    with pytest.raises(PlacementError, match="(?s)'AMX4' is unknown; did you mean.*numa_nodes=0"):
        SGLang.of(base, method="AMX4", numa_nodes=0)
    split = SGLang.of(
        base.put("shared", "cpu", layers=[3]).put("experts", "cuda:1", phase="prefill")
    )
    assert len(split.left_out) == 4 and "shared of layers 3 on cpu" in str(split.left_out)


def test_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from ktlab.cli import main

    shape = ["plan", "deepseek-v3", "--format", "q4_k_m"]
    assert main([*shape, "-ngl", "99", "--n-cpu-moe", "20", "-ot", "shexp=CUDA1", "--json"]) == 0
    plan = Plan.from_json(capsys.readouterr().out)
    assert plan.placement.devices == ("cpu", "cuda:0", "cuda:1")
    assert plan["cuda:1"].needed > 0 and "experts" in {r.part.component for r in plan.rows}
    assert main([*shape, "--vram", "24GB", "--as", "llama.cpp"]) == 0
    assert capsys.readouterr().out == "-ngl 999 --cpu-moe\n"
    assert main([*shape, "-ngl", "99", "-ot", "exps=CPU", "--as", "sglang"]) == 0
    found = capsys.readouterr()
    assert "--kt-num-gpu-experts 0" in found.out and "left out: embedding on cpu" in found.err
    assert main([*shape, "-ngl", "3", "--as", "yaml"]) == 0
    assert Placement.from_yaml(capsys.readouterr().out) == read("-ngl 3", V3)
    assert main([*shape, "-ot", "exps=CUAD0"]) == 2
    assert 'did you mean "CUDA0"' in capsys.readouterr().err
    assert main([*shape, "-ot", "nothing=CPU", "-ngl", "1", "--as", "json"]) == 0
    assert "nothing=CPU: decides for no tensor of" in capsys.readouterr().err
    assert main([*shape, "--placement", "x.yaml", "-ngl", "1"]) == 2
    assert "both say what goes where" in capsys.readouterr().err


@given(st.lists(st.text("ab -=^$\\'|()", min_size=1, max_size=40), min_size=1, max_size=30))
def test_lines_of_a_terminal(words: list[str]) -> None:
    """A shell, which drops a backslash with its line's end, reads the same words; none is wider
    than 80 columns."""
    lines = shown(words, ["a long reason, " * 10]).splitlines()
    command = [line for line in lines if not line.startswith("#")]
    assert shlex.split("\n".join(command).replace(" \\\n", " ")) == words
    assert all(line.endswith(" \\") for line in command[:-1])
    widest = max(len(shlex.quote(word)) for word in words)
    assert max(map(len, lines)) <= 80 or widest > 74, "only a word alone may be wider"


@pytest.mark.parametrize("last", range(30, 45))
def test_a_line_of_a_terminal_is_filled_to_its_end(last: int) -> None:
    lines = shown(["x" * 60, "y" * 35, "z" * last, "w" * 60], []).splitlines()
    one_line = 4 + 35 + 1 + last + 2  # indented, and a backslash
    assert [len(line) for line in lines] == [
        62, *([one_line] if one_line <= 80 else [41, last + 6]), 64
    ]  # fmt: skip
