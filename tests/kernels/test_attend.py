"""Attention of one token over keys that all heads share, against float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ktlab.kernels import native, products
from ktlab.kernels.dispatch import choose
from ktlab.kernels.request import Kernel, Request

ISAS = [isa for isa, reason in native.isas().items() if not reason]
SHAPES = [  # heads, positions, columns, values
    (16, 512, 576, 512),
    (8, 200, 80, 64),
    (5, 1, 37, 21),
    (9, 67, 37, 37),
    (3, 1100, 48, 32),
    (9, 1101, 37, 21),
    (40, 9000, 48, 32),
    (33, 600, 576, 512),
    (17, 300, 572, 512),  # rows of 576, as DeepSeek's: addresses that are constants
    (9, 1101, 64, 48),
    (8, 513, 96, 16),
    (16, 515, 32, 32),
]


def in_words(isa: str, heads: int, positions: int, cols: int, values: int) -> bool:
    """Whether integers of 16 bits take the place of float32, as ktl.h says."""
    fits = cols % 32 == 0 and values % 16 == 0
    return isa.startswith("avx512") and heads >= 8 and positions >= 512 and fits


def kernel(isa: str, threads: int = 2) -> Kernel:
    return choose(Request(backend="native", isa=isa, threads=threads), ("q4_0",))


def case(heads: int, positions: int, cols: int) -> tuple[Tensor, Tensor]:
    generator = torch.manual_seed(heads * positions)
    # Rows of a wider cache, which holds more positions than are seen.
    cache = torch.randn(positions + 3, cols + 4, generator=generator)
    return torch.randn(heads, cols, generator=generator), cache[:positions, :cols]


def exact(q: Tensor, keys: Tensor, values: int, scale: float) -> Tensor:
    keys = keys.double()
    return ((q.double() @ keys.T) * scale).softmax(-1) @ keys[:, :values]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "positions", "cols", "values"), SHAPES)
def test_attend_is_softmax_times_values(
    isa: str, heads: int, positions: int, cols: int, values: int
) -> None:
    q, keys = case(heads, positions, cols)
    found, expected = (
        products.attend(kernel(isa), q, keys, values, 0.2),
        exact(q, keys, values, 0.2),
    )
    if native.attends_many(isa) and heads >= 8 and positions >= 512:  # tiles of bfloat16
        assert 1e-5 < float((found - expected).norm() / expected.norm()) < 6e-3
    elif in_words(isa, heads, positions, cols, values):
        assert 1e-5 < float((found - expected).norm() / expected.norm()) < 1.2e-3
    else:
        torch.testing.assert_close(
            found, expected.float(), rtol=1e-4, atol=2e-5, check_stride=False
        )
    for threads in (1, 3):
        assert torch.equal(found, products.attend(kernel(isa, threads), q, keys, values, 0.2))


def test_without_native_kernels_torch_computes_the_same() -> None:
    q, keys = case(8, 200, 80)
    found = products.attend(choose(Request(backend="torch"), ("f32",)), q, keys, 64, 0.2)
    torch.testing.assert_close(found, exact(q, keys, 64, 0.2).float(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "positions"), [(8, 200), (8, 600), (40, 600)])
@pytest.mark.parametrize("cols", [80, 96])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_query_stays_in_its_head(
    isa: str, heads: int, positions: int, cols: int, bad: float
) -> None:
    q, keys = case(heads, positions, cols)
    clean = products.attend(kernel(isa), q, keys, 64, 0.2)
    q[3, 5] = bad
    found = products.attend(kernel(isa), q, keys, 64, 0.2)
    assert found[3].isnan().all()
    others = [h for h in range(heads) if h != 3]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "positions"), [(8, 200), (8, 600), (40, 600)])
@pytest.mark.parametrize("cols", [80, 96])
def test_huge_scores_do_not_overflow(isa: str, heads: int, positions: int, cols: int) -> None:
    q, keys = case(heads, positions, cols)
    found = products.attend(kernel(isa), q * 1e4, keys, 64, 1.0)
    best = keys[(q @ keys.T).argmax(-1), :64]
    # Integers of 16 bits are off by half of |key| / 32000.
    torch.testing.assert_close(found, best, rtol=4e-3, atol=2e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cols", [80, 96])
def test_integers_neither_overflow_nor_vanish(isa: str, cols: int) -> None:
    """Keys and queries of very different sizes, some of one number alone, some of none."""
    q, keys = case(8, 600, cols)
    keys *= torch.logspace(-3, 1, 600)[:, None]
    keys[100:200] = 0
    keys[300] = 0
    keys[300, 7] = 1e4
    q[2], q[4] = 0, q[4] * 1e-12
    q[5], q[5, 7] = 0, 1e3
    keys[400:] = keys[300]  # all of the same sign, to the end of what is summed at a time
    found, expected = products.attend(kernel(isa), q, keys, 64, 0.2), exact(q, keys, 64, 0.2)
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < 6e-3


@pytest.mark.parametrize("isa", ISAS)
def test_a_bad_key_is_seen(isa: str) -> None:
    q, keys = case(8, 600, 96)
    keys[77, 5] = torch.nan
    assert products.attend(kernel(isa), q, keys, 64, 0.2).isnan().any(dim=1).all()


@pytest.mark.skipif(not ISAS, reason=f"no native kernels here: {native.unavailable()}")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(keys=np.zeros((7, 20), np.float32)), "keys: expected at least one row of 24"),
        (dict(keys=np.zeros((0, 24), np.float32)), "keys: expected at least one row of 24"),
        (dict(y=np.zeros((4, 25), np.float32)), r"y: expected shape \(4, 1 to 24\)"),
        (dict(y=np.zeros((3, 16), np.float32)), r"y: expected shape \(4, 1 to 24\)"),
        (dict(q=np.zeros((4, 48), np.float32)[:, ::2]), "q: expected a C-contiguous array"),
        (dict(keys=np.zeros((7, 24))), "keys: expected 2 dimensions of float32"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, np.ndarray], message: str) -> None:
    import ktlab_ext

    arrays = dict(
        q=np.ones((4, 24), np.float32),
        keys=np.ones((7, 24), np.float32),
        y=np.full((4, 16), 7, np.float32),
    )
    given = arrays | changed
    with pytest.raises((ValueError, TypeError), match=message):
        assert ktlab_ext.native is not None
        ktlab_ext.native.attend(
            native.pool(2), "serial", given["q"], given["keys"], 1.0, given["y"]
        )
    assert (arrays["y"] == 7).all()
