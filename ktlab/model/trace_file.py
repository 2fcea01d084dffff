"""Traces on disk: one compressed .npz, metadata as JSON, arrays by name, no pickle."""

import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktlab.errors import TraceError

VERSION = 1
_METADATA, _ARRAY = "metadata.json", "array/"
# What NumPy and zipfile raise on foreign and damaged archives, once the file could be opened.
_DAMAGED = (
    KeyError, ValueError, EOFError, AttributeError, TypeError, OSError, RuntimeError, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip


def write(
    path: Path,
    metadata: Mapping[str, Any],
    own: Mapping[str, NDArray],
    arrays: Mapping[str, NDArray],
) -> Path:
    """Write whole or not at all; a suffix other than .npz is an error."""
    if path.suffix != ".npz":
        found = path.suffix or "no suffix"
        raise TraceError(f"{path}: expected a name that ends in .npz, found {found}")
    members: dict[str, Any] = {**own, **{_ARRAY + name: array for name, array in arrays.items()}}
    text = json.dumps({"ktlab_trace": VERSION, "members": sorted(members), **metadata})
    members[_METADATA] = np.frombuffer(text.encode(), np.uint8)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".npz.part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **members)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read(path: Path) -> tuple[dict[str, Any], dict[str, NDArray], dict[str, NDArray]]:
    """Metadata, the trace's own arrays and the recorded ones; TraceError if it is not a trace."""
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                members = {name: archive[name] for name in archive.files}
            metadata = json.loads(members.pop(_METADATA).tobytes())
            version = metadata.pop("ktlab_trace")
            if metadata.pop("members") != sorted(members):
                raise ValueError("some arrays are missing")
        except _DAMAGED as error:
            raise TraceError(
                f"{path}: expected a trace written by Trace.save, found something else or a "
                f"damaged file ({type(error).__name__}: {error}); record it again with model.trace"
            ) from error
    if version != VERSION:
        raise TraceError(
            f"{path}: expected trace version {VERSION}, found {version}; read it with the ktlab "
            "that wrote it, or record it again"
        )
    arrays = {n.removeprefix(_ARRAY): a for n, a in members.items() if n.startswith(_ARRAY)}
    own = {name: array for name, array in members.items() if not name.startswith(_ARRAY)}
    return metadata, own, arrays
