"""What `doctor` looks at, one function a subject; each yields or returns checks.

Everything is detected, nothing assumed, and nothing here needs torch to be importable.
"""

import hashlib
import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ktlab
from ktlab import hardware, html
from ktlab.measurement.provenance import git_revision, version
from ktlab.record import Record

Verdict = Literal["ok", "warn", "missing"]
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Check(Record):
    """One thing looked at."""

    group: str
    name: str
    found: str
    verdict: Verdict = "ok"
    why: str = ""
    """What the verdict means for ktlab."""
    do: str = ""
    """What would change it."""
    required: bool = False
    """Whether ktlab does not work without it."""


def software() -> Iterator[Check]:
    python = sys.version_info
    supported = (3, 10) <= python[:2] <= (3, 13)
    yield Check(
        group="software",
        name="Python",
        found=f"{platform.python_version()} on {platform.system()} {platform.release()}",
        verdict="ok" if supported else "warn",
        why="" if supported else "ktlab is tested on 3.10 to 3.13",
        required=True,
    )
    yield _library("torch", "software", wanted=(2,), required=True)
    yield _library("numpy", "software", wanted=(2,), required=True)
    yield _library("gguf", "software", required=True)
    yield _library(
        "numba", "software", why="the numba backend is absent; torch and numpy compute instead"
    )
    revision = git_revision()
    yield Check(
        group="software",
        name="ktlab",
        found=f"{ktlab.__version__}, "
        + (
            f"clone at {revision[:12]}{', changed' * revision.endswith('+')}"
            if revision
            else "no clone"
        ),
    )


def _library(
    name: str,
    group: str,
    *,
    wanted: tuple[int, ...] = (),
    why: str = "",
    required: bool = False,
    do: str = "",
) -> Check:
    """A distribution: installed, importable, new enough."""
    found, least = version(name), ".".join(map(str, wanted))
    do = do or f"pip install {name}{'>=' + least if least else ''}"
    if found is None:
        why = why or ("ktlab needs it" if required else "")
        return Check(
            group=group,
            name=name,
            found="not installed",
            verdict="missing",
            why=why,
            do=do,
            required=required,
        )
    try:
        if group == "software":  # a notebook library takes a second to import and rarely breaks
            importlib.import_module(name)
    except Exception as error:
        return Check(
            group=group,
            name=name,
            found=f"{found}, which does not import",
            verdict="missing",
            why=f"{type(error).__name__}: {error}".split("\n")[0],
            do=f"reinstall: {do} --force-reinstall",
            required=required,
        )
    if _numbers(found) < wanted:
        return Check(
            group=group,
            name=name,
            found=found,
            verdict="warn",
            why=f"expected {least} or newer",
            do=do,
            required=required,
        )
    return Check(group=group, name=name, found=found, required=required)


def processor() -> Iterator[Check]:
    cores, quota = hardware.cores(), hardware.cpu_quota()
    limited = quota is not None and quota < cores
    yield Check(
        group="processor",
        name="CPU",
        found=f"{hardware.cpu_name()}, {cores} of {os.cpu_count()} cores",
        verdict="warn" if limited else "ok",
        why=f"a container allows {quota:.3g} cores' worth of time" if limited else "",
        do="torch.set_num_threads(...) to no more than that" if limited else "",
    )
    if (threads := _torch_threads()) is not None:
        many = threads > cores
        yield Check(
            group="processor",
            name="threads",
            found=f"torch uses {threads}",
            verdict="warn" if many else "ok",
            why=f"more than the {cores} cores there are: they wait for each other" if many else "",
            do=f"torch.set_num_threads({cores})" if many else "",
        )
    found = hardware.features()
    if found is None:
        yield Check(
            group="processor",
            name="instruction sets",
            found="unknown",
            verdict="warn",
            why=f"{platform.system()} {platform.machine()} lists no x86 flags in /proc/cpuinfo; "
            "the portable kernels are used",
        )
        return
    plain = {name: has for name, has in found.items() if not name.startswith("amx")}
    lacking = [name for name, has in plain.items() if not has]
    yield Check(
        group="processor",
        name="instruction sets",
        found=" ".join(name for name, has in plain.items() if has) or "none of those looked for",
        verdict="ok" if plain["avx2"] else "warn",
        why=f"not on this processor: {' '.join(lacking)}" if lacking else "",
    )
    yield _amx([name for name, has in found.items() if has and name.startswith("amx")])


def _amx(flags: list[str]) -> Check:
    if not flags:
        return Check(
            group="processor",
            name="AMX",
            found="not on this processor",
            why="AMX came with Xeon Sapphire Rapids (2023); everything works without",
        )
    grant = hardware.amx_grant()
    if grant.granted:
        return Check(
            group="processor", name="AMX", found=f"{' '.join(flags)}, granted", why=grant.reason
        )
    return Check(
        group="processor",
        name="AMX",
        found=f"{' '.join(flags)}, not granted",
        verdict="warn",
        why=f"the processor has it, the operating system refuses: {grant.reason}",
        do="Linux 5.16 or newer, and in a virtual machine a host that passes AMX on",
    )


def kernels() -> Iterator[Check]:
    """The code that computes: native built or not, each instruction set, threads, NUMA nodes."""
    try:
        from ktlab.kernels import native, numba_backend, request, threads
    except Exception as error:  # torch or NumPy is missing: said elsewhere
        why = f"{type(error).__name__}: {error}".split("\n")[0]
        yield Check(group="kernels", name="kernels", found="not usable", verdict="warn", why=why)
        return
    reason = native.unavailable()
    yield Check(
        group="kernels",
        name="native",
        found="not built" if reason else f"built, computes {' '.join(native.formats())}",
        verdict="warn" if reason else "ok",
        why=reason,
        do="install a C compiler, then: pip install -e . --force-reinstall --no-deps"
        if reason
        else "",
    )
    for name, why in native.isas().items():
        emulated = name in request.EMULATED
        usable = "usable, for tests and lessons" if emulated else "usable"
        yield Check(group="kernels", name=name, found="no" if why else usable, why=why)
    yield _forced_isa(native.isas())
    reason = numba_backend.unavailable()
    yield Check(
        group="kernels",
        name="numba kernels",
        found="no" if reason else "usable",
        verdict="warn" if reason and native.unavailable() else "ok",
        why=reason,
    )
    cpus, nodes = threads.allowed_cpus(), threads.numa_nodes()
    yield Check(
        group="kernels",
        name="kernel threads",
        found=f"{threads.default_threads()} by default: a core each, of {len(cpus)} processors",
        why="set with threads=; numa= keeps them on one node",
    )
    yield _waiting_threads()
    yield Check(
        group="kernels",
        name="NUMA nodes",
        found=", ".join(f"{n}: {len(c)} processors" for n, c in nodes.items()) or "unknown",
    )


def _waiting_threads() -> Check:
    """torch's threads wait for work on the cores that the kernels compute on."""
    passive = os.environ.get("OMP_WAIT_POLICY", "").strip().lower() == "passive"
    return Check(
        group="kernels",
        name="OpenMP threads",
        found="sleep while they wait" if passive else "spin while they wait",
        verdict="ok" if passive else "warn",
        why="" if passive else "torch's take cores from the kernels: a prompt is slower",
        do="" if passive else "start with OMP_WAIT_POLICY=PASSIVE, as `make lab` does",
    )


def _forced_isa(known: dict[str, str]) -> Check:
    """What KTLAB_ISA asks for, and whether that works here."""
    from ktlab.kernels.request import AUTO, ISA_VARIABLE

    forced = os.environ.get(ISA_VARIABLE, "").strip().lower()
    if not forced or forced == AUTO:
        return Check(group="kernels", name=ISA_VARIABLE, found="not set")
    why = known.get(forced, "there is no such instruction set, or no native code")
    usable = ", ".join(name for name, reason in known.items() if not reason) or "none"
    return Check(
        group="kernels",
        name=ISA_VARIABLE,
        found=forced,
        verdict="warn" if why else "ok",
        why=why or "forces this instruction set wherever no isa is named",
        do=f"unset it, or one of: {usable}" if why else "",
    )


def memory() -> Iterator[Check]:
    found = hardware.memory()
    if found.total is None or found.available is None:
        yield Check(
            group="memory",
            name="memory",
            found="unknown",
            verdict="warn",
            why=f"{platform.system()} does not say, and psutil is not installed",
            do="pip install psutil",
        )
        return
    limit = f", a container allows {html.byte_size(found.limit)}" if found.limit else ""
    usable = min(found.available, found.limit or found.available)
    tight = usable < 1.5 * GIB
    yield Check(
        group="memory",
        name="memory",
        found=f"{html.byte_size(found.available)} available of {html.byte_size(found.total)}"
        + limit,
        verdict="warn" if tight else "ok",
        why="the embedded model with torch and a notebook takes about 1 GiB" if tight else "",
        do="close other notebooks' kernels" if tight else "",
    )
    used = found.swap_used or 0
    yield Check(
        group="memory",
        name="swap",
        found=f"{html.byte_size(used)} used of {html.byte_size(found.swap_total)}"
        if found.swap_total
        else "none",
        verdict="warn" if used > GIB // 4 else "ok",
        why="weights that were swapped out make decoding slower by orders"
        if used > GIB // 4
        else "",
        do="free memory before timing anything" if used > GIB // 4 else "",
    )


def gpu() -> Check:
    try:
        import torch

        from ktlab.kernels.seat import free_bytes

        if not torch.cuda.is_available():
            build = torch.version.cuda
            why = (
                "this torch is built without CUDA"
                if build is None
                else f"torch is built for CUDA {build} and finds no usable device"
            )
            return Check(group="GPU", name="GPU", found="none", why=f"{why}; the CPU does it all")
        gpu = torch.cuda.current_device()
        free, total = free_bytes(gpu), torch.cuda.mem_get_info(gpu)[1]
        return Check(
            group="GPU",
            name="GPU",
            found=f"{torch.cuda.get_device_name()}, {html.byte_size(free)} free of "
            f"{html.byte_size(total)}, CUDA {torch.version.cuda}",
        )
    except Exception as error:  # a broken driver must not end the examination
        return Check(
            group="GPU",
            name="GPU",
            found="unknown",
            verdict="warn",
            why=f"{type(error).__name__}: {error}".split("\n")[0],
        )


def embedded_model() -> Iterator[Check]:
    do = "run from a complete clone, or install the wheel; any .gguf of deepseek2 works instead"
    try:
        from ktlab.checkpoint.embedded import data_path
        from ktlab.checkpoint.opening import open_checkpoint

        path = data_path("tiny.gguf")
        config = open_checkpoint("tiny").config
    except Exception as error:
        yield Check(
            group="embedded model",
            name="tiny",
            found="not usable",
            verdict="missing",
            why=f"{type(error).__name__}: {error}".split("\n")[0],
            do=do,
        )
        return
    yield Check(
        group="embedded model",
        name="tiny",
        found=f"{html.byte_size(path.stat().st_size)}, sha256 {_sha256(path)[:16]}, "
        f"{config.num_layers} layers, {config.num_experts} experts, trained k = {config.top_k}",
        why=str(path),
    )


def notebook() -> Iterator[Check]:
    needs = {
        "jupyterlab": ((4,), "`make lab` opens notebooks in it"),
        "ipywidgets": ((8,), "the control room is made of widgets"),
        "plotly": ((6,), "the figures are Plotly's"),
        "anywidget": ((0, 9), "Plotly's live figures are carried by it"),
    }
    for name, (wanted, why) in needs.items():
        yield _library(name, "notebook", wanted=wanted, why=why)
    widgets, frontend = version("ipywidgets"), version("jupyterlab_widgets")
    if widgets and frontend:
        fits = _numbers(widgets)[0] == 8 and _numbers(frontend)[0] == 3
        yield Check(
            group="notebook",
            name="widget front end",
            found=f"jupyterlab_widgets {frontend}",
            verdict="ok" if fits else "warn",
            why="" if fits else f"ipywidgets {widgets} needs jupyterlab_widgets 3",
            do="" if fits else "pip install --upgrade ipywidgets jupyterlab_widgets",
        )


def browser() -> Check:
    found = chromium()
    if found is None:
        return Check(
            group="notebook",
            name="Chromium",
            found="none",
            verdict="missing",
            why="only the browser tests need it; `make test` skips them",
            do="playwright install chromium",
        )
    return Check(
        group="notebook",
        name="Chromium",
        found=str(found),
        why="" if version("playwright") else "the browser tests need playwright too",
        verdict="ok" if version("playwright") else "warn",
        do="" if version("playwright") else "pip install playwright",
    )


def chromium() -> Path | None:
    """A Chromium that the browser tests can start: Playwright's own, or one on the path."""
    places = [Path.home() / ".cache/ms-playwright", Path.home() / "Library/Caches/ms-playwright"]
    if (chosen := os.environ.get("PLAYWRIGHT_BROWSERS_PATH")) and chosen != "0":
        places.insert(0, Path(chosen))
    for place in places:
        for pattern in (
            "chromium-*/chrome-*/chrome",
            "chromium-*/chrome-*/*.app",
            "chromium_headless_shell-*/*/*headless*shell",
        ):
            if hits := sorted(place.glob(pattern)):
                return hits[-1]
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return Path(path)
    return None


def _torch_threads() -> int | None:
    try:
        import torch

        return torch.get_num_threads()
    except Exception:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
