"""A decoded token through a layer in one native call, against the same stage by stage."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.synthesis import (
    TINY_QWEN3MOE_CONFIG,
    TINY_TEST_CONFIG,
    TINY_V2_CONFIG,
    TINY_V2_GROUPS_CONFIG,
    TINY_YARN_CONFIG,
    synthesize,
)
from ktlab.errors import SettingError
from ktlab.kernels import computed, native
from ktlab.model.block import MoEBlock
from ktlab.model.interrupt import Interrupted, interruptible
from ktlab.model.model import Model
from ktlab.model.whole_layer import WholeLayer
from ktlab.probe import NO_PROBE, Recorder
from ktlab.routing.router import Router, Routing
from ktlab.routing.rules import RelativeThreshold

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason="no native kernels here")

UNSHARED = replace(TINY_TEST_CONFIG, name="tiny-test-unshared", num_shared_experts=0)
CONFIGS = (TINY_TEST_CONFIG, TINY_V2_CONFIG, TINY_V2_GROUPS_CONFIG, TINY_YARN_CONFIG, UNSHARED)
IDS = np.random.default_rng(0).integers(272, size=(1, 24))


def decoded(model: Model, **options: Any) -> Tensor:
    """Logits of each of 16 tokens after a prompt of 8, one call a token, and what was cached."""
    cache = model.new_cache(context=24)
    model.next_logits(IDS[:, :8], cache)
    found = [model.next_logits(IDS[:, at : at + 1], cache, **options) for at in range(8, 24)]
    return torch.cat([*found, *(layer.keys.reshape(1, -1) for layer in cache.layers)], dim=1)


def whole(model: Model) -> list[bool]:
    """Which layers took the last token in one call."""
    return [layer._whole is not None and layer._whole.usable for layer in model.layers]


@contextmanager
def stage_by_stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(WholeLayer, "usable", False)
        yield


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_is_the_layer_by_its_stages(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(synthesize(config))
    found = decoded(model)
    assert all(whole(model))
    with stage_by_stage(monkeypatch):
        torch.testing.assert_close(found, decoded(model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, decoded(model, probe=Recorder()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", [isa for isa, reason in native.isas().items() if not reason])
def test_with_quantized_weights_in_every_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(synthesize(TINY_TEST_CONFIG, formats="q8_0"))
    with model.override(isa=isa):
        found = decoded(model)
        assert all(whole(model))
        with stage_by_stage(monkeypatch):
            expected = decoded(model)
    # A last bit of a norm may move an activation's code: one step of 127.
    assert torch.linalg.vector_norm(found - expected) < 2e-3 * torch.linalg.vector_norm(expected)


def test_follows_every_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is changed between two tokens holds for the second, and back again."""
    model = Model(synthesize(TINY_TEST_CONFIG))
    plain = decoded(model)
    for words, in_one_call in (
        ({"top_k": 2}, True),
        ({"layout": "packed"}, True),
        ({"isa": "serial"}, True),
        ({"few": 3}, True),
        ({"rule": RelativeThreshold(0.6, k_max=4)}, False),
        ({"mask": {1: [3]}}, False),
        ({"force": {1: [3]}}, False),
        ({"backend": "torch"}, False),
        ({"attention": "naive"}, False),
        ({"threads": {"attention": 3}}, False),
    ):
        with model.override(**words):
            found = decoded(model)
            assert whole(model)[1] is in_one_call, words
            with stage_by_stage(monkeypatch):
                torch.testing.assert_close(found, decoded(model), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(decoded(model), plain, rtol=1e-4, atol=1e-5)
        assert all(whole(model)), words


def test_a_router_or_a_layer_of_ones_own_runs_stage_by_stage() -> None:
    class First(Router):
        """Always the first experts."""

        def forward(self, hidden_TD: Tensor) -> Routing:
            routing = super().forward(hidden_TD)
            return replace(routing, ids_TK=torch.arange(4).expand_as(routing.ids_TK))

    class Louder(MoEBlock):
        def feed_forward(self, hidden_TD: Tensor, probe: Any, later: Any = None) -> Tensor:
            return 2 * super().feed_forward(hidden_TD, probe, later)

    model = Model(synthesize(TINY_TEST_CONFIG))
    plain = decoded(model)
    layer = model.layers[1]
    assert isinstance(layer, MoEBlock)
    old = layer.router
    layer.router = First(model.config, 1, old.gate, old.bias_E)
    own = decoded(model)
    assert whole(model) == [True, False, True] and not torch.allclose(own, plain)
    layer.router = old
    torch.testing.assert_close(decoded(model), plain)
    layer.__class__ = Louder
    assert not torch.allclose(decoded(model), plain)


def test_grouped_queries_run_stage_by_stage() -> None:
    model = Model(synthesize(TINY_QWEN3MOE_CONFIG))
    assert torch.isfinite(decoded(model)).all()
    assert not any(whole(model))


def test_probes_that_look_inside_are_told_everything() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG))
    recorder = Recorder(("layers.1.router.ids", "layers.2.attention.q"))
    decoded(model, probe=recorder)
    assert {"layers.1.router", "layers.1.experts", "layers.1.shared"} <= set(recorder.seconds)
    assert len(recorder.joined()["layers.1.router.ids"]) == 16


def test_can_be_stopped_between_layers() -> None:
    cancel = threading.Event()
    model = interruptible(Model(synthesize(TINY_TEST_CONFIG)), cancel)
    cache = model.new_cache(context=8)
    model.next_logits(IDS[:, :1], cache)
    assert all(whole(model))
    cancel.set()
    assert model.watch is not None
    with pytest.raises(Interrupted):
        model.layers[1].forward(
            torch.zeros(1, 1, 64), cache.layers[1], torch.tensor([[1]]), model.watch(NO_PROBE)
        )


def test_a_cache_of_another_form_is_refused() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG))
    with model.override(attention="naive"):
        cache = model.new_cache(context=8)
    with pytest.raises(SettingError, match="the cache holds 'naive'"):
        model.next_logits(IDS[:, :1], cache)


def test_values_that_are_no_numbers_are_passed_on() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG))
    layer, cache = model.layers[1], model.new_cache(context=8).layers[1]
    for bad in (float("nan"), float("inf")):
        hidden = torch.zeros(1, 1, 64)
        hidden[..., 5] = bad
        out = layer.forward(hidden, cache, torch.zeros(1, 1, dtype=torch.int64))
        assert layer._whole is not None and layer._whole.usable
        assert not torch.isfinite(out).all()


def test_nothing_is_kept_alive_by_decoding_once_packed() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG, formats="q8_0"))
    decoded(model)
    assert all(whole(model))
    model.pack()
    assert not any(whole(model))
    found = decoded(model)
    assert all(whole(model)) and torch.isfinite(found).all()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_core_routes_as_the_router(config: ModelConfig) -> None:
    router = Model(synthesize(config)).layers[1].router
    core, experts = native.core(), config.num_experts
    gate = router.weight_ED.numpy()
    matrix = core.Matrix(
        gate.view(np.uint8).reshape(-1), "f32", "ggml_blocks", 1, experts, config.hidden_size
    )
    bias = None if router.bias_E is None else router.bias_E.numpy()
    made = core.Router(
        "serial", matrix, bias, config.gating == "sigmoid", config.norm_topk_prob,
        max(1, config.n_group), config.topk_group or 1, config.top_k,
        config.routed_scaling_factor,
    )  # fmt: skip
    pool, rng = core.Pool(1), np.random.default_rng(1)
    ids, weights = np.empty(config.top_k, np.int64), np.empty(config.top_k, np.float32)
    for _ in range(50):
        x = rng.normal(size=config.hidden_size).astype(np.float32)
        core.route(pool, made, x, ids, weights)
        expected = router.forward(torch.from_numpy(x)[None])
        assert ids.tolist() == expected.ids_TK[0].tolist()
        np.testing.assert_allclose(weights, expected.weights_TK[0], rtol=1e-5)
    for bad in (np.full(64, np.nan), np.full(64, np.inf)):
        core.route(pool, made, bad.astype(np.float32), ids, weights)
        assert ((ids >= 0) & (ids < experts)).all()


def test_small_banks_are_packed_unless_a_layout_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = Model(synthesize(TINY_TEST_CONFIG, formats="q8_0")).layers[1].experts
    assert bank.layout == "packed" and bank.explain().chosen.layout == "packed"
    assert bank.use(layout="ggml_blocks").layout == "ggml_blocks"
    assert bank.use(format="q4_0", layout="auto").layout == "packed"
    monkeypatch.setattr(computed, "PACKED_BYTES", bank.nbytes - 1)
    assert bank.use(layout="auto").layout == "ggml_blocks"


def test_all_layers_pass_in_one_call_and_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(synthesize(TINY_TEST_CONFIG))
    calls: list[int] = []
    layers_token = native.layers_token

    def counted(kernel: Any, layers: list[Any], *given: Any) -> Tensor:
        calls.append(len(layers))
        return layers_token(kernel, layers, *given)

    monkeypatch.setattr(native, "layers_token", counted)
    together = decoded(model)
    assert calls == [3] * 16
    with model.override(threads={"attention": 3}):
        decoded(model)  # kernels on different threads: not even one layer is one call
    assert calls == [3] * 16
    # Layers on different threads: each is a call of its own.
    monkeypatch.setattr(WholeLayer, "together", lambda _: False)
    assert torch.equal(decoded(model), together)
    assert calls == [3] * 16 + [1] * 48


def test_a_layer_that_defers_is_not_passed_with_the_others() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG))
    plain = decoded(model)
    with model.override(deferred=2):
        deferred = decoded(model)
    assert not torch.allclose(deferred, plain)
    torch.testing.assert_close(decoded(model), plain)
