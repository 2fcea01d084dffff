"""Every expert kernel against the NumPy reference in float64, at every shape that matters."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ktlab.errors import SettingError
from ktlab.experts.bank import ExpertBank
from ktlab.kernels import dispatch, reference
from ktlab.kernels.dispatch import EXPERT_KERNELS
from ktlab.quantization import QTensor

EXPERTS, HIDDEN, WIDTH = 12, 64, 96
BACKENDS = [kernel.backend for kernel in EXPERT_KERNELS]


def make_bank(format: str, seed: int = 0) -> ExpertBank:
    generator = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> QTensor:
        values = generator.standard_normal(shape) / np.sqrt(shape[-1])
        return QTensor.from_array(name, values, format)

    return ExpertBank(
        0,
        weight("gate", EXPERTS, WIDTH, HIDDEN),
        weight("up", EXPERTS, WIDTH, HIDDEN),
        weight("down", EXPERTS, HIDDEN, WIDTH),
    )


def make_call(tokens: int, top_k: int, seed: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(top_k).indices
    ids[torch.rand(tokens, top_k, generator=generator) < 0.2] = -1
    weights = torch.rand(tokens, top_k, generator=generator) * (ids >= 0)
    return hidden, ids, weights


def judge(bank: ExpertBank, *call: torch.Tensor) -> NDArray[np.float64]:
    hidden, ids, weights = (t.numpy() for t in call)
    return reference.moe(bank.gate, bank.up, bank.down, hidden, ids, weights, dtype=np.float64)


@pytest.mark.parametrize("tokens", [1, 2, 7, dispatch.NUMBA_TOKENS + 1, 200])
@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_against_the_reference(backend: str, top_k: int, tokens: int) -> None:
    bank = make_bank("q8_0")
    bank.backend = backend
    call = make_call(tokens, top_k)
    expected = judge(bank, *call)
    found = bank.forward(*call)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5 * np.abs(expected).max())


def test_the_reference_against_one_token_at_a_time() -> None:
    bank = make_bank("f32")
    hidden, ids, weights = make_call(5, 3)
    gate, up, down = (w.dequantize().astype(np.float64) for w in (bank.gate, bank.up, bank.down))
    expected = np.zeros((5, HIDDEN))
    for t in range(5):
        x = hidden[t].numpy().astype(np.float64)
        for e, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            if e >= 0:
                g = gate[e] @ x
                expected[t] += weight * (down[e] @ (g / (1 + np.exp(-g)) * (up[e] @ x)))
    np.testing.assert_allclose(judge(bank, hidden, ids, weights), expected, atol=1e-12)


def test_nobody_selected_gives_zero() -> None:
    hidden, _, _ = make_call(4, 2)
    nobody = torch.full((4, 2), -1)
    for backend in BACKENDS:
        bank = make_bank("q8_0")
        bank.backend = backend
        assert not bank.forward(hidden, nobody, torch.zeros(4, 2)).any()


def test_auto_takes_numba_for_few_tokens_and_torch_for_many() -> None:
    bank = make_bank("q8_0")
    few, many = bank.explain(tokens=1), bank.explain(tokens=dispatch.NUMBA_TOKENS + 1)
    assert [v.backend for v in few if v.status == "chosen"] == ["numba"]
    assert [v.backend for v in many if v.status == "chosen"] == ["torch"]
    bank.forward(*make_call(1, 2))
    assert list(bank.prepared_bytes) == ["numba"]


def test_a_named_backend_never_falls_back() -> None:
    bank = make_bank("q4_0")
    bank.backend = "numba"
    with pytest.raises(SettingError, match="computes q8_0 only, this bank has q4_0; usable here"):
        bank.forward(*make_call(1, 2))
    bank.backend = "auto"
    rejected = {v.backend: v.reason for v in bank.explain() if v.status == "rejected"}
    assert "q8_0 only" in rejected["numba"]
    with pytest.raises(SettingError, match='did you mean "numba"'):
        dispatch.check_backend("nunba")


def test_requantized_bank_falls_back_as_llama_cpp_does() -> None:
    bank = make_bank("f32").quantized("q4_k")  # rows of 64 and 96 do not fit blocks of 256
    assert bank.formats == ("q5_0", "q5_0", "q5_0")
    assert bank.num_experts == EXPERTS and bank.nbytes < make_bank("f32").nbytes / 5
