"""One token through a layer: what the skin's objects and calls refuse, and how they say so."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

HIDDEN, HEADS, NOPE, ROPE, LATENT, VALUE, EXPERTS, WIDTH = 32, 2, 16, 8, 24, 12, 6, 20


class Parts:
    """Valid arguments of every object and call of a layer, each replaceable."""

    def __init__(self, native: ModuleType) -> None:
        self.native, self.pool = native, native.Pool(1)
        self.rng = np.random.default_rng(3)

    def numbers(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def matrix(self, *shape: int) -> Any:
        data = self.numbers(*shape).view(np.uint8).reshape(-1)
        return self.native.Matrix(data, "f32", "ggml_blocks", *(1, *shape)[-3:])

    def mla(self, **changed: Any) -> Any:
        given = dict(
            q_a=None, q_a_norm=None, q_b=self.matrix(HEADS * (NOPE + ROPE), HIDDEN),
            kv_a=self.matrix(LATENT + ROPE, HIDDEN), kv_a_norm=self.numbers(LATENT),
            k_b=self.matrix(HEADS, LATENT, NOPE), v_b=self.matrix(HEADS, VALUE, LATENT),
            output=self.matrix(HIDDEN, HEADS * VALUE), halves=False, eps=1e-6, scale=0.2,
        ) | changed  # fmt: skip
        return self.native.MLA(**given)

    def router(self, **changed: Any) -> Any:
        given = dict(
            isa="serial", gate=self.matrix(EXPERTS, HIDDEN), bias=self.numbers(EXPERTS),
            sigmoid=True, normalise=True, groups=3, open_groups=2, top_k=2, scale=1.0,
        ) | changed  # fmt: skip
        return self.native.Router(**given)

    def experts(self, count: int = EXPERTS, **changed: Any) -> Any:
        given = dict(
            isa="serial", few=4, gate=self.matrix(count, WIDTH, HIDDEN),
            up=self.matrix(count, WIDTH, HIDDEN), down=self.matrix(count, HIDDEN, WIDTH),
        ) | changed  # fmt: skip
        return self.native.Experts(**given)

    def layer(self, **changed: Any) -> Any:
        given = dict(
            isa="serial", attention_norm=self.numbers(HIDDEN), mla=self.mla(),
            mlp_norm=self.numbers(HIDDEN),
            router=self.router(), routed=self.experts(), shared=self.experts(1),
        ) | changed  # fmt: skip
        return self.native.Layer(**given)

    def token(self, **changed: Any) -> np.ndarray:
        given = dict(
            layer=changed.get("layer") or self.layer(), turns=self.numbers(ROPE),
            x=self.numbers(HIDDEN), keys=self.numbers(3, LATENT + ROPE),
            y=np.full(HIDDEN, np.nan, np.float32),
        ) | changed  # fmt: skip
        one_a_layer = [given["layer"]], [given["turns"]], given["x"], [given["keys"]]
        self.native.layers_token(self.pool, *one_a_layer, given["y"])
        return given["y"]


@pytest.fixture
def parts(native: ModuleType) -> Parts:
    return Parts(native)


def test_every_number_is_written_and_inputs_are_kept_alive(parts: Parts) -> None:
    layer, x, keys = parts.layer(), parts.numbers(HIDDEN), parts.numbers(3, LATENT + ROPE)
    turns, before = parts.numbers(ROPE), keys.copy()
    first = parts.token(layer=layer, turns=turns, x=x, keys=keys)
    assert np.isfinite(first).all()
    assert (keys[:2] == before[:2]).all() and (keys[2] != before[2]).all()
    assert (parts.token(layer=layer, turns=turns, x=x, keys=keys) == first).all()
    dense = parts.layer(router=None, routed=parts.experts(1), shared=None)
    assert np.isfinite(parts.token(layer=dense)).all()


MLA_WRONG = {
    "kv_a": ((LATENT + ROPE + 1, HIDDEN), "even number of rows"),
    "q_b": ((HEADS * (NOPE + ROPE) + 1, HIDDEN), "q_b: expected 1 x 48 x 32"),
    "v_b": ((HEADS, VALUE, LATENT + 1), "v_b: expected 2 x 12 x 24"),
    "output": ((HIDDEN, HEADS * VALUE + 1), "output: expected 1 x 32 x 24"),
}


@pytest.mark.parametrize("name", MLA_WRONG)
def test_attention_refuses_matrices_that_do_not_fit(parts: Parts, name: str) -> None:
    shape, message = MLA_WRONG[name]
    with pytest.raises(ValueError, match=message):
        parts.mla(**{name: parts.matrix(*shape)})


def test_attention_with_compressed_queries(parts: Parts) -> None:
    q_a, q_b = parts.matrix(10, HIDDEN), parts.matrix(HEADS * (NOPE + ROPE), 10)
    mla = parts.mla(q_a=q_a, q_a_norm=parts.numbers(10), q_b=q_b)
    assert np.isfinite(parts.token(layer=parts.layer(mla=mla))).all()
    with pytest.raises(ValueError, match="q_a_norm: expected 10 numbers, found 9"):
        parts.mla(q_a=q_a, q_a_norm=parts.numbers(9), q_b=q_b)
    with pytest.raises(ValueError, match="q_b: expected 1 x 48 x 10"):
        parts.mla(q_a=q_a, q_a_norm=parts.numbers(10))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"groups": 4}, "groups that divide 6 experts"),
        ({"open_groups": 0}, "found 3 groups, 0 open"),
        ({"top_k": 5}, "top_k: expected 1 to 4, found 5"),
        ({"top_k": 0}, "top_k: expected 1 to 4"),
        ({"bias": np.zeros(5, np.float32)}, "bias: expected 6 numbers"),
        ({"isa": "amx_int8_emulated"}, "cannot be used"),
    ],
    ids=str,
)
def test_the_router_refuses(parts: Parts, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parts.router(**changed)


def test_experts_and_layers_refuse_what_does_not_fit(parts: Parts) -> None:
    with pytest.raises(ValueError, match="down: expected 6 x 32 x 20"):
        parts.experts(down=parts.matrix(EXPERTS, HIDDEN, WIDTH + 1))
    with pytest.raises(ValueError, match="router: expected 5 rows"):
        parts.layer(routed=parts.experts(5))
    with pytest.raises(ValueError, match="shared: expected 1 expert"):
        parts.layer(shared=parts.experts(2))
    with pytest.raises(ValueError, match="routed: expected 1 expert"):
        parts.layer(router=None)
    with pytest.raises(ValueError, match="mlp_norm: expected 32 numbers, found 31"):
        parts.layer(mlp_norm=parts.numbers(HIDDEN - 1))
    with pytest.raises(ValueError, match="cannot be used"):
        parts.layer(isa="amx_int8_emulated")
    with pytest.raises(TypeError):
        parts.layer(mla=None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"turns": np.zeros(ROPE + 2, np.float32)}, "turns: expected 8 numbers"),
        ({"x": np.zeros(HIDDEN + 1, np.float32)}, "x: expected 32 numbers"),
        ({"y": np.zeros(HIDDEN - 1, np.float32)}, "y: expected 32 numbers"),
        ({"keys": np.zeros((0, LATENT + ROPE), np.float32)}, "keys: expected rows of 32"),
        ({"keys": np.zeros((3, LATENT), np.float32)}, "keys: expected rows of 32"),
    ],
    ids=str,
)
def test_a_token_refuses(parts: Parts, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parts.token(**changed)


def test_several_layers_are_one_after_the_other(parts: Parts) -> None:
    layers = [parts.layer(), parts.layer(router=None, routed=parts.experts(1)), parts.layer()]
    turns, x = [parts.numbers(ROPE) for _ in layers], parts.numbers(HIDDEN)
    caches = [parts.numbers(3 + i, LATENT + ROPE) for i in range(3)]
    one_by_one, y = [cache.copy() for cache in caches], x
    for layer, turned, keys in zip(layers, turns, one_by_one, strict=True):
        y = parts.token(layer=layer, turns=turned, x=y, keys=keys)
    for count in (3, 2):
        found = np.full(HIDDEN, np.nan, np.float32)
        given = layers[:count], turns[:count], x, [cache.copy() for cache in caches[:count]]
        parts.native.layers_token(parts.pool, *given, found)
        assert (found == y).all() if count == 3 else np.isfinite(found).all()
        assert all((a == b).all() for a, b in zip(given[3], one_by_one, strict=False))


def test_layers_refuse_what_does_not_fit_together(parts: Parts) -> None:
    layer, y = parts.layer(), np.full(HIDDEN, 7, np.float32)
    turns, x, keys = parts.numbers(ROPE), parts.numbers(HIDDEN), parts.numbers(3, LATENT + ROPE)
    for given in (([], [], []), ([layer] * 2, [turns], [keys]), ([layer], [turns], [keys] * 2)):
        with pytest.raises(ValueError, match="expected layers, and turns and keys for each"):
            parts.native.layers_token(parts.pool, given[0], given[1], x, given[2], y)
    with pytest.raises(TypeError):
        parts.native.layers_token(parts.pool, [layer, None], [turns] * 2, x, [keys] * 2, y)
    with pytest.raises(ValueError, match="keys: expected rows of 32"):
        parts.native.layers_token(parts.pool, [layer] * 2, [turns] * 2, x, [keys, keys[:0]], y)
    assert (y == 7).all()


def test_a_token_needs_an_output_of_its_own(parts: Parts) -> None:
    x = parts.numbers(HIDDEN + 4)
    for y in (x[:HIDDEN], x[4:]):
        with pytest.raises(ValueError, match="share memory"):
            parts.token(x=x[:HIDDEN], y=y)


def test_routing_refuses_wrong_outputs(parts: Parts) -> None:
    router, x = parts.router(), parts.numbers(HIDDEN)
    with pytest.raises(ValueError, match="ids: expected 2 numbers, found 3"):
        parts.native.route(parts.pool, router, x, np.zeros(3, np.int64), parts.numbers(2))
    with pytest.raises(ValueError, match="weights: expected 2 numbers, found 1"):
        parts.native.route(parts.pool, router, x, np.zeros(2, np.int64), parts.numbers(1))
