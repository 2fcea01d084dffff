"""Creates .venv from the lock, once: `python3 binder/make_venv.py`.

`make lab` and `make test` call this first. By hand it is

    python3 -m venv .venv
    .venv/bin/pip install -r binder/requirements.txt -e .

A stamp in .venv holds the hash of the lock, so a second call installs nothing; when the lock
changes, pip brings the same .venv up to date. A second stamp holds the hash of the C kernels'
sources: when one changes, what it needs is compiled again. Nothing outside the repository's folder
is written, but for pip's own download cache. Standard library only, and
syntax old enough that an unsupported Python gets an explanation instead of a SyntaxError.
"""

import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
LOCK = os.path.join(ROOT, "binder", "requirements.txt")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "ktlab-stamp")
NATIVE_STAMP = os.path.join(VENV, "ktlab-native-stamp")
LOG = os.path.join(VENV, "install.log")
OLDEST, NEWEST = (3, 10), (3, 13)


def say(text: str) -> None:
    print(text, flush=True)


def digest_of(names: "list[str]", *words: str) -> str:
    digest = hashlib.sha256("\n".join((ROOT,) + words).encode())
    for name in names:
        digest.update(name.encode())
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(hashlib.sha256(file.read()).digest())
    return digest.hexdigest()


def fingerprint() -> str:
    """Hash of all that decides what .venv holds: the lock, the package's metadata, the place."""
    return digest_of(
        ["binder/requirements.txt", "binder/overrides.json", "pyproject.toml", "setup.py"]
    )


def native_fingerprint() -> str:
    """Hash of all that decides what the C kernels are: their sources, the flags, the compiler."""
    sources = glob.glob(os.path.join(ROOT, "ktlab_ext", "csrc", "*.*"))
    sources += glob.glob(os.path.join(ROOT, "ktlab_ext", "*.px*"))
    names = sorted(os.path.relpath(path, ROOT) for path in sources)
    return digest_of(
        names + ["setup.py"],
        os.environ.get("KTLAB_NO_NATIVE", "0"),
        shutil.which(os.environ.get("CC", "gcc")) or "",
    )


def holds(stamp: str, value: str) -> bool:
    if not os.path.exists(stamp):
        return False
    with open(stamp) as file:
        return file.read().strip() == value


def is_current() -> bool:
    return os.path.exists(VENV_PYTHON) and holds(STAMP, fingerprint())


def check_version() -> None:
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        found = "{}.{}.{}".format(*sys.version_info[:3])
        others = [name for name in map("python3.{}".format, (12, 13, 11, 10)) if shutil.which(name)]
        known = f"on this machine: {', '.join(others)}" if others else "none of them is on the PATH"
        raise SystemExit(
            f"ktlab needs Python 3.10, 3.11, 3.12 or 3.13; found {found} at {sys.executable}.\n"
            f"Name another one ({known}): make lab PYTHON={others[0] if others else 'python3.12'}"
        )


def is_usable() -> bool:
    """Whether .venv is there, was not moved, and holds this interpreter's version."""
    if not os.path.exists(VENV_PYTHON) or not os.path.exists(os.path.join(VENV, "bin", "pip")):
        return False
    ask = "import sys; print(sys.prefix, sys.version_info[:2])"
    run = subprocess.run([VENV_PYTHON, "-c", ask], stdout=subprocess.PIPE)
    return run.stdout.decode().strip() == f"{VENV} {sys.version_info[:2]}"


def create_venv() -> None:
    if os.path.exists(VENV):
        shutil.rmtree(VENV)
    run = subprocess.run([sys.executable, "-m", "venv", VENV], stdout=subprocess.PIPE)
    if run.returncode != 0 or not os.path.exists(os.path.join(VENV, "bin", "pip")):
        shutil.rmtree(VENV, ignore_errors=True)
        raise SystemExit(
            "{} -m venv failed{}\nOn Debian and Ubuntu the module is a package of its own: "
            "apt-get install python3-venv".format(
                sys.executable, ":\n" + run.stdout.decode(errors="replace") if run.stdout else "."
            )
        )


def pip_install(arguments: "list[str]", total: int, **environment: str) -> None:
    """Runs pip, shows how far it is, keeps its whole output in .venv/install.log."""
    command = [VENV_PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "--no-input"]
    live = sys.stdout.isatty()
    tail = []  # type: list[str]
    seen, shown = 0, time.monotonic()
    with open(LOG, "a") as log:
        process = subprocess.Popen(
            command + arguments,
            cwd=ROOT,
            env=dict(os.environ, **environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            tail = (tail + [line])[-25:]
            text = ""
            found = re.match(r"(?:Collecting|Requirement already satisfied:) ([^\s;]+)", line)
            if found:
                seen += 1
                text = f"      {min(seen, total)} of about {total}: {found.group(1)}"
            elif line.startswith("Installing collected packages") and total > 1:
                text = "      unpacking all of them (about a minute)"
            elif line.lstrip().startswith("Downloading") and "MB" in line:
                text = "      " + line.strip()
            if text and live:
                print("\r\033[K" + text[:100], end="", flush=True)
            elif text and (time.monotonic() - shown > 5 or "unpacking" in text):
                shown = time.monotonic()
                say(text)
        code = process.wait()
    if live:
        print("\r\033[K", end="", flush=True)
    if code != 0:
        raise SystemExit("pip failed:\n{}\nIts whole output: {}".format("".join(tail), LOG))


def configure() -> None:
    """JupyterLab's defaults in this environment: no news, no update check; both ask a network."""
    settings = os.path.join(VENV, "share", "jupyter", "lab", "settings")
    os.makedirs(settings, exist_ok=True)
    shutil.copy(os.path.join(ROOT, "binder", "overrides.json"), settings)


def build_native() -> None:
    """Compiles the C kernels in place. Where that cannot be, one line says why, and Numba works."""
    for old in glob.glob(os.path.join(ROOT, "ktlab_ext", "_native.*.so")):
        os.unlink(old)
    run = subprocess.run(
        [VENV_PYTHON, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with open(LOG, "a") as log:
        log.write(run.stdout)
    for line in run.stdout.splitlines():
        if line.startswith("ktlab:"):
            say(f"      {line}; see {os.path.relpath(LOG, ROOT)}")
    if run.returncode != 0:
        raise SystemExit("the C kernels' build failed:\n" + run.stdout[-3000:])


def install() -> None:
    check_version()
    with open(LOCK) as file:
        total = len({line.split("==")[0] for line in file if "==" in line})
    version = "{}.{}.{}".format(*sys.version_info[:3])
    if is_usable():
        say(f"[1/4] .venv with Python {version} is there; the lock has changed")
    else:
        say(f"[1/4] a fresh .venv with Python {version} ({sys.executable})")
        create_venv()
    say("[2/4] the pinned packages of binder/requirements.txt; minutes the first time")
    pip_install(["-r", LOCK], total)
    say("[3/4] ktlab itself, editable")
    # The kernels come in a step of their own, which keeps what it has compiled.
    pip_install(["--no-deps", "--no-build-isolation", "-e", ROOT], 1, KTLAB_NO_NATIVE="1")
    configure()
    with open(STAMP, "w") as file:
        file.write(fingerprint() + "\n")


def main() -> None:
    named = "--named" in sys.argv  # the user chose this interpreter, so .venv must be made of it
    started = time.monotonic()
    if not is_current() or (named and not is_usable()):
        install()
    if not holds(NATIVE_STAMP, native_fingerprint()):
        say("[4/4] the C kernels; minutes the first time, then only what has changed")
        build_native()
        with open(NATIVE_STAMP, "w") as file:
            file.write(native_fingerprint() + "\n")
    if time.monotonic() - started > 1:
        say(f"ready in {time.monotonic() - started:.0f} s; the next start installs nothing")


if __name__ == "__main__":
    main()
