"""Latent attention in its two forms, grouped-query attention, cache and position embedding."""

from ktlab.attention.cache import Cache
from ktlab.attention.gqa import GQA
from ktlab.attention.mla import MLA
from ktlab.attention.stage import Attention

__all__ = ["GQA", "MLA", "Attention", "Cache"]
