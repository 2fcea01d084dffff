"""Tables of notebook 04: the cache of one token, and work against bytes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ktlab.attention.cache import elements_per_token
from ktlab.checkpoint.config import MLASizes
from ktlab.errors import SettingError
from ktlab.notebook.mla_timing import work

if TYPE_CHECKING:
    import pandas as pd

    from ktlab.checkpoint.config import ModelConfig
    from ktlab.measurement.roofline import Ceilings
    from ktlab.model.model import Model

FORMS = ("naive", "absorbed")
_HEAD: dict[str, Any] = {"kv_lora_rank": 512, "qk_rope_dim": 64, "qk_nope_dim": 128, "v_dim": 128}
PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-V2-Lite": {
        "num_layers": 27,
        "attention": MLASizes(num_heads=16, q_lora_rank=0, **_HEAD),
    },
    "DeepSeek-V3": {
        "num_layers": 61,
        "attention": MLASizes(num_heads=128, q_lora_rank=1536, **_HEAD),
    },
}
"""What of their configurations decides the cache (config.json of the releases)."""


def token_cache_bytes(config: "ModelConfig", form: str, width: int) -> int:
    """Bytes that one token leaves in all layers, with numbers of `width` bytes."""
    return config.num_layers * width * elements_per_token(config, form)  # type: ignore[arg-type]


def check_latent(model: "Model") -> None:
    """`SettingError` for a model whose attention has one form only."""
    if not isinstance(model.config.attention, MLASizes):
        raise SettingError(
            f"{model.name} has grouped-query attention, which has one form: there is nothing to "
            "compare; load a model with latent attention (architecture deepseek2), such as "
            'ktlab.load("tiny")'
        )


def cache_frame(model: "Model") -> "pd.DataFrame":
    """The cache of one token: this model in float32, the published ones in 16 bits."""
    import pandas as pd

    check_latent(model)
    configs = {f"{model.name} (float32)": (model.config, 4)}
    for name, sizes in PUBLISHED.items():
        configs[f"{name} (16 bit)"] = (replace(model.config, **sizes), 2)
    rows = []
    for name, (config, width) in configs.items():
        naive, absorbed = (token_cache_bytes(config, form, width) for form in FORMS)
        row = {"model": name, "naive, bytes": f"{naive:,}", "absorbed, bytes": f"{absorbed:,}"}
        rows.append({**row, "ratio": f"{naive / absorbed:.1f}"})
    return pd.DataFrame(rows).set_index("model")


def work_frame(
    model: "Model", ceilings: "Ceilings", calls: Sequence[int], context: int
) -> "pd.DataFrame":
    """Work and bytes of attention in calls of so many tokens, and the least time for each."""
    import pandas as pd

    rows = []
    for tokens in calls:
        for form in FORMS:
            flop, nbytes = work(model, form, tokens, context)  # type: ignore[arg-type]
            rows.append(
                {
                    "tokens a call": tokens,
                    "form": form,
                    "MFLOP": f"{flop / 1e6:,.1f}",
                    "MB moved": f"{nbytes / 1e6:,.2f}",
                    "FLOP per byte": f"{flop / nbytes:.3g}",
                    "ms for arithmetic": f"{1e3 * flop / ceilings.gemm_flops:.3g}",
                    "ms for memory": f"{1e3 * nbytes / ceilings.bandwidth_for(nbytes):.3g}",
                }
            )
    return pd.DataFrame(rows).set_index(["tokens a call", "form"])
