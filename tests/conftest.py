"""What all tests share: no network, no traces in the home folder, honest skips, notebook times."""

import os

import pytest
from hypothesis import settings

# Before transformers or Jupyter are imported anywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait must not burn the other core: see CONTRIBUTING.md, "Tries that lost".
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shared machine's clock says nothing about a property; CI repeats the same examples.
settings.register_profile("ktlab", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("ktlab")

BROWSER_REQUIRED = os.environ.get("KTLAB_REQUIRE_BROWSER") == "1"
SECONDS = pytest.StashKey[dict[str, float]]()
BROWSER_PASSED = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SECONDS] = {}
    config.stash[BROWSER_PASSED] = 0


@pytest.fixture(scope="session", autouse=True)
def _private_jupyter(tmp_path_factory: pytest.TempPathFactory):
    """Jupyter and IPython write into a temporary folder, and read no settings of the user's."""
    place = tmp_path_factory.mktemp("jupyter")
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setenv(name, str(place / name.lower()))
        yield


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU: rules that name one are told, not done."""
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture(scope="session")
def notebook_seconds(request: pytest.FixtureRequest) -> dict[str, float]:
    """Filled by test_notebooks.py, printed at the end of the run."""
    return request.config.stash[SECONDS]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = (yield).get_result()
    if report.when == "call" and report.passed and item.get_closest_marker("browser"):
        item.config.stash[BROWSER_PASSED] += 1


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """CI asks for the browser tests: a run without one is a failed run."""
    if BROWSER_REQUIRED and exitstatus == 0 and not session.config.stash[BROWSER_PASSED]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    if config.stash[SECONDS]:
        terminalreporter.section("notebooks, from top to bottom")
        for name, seconds in sorted(config.stash[SECONDS].items()):
            terminalreporter.line(f"{seconds:6.1f} s  {name}")
    if BROWSER_REQUIRED and not config.stash[BROWSER_PASSED]:
        terminalreporter.section("KTLAB_REQUIRE_BROWSER=1", red=True)
        terminalreporter.line("no browser test passed, so this run has failed")
