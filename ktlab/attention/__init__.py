"""Multi-head latent attention in its two forms, its cache and its position embedding."""

from ktlab.attention.cache import Cache
from ktlab.attention.mla import MLA

__all__ = ["MLA", "Cache"]
