"""JupyterLab in a real browser, for tests: a server of its own, and a page that remembers errors.

`start_server` runs JupyterLab on a free port with a token, over a folder of the test's own.
`Lab` is one browser tab on it: open a notebook, run it, wait, take a picture, look for complaints.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import ConsoleMessage, Locator, Page

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / ".artifacts" / "screenshots"

CHROMIUM_ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# A line of the server's log (which is also where kernels write) that no run may leave behind.
COMPLAINT = re.compile(r"Traceback \(most recent call last\)|^\[[EC] |\bError:|\bException\b")
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@dataclass(kw_only=True)
class Server:
    """A running JupyterLab: its address, its folder, its log."""

    url: str
    token: str
    folder: Path
    log: Path

    def request(self, method: str, path: str, body: object = None) -> Any:
        """One call of Jupyter Server's REST API."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"token {self.token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def configure(self, plugin: str, **values: object) -> None:
        """A user setting of JupyterLab, such as the theme; read by the next page load."""
        raw = json.dumps(values)
        self.request("PUT", f"/lab/api/settings/@jupyterlab/{plugin}", {"raw": raw})

    def complaints(self, start: int = 0) -> list[str]:
        """What the server and its kernels wrote that looks like an error, from a byte on."""
        text = self.log.read_bytes()[start:].decode(errors="replace")
        return [line for line in text.splitlines() if COMPLAINT.search(line)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def start_server(folder: Path, private: Path) -> Iterator[Server]:
    """JupyterLab over `folder`; all that it writes about itself goes under `private`."""
    port, token = free_port(), secrets.token_hex(16)
    environment = dict(os.environ, IPYTHONDIR=str(private / "ipython"))
    for name in ("CONFIG", "DATA", "RUNTIME"):
        environment[f"JUPYTER_{name}_DIR"] = str(private / name.lower())
    for name in ("SETTINGS", "WORKSPACES"):
        environment[f"JUPYTERLAB_{name}_DIR"] = str(private / name.lower())
    log = private / "server.log"
    private.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
        *("--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"),
        *(f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"),
        *("--expose-app-in-browser", "--LabApp.news_url=None"),
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        server = Server(url=f"http://127.0.0.1:{port}", token=token, folder=folder, log=log)
        try:
            _wait_until_up(server, process)
            server.configure("apputils-extension:notification", fetchNews="false")
            # A saved view has no model behind it: the next to open the notebook would complain.
            server.configure("docmanager-extension:plugin", autosave=False)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_up(server: Server, process: subprocess.Popen, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            server.request("GET", "/api/status")
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{server.log.read_text(errors='replace')}")


@dataclass(kw_only=True)
class Lab:
    """One tab of the browser on one server."""

    page: Page
    server: Server
    timeout_s: float = 240
    """Of a wait. Costs nothing when things go well, and other tests may have the cores."""
    errors: list[str] = field(default_factory=list)
    log_start: int = 0

    def __post_init__(self) -> None:
        self.page.set_default_timeout(self.timeout_s * 1000)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.errors.append(f"page: {error}"))
        self.log_start = self.server.log.stat().st_size

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            where = message.location.get("url", "")
            self.errors.append(f"console: {message.text} ({where})")

    # ---- a notebook ------------------------------------------------------------------------------

    def open(
        self, name: str, *, theme: str = "light", width: int = 1280, height: int = 900
    ) -> None:
        """Shows a notebook of the server's folder, alone on the page, in a fresh kernel."""
        self.server.configure("apputils-extension:themes", theme=THEMES[theme])
        self.page.set_viewport_size({"width": width, "height": height})
        path = urllib.parse.quote(name)
        workspace = f"test-{secrets.token_hex(4)}"
        self.page.goto(
            f"{self.server.url}/doc/workspaces/{workspace}/tree/{path}?token={self.server.token}"
        )
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.page.wait_for_function(
            "theme => document.body.dataset.jpThemeName === theme", arg=THEMES[theme]
        )
        self.page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.context?.sessionContext"
            "?.session?.kernel?.status === 'idle'"
        )

    def run_all(self, timeout_s: float = 120) -> None:
        """Runs every cell, and returns when the last one is done."""
        self.page.evaluate(
            """async (limit_ms) => {
                const late = new Promise((_, refuse) =>
                    setTimeout(() => refuse(new Error('the cells take too long')), limit_ms));
                const run = window.jupyterapp.commands.execute('notebook:run-all-cells');
                await Promise.race([run, late]);
            }""",
            timeout_s * 1000,
        )
        errors = [output for output in self.outputs() if output["output_type"] == "error"]
        assert not errors, "\n".join("\n".join(error["traceback"]) for error in errors)

    def outputs(self) -> list[dict[str, Any]]:
        """All outputs of the open notebook, in nbformat's form."""
        notebook = self.page.evaluate(
            "() => window.jupyterapp.shell.currentWidget.content.model.toJSON()"
        )
        return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]

    def cell_of(self, source: str) -> int:
        """Index of the first code cell that contains `source`."""
        cells = self.page.evaluate(
            "() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells"
        )
        return next(
            i
            for i, c in enumerate(cells)
            if c["cell_type"] == "code" and source in "".join(c["source"])
        )

    def show_cell(self, index: int) -> None:
        """Scrolls to a cell: JupyterLab keeps cells that are far away out of the page."""
        self.page.evaluate(
            "index => window.jupyterapp.shell.currentWidget.content.scrollToItem(index, 'start')",
            index,
        )

    # ---- what is on the page ---------------------------------------------------------------------

    def wait_for(self, selector: str, timeout_s: float | None = None) -> Locator:
        """The first element that matches, once it is visible."""
        found = self.page.locator(selector).first
        found.wait_for(timeout=None if timeout_s is None else timeout_s * 1000)
        return found

    def wait_until(
        self, expression: str, timeout_s: float | None = None, arg: object = None
    ) -> Any:
        """The value of a JavaScript expression (or function), once it is true."""
        limit = None if timeout_s is None else timeout_s * 1000
        return self.page.wait_for_function(expression, arg=arg, timeout=limit).json_value()

    def seconds_until(self, expression: str, action: Any, timeout_s: float = 30) -> float:
        """How long after `action()` the expression became true, by the browser's own clock."""
        self.page.evaluate(
            """(source) => {
                const holds = eval('() => (' + source + ')');
                const started = performance.now();
                window.ktlabSeconds = null;
                const look = () => {
                    if (holds()) window.ktlabSeconds = (performance.now() - started) / 1000;
                    else requestAnimationFrame(look);
                };
                document.addEventListener('click', () => requestAnimationFrame(look),
                    {once: true, capture: true});
            }""",
            expression,
        )
        action()
        return float(self.wait_until("() => window.ktlabSeconds", timeout_s))

    def screenshot(self, name: str, selector: str | None = None) -> Path:
        """A picture of the page, or of one element, in .artifacts/screenshots (ignored by git)."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        if selector is None:
            self.page.screenshot(path=path)
        else:
            self.page.locator(selector).first.screenshot(path=path)
        return path

    def complaints(self) -> list[str]:
        """Errors of the page, of the notebook's cells, of the server and of its kernels."""
        noise = [
            f"cell: {output.get('text') or output.get('evalue')}"
            for output in self.outputs()
            if output["output_type"] == "error" or output.get("name") == "stderr"
        ]
        return self.errors + noise + self.server.complaints(self.log_start)
