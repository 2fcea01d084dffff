"""Matrices of the dense part: one a head, small ones packed, and the norm between them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ktlab.kernels import computed, linear, native, reference
from ktlab.kernels.linear import Linear
from ktlab.kernels.norm import rms_norm
from ktlab.kernels.request import BACKENDS
from ktlab.quantization import QTensor

needs_native = pytest.mark.skipif(bool(native.unavailable()), reason="no native kernels here")


def matrix(shape: tuple[int, ...], format: str) -> Linear:
    values = np.random.default_rng(0).standard_normal(shape, np.float32) / 10
    return Linear(QTensor.from_array("w", values, format))


@pytest.mark.parametrize("small", [0, 1 << 30], ids=["native", "torch"])
@pytest.mark.parametrize(("format", "bound"), [("f32", 1e-5), ("q8_0", 5e-3), ("q5_0", 1e-2)])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_by_head_multiplies_each_head_by_its_own_matrix(
    tokens: int, format: str, bound: float, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "SMALL", small)
    heads = matrix((4, 48, 32), format)
    # A slice of wider rows, as queries without their position part are.
    x_THK = torch.randn(tokens, 4, 40, generator=torch.manual_seed(1))[..., :32]
    expected = torch.einsum("thk,hnk->thn", x_THK.double(), heads.weight_OI.double())
    found = heads.by_head(x_THK)
    assert found.shape == (tokens, 4, 48)
    assert float((found - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", [word for word in BACKENDS if word != "auto"])
def test_floats_of_every_kind_are_multiplied(backend: str, kind: torch.dtype) -> None:
    if backend == "native" and native.unavailable():
        pytest.skip(native.unavailable())
    w, heads = matrix((50, 64), "q8_0").use(backend=backend), matrix((4, 48, 32), "q8_0")
    x = torch.randn(5, 80, generator=torch.manual_seed(1)).to(kind)[:, :64].requires_grad_()
    expected = x.double() @ w.weight_OI.double().T
    found = w(x)
    assert found.dtype == torch.float32
    assert float((found - expected).detach().norm() / expected.detach().norm()) < 5e-3
    x_THK = torch.randn(5, 4, 32, generator=torch.manual_seed(1)).to(kind)
    by_head = torch.einsum("thk,hnk->thn", x_THK.double(), heads.weight_OI.double())
    assert float((heads.by_head(x_THK) - by_head).norm() / by_head.norm()) < 5e-3


def test_the_reference_holds_some_rows_as_floats_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix((50, 64), "q8_0").weight
    x_TK = np.random.default_rng(1).standard_normal((3, 64), np.float32)
    whole, shapes = reference.linear(weight, x_TK), []
    monkeypatch.setattr(reference, "ROWS", 16)
    floats = QTensor.dequantize

    def dequantize(self: QTensor) -> np.ndarray:
        shapes.append(self.shape)
        return floats(self)

    monkeypatch.setattr(QTensor, "dequantize", dequantize)
    assert np.allclose(reference.linear(weight, x_TK), whole)
    assert shapes == [(16, 64)] * 3 + [(2, 64)]


@needs_native
def test_small_matrices_are_packed_where_nothing_else_is_named() -> None:
    small = matrix((64, 96), "q8_0")
    assert small.layout == "packed" and small.explain().chosen.layout == "packed"
    assert small.use(layout="ggml_blocks").layout == "ggml_blocks"
    assert small.use(layout="auto").layout == "packed"
    assert small.use(backend="torch").kernel.backend == "torch"


@needs_native
def test_large_matrices_stay_as_they_lie_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computed, "PACKED_BYTES", 1000)
    assert matrix((64, 96), "q8_0").layout == "ggml_blocks"


@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (2, 7, 64)])
def test_rms_norm_is_torchs(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.manual_seed(0)) * 3
    weight_D = torch.rand(64, generator=torch.manual_seed(1))
    before = x.clone()
    expected = F.rms_norm(x, (64,), weight_D, eps=1e-6)
    torch.testing.assert_close(rms_norm(x, weight_D, 1e-6), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, before)
