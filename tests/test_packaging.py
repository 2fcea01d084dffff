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


def run(*command: object, **options) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        **options,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once, from a copy, so that no build/ or egg-info appears in the clone."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "build")
    for name in ("ktlab", "ktlab_ext", "data"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", work, source)
    return next(work.glob("ktlab-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that holds the wheel, and borrows the dependencies of this one."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel)
    # A path in a .pth file is added as it is: .pth files inside it (the clone's editable install
    # among them) are not read, so the only ktlab is the wheel's.
    borrowed = sysconfig.get_path("purelib")
    site = next((place / "lib").glob("python*")) / "site-packages"
    (site / "borrowed.pth").write_text(borrowed + "\n")
    return place


def test_wheel_holds_what_it_should(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ktlab").rglob("*.py")}
    assert modules <= set(names)
    assert "ktlab/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "data/", "notebooks/"))]
    assert not [name for name in names if name.startswith("ktlab/data/") and "recipe" in name]
    assert wheel.stat().st_size < WHEEL_BYTES


@needs_tiny
def test_wheel_holds_the_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "ktlab/data/tiny.gguf" in names
    texts = {f"ktlab/data/texts/{path.name}" for path in (ROOT / "data" / "texts").glob("*.txt")}
    assert texts <= names


@needs_tiny
def test_load_away_from_the_clone(installed: Path, tmp_path: Path) -> None:
    code = (
        "import json, pathlib, ktlab\n"
        "model = ktlab.load('tiny')\n"
        "logits = model.forward(model.tokenizer.encode('The history of'))\n"
        "print(json.dumps([str(pathlib.Path(ktlab.__file__)), list(logits.shape),"
        " model.config.vocab_size]))"
    )
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    printed = run(installed / "bin" / "python", "-c", code, cwd=tmp_path, env=environment)
    where, shape, vocab_size = json.loads(printed.splitlines()[-1])
    assert Path(where).is_relative_to(installed)
    assert shape[1] == vocab_size
    assert "usage" in run(installed / "bin" / "ktlab", "--help", cwd=tmp_path).lower()


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
