"""Every expert kernel against the NumPy reference in float64, at every shape that matters."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ktlab.errors import SettingError
from ktlab.experts.bank import ExpertBank
from ktlab.experts.banks import ExpertBanks, layers
from ktlab.kernels import native, reference
from ktlab.kernels.request import BACKENDS as WORDS
from ktlab.quantization import QTensor

EXPERTS, HIDDEN, WIDTH = 12, 64, 96
BACKENDS = [word for word in WORDS if word not in ("auto", native.unavailable() and "native")]
BOUND = {"native": 0.03}
"""Native kernels round activations to 8 bits, 1 % for each of three products; the others do not."""


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


@pytest.mark.parametrize("tokens", [1, 2, 7, 49, 200])
@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_against_the_reference(backend: str, top_k: int, tokens: int) -> None:
    bank = make_bank("q8_0")
    bank.backend = backend
    call = make_call(tokens, top_k)
    expected = judge(bank, *call)
    found = bank.forward(*call)
    assert found.dtype == torch.float32
    bound = BOUND.get(backend, 2e-5) * np.abs(expected).max()
    np.testing.assert_allclose(found.numpy(), expected, atol=bound)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_and_ids_of_every_kind_are_taken(backend: str) -> None:
    bank = make_bank("q8_0").use(backend=backend)
    hidden, ids, weights = make_call(7, 3)
    for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x, w = hidden.to(kind), weights.to(kind)
        expected = judge(bank, x.float(), ids, w.float())
        for narrow in (ids, ids.int(), ids.to(torch.int16)):
            found = bank.forward(x.clone().requires_grad_(), narrow, w)
            assert found.dtype == torch.float32 and not found.requires_grad
            bound = BOUND.get(backend, 2e-5) * np.abs(expected).max()
            np.testing.assert_allclose(found.numpy(), expected, atol=bound)
    with pytest.raises(TypeError, match=r"ids: expected integers, found torch\.float32"):
        bank.forward(hidden, ids.float(), weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_that_do_not_fit_are_refused_and_empty_ones_are_not(backend: str) -> None:
    bank = make_bank("q8_0").use(backend=backend)
    hidden, ids, weights = make_call(4, 2)
    for wrong in (EXPERTS, -2, 2**40):
        bad = ids.clone()
        bad[2, 1] = wrong
        with pytest.raises(ValueError, match=f"expected .*-1.*nobody.*, found {wrong}"):
            bank.forward(hidden, bad, weights)
    shapes = (
        (hidden, ids[:3], weights[:3]),
        (hidden[:3], ids, weights),
        (hidden, ids, weights[1:]),
    )
    for call in shapes:
        with pytest.raises(ValueError, match=r"ids and weights.*\(\d, (k|selected)\)"):
            bank.forward(*call)
    with pytest.raises(ValueError, match=f"expected .*{HIDDEN}.*found"):
        bank.forward(hidden[:, :-1], ids, weights)
    assert bank.forward(hidden[:0], ids[:0], weights[:0]).shape == (0, HIDDEN)
    found = bank.forward(hidden, ids[:, :0], weights[:, :0])
    assert found.shape == (4, HIDDEN) and not found.any()


def test_an_expert_that_is_named_twice_counts_twice() -> None:
    hidden, _, _ = make_call(3, 1)
    twice, weights = torch.tensor([[4, 4]] * 3), torch.tensor([[0.25, 0.5]] * 3)
    for backend in BACKENDS:
        bank = make_bank("q8_0")
        bank.backend = backend
        once = judge(bank, hidden, twice[:, :1], weights.sum(1, keepdim=True))
        found = bank.forward(hidden, twice, weights).numpy()
        np.testing.assert_allclose(found, once, atol=BOUND.get(backend, 1e-5) * np.abs(once).max())


def test_use_is_live_and_refused_words_change_nothing() -> None:
    bank = make_bank("q8_0")
    call = make_call(5, 2)
    expected = judge(bank, *call)
    for words in ({"backend": "numpy"}, {"backend": "numba", "layout": "packed", "threads": 2},
                  {"backend": "torch"}, {"backend": "auto", "layout": "auto"}):  # fmt: skip
        assert bank.use(**words) is bank
        assert words["backend"] in ("auto", bank.kernel.backend)
        found = bank.forward(*call).numpy()
        np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())
    before = bank.request, bank.formats
    for words in ({"isa": "avx1024"}, {"backend": "numpy", "layout": "packed"},
                  {"format": "q5_1", "backend": "numba"}, {"format": "q9_0"}):  # fmt: skip
        with pytest.raises(ValueError, match="avx1024|no such combination|no Numba|q9_0"):
            bank.use(**words)
        assert (bank.request, bank.formats) == before


def test_format_is_a_switch_like_the_others() -> None:
    bank = make_bank("q8_0")
    stored = bank.gate
    bank.use(format="int8_channel", backend="numba")
    assert bank.format == "int8_channel" and bank.backend == "numba"
    bank.use(format="q8_0")
    assert bank.gate is stored and bank.backend == "numba"


def test_operands_are_shared_by_clones_and_kept_apart_by_layout() -> None:
    bank = make_bank("q8_0").use(layout="ggml_blocks")
    twin = bank.clone().use(backend="numba", layout="packed")
    twin.forward(*make_call(2, 2))
    assert bank.kernel.layout == "ggml_blocks", "the clone has switches of its own"
    assert list(bank.prepared_bytes) == ["packed"] and bank.stacks is twin.stacks
    other = bank.clone().use(backend="torch")
    other.forward(*make_call(2, 2))
    assert set(twin.prepared_bytes) == {"packed", "float32"}


def test_all_layers_at_once_or_none() -> None:
    mixed = [make_bank("q8_0"), make_bank("q5_1")]
    banks = ExpertBanks(mixed)
    with pytest.raises(SettingError, match="no Numba kernel computes q5_1"):
        banks.use(backend="numba")
    assert [bank.backend for bank in banks] == ["auto", "auto"]
    banks.use(backend="numpy")
    assert [bank.kernel.backend for bank in banks] == ["numpy", "numpy"]
    assert "q8_0" in repr(banks) and "q5_1" in repr(banks)
    assert len(banks.explain()) == 2, "layers that differ are told apart"
    alike = ExpertBanks([mixed[0], make_bank("q8_0").use(backend="numpy")]).explain()
    assert len(alike) == 1 and alike._repr_mimebundle_()["text/html"].count("<details open>") == 1
    assert "<details open>" not in banks.explain()._repr_mimebundle_()["text/html"]
    assert isinstance(banks[:1], ExpertBanks) and banks[1] is mixed[1]
    for shown in (banks, banks.explain(), mixed[0]):
        assert shown._repr_mimebundle_()["text/plain"] == repr(shown)


def test_layer_numbers_as_ranges() -> None:
    assert layers([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"


def test_requantized_bank_falls_back_as_llama_cpp_does() -> None:
    bank = make_bank("f32").quantized("q4_k")  # rows of 64 and 96 do not fit blocks of 256
    assert bank.formats == ("q5_0", "q5_0", "q5_0")
    assert bank.num_experts == EXPERTS and bank.nbytes < make_bank("f32").nbytes / 5
