"""MLA: both forms give the same numbers, RoPE depends on distances alone, caches are accounted."""

from dataclasses import replace

import pytest
import torch

import ktlab
from ktlab.attention import mla
from ktlab.attention.cache import Cache, elements_per_token
from ktlab.attention.mla import MLA
from ktlab.attention.rope import RoPE, frequencies, softmax_scale
from ktlab.checkpoint.synthesis import (
    TINY_TEST_CONFIG,
    TINY_V2_CONFIG,
    TINY_YARN_CONFIG,
    synthesize,
)
from ktlab.errors import ContextError, SettingError
from ktlab.kernels import native, products
from ktlab.model.model import Model
from ktlab.probe import Recorder


def attend(model: Model, form: str, hidden: torch.Tensor) -> torch.Tensor:
    attention = model.layers[0].attention
    with model.override(attention=form):
        cache = model.new_cache(batch=len(hidden), context=hidden.shape[1])
        return attention.forward(hidden, cache.layers[0], cache.positions(hidden.shape[1]))


@pytest.mark.parametrize(
    "config", [TINY_TEST_CONFIG, TINY_V2_CONFIG, TINY_YARN_CONFIG], ids=lambda c: c.name
)
def test_absorbed_equals_naive(config: object) -> None:
    model = Model(synthesize(config, seed=2))  # type: ignore[arg-type]
    hidden = torch.randn(3, 40, 64, generator=torch.manual_seed(0))
    absorbed, naive = (attend(model, form, hidden) for form in ("absorbed", "naive"))
    torch.testing.assert_close(absorbed, naive, rtol=1e-4, atol=1e-5)


def test_attention_is_causal() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG))
    hidden = torch.randn(1, 20, 64, generator=torch.manual_seed(0))
    changed = hidden.clone()
    changed[:, 12:] += 1.0
    for form in ("absorbed", "naive"):
        before, after = attend(model, form, hidden), attend(model, form, changed)
        assert torch.equal(before[:, :12], after[:, :12])
        assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_rope_scores_depend_on_the_distance_alone() -> None:
    rope = RoPE(TINY_TEST_CONFIG)
    q, k = torch.randn(2, 16, generator=torch.manual_seed(1))

    def score(at: int, seen: int) -> float:
        turns = (rope.places(torch.tensor([[p]])).turns_BTr[0, 0] for p in (at, seen))
        turned = [rope.rotate(x, turn) for x, turn in zip((q, k), turns, strict=True)]
        return float(turned[0] @ turned[1])

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    yarn = TINY_YARN_CONFIG.yarn
    assert yarn is not None
    ratio = frequencies(TINY_YARN_CONFIG) / frequencies(TINY_TEST_CONFIG)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / yarn.factor)
    assert (ratio.diff() <= 1e-7).all()
    assert softmax_scale(TINY_YARN_CONFIG) > softmax_scale(TINY_TEST_CONFIG)


def test_cached_numbers_per_token() -> None:
    c = TINY_TEST_CONFIG
    assert elements_per_token(c, "absorbed") == 32 + 16
    assert elements_per_token(c, "naive") == 4 * (32 + 16 + 32)
    cache = Cache(c, ["absorbed", "naive"], batch=2, context=10)
    assert cache.nbytes == 4 * 2 * 10 * (48 + 320)


def test_impossible_caches_and_forms() -> None:
    with pytest.raises(ContextError, match="at least 1"):
        Cache(TINY_TEST_CONFIG, ["naive"], batch=1, context=0)
    with pytest.raises(ContextError, match="context of 513.*has 512"):
        Cache(TINY_TEST_CONFIG, ["naive"], batch=1, context=513)
    with pytest.raises(SettingError, match="expected one of absorbed, naive"):
        Model(synthesize(TINY_TEST_CONFIG)).set(attention="flash")


@pytest.mark.parametrize("bytes_at_once", [1, 1 << 26], ids=["head by head", "all heads"])
def test_long_prompts_over_the_latent_give_the_same_numbers(
    bytes_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values made anew for many queries, from an empty cache and beyond a filled one."""
    monkeypatch.setattr(mla, "DECOMPRESSED_BYTES", bytes_at_once)
    model = Model(synthesize(TINY_YARN_CONFIG))
    attention = model.layers[0].attention
    hidden = torch.randn(2, 30, 64, generator=torch.manual_seed(0))
    outputs = []
    for pays in (False, True):
        monkeypatch.setattr(MLA, "_decompression_pays", lambda self, tokens, pays=pays: pays)
        cache = model.new_cache(batch=2, context=40).layers[0]
        at = torch.stack((torch.arange(20), torch.arange(20)))
        first = attention.forward(hidden[:, :20], cache, at)
        # The second sequence goes on at another place, as after a shorter text.
        then = torch.stack((torch.arange(20, 30), torch.arange(15, 25)))
        outputs.append(torch.cat((first, attention.forward(hidden[:, 20:], cache, then)), dim=1))
        alone = model.new_cache(context=40).layers[0]
        outputs[-1] = torch.cat(
            (outputs[-1], attention.forward(hidden[:1], alone, torch.arange(30)[None]))
        )
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(bool(native.unavailable()), reason="no native kernels here")
@pytest.mark.parametrize("q_lora_rank", [0, 32])
@pytest.mark.parametrize("halves", [False, True])
def test_a_token_in_one_call_is_the_token_by_its_operations(
    q_lora_rank: int, halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = replace(TINY_YARN_CONFIG.mla, q_lora_rank=q_lora_rank)
    model = Model(synthesize(replace(TINY_YARN_CONFIG, attention=sizes)))
    attention = model.layers[0].attention
    assert isinstance(attention, MLA)
    attention._rope.halves = halves
    hidden = torch.randn(1, 12, 64, generator=torch.manual_seed(0))
    names = ("layers.0.attention.q", "layers.0.attention.latent")

    def outputs() -> list[torch.Tensor]:
        cache, recorder = model.new_cache(context=12).layers[0], Recorder(names)
        found = [attention.forward(hidden[:, :8], cache, torch.arange(8)[None])]
        for at in range(8, 12):
            place = torch.tensor([[at]])
            found.append(attention.forward(hidden[:, at : at + 1], cache, place, recorder))
        return [*found, cache.keys, *(recorder.joined()[name] for name in names)]

    whole = outputs()
    token = attention.whole_token()
    assert token is not None and token.holds()
    monkeypatch.setattr(MLA, "whole_token", lambda self: None)
    for found, expected in zip(whole, outputs(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(bool(native.unavailable()), reason="no native kernels here")
def test_a_token_goes_by_its_operations_where_kernels_differ() -> None:
    attention = Model(synthesize(TINY_YARN_CONFIG)).layers[0].attention
    assert isinstance(attention, MLA)
    before = attention.whole_token()
    assert before is not None
    attention.weights.output.use(threads=3)
    assert attention.whole_token() is None
    attention.weights.output.use(threads=None)
    after = attention.whole_token()
    assert after is not None and after is not before
    for linear in attention.linears.values():
        linear.use(backend="torch")
    assert attention.whole_token() is None


@pytest.mark.skipif(bool(native.unavailable()), reason="no native kernels here")
def test_long_prompts_are_computed_on_tiles_where_the_kernels_have_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model(synthesize(TINY_YARN_CONFIG, formats={"*_b.weight": "q8_0", "*": "f32"}))
    attention = model.layers[0].attention
    assert isinstance(attention, MLA)
    hidden = torch.randn(2, 30, 64, generator=torch.manual_seed(0))
    monkeypatch.setattr(MLA, "_decompression_pays", lambda *_: True)

    def output() -> torch.Tensor:
        cache = model.new_cache(batch=2, context=40).layers[0]
        at = torch.arange(20).expand(2, -1)
        first = attention.forward(hidden[:, :20], cache, at)
        # The second sequence goes on at another place, as after a shorter text.
        then = torch.stack((torch.arange(20, 30), torch.arange(15, 25)))
        return torch.cat((first, attention.forward(hidden[:, 20:], cache, then)), dim=1)

    for linear in (attention.weights.k_b, attention.weights.v_b):
        linear.use(backend="torch")
    exact = output()
    for linear in (attention.weights.k_b, attention.weights.v_b):
        linear.use(backend="auto", isa="amx_bf16_emulated")
    error = float((output() - exact).norm() / exact.norm())
    assert 1e-5 < error < 1e-2


@pytest.mark.skipif(bool(native.unavailable()), reason="no native kernels here")
def test_prompts_multiply_bfloat16_on_avx512_where_nobody_named_another_isa() -> None:
    if reason := native.isas()["avx512_bf16"]:
        pytest.skip(reason)
    model = Model(synthesize(TINY_YARN_CONFIG, formats={"*_b.weight": "q8_0", "*": "f32"}))
    weights = model.layers[0].attention.weights
    up = (weights.k_b, weights.v_b)

    def found(**words: str) -> str | None:
        for linear in up:
            linear.use(backend="auto", isa="auto", layout="auto")
            linear.use(**words)
        kernel = products.many_kernel(*up)
        return None if kernel is None else kernel.isa

    if not native.reject("amx_bf16", ("q8_0",)):
        assert found() == "amx_bf16"
    else:
        assert found() == "avx512_bf16"
    assert found(isa="avx512_vnni") is None, "named, so not left for another"
    assert found(isa="avx512_bf16") == "avx512_bf16"
    assert found(backend="torch") is None
    floats = Model(synthesize(TINY_YARN_CONFIG, formats={"*": "f32"})).layers[0].attention.weights
    assert products.many_kernel(floats.k_b, floats.v_b) is None, "float32 keeps its bits"


def test_decompression_pays_for_prompts_and_not_for_tokens() -> None:
    attention = ktlab.load("tiny").layers[0].attention
    assert isinstance(attention, MLA)
    assert not attention._decompression_pays(1) and attention._decompression_pays(512)
    absorbed = attention.config.attention.flop_per_pair["absorbed"]
    pairs = 512 * 513 / 2
    projections = sum(2 * linear.stack.size for linear in attention.linears.values())
    assert attention.flop(512, 512) < 512 * projections + pairs * absorbed
