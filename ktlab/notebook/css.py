"""Style sheets of the live views: files beside this one, inlined where they are used (no CDN)."""

from functools import cache
from pathlib import Path


@cache
def style(name: str) -> str:
    """`<style>...</style>` with the contents of `ktlab/notebook/{name}.css`."""
    css = Path(__file__).with_name(f"{name}.css").read_text(encoding="utf-8")
    return f"<style>{css}</style>"
