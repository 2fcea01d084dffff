"""Every notebook runs from top to bottom in a fresh kernel, and is committed without results.

Where Chromium is, those of `IN_CHROMIUM` are run there, by the browser tests, and not again here.
A notebook is promised to take under 60 s on an idle 2-core machine; KTLAB_NOTEBOOK_LIMIT_S moves
that limit for a busy one. The run times are printed at the end of the test run.
"""

import os
import re
import shutil
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.browser.lab import find_chromium

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIMIT_S = float(os.environ.get("KTLAB_NOTEBOOK_LIMIT_S", "60"))
TIMEOUT_S = 180
IN_CHROMIUM = {
    "00_start": "test_chat.py",
    "03_expert_offload": "test_offload.py",
    "06_layouts_and_kernels": "test_layouts.py",
}
"""Notebook -> the browser test that runs all of its cells and looks for errors and stderr."""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_is_committed_without_results(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata, "saved widget state: clear it and save again"
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            assert not cell.outputs, f"cell {index} holds outputs: clear them and save again"
            assert cell.execution_count is None, f"cell {index} holds an execution count"


@each_notebook
def test_shell_commands_are_not_called_python(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for fenced in re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL):
                compile(fenced, path.name, "exec")


def test_the_browser_tests_run_what_is_left_to_them() -> None:
    assert set(IN_CHROMIUM) <= {path.stem for path in NOTEBOOKS}
    for stem, file in IN_CHROMIUM.items():
        source = (ROOT / "tests" / "browser" / file).read_text(encoding="utf-8")
        assert f'"{stem}.ipynb"' in source and "pytest.mark.skip" not in source
        assert "lab.run_all(" in source and "assert not lab.complaints()" in source


@pytest.mark.notebook
@each_notebook
def test_runs_from_top_to_bottom(
    path: Path, tmp_path: Path, notebook_seconds: dict[str, float]
) -> None:
    if path.stem in IN_CHROMIUM and find_chromium():
        pytest.skip(f"tests/browser/{IN_CHROMIUM[path.stem]} runs it in Chromium")
    # In a copy: a notebook that writes files writes them there.
    folder = tmp_path / "notebooks"
    shutil.copytree(path.parent, folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    notebook = nbformat.read(folder / path.name, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    started = time.monotonic()
    client.execute()
    seconds = time.monotonic() - started
    notebook_seconds[path.name] = seconds

    noise = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert not noise, "the notebook writes to stderr:\n" + "\n".join(noise)
    assert seconds < LIMIT_S, (
        f"{path.name} took {seconds:.1f} s, more than {LIMIT_S:.0f} s; "
        "on a busy machine set KTLAB_NOTEBOOK_LIMIT_S"
    )
