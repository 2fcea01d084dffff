"""Words, choices and their reasons; threads and nodes; the native module absent."""

from itertools import product
from typing import Any

import numpy as np
import pytest

from ktlab.errors import SettingError
from ktlab.kernels import dispatch, native, numba_backend, switch, threads
from ktlab.kernels import request as request_module
from ktlab.kernels.request import NATIVE_ISAS, Request, Settled

Q8 = ("q8_0", "q8_0", "q8_0")


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch):
    monkeypatch.delenv("KTLAB_ISA", raising=False)


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda: "not built: no compiler")


@pytest.fixture
def cpu(monkeypatch):
    """A machine whose instruction sets are given: name -> reason ("" is usable)."""

    def make(**reasons: str) -> None:
        known = {isa: reasons.get(isa, "the CPU lacks it") for isa in NATIVE_ISAS}
        monkeypatch.setattr(native, "unavailable", lambda: "")
        monkeypatch.setattr(native, "isas", lambda: known)
        int8 = ("q8_0", "q4_k", "int8_channel")
        monkeypatch.setattr(native, "formats", lambda: (*int8, "bf16", "f32"))
        monkeypatch.setattr(
            native,
            "computes",
            lambda isa, f: {"amx_int8": f in int8, "amx_bf16": f != "f32"}.get(isa, True),
        )

    return make


def chosen(request: Request, formats=Q8) -> tuple[str, str, str]:
    kernel = dispatch.choose(request, formats)
    return kernel.backend, kernel.isa, kernel.layout


def test_auto_takes_the_best_instruction_set_for_the_formats(cpu) -> None:
    cpu(amx_bf16="", amx_int8="", avx512_vnni="", avx2="", serial="", amx_int8_emulated="")
    assert chosen(Request(), ("int8_channel",)) == ("native", "amx_int8", "ggml_blocks")
    assert chosen(Request()) == ("native", "amx_bf16", "ggml_blocks"), "a scale every 32 columns"
    assert chosen(Request(), ("bf16",)) == ("native", "amx_bf16", "ggml_blocks")
    assert chosen(Request(), ("q8_0", "q8_0", "f32")) == ("native", "avx512_vnni", "ggml_blocks")
    cpu(avx512_vnni="", avx512_bf16="", avx2="", serial="")
    assert chosen(Request(), ("bf16",)) == ("native", "avx512_bf16", "ggml_blocks")
    assert chosen(Request()) == ("native", "avx512_vnni", "ggml_blocks")
    cpu(avx2="", serial="", amx_int8_emulated="")
    assert chosen(Request()) == ("native", "avx2", "ggml_blocks")
    cpu(amx_int8_emulated="", serial="no")
    assert chosen(Request())[0] == "numba", "emulation is for those who name it"
    assert chosen(Request(isa="amx_int8_emulated"))[1] == "amx_int8_emulated"


def test_without_native_code_numba_then_torch(no_native, monkeypatch) -> None:
    assert chosen(Request()) == ("numba", "LLVM's choice", "ggml_blocks")
    assert chosen(Request(layout="packed")) == ("numba", "LLVM's choice", "packed")
    monkeypatch.setattr(numba_backend, "unavailable", lambda: "numba is not installed")
    assert chosen(Request())[0] == "torch"
    assert chosen(Request(), ("iq1_m",))[0] == "torch"
    reasons = {v.backend: v.reason for v in dispatch.explain(Request(), Q8)}
    assert reasons["native"] == "not built: no compiler"
    assert reasons["numba"] == "numba is not installed"
    with pytest.raises(SettingError, match="not built: no compiler.*usable here: torch, numpy"):
        dispatch.choose(Request(backend="native"), Q8)
    with pytest.raises(SettingError, match="avx2 cannot compute q8_0: not built"):
        dispatch.choose(Request(isa="avx2"), Q8)


@pytest.mark.parametrize("backend", ["native", "numba"])
def test_a_format_without_a_kernel_is_refused_with_the_way_out(cpu, backend: str) -> None:
    cpu(avx2="")
    with pytest.raises(SettingError, match=r"computes iq1_m; convert it at load: load\("):
        dispatch.choose(Request(backend=backend), ("iq1_m",))
    assert chosen(Request(), ("iq1_m",))[0] == "torch"
    assert chosen(Request(backend="numpy"), ("iq1_m",))[0] == "numpy"


def test_the_environment_forces_an_instruction_set(cpu, monkeypatch) -> None:
    cpu(avx512_vnni="", avx2="")
    monkeypatch.setenv("KTLAB_ISA", "avx2")
    assert chosen(Request())[1] == "avx2"
    assert "avx2 by KTLAB_ISA" in dispatch.choose(Request(), Q8).reason
    assert chosen(Request(isa="avx512_vnni"))[1] == "avx512_vnni", "an argument counts more"
    assert chosen(Request(backend="torch"))[0] == "torch", "torch picks its own instructions"
    assert chosen(Request(), ("iq1_m",))[0] == "torch", "no native code, no instruction set"
    monkeypatch.setenv("KTLAB_ISA", "amx_int8")
    with pytest.raises(
        SettingError, match=r"KTLAB_ISA is set\).*the CPU lacks it; usable here: native avx512_vnni"
    ):
        dispatch.choose(Request(), Q8)
    monkeypatch.setenv("KTLAB_ISA", "avx9")
    with pytest.raises(SettingError, match="KTLAB_ISA = 'avx9' is unknown; expected one of auto"):
        dispatch.choose(Request(), Q8)


def test_what_is_named_never_falls_back(cpu) -> None:
    cpu(avx2="")
    for request in (
        Request(backend="torch", isa="avx2"),
        Request(backend="torch", layout="packed"),
        Request(backend="numpy", layout="packed"),
    ):
        with pytest.raises(SettingError, match="no such combination"):
            dispatch.choose(request, Q8)
    with pytest.raises(SettingError, match="has no kernel for|the CPU lacks it"):
        dispatch.choose(Request(isa="avx512_vnni"), Q8)


def test_a_word_named_later_frees_older_ones_that_do_not_fit() -> None:
    packed = Request(layout="packed", isa="avx2")
    assert packed.with_(backend="torch") == Request(backend="torch")
    assert packed.with_(backend="numba") == Request(backend="numba", layout="packed")
    assert Request(backend="torch").with_(isa="avx2") == Request(isa="avx2")
    assert Request(backend="numpy").with_(layout="packed") == Request(layout="packed")
    assert packed.with_(threads=3) == Request(layout="packed", isa="avx2", threads=3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"backend": "nunba"}, 'did you mean "numba"'),
        ({"isa": "avx512vnni"}, 'did you mean "avx512_vnni"'),
        ({"layout": "tiles"}, "expected one of auto, ggml_blocks, packed"),
        ({"threads": 0}, "threads = 0: expected a whole number from 1 to 1024"),
        ({"threads": True}, "whole number"),
        ({"threads": 2.5}, "whole number"),
        ({"few": -1}, "few = -1"),
        ({"few": 10**10}, "few = 10000000000: expected a whole number of tokens from 0 to 2147483"),
        ({"few": "3"}, "few = '3': expected a whole number"),
        ({"few": "a"}, "few = 'a': expected a whole number"),
        ({"few": float("nan")}, "few = nan: expected a whole number"),
        ({"few": 2.5}, "few = 2.5: expected a whole number"),
        ({"few": True}, "few = True: expected a whole number"),
        ({"isa": "AVX2"}, "isa 'AVX2' is unknown.*did you mean \"avx2\""),
        ({"numa": 99}, "numa = 99: there is no such node; this machine has"),
    ],
)
def test_words_are_checked(words: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Request(**words)


def test_whole_numbers_of_numpy_are_taken(cpu) -> None:
    cpu(avx2="")
    request = Request(threads=np.int64(2), few=np.int32(3))
    assert (type(request.threads), type(request.few)) == (int, int)
    assert request == Request(threads=2, few=3)
    wrong: tuple[Any, ...] = (-1, 2.5, "1")
    for tokens in wrong:
        with pytest.raises(SettingError, match=f"tokens = {tokens!r}: expected a whole number"):
            dispatch.explain(Request(), Q8, tokens=tokens)
    assert "4 tokens take" in dispatch.explain(Request(), Q8, tokens=np.int64(4)).chosen.reason


def test_the_way_out_is_one(cpu, no_native, monkeypatch) -> None:
    monkeypatch.setattr(threads, "node_cpus", lambda node: (0,))
    monkeypatch.setattr(request_module, "node_cpus", lambda node: (0,))
    with pytest.raises(SettingError, match="not built.*; leave out numa=0$"):
        dispatch.choose(Request(numa=0), Q8)
    with pytest.raises(SettingError, match="usable here: numba, torch, numpy, or 'auto'$"):
        dispatch.choose(Request(backend="native"), Q8)
    cpu(avx2="")
    with pytest.raises(SettingError, match="usable here: native avx2, or 'auto'$"):
        dispatch.choose(Request(backend="numba", numa=0), Q8)
    with pytest.raises(SettingError, match="; leave out numa=0$"):
        dispatch.choose(Request(numa=0), ("q5_1",))
    monkeypatch.setenv("KTLAB_ISA", "amx_int8")
    with pytest.raises(SettingError, match="usable here: native avx2, numba, torch, numpy$"):
        dispatch.choose(Request(), Q8)


def test_what_nobody_named_is_not_said_to_be_named(cpu) -> None:
    cpu(avx512_vnni="", avx2="")
    settled = dispatch.choose(Settled.of(Request()), Q8)
    assert settled.layout == "packed" and "named" not in settled.reason
    assert settled.reason.startswith("the best that is usable here, packed since")
    assert (
        "named (avx2), packed since" in dispatch.choose(Settled.of(Request(isa="avx2")), Q8).reason
    )
    assert "named (packed)" in dispatch.choose(Request(layout="packed"), Q8).reason


def test_explain_lists_every_combination_once_with_one_chosen(cpu) -> None:
    cpu(avx512_vnni="", avx2="")
    found = dispatch.explain(Request(), Q8, tokens=3)
    rows = [(v.backend, v.isa, v.layout) for v in found]
    assert len(rows) == len(set(rows)) == 2 * len(NATIVE_ISAS) + 4
    assert [v.status for v in found].count("chosen") == 1
    assert (
        found.chosen.isa == "avx512_vnni"
        and "3 tokens take the path for few" in found.chosen.reason
    )
    many = dispatch.explain(Request(few=2), Q8, tokens=3)
    assert "3 tokens take the path for many" in many.chosen.reason
    assert not any("BLAS" in v.reason for v in found if v.backend == "numba"), "its own tile"
    lacking = {v.isa: v.reason for v in found if v.status == "rejected"}
    assert lacking["amx_int8"] == "the CPU lacks it"
    assert found._repr_mimebundle_()["text/plain"] == repr(found)


def test_every_format_has_a_family_and_every_kernel_a_border() -> None:
    for format in native.formats():
        for isa in NATIVE_ISAS:
            for layout in ("ggml_blocks", "packed"):
                border = switch.threshold(isa, layout, (format,))
                assert border.few >= 0 and border.reason
    kernel = dispatch.choose(Request(few=7), Q8)
    assert kernel.few == 7 and dispatch.path(kernel, 7) == "few"
    assert dispatch.path(kernel, 8) == "many"


def test_borders_differ_between_makers_of_processors(monkeypatch) -> None:
    few = {}
    for vendor in ("AuthenticAMD", "GenuineIntel", ""):
        monkeypatch.setattr(native, "cpu_vendor", lambda vendor=vendor: vendor)
        few[vendor] = switch.threshold("avx512_vnni", "packed", ("q4_k",)).few
    assert few["AuthenticAMD"] > few["GenuineIntel"] == few[""]


def test_the_reason_says_how_sums_are_scaled(cpu, monkeypatch) -> None:
    cpu(avx512_vnni="", avx2="")
    for isa, pairs in product(switch.PAIRS, (True, False)):
        monkeypatch.setattr(native, "pairs", lambda isa, pairs=pairs: pairs)
        for format in ("q4_k", "q8_0", "int8_channel"):
            reason = dispatch.choose(Request(isa=isa), (format,)).reason
            assert ("two by two" in reason) == (pairs and format == "q4_k"), (isa, format)
            assert ("in words" in reason) == (isa == "avx2" and format != "q4_k"), (isa, format)


def test_threads_default_to_cores_and_stay_in_the_quota(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(threads, "allowed_cpus", lambda: (0, 1, 2, 3))
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "none")
    monkeypatch.setattr(threads, "CPUS", tmp_path)
    threads.default_threads.cache_clear()
    assert threads.default_threads() == 4, "without a topology every processor is a core"
    for cpu in range(4):  # two cores of two hyperthreads
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text("0\n")
        (folder / "core_id").write_text(f"{cpu % 2}\n")
    threads.default_threads.cache_clear()
    assert threads.default_threads() == 2
    (tmp_path / "max").write_text("150000 100000\n")
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "max")
    threads.default_threads.cache_clear()
    assert threads.default_threads() == 1
    threads.default_threads.cache_clear()


def test_numa_nodes(monkeypatch, tmp_path) -> None:
    for node, cpus in ((0, "0-2,8"), (1, "4-5")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus + "\n")
    monkeypatch.setattr(threads, "NODES", tmp_path)
    monkeypatch.setattr(threads, "allowed_cpus", lambda: (0, 1, 8))
    assert threads.numa_nodes() == {0: (0, 1, 2, 8), 1: (4, 5)}
    assert threads.node_cpus(0) == (0, 1, 8)
    with pytest.raises(SettingError, match=r"numa = 1: its processors \[4, 5\] are not among"):
        threads.node_cpus(1)
    with pytest.raises(SettingError, match="no such node; this machine has 0, 1"):
        threads.node_cpus(2)
    assert chosen(Request(numa=0))[0] == "native" or native.unavailable()
    with pytest.raises(SettingError, match="only native threads can be kept"):
        dispatch.choose(Request(backend="numba", numa=0), Q8)
