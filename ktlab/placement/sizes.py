"""Sizes as people write them: "24GB", "22.5 GiB", 14e9."""

import math
import re

from ktlab.errors import SettingError

UNITS = {
    "": 1, "B": 1,
    "K": 1e3, "KB": 1e3, "M": 1e6, "MB": 1e6, "G": 1e9, "GB": 1e9, "T": 1e12, "TB": 1e12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:[_,]\d{3})*(?:\.\d+)?(?:[eE]\d+)?)\s*([a-zA-Z]*)")


def parse_size(what: str, size: "str | int | float") -> int:
    """Bytes: a number, or text with a unit. GB counts in powers of 10, GiB in powers of 2.

    `what` names the argument in the SettingError for what is no size.
    """
    expected = 'expected bytes, or text such as "24GB" or "22.5GiB"'
    if isinstance(size, bool) or not isinstance(size, (str, int, float)):
        raise SettingError(f"{what}={size!r}: {expected}")
    if isinstance(size, str):
        found = _SIZE.fullmatch(size.strip())
        if found is None or found[2].upper() not in UNITS:
            raise SettingError(f"{what}={size!r}: {expected}; units: KB, MB, GB, TB, KiB, ... TiB")
        value = float(re.sub("[_,]", "", found[1])) * UNITS[found[2].upper()]
    else:
        value = float(size)
    if not math.isfinite(value) or not 0 < value < 2**60:
        raise SettingError(f"{what}={size!r} is no size of a memory: {expected}")
    return round(value)
