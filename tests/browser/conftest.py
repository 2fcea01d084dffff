"""Fixtures of the browser tests: `lab` is a tab in Chromium on a JupyterLab of the tests' own.

Without Chromium the tests are skipped and say how to get it; KTLAB_REQUIRE_BROWSER=1, which CI
sets, makes that a failure.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.browser.lab import CHROMIUM_ARGS, ROOT, Lab, Server, find_chromium, start_server

HOW_TO_GET_IT = "no Chromium here; on Debian or Ubuntu: apt-get install chromium, then make test"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = find_chromium()
    if chromium is None:
        if os.environ.get("KTLAB_REQUIRE_BROWSER") == "1":
            pytest.fail(HOW_TO_GET_IT)
        pytest.skip(HOW_TO_GET_IT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=list(CHROMIUM_ARGS), headless=True
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def notebook_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of notebooks/, which the server serves and the tests may write to."""
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    source = ROOT / "notebooks"
    if source.exists():
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    else:
        folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def server(
    browser: Browser, notebook_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with start_server(notebook_folder, tmp_path_factory.mktemp("jupyter-server")) as server:
        yield server


@pytest.fixture
def lab(browser: Browser, server: Server, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A fresh tab; afterwards its kernels are shut down. A failed test leaves a picture."""
    context = browser.new_context()
    lab = Lab(page=context.new_page(), server=server)
    failed_before = request.session.testsfailed
    yield lab
    if request.session.testsfailed > failed_before:
        lab.screenshot(f"failed-{request.node.name}")
    context.close()
    for session in server.request("GET", "/api/sessions"):
        server.request("DELETE", f"/api/sessions/{session['id']}")
