"""The wheel works away from the clone; the lock, Binder's environment and the metadata agree."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement

import ktlab

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny.gguf"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# Git hosts refuse files past 100 MB; the embedded data is promised to stay under 48 MB.
WHEEL_BYTES = 60_000_000

needs_tiny = pytest.mark.skipif(not TINY.exists(), reason=f"{TINY.relative_to(ROOT)} is not here")

needs_native = pytest.mark.skipif(
    sysconfig.get_platform() != "linux-x86_64"
    or not (shutil.which("gcc") or shutil.which("cc"))
    or os.environ.get("KTLAB_NO_NATIVE", "0") not in ("", "0"),
    reason="no C kernels here: they need Linux on x86-64, a compiler, and no KTLAB_NO_NATIVE",
)


def run(*command: object, **options) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **({"timeout": 300} | options),
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is made of, so that no build/ or egg-info appears in the clone."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    # What make venv has compiled (build/temp*) is taken over, as long as no source is newer.
    compiled = [str(path.relative_to(ROOT)) for path in (ROOT / "build").glob("[ct]*")]
    for name in ("ktlab", "ktlab_ext", "data", *compiled):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    return source


def wheel_of(source: Path, where: Path, **environment: str) -> Path:
    pip_wheel = (*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", where, source)
    run(*pip_wheel, env=os.environ | environment, timeout=1500)
    return next(where.glob("ktlab-*.whl"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel_of(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def pure_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made where the C kernels are not wanted, or cannot be."""
    return wheel_of(source, tmp_path_factory.mktemp("pure"), KTLAB_NO_NATIVE="1")


def install(wheel: Path, place: Path) -> Path:
    """A new environment that holds the wheel, and borrows the dependencies of this one."""
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel)
    # A path in a .pth file is added as it is: .pth files inside it (the clone's editable install
    # among them) are not read, so the only ktlab is the wheel's.
    borrowed = sysconfig.get_path("purelib")
    site = next((place / "lib").glob("python*")) / "site-packages"
    (site / "borrowed.pth").write_text(borrowed + "\n")
    return place


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def installed_pure(pure_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(pure_wheel, tmp_path_factory.mktemp("installed-pure"))


def test_wheel_holds_what_it_should(source: Path, wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(source)) for path in (source / "ktlab").rglob("*.py")}
    assert modules <= set(names)
    assert "ktlab/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "data/", "notebooks/"))]
    assert not [name for name in names if name.startswith("ktlab/data/") and "recipe" in name]
    assert wheel.stat().st_size < WHEEL_BYTES


@needs_tiny
def test_wheel_holds_the_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "ktlab/data/tiny.gguf" in names
    assert "ktlab/data/rules/cpu-experts.yaml" in names
    texts = {f"ktlab/data/texts/{path.name}" for path in (ROOT / "data" / "texts").glob("*.txt")}
    assert texts <= names


def load_and_compute(place: Path, work: Path) -> tuple[str, list[int], int, str]:
    """Where ktlab lies, the logits' shape, the vocabulary, why there are no C kernels."""
    code = (
        "import json, pathlib, ktlab, ktlab_ext\n"
        "model = ktlab.load('tiny')\n"
        "logits = model.forward(model.tokenizer.encode('The history of'))\n"
        "print(json.dumps([str(pathlib.Path(ktlab.__file__)), list(logits.shape),"
        " model.config.vocab_size, ktlab_ext.reason]))"
    )
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    printed = run(place / "bin" / "python", "-c", code, cwd=work, env=environment)
    return json.loads(printed.splitlines()[-1])


@needs_tiny
def test_load_away_from_the_clone(installed: Path, tmp_path: Path) -> None:
    where, shape, vocab_size, _ = load_and_compute(installed, tmp_path)
    assert Path(where).is_relative_to(installed)
    assert shape[1] == vocab_size
    assert "usage" in run(installed / "bin" / "ktlab", "--help", cwd=tmp_path).lower()


# ---- the C kernels, with and without -------------------------------------------------------------


@needs_native
def test_wheel_holds_the_kernels_and_not_their_sources(wheel: Path, installed: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("ktlab_ext/")]
    suffixes = sorted("".join(Path(name).suffixes[-1:]) for name in names)
    assert suffixes == [".py", ".pyi", ".so", ".typed"], names
    assert "linux_x86_64" in wheel.name
    code = "import ktlab_ext; print(ktlab_ext.reason, ktlab_ext.native.isas()['serial'] == '')"
    assert run(installed / "bin" / "python", "-c", code, cwd=installed).strip() == "True"


@needs_tiny
def test_pure_install_works(pure_wheel: Path, installed_pure: Path, tmp_path: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(pure_wheel).namelist() if name.endswith(".so")]
    where, shape, vocab_size, reason = load_and_compute(installed_pure, tmp_path)
    assert Path(where).is_relative_to(installed_pure)
    assert shape[1] == vocab_size
    assert "C kernels are not installed" in reason


@needs_native
@pytest.mark.parametrize(
    "environment, words",
    [
        ({"CC": "false"}, "false failed"),
        ({"CC": "/nowhere/cc"}, "no C compiler is here (looked for /nowhere/cc)"),
        ({"KTLAB_NO_NATIVE": "1"}, "KTLAB_NO_NATIVE is set"),
    ],
)
def test_install_without_kernels_succeeds_and_says_so_once(
    source: Path, tmp_path: Path, environment: dict[str, str], words: str
) -> None:
    places = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    build = (sys.executable, "setup.py", "build_ext", "--force", *places)
    printed = run(*build, cwd=source, env=os.environ | environment)
    said = [line for line in printed.splitlines() if line.startswith("ktlab:")]
    assert len(said) == 1 and words in said[0] and "Numba" in said[0], printed
    assert not list(tmp_path.rglob("*.so"))
    required = os.environ | environment | {"KTLAB_REQUIRE_NATIVE": "1"}
    with pytest.raises(AssertionError, match="setup.py build_ext"):
        run(*build, cwd=source, env=required)


# ---- one list of pins ----------------------------------------------------------------------------


def lock_lines() -> list[str]:
    text = (ROOT / "binder" / "requirements.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip() and line.lstrip()[0] != "#"]


def pins(python: str) -> dict[str, str]:
    """Name -> version of what the lock gives a Linux machine with this Python."""
    environment = {name: str(value) for name, value in default_environment().items()}
    environment |= {"python_version": python, "extra": ""}
    environment |= {"python_full_version": f"{python}.99", "sys_platform": "linux"}
    environment |= {"os_name": "posix", "platform_system": "Linux"}
    chosen: dict[str, str] = {}
    for line in lock_lines():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.name not in chosen, f"{requirement.name} twice for {python}"
            chosen[requirement.name] = str(requirement.specifier).removeprefix("==")
    return chosen


def metadata() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def runtime_requirements() -> list[Requirement]:
    # tomllib is not in Python 3.10; the list is one quoted requirement a line.
    block = re.search(r"^dependencies = \[\n(.*?)^\]", metadata(), re.MULTILINE | re.DOTALL)
    assert block
    return [Requirement(text) for text in re.findall(r'"([^"]+)"', block.group(1))]


def tool_requirements() -> list[Requirement]:
    lines = (ROOT / "binder" / "requirements.in").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_covers_what_we_ask_for(python: str) -> None:
    pinned = pins(python)
    for requirement in runtime_requirements() + tool_requirements():
        assert requirement.name in pinned, f"{requirement.name}: run `make lock`"
        assert requirement.specifier.contains(pinned[requirement.name]), requirement
    assert pinned["torch"] == "2.13.0"


def test_lock_is_portable() -> None:
    """Only pins: no address, no path, no CUDA."""
    for line in lock_lines():
        assert re.fullmatch(r"[\w.-]+==[\w.!+-]+( ; .+)?", line), line
    assert "://" not in (ROOT / "binder" / "requirements.txt").read_text(encoding="utf-8")
    cuda = ("nvidia", "cuda", "triton")
    assert not [line for line in lock_lines() if line.startswith(cuda)]


def test_binder_shares_the_lock() -> None:
    environment = yaml.safe_load((ROOT / "binder" / "environment.yml").read_text())
    conda = dict(
        part.split("=", 1)
        for part in environment["dependencies"]
        if isinstance(part, str) and "=" in part
    )
    pip = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    assert pip == ["-r requirements.txt"]
    assert conda["python"] in PYTHONS
    assert conda["pytorch-cpu"] == pins(conda["python"])["torch"]
    assert os.access(ROOT / "binder" / "postBuild", os.X_OK)


def test_metadata_agrees() -> None:
    assert f'\nversion = "{ktlab.__version__}"\n' in metadata()
    listed = re.findall(r"Python :: (3\.\d+)\"", metadata())
    assert tuple(listed) == PYTHONS
    assert 'requires-python = ">=3.10,<3.14"' in metadata()
