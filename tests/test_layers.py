"""Imports go one way: a module imports from itself and from what stands left of it in LAYERS.

Every import counts, also inside functions and under TYPE_CHECKING, and also a name handed to
importlib: a layer that is reached late is still reached.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ktlab"

# DESIGN order. Names in one group are peers, which may import to their left inside the group too.
LAYERS = (
    ("errors", "record", "memory", "hardware", "interval", "probe", "progress", "html", "figures"),
    ("quantization", "kernels"),
    ("checkpoint",),
    ("routing", "experts", "attention"),
    ("model",),
    ("placement",),
    ("measurement",),
    ("chat",),
    ("notebook",),
    ("cli", "local_chat"),
)
ORDER = {name: rank for rank, name in enumerate(name for group in LAYERS for name in group)}
# `import ktlab` from inside reaches every layer; only the outermost two may do that. The others may
# ask it for what is its own: __version__, __file__.
MAY_USE_FACADE = ("notebook", "cli", "local_chat")
# Only the dispatch table knows the native extension.
MAY_USE_NATIVE = ("kernels",)


def layer_of(path: Path) -> str:
    """`ktlab/routing/rules.py` -> `routing`; `ktlab/figures.py` -> `figures`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def package_of(path: Path) -> list[str]:
    return list(path.relative_to(ROOT).parent.parts)


def imported_names(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that the source imports, absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            first = node.args[0]
            if called.endswith(("import_module", "__import__")) and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def asks_only_for_dunders(tree: ast.AST, name: str) -> bool:
    """Whether `import ktlab` serves nothing but `ktlab.__version__` and the like."""
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ktlab"
    }
    return all(word.startswith("__") for word in (used if not name else {name}))


def wrong_imports(source: str, path: Path) -> list[str]:
    """What this module may not import, as `line: reason`."""
    here = layer_of(path)
    tree = ast.parse(source)
    wrong = []
    for line, name in imported_names(tree, package_of(path)):
        parts = name.split(".")
        if parts[0] == "ktlab_ext" and here not in MAY_USE_NATIVE:
            wrong.append(f"{line}: {name}: only ktlab.kernels imports the native extension")
        if parts[0] != "ktlab":
            continue
        there = parts[1] if len(parts) > 1 else ""
        if there not in ORDER:
            if here not in MAY_USE_FACADE and not asks_only_for_dunders(tree, there):
                wrong.append(f"{line}: {name}: import from the module that defines it")
        elif ORDER[there] > ORDER[here]:
            wrong.append(f"{line}: {name}: {here} stands left of {there}")
    return wrong


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    assert layer_of(path) in ORDER, f"{path.name}: give it a place in LAYERS"
    wrong = wrong_imports(path.read_text(encoding="utf-8"), path)
    assert not wrong, f"{path.relative_to(ROOT)}\n  " + "\n  ".join(wrong)


@pytest.mark.parametrize(
    ("where", "source", "refused"),
    [
        ("routing/rules.py", "from ktlab.errors import KtlabError", False),
        ("routing/rules.py", "from ..model import Model", True),
        ("routing/rules.py", "from .router import Router", False),
        ("routing/rules.py", "def late():\n    import ktlab.notebook.room", True),
        ("routing/rules.py", "import importlib\nimportlib.import_module('ktlab.cli')", True),
        ("routing/rules.py", "import ktlab\nktlab.load('tiny')", True),
        ("routing/rules.py", "import ktlab\nprint(ktlab.__version__)", False),
        ("routing/rules.py", "from ktlab import load", True),
        ("routing/rules.py", "import ktlab_ext", True),
        ("kernels/native.py", "import ktlab_ext", False),
        ("quantization/formats.py", "from ktlab.kernels import linear", True),
        ("cli.py", "import ktlab\nfrom ktlab.notebook import room", False),
    ],
)
def test_the_check_itself(where: str, source: str, refused: bool) -> None:
    assert bool(wrong_imports(source, PACKAGE / where)) == refused


def test_native_extension_knows_nothing_of_ktlab() -> None:
    """The C kernels and their Cython skin are usable, and testable, without the package."""
    pattern = re.compile(r"^\s*(?:from|import|cimport)\s+ktlab(?:\s|\.|$)", re.MULTILINE)
    for path in sorted((ROOT / "ktlab_ext").rglob("*")):
        if path.suffix in {".py", ".pyx", ".pxd", ".pxi"}:
            assert not pattern.search(path.read_text(encoding="utf-8")), path


def test_every_folder_is_a_package() -> None:
    """A folder without __init__.py would be left out of the wheel without a word."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    missing = [str(folder) for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing
