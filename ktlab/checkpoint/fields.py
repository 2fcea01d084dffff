"""Typed values out of what a file says of its model, with everything that is wrong collected."""

from collections.abc import Mapping

from ktlab.errors import short

LARGEST = 2**31
"""No count in a configuration is as large as this."""
LARGEST_NUMBER = 1e300


class FieldReader:
    """Takes values out of metadata by key, after `prefix`, and collects `problems` with them."""

    def __init__(self, metadata: Mapping[str, object], prefix: str = "") -> None:
        self.metadata, self.prefix = metadata, prefix
        self.problems: list[str] = []

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        return self.prefix + key in self.metadata

    def get(self, key: str, default: object = None) -> object:
        """The value as it is."""
        return self.metadata.get(self.prefix + key, default)

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least`; a missing key without a default is a problem."""
        value = self.get(key, default)
        if value is None:
            self.problems.append(f"{self.prefix}{key} is missing (expected a whole number)")
        elif isinstance(value, bool) or not isinstance(value, int) or not least <= value < LARGEST:
            self.problems.append(
                f"{self.prefix}{key} is {short(value)}, expected a whole number from {least}"
            )
        else:
            return value
        return least

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number >= 0; a missing key without a default is a problem."""
        value = self.get(key, default)
        if value is None:
            self.problems.append(f"{self.prefix}{key} is missing (expected a number)")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            self.problems.append(f"{self.prefix}{key} is {short(value)}, expected a number")
        elif not 0 <= value <= LARGEST_NUMBER:  # NaN is neither
            self.problems.append(f"{self.prefix}{key} is {short(value)}, expected a number >= 0")
        else:
            return float(value)
        return 1.0

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.problems.append(f"{self.prefix}{key} is {short(value)}, expected true or false")
        return bool(value)
