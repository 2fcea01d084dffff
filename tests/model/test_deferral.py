"""Expert deferral against a slow reference: every layer written out, every expert on its own."""

import json
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import ktlab
from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.synthesis import (
    TINY_QWEN3MOE_CONFIG,
    TINY_TEST_CONFIG,
    TINY_V2_GROUPS_CONFIG,
    synthesize,
)
from ktlab.errors import SettingError
from ktlab.kernels.norm import rms_norm
from ktlab.measurement.compare import compare
from ktlab.model.block import MoEBlock
from ktlab.model.deferral import Later, split
from ktlab.model.model import Model
from ktlab.probe import Recorder
from ktlab.routing.rules import RelativeThreshold

CONFIGS = (TINY_TEST_CONFIG, TINY_V2_GROUPS_CONFIG, TINY_QWEN3MOE_CONFIG)
IDS = np.random.default_rng(0).integers(272, size=24)


def expert(block: MoEBlock, number: int, x_D: Tensor) -> Tensor:
    """One expert's SwiGLU."""
    bank = block.experts
    gate, up, down = (
        torch.from_numpy(w[number].dequantize()) for w in (bank.gate, bank.up, bank.down)
    )
    return down @ (F.silu(gate @ x_D) * (up @ x_D))


def reference(model: Model, ids: np.ndarray, deferred: Mapping[int, int]) -> Tensor:
    """(T, V) logits of one text: token by token where experts are concerned."""
    cache = model.new_cache()
    positions_BT = cache.positions(len(ids))
    hidden_BTD = model._embed(torch.from_numpy(ids)[None])
    waiting: list[list[tuple[MoEBlock, int, float, Tensor]]] = [[] for _ in ids]
    for block, layer_cache in zip(model.layers, cache.layers, strict=True):
        eps = model.config.rms_eps
        normed = rms_norm(hidden_BTD, block.attention_norm_D, eps)
        hidden_BTD = hidden_BTD + block.attention.forward(normed, layer_cache, positions_BT)
        x_TD = rms_norm(hidden_BTD, block.mlp_norm_D, eps)[0]
        out_TD = torch.zeros_like(x_TD)
        if not isinstance(block, MoEBlock):
            hidden_BTD = hidden_BTD + block.mlp.forward(x_TD)[None]
            continue
        routing = block.router.forward(x_TD)
        for t, x_D in enumerate(x_TD):
            arrived, waiting[t] = waiting[t], []
            chosen = [
                (float(w), -rank, int(e))
                for rank, (e, w) in enumerate(
                    zip(routing.ids_TK[t], routing.weights_TK[t], strict=True)
                )
                if e >= 0
            ]
            light = sorted(chosen)[: deferred.get(block.index, 0)]
            for weight, rank, number in chosen:
                if (weight, rank, number) in light:
                    waiting[t].append((block, number, weight, x_D))
                else:
                    out_TD[t] += weight * expert(block, number, x_D)
            for before, number, weight, x_before_D in arrived:
                out_TD[t] += weight * expert(before, number, x_before_D)
        if block.shared is not None:
            out_TD = out_TD + block.shared.forward(x_TD)
        hidden_BTD = hidden_BTD + out_TD[None]
    assert not any(waiting), "the last layer defers nothing"
    return model.output(rms_norm(hidden_BTD[0], model.output_norm_D, model.config.rms_eps))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("count", (1, 2, "all"))
def test_is_what_the_reference_computes(config: ModelConfig, count: int | str) -> None:
    model = Model(synthesize(config))
    number = config.top_k if isinstance(count, str) else count
    before = [block.index for block in model.moe_blocks[:-1]]
    with torch.inference_mode():
        expected = reference(model, IDS, dict.fromkeys(before, number))
        plain = reference(model, IDS, {})
    torch.testing.assert_close(model.forward(IDS), plain, rtol=1e-3, atol=1e-4)
    with model.override(deferred=number):
        found = model.forward(IDS)
        parts = model.forward(IDS, chunk=7)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(parts, expected, rtol=1e-3, atol=1e-4)
    assert (found - plain).abs().max() > 1e-3, "deferring changes the model"


def test_decodes_as_it_reads() -> None:
    """Token by token, where other layers are one native call, as a prompt at once."""
    model = Model(synthesize(TINY_TEST_CONFIG))
    for deferred in (2, {1: 3}):
        with model.override(deferred=deferred):
            cache = model.new_cache()
            steps = torch.cat([model.forward(IDS[t : t + 1], cache) for t in range(len(IDS))])
            torch.testing.assert_close(steps, model.forward(IDS), rtol=1e-3, atol=1e-4)
            used = [block._whole is not None for block in model.layers]
        deferring = [bool(block.deferred) for block in model.clone().layers]
        assert not any(deferring), "restored"
    assert used[1] is False, "a layer that defers is left to Python"


def test_none_deferred_is_bit_for_bit_the_model() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG))
    plain, cache = model.forward(IDS), model.new_cache()
    steps = [model.forward(IDS[t : t + 1], cache) for t in range(4)]
    for nothing in (0, {}, {1: 0, 2: 0}):
        with model.override(deferred=nothing):
            assert torch.equal(model.forward(IDS), plain)
            cache = model.new_cache()
            for t, expected in enumerate(steps):
                assert torch.equal(model.forward(IDS[t : t + 1], cache), expected)
            assert str(model.settings) == str(ktlab.Model(model.checkpoint).settings)
    block = model.layers[1]
    block.deferred = 2  # without somebody to hand them to
    hidden, layer_cache = torch.randn(1, 3, 64), model.new_cache().layers[1]
    alone = block.forward(hidden, layer_cache, torch.arange(3)[None])
    block.deferred = 0
    layer_cache = model.new_cache().layers[1]
    assert torch.equal(alone, block.forward(hidden, layer_cache, torch.arange(3)[None]))


@pytest.mark.parametrize("backend", ("native", "numba", "torch", "numpy"))
def test_every_backend_defers_all(backend: str) -> None:
    """A call in which no token selects anybody gives zeros."""
    model = Model(synthesize(TINY_TEST_CONFIG))
    with model.override(deferred=4):
        expected = model.forward(IDS[:6])
        try:
            with model.override(backend={"experts": backend}):
                found = model.forward(IDS[:6])
        except SettingError as error:
            pytest.skip(str(error))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@given(st.data(), st.integers(1, 5), st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_the_lightest_are_split_off(data: st.DataObject, width: int, count: int) -> None:
    row = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.5]), min_size=width, max_size=width)
    weights = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=4)))
    empty = torch.tensor(data.draw(st.lists(st.integers(0, width), min_size=len(weights),
                                            max_size=len(weights))))  # fmt: skip
    ids = torch.arange(width).expand(len(weights), -1).clone()
    ids[torch.arange(width) < empty[:, None]] = -1
    weights = weights.masked_fill(ids < 0, 0.0)
    heavy, light = split(ids, weights, count)
    for t in range(len(ids)):
        chosen = [(float(weights[t, k]), -k) for k in range(width) if ids[t, k] >= 0]
        deferred = {-k for _, k in sorted(chosen)[:count]}
        assert light[t].tolist() == [k if k in deferred else -1 for k in range(width)]
        kept = {-k for _, k in chosen} - deferred
        assert heavy[t].tolist() == [k if k in kept else -1 for k in range(width)]


def test_a_rule_that_takes_fewer_defers_what_there_is() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG))
    with model.override(rule=RelativeThreshold(0.9, k_max=4), deferred=3), torch.inference_mode():
        before = [block.index for block in model.moe_blocks[:-1]]
        expected = reference(model, IDS, dict.fromkeys(before, 3))
        torch.testing.assert_close(model.forward(IDS), expected, rtol=1e-3, atol=1e-4)


def test_it_is_live_shown_and_watched() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG))
    last = model.moe_blocks[-1].index
    with model.override(deferred=2):
        assert "deferred 2" in str(model.settings) and "2 deferred" in repr(model)
        assert json.loads(json.dumps(model.settings.to_dict()))["deferred"] == "2"
        assert model.settings.deferred == {i: 2 for i in model.config.moe_layers if i != last}
        with model.override(deferred={1: 0}):
            assert 1 not in model.settings.deferred
        recorder = Recorder(("layers.*.output",))
        model.forward(IDS, probe=recorder)
        assert "layers.1.deferred" in recorder.seconds
        assert recorder.joined()["layers.1.deferred.output"].shape == (24, 64)
        assert f"layers.{last}.deferred" not in recorder.seconds
    assert model.settings.deferred == {} and "defer" not in repr(model)


def test_compare_measures_what_it_costs() -> None:
    """On the embedded model: something, and less than leaving as many experts out."""
    model = ktlab.load("tiny")
    text = ktlab.domain_texts()["english"]
    found = {
        name: compare(model, text, a={}, b=b, max_tokens=512, speed=False).quality
        for name, b in {"later": {"deferred": 2}, "never": {"top_k": 6}}.items()
    }
    assert 0 < found["later"].kl_mean.low < found["later"].kl_mean.high < 0.1
    assert found["later"].top1_agreement.value > 90
    assert found["later"].kl_mean.value < 2 * found["never"].kl_mean.value


def test_what_cannot_be_deferred_is_refused() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG))
    last = model.moe_blocks[-1].index
    for bad, words in (
        ({last: 1}, f"layer {last} is the last one with experts"),
        (5, "expected a whole number from 0 to 4"),
        (-1, "expected a whole number from 0 to 4"),
        (True, "expected a whole number"),
        ("two", "expected a whole number"),
        ({0: 1}, r"layers \[0\] cannot take it"),
    ):
        with pytest.raises(SettingError, match=words):
            model.set(deferred=bad)
        assert model.settings.deferred == {}
    with model.override(deferred=3), pytest.raises(SettingError, match="deferred = 3"):
        model.set(top_k=2)
    with model.override(top_k=2, deferred=2):
        assert model.settings.deferred
    with pytest.raises(AssertionError):
        later = Later()
        later.leave(lambda _: torch.zeros(1))
        later.leave(lambda _: torch.zeros(1))
