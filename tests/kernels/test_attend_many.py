"""Attention of a prompt over its latent cache on bfloat16 tiles, against float64."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from ktlab.kernels import native, products
from ktlab.kernels.dispatch import choose
from ktlab.kernels.request import EMULATED, Kernel, Request
from ktlab.kernels.stack import Stack
from ktlab.quantization import QTensor, get_format

ISAS = [
    isa
    for isa, reason in native.isas().items()
    if not reason and not native.unavailable() and native.attends_many(isa)
]
SHAPES = [  # heads, rank, nope, rope, values, tokens, positions
    (3, 96, 32, 16, 32, 20, 20),
    (2, 40, 24, 8, 24, 7, 33),
    (1, 64, 16, 8, 16, 1, 1),
    (1, 33, 17, 5, 19, 18, 18),
    (2, 64, 48, 40, 40, 40, 1100),  # beyond a run of positions, and most of them seen before
    (2, 32, 16, 32, 16, 600, 600),
]


def kernel(isa: str, threads: int = 2) -> Kernel:
    return choose(Request(backend="native", isa=isa, threads=threads), ("q4_0",))


@dataclass(frozen=True, kw_only=True)
class Case:
    q: Tensor
    q_rope: Tensor
    keys: Tensor
    k_b: Stack
    v_b: Stack
    scale: float

    def run(self, isa: str, threads: int = 2) -> Tensor:
        """On outputs that hold NaN before."""
        tokens, heads, _ = self.q.shape
        out = torch.full((tokens, heads, self.v_b.shape[1]), torch.nan)
        up = (self.k_b, self.v_b)
        k = kernel(isa, threads)
        products.attend_many(k, (self.q, self.q_rope), self.keys, up, self.scale, out)
        return out

    def exact(self) -> Tensor:
        """Equations of the naive form in float64; k_b and v_b as the kernel rounds them."""
        k_b, v_b = self.k_b.halves.double(), self.v_b.halves.double()
        latent, rope = self.keys.double().split((k_b.shape[1], self.q_rope.shape[2]), dim=-1)
        keys = torch.einsum("sc,hcn->hsn", latent, k_b)
        values = torch.einsum("sc,hvc->hsv", latent, v_b)
        scores = torch.einsum("thn,hsn->hts", self.q.double(), keys)
        scores += torch.einsum("thr,sr->hts", self.q_rope.double(), rope)
        tokens, positions = scores.shape[1:]
        own = torch.arange(tokens)[:, None] + positions - tokens
        hidden = torch.arange(positions)[None] > own
        weights = (scores * self.scale).masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hts,hsv->thv", weights, values)


def case(shape: tuple[int, ...], size: float = 1.0) -> Case:
    heads, rank, nope, rope, values, tokens, positions = shape
    g = torch.Generator().manual_seed(tokens + positions)

    def stack(rows: int, cols: int) -> Stack:
        weights = (torch.randn(heads, rows, cols, generator=g) / rank**0.5).numpy()
        blocks = weights.view(np.uint8).reshape(heads, rows, -1)
        f32 = get_format("f32")
        return Stack(QTensor(name="up", format=f32, shape=weights.shape, blocks=blocks, source=""))

    # Queries are a part of wider rows, keys rows of a wider cache.
    q = torch.randn(tokens, heads, nope + rope, generator=g) * size
    cache = torch.randn(positions + 2, rank + rope + 3, generator=g)
    return Case(
        q=q[..., :nope],
        q_rope=q[..., nope:].contiguous(),
        keys=cache[:positions, : rank + rope],
        k_b=stack(rank, nope),
        v_b=stack(values, rank),
        scale=(nope + rope) ** -0.5,
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_attention_within_the_rounding_of_bfloat16(isa: str, shape: tuple[int, ...]) -> None:
    this = case(shape)
    found, exact = this.run(isa), this.exact()
    assert float((found - exact).norm() / exact.norm()) < 6e-3
    for threads in (1, 3):
        assert torch.equal(found, this.run(isa, threads))


@pytest.mark.parametrize("isa", ISAS)
def test_a_token_sees_none_after_it(isa: str) -> None:
    this = case((2, 64, 32, 16, 32, 40, 70))
    before = this.run(isa)
    this.keys[60:] = 3.0
    after = this.run(isa)
    assert torch.equal(before[:30], after[:30]) and not torch.equal(before[30:], after[30:])


@pytest.mark.parametrize("isa", ISAS)
def test_huge_scores_do_not_overflow(isa: str) -> None:
    this = case((2, 64, 32, 16, 32, 40, 600), size=1e3)
    found, exact = this.run(isa), this.exact()
    assert found.isfinite().all()
    # One position takes all; rounding moves that one only where two are nearly alike.
    assert float(((found - exact).norm(dim=-1) < 0.02 * exact.norm(dim=-1)).double().mean()) > 0.8


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_query_stays_in_its_token_and_head(isa: str, bad: float) -> None:
    this = case((3, 64, 32, 16, 32, 40, 70))
    clean = this.run(isa)
    this.q_rope[7, 1, 3] = bad
    found = this.run(isa)
    assert found[7, 1].isnan().all()
    clean[7, 1] = found[7, 1] = 0
    assert torch.equal(found, clean)


@pytest.mark.skipif(len(ISAS) < 2, reason=f"no native tiles here, only {ISAS}")
@pytest.mark.parametrize("real", sorted(set(ISAS) - set(EMULATED)))
def test_the_emulation_is_the_processor(real: str) -> None:
    this = case((2, 40, 24, 8, 24, 37, 600))
    (emulated,) = set(ISAS) & set(EMULATED)
    torch.testing.assert_close(this.run(real), this.run(emulated), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not ISAS, reason=f"no native kernels here: {native.unavailable()}")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(keys=np.zeros((3, 20), np.float32)), "expected k_b .* keys of at least T rows"),
        (dict(keys=np.zeros((9, 21), np.float32)), "expected k_b .* keys of at least T rows"),
        (dict(v_b=np.zeros((2, 8, 15), np.int16)), "expected k_b .* v_b"),
        (dict(k_b=np.zeros((2, 16, 8), np.float32)), "k_b: expected 3 dimensions of 16-bit"),
        (dict(q=np.zeros((4, 3, 8), np.float32)), r"q: expected shape \(4, 2, ...\)"),
        (dict(q=np.zeros((4, 2, 16), np.float32)[..., ::2]), "q: expected a contiguous last axis"),
        (dict(y=np.zeros((4, 2, 16), np.float32)[..., ::2]), "y: expected a C-contiguous array"),
        (dict(isa="serial"), "serial cannot be used: it has no tiles of bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, np.ndarray], message: str) -> None:
    import ktlab_ext

    y = np.full((4, 2, 8), 7, np.float32)
    given = dict(
        isa=ISAS[-1],
        q=np.ones((4, 2, 8), np.float32),
        q_rope=np.ones((4, 2, 4), np.float32),
        keys=np.ones((9, 20), np.float32),
        k_b=np.ones((2, 16, 8), np.int16),
        v_b=np.ones((2, 8, 16), np.int16),
        scale=1.0,
        y=y,
    )
    assert ktlab_ext.native is not None
    with pytest.raises((ValueError, TypeError), match=message):
        ktlab_ext.native.attend_many(native.pool(2), **(given | changed))
    assert (y == 7).all()
