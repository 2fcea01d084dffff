"""doctor: on this machine, and on machines that it is told it is on."""

import builtins
import ctypes
import os
import platform

import pytest

from ktlab import hardware
from ktlab.hardware import Grant, Memory
from ktlab.measurement import checks
from ktlab.measurement.checks import Check
from ktlab.measurement.doctor import Doctor, doctor

OLD = "fpu sse2 ssse3 avx f16c"
ZEN = OLD + " avx2 fma avx512f avx512_vnni avx512_bf16"
SAPPHIRE = ZEN + " amx_tile amx_int8 amx_bf16"


@pytest.fixture
def cpu(monkeypatch):
    """Pretend to be a processor with these flags."""

    def pretend(flags, grant=None, **info):
        found = {"model name": "Test CPU", **info}
        if flags is not None:
            found["flags"] = flags
        monkeypatch.setattr(hardware, "cpuinfo", lambda: found)
        if grant is not None:
            monkeypatch.setattr(hardware, "amx_grant", lambda: Grant(granted=grant, reason="why"))

    return pretend


def test_here():
    report = doctor()
    assert report["torch"].verdict == report["numpy"].verdict == "ok"
    assert report["Python"].found.startswith(platform.python_version())
    text, page = str(report), report.to_html()
    for check in report:
        assert check.name in text and check.name in page
        if check.verdict != "ok":
            assert check.why or check.do
    assert Doctor.from_json(report.to_json()) == report
    with pytest.raises(KeyError, match="torch"):
        report["trorch"]


def test_what_a_machine_has_not_is_neither_good_nor_bad():
    def check(**words):
        return Check(**{"group": "kernels", "name": "amx_int8", "found": "no", **words})

    report = Doctor(
        checks=(
            check(why="the CPU lacks " + "amx_tile " * 12),
            check(group="memory", name="swap", found="none"),
            check(name="native", verdict="warn"),
        )
    )
    assert ": 1 ok, 1 not on this machine, 1 to note, 0 missing" in report.summary
    said = str(report)
    assert "– amx_int8" in said and "✓ swap" in said and "! native" in said
    assert max(map(len, said.splitlines())) <= 80 and "absent" in report.to_html()


def test_features(cpu):
    cpu(OLD)
    found = hardware.features()
    assert found == {name: name == "f16c" for name in hardware.FEATURES}
    sets = {check.name: check for check in checks.processor()}
    assert sets["instruction sets"].verdict == "warn" and "avx2" in sets["instruction sets"].why
    assert sets["AMX"].found == "not on this processor" and sets["AMX"].verdict == "ok"
    assert hardware.isa() == ("f16c",)


@pytest.mark.parametrize(("grant", "verdict"), [(True, "ok"), (False, "warn")])
def test_amx_counts_only_if_granted(cpu, grant, verdict):
    cpu(SAPPHIRE, grant)
    sets = {check.name: check for check in checks.processor()}
    assert sets["AMX"].verdict == verdict
    assert ("amx_int8" in hardware.isa()) is grant
    assert "avx512_vnni" in hardware.isa()
    assert bool(sets["AMX"].do) is not grant


def test_a_title_names_vectors_and_tiles(cpu):
    cpu("avx2 fma f16c")
    assert hardware.isa() == ("avx2", "fma", "f16c") and hardware.widest_isa() == ("avx2",)
    cpu("avx2 fma f16c avx512f avx512_vnni")
    assert hardware.widest_isa() == ("avx512f", "avx512_vnni")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("AMD EPYC", "AMD EPYC (family 26 model 2)"),
        ("AMD EPYC 9654 96-Core Processor", "AMD EPYC 9654 96-Core Processor"),
    ],
)
def test_a_name_without_a_number_says_which_generation(cpu, name, shown):
    cpu("avx2", **{"model name": name, "cpu family": "26", "model": "2"})
    assert hardware.cpu_name() == shown


def test_no_flags_is_unknown_not_absent(cpu):
    cpu(None, **{"model name": "Apple M9"})
    assert hardware.features() is None and hardware.isa() == ()
    sets = {check.name: check for check in checks.processor()}
    assert sets["instruction sets"].found == "unknown"
    assert "Apple M9" in sets["CPU"].found


def test_the_operating_system_is_asked_for_amx(monkeypatch):
    """Two system calls, request then look; every answer is told apart."""
    hardware.amx_grant.cache_clear()
    real = hardware.amx_grant()
    assert real.granted in (True, False, None) and real.reason

    class Kernel:
        def __init__(self, refuse, permitted):
            self.refuse, self.permitted, self.calls = refuse, permitted, []

        def syscall(self, number, code, argument):
            self.calls.append((number.value, code.value))
            if code.value == hardware.ARCH_REQ_XCOMP_PERM:
                assert argument.value == 18
                ctypes.set_errno(self.refuse)
                return -1 if self.refuse else 0
            argument.contents.value = self.permitted
            return 0

    monkeypatch.setattr(hardware.sys, "platform", "linux")
    monkeypatch.setattr(hardware.platform, "machine", lambda: "x86_64")
    for kernel, granted, says in (
        (Kernel(0, 1 << 18 | 7), True, "granted"),
        (Kernel(95, 7), False, os.strerror(95)),
        (Kernel(0, 7), False, "unset"),
    ):
        monkeypatch.setattr(hardware.ctypes, "CDLL", lambda *_, k=kernel, **__: k)
        hardware.amx_grant.cache_clear()
        found = hardware.amx_grant()
        assert found.granted is granted and says in found.reason
        assert kernel.calls == [(158, 0x1023), (158, 0x1022)]
    monkeypatch.setattr(hardware.sys, "platform", "darwin")
    hardware.amx_grant.cache_clear()
    assert hardware.amx_grant().granted is None
    assert "darwin" in hardware.amx_grant().reason
    hardware.amx_grant.cache_clear()


@pytest.mark.parametrize(
    ("memory", "verdicts"),
    [
        (dict(total=2**34, available=2**33, limit=None, swap_total=0, swap_used=0), ["ok", "ok"]),
        (
            dict(total=2**34, available=2**33, limit=2**30, swap_total=0, swap_used=0),
            ["warn", "ok"],
        ),
        (
            dict(total=2**34, available=2**29, limit=None, swap_total=2**33, swap_used=2**32),
            ["warn", "warn"],
        ),
        (dict(total=None, available=None, limit=None, swap_total=None, swap_used=None), ["warn"]),
    ],
)
def test_memory(monkeypatch, memory, verdicts):
    monkeypatch.setattr(hardware, "memory", lambda: Memory(**memory))
    assert [check.verdict for check in checks.memory()] == verdicts


def test_memory_without_proc(monkeypatch):
    def nothing(self, *_, **__):
        raise FileNotFoundError(self)

    monkeypatch.setattr(hardware.Path, "read_text", nothing)
    found = hardware.memory()
    assert found.total and found.available and found.limit is None  # psutil knows


def test_container_quota_and_too_many_threads(cpu, monkeypatch):
    cpu(ZEN)
    monkeypatch.setattr(hardware, "cores", lambda: 4)
    monkeypatch.setattr(hardware, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(checks, "_torch_threads", lambda: 16)
    sets = {check.name: check for check in checks.processor()}
    assert sets["CPU"].verdict == "warn" and "1.5 cores" in sets["CPU"].why
    assert sets["threads"].verdict == "warn" and "set_num_threads(4)" in sets["threads"].do


def test_missing_old_and_broken_libraries(monkeypatch):
    versions = {"torch": None, "numpy": "1.26.4", "gguf": "0.19", "numba": "0.6"}
    monkeypatch.setattr(checks, "version", lambda name: versions.get(name, "9.9"))
    imported = checks.importlib.import_module

    def broken(name, *rest):
        if name == "numba":
            raise ImportError("libllvm.so: undefined symbol\nmore")
        return imported(name, *rest)

    monkeypatch.setattr(checks.importlib, "import_module", broken)
    found = {check.name: check for check in checks.software()}
    assert found["torch"].verdict == "missing" and "pip install torch" in found["torch"].do
    assert found["numpy"].verdict == "warn" and "2 or newer" in found["numpy"].why
    assert found["numba"].verdict == "missing" and "undefined symbol" in found["numba"].why
    report = Doctor(checks=tuple(found.values()))
    assert not report.ok and "cannot run" in str(report)
    without = Doctor(checks=tuple(c for c in report if c.name != "torch"))
    assert without.ok, "numba is not required"


def test_doctor_works_without_torch(monkeypatch):
    real = builtins.__import__

    def no_torch(name, *rest):
        if name.split(".")[0] == "torch":
            raise ImportError("No module named 'torch'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    assert checks._torch_threads() is None
    assert checks.gpu().verdict == "warn"


def test_widgets_that_do_not_match(monkeypatch):
    versions = {"ipywidgets": "8.1.9", "jupyterlab_widgets": "1.0", "jupyterlab": "3.6",
                "anywidget": None, "plotly": "6.1"}  # fmt: skip
    monkeypatch.setattr(checks, "version", versions.get)
    found = {check.name: check for check in checks.notebook()}
    verdicts = {name: check.verdict for name, check in found.items()}
    assert verdicts == {"jupyterlab": "warn", "ipywidgets": "ok", "plotly": "ok",
                        "anywidget": "missing", "widget front end": "warn"}  # fmt: skip


def test_chromium(monkeypatch, tmp_path):
    monkeypatch.setattr(checks.Path, "home", lambda: tmp_path)
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "browsers"))
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    assert checks.chromium() is None and "playwright install" in checks.browser().do
    binary = tmp_path / "browsers/chromium-1/chrome-linux64/chrome"
    binary.parent.mkdir(parents=True)
    binary.touch()
    assert checks.chromium() == binary and checks.browser().verdict == "ok"


def test_embedded_model_missing(monkeypatch):
    from ktlab.checkpoint import embedded

    monkeypatch.setattr(embedded, "DATA_FOLDERS", (embedded.Path("/nowhere"),))
    (found,) = checks.embedded_model()
    assert found.verdict == "missing" and "/nowhere/tiny.gguf" in found.why and found.do


def test_html_is_escaped():
    report = Doctor(checks=(Check(group="g", name="<b>", found="<i>"),))
    assert "<b>" not in report.to_html() and "&lt;i&gt;" in report.to_html()


@pytest.mark.parametrize(
    ("text", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("8.1.9rc1", (8, 1, 9)), ("x", ())]
)
def test_version_numbers(text, numbers):
    assert checks._numbers(text) == numbers


def test_kernels_are_reported_with_the_reason_for_each(monkeypatch):
    from ktlab.kernels import native, numba_backend

    found = {check.name: check for check in checks.kernels()}
    assert {"native", "KTLAB_ISA", "numba kernels", "kernel threads", "NUMA nodes"} <= set(found)
    assert set(native.isas()) <= set(found)

    known = {"serial": "", "avx2": "the CPU lacks avx2 (cpuid 7.0 EBX 5)", "amx_int8_emulated": ""}
    monkeypatch.setattr(native, "isas", lambda: known)
    monkeypatch.setattr(native, "unavailable", lambda: "")
    monkeypatch.setenv("KTLAB_ISA", "avx2")
    found = {check.name: check for check in checks.kernels()}
    assert found["native"].verdict == "ok" and found["serial"].found == "usable"
    assert found["avx2"].found == "no" and "cpuid 7.0" in found["avx2"].why
    assert "tests and lessons" in found["amx_int8_emulated"].found
    assert found["KTLAB_ISA"].verdict == "warn" and "serial" in found["KTLAB_ISA"].do
    monkeypatch.setenv("KTLAB_ISA", "serial")
    assert {c.name: c for c in checks.kernels()}["KTLAB_ISA"].verdict == "ok"

    monkeypatch.setattr(native, "isas", dict)
    monkeypatch.setattr(native, "unavailable", lambda: "not built: no compiler")
    monkeypatch.setattr(numba_backend, "unavailable", lambda: "numba is not installed")
    found = {check.name: check for check in checks.kernels()}
    assert found["native"].found == "not built" and "no compiler" in found["native"].why
    assert found["numba kernels"].verdict == "warn"


def test_openmp_threads_that_spin(monkeypatch):
    found = {}
    for policy in ("PASSIVE", "active", ""):
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
        (found[policy],) = (c for c in checks.kernels() if c.name == "OpenMP threads")
    assert [check.verdict for check in found.values()] == ["ok", "warn", "warn"]
    assert "OMP_WAIT_POLICY=PASSIVE" in found[""].do


def test_provenance_says_which_kernels_were_there(monkeypatch):
    from ktlab.kernels import native
    from ktlab.measurement.provenance import Provenance

    monkeypatch.setattr(native, "unavailable", lambda: "not built: no compiler")
    assert "not built: no compiler" in str(Provenance.collect())
    monkeypatch.setattr(native, "unavailable", lambda: "")
    monkeypatch.setattr(
        native, "isas", lambda: {"serial": "", "avx2": "no", "amx_int8_emulated": ""}
    )
    monkeypatch.setenv("KTLAB_ISA", "serial")
    found = Provenance.collect()
    assert found.kernels.startswith("native kernels serial, ") and "KTLAB_ISA=serial" in str(found)
    assert Provenance.from_json(found.to_json()) == found
