"""Creates the peers' environments in .peers/, once: `.venv/bin/python binder/make_peers.py`.

`make peers` calls this with the interpreter of .venv. Each peer that `ktlab bench --peers` measures
has an environment of its own, made from binder/peers-NAME.txt; the file `ready` in it holds the
hash of that list, so that a second call installs nothing. llama.cpp is compiled (about 12 minutes
on 2 cores; pip keeps the wheel). KTLAB_PEERS names another folder; arguments name some peers only.
Standard library only.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

BINDER = Path(__file__).resolve().parent
PEERS = Path(os.environ.get("KTLAB_PEERS") or BINDER.parent / ".peers")
PREFIX = "peers-"
NAMES = sorted(path.stem.removeprefix(PREFIX) for path in BINDER.glob(f"{PREFIX}*.txt"))
BUILD = {
    # For this machine's processor; without the programs and the picture models.
    "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF "
    "-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF",
}


def make(name: str) -> None:
    """Create or bring up to date one environment."""
    folder, requirements = PEERS / name, BINDER / f"{PREFIX}{name}.txt"
    ready, log = folder / "ready", folder / "install.log"
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    if ready.exists() and ready.read_text().strip() == wanted:
        print(f"{name} is ready in {folder}", flush=True)
        return
    started = time.monotonic()
    print(f"{name}: installing into {folder}; what pip says is in {log}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    interpreter = str(base) if base.exists() else sys.executable
    subprocess.run([interpreter, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-v"]
    with log.open("w") as file:
        code = subprocess.run(
            [*pip, "--no-input", "--no-deps", "-r", requirements],
            env=os.environ | BUILD,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    if code != 0:
        lines = log.read_text(errors="replace").splitlines()[-15:]
        raise SystemExit("\n".join([*lines, f"{name}: pip failed; its whole output: {log}"]))
    ready.write_text(wanted + "\n")
    print(f"{name} is ready after {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    unknown = [name for name in sys.argv[1:] if name not in NAMES]
    if unknown:
        raise SystemExit(f"unknown peer {', '.join(unknown)}; there are {', '.join(NAMES)}")
    for name in sys.argv[1:] or NAMES:
        make(name)


if __name__ == "__main__":
    main()
