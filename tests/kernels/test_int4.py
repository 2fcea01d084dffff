"""Four bits on a device: torch's product where a check of it passes, 16-bit copies where not."""

import pytest
import torch

from ktlab.kernels import int4
from ktlab.kernels.int4 import Int4, PackedInt4, dense, product
from ktlab.kernels.seat import TorchSeat
from ktlab.quantization import QTensor, get_format
from tests.model.strict_seat import StrictSeat

CPU = torch.device("cpu")
REFUSED = "no such operator"


def made(rows: int, cols: int, group: int) -> QTensor:
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)).numpy()
    known = get_format(f"int4_group{group}")
    return QTensor(name="w", format=known, shape=(rows, cols), blocks=known.quantize(values))


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("rows, cols, group", [(64, 256, 128), (48, 96, 32), (256, 1408, 128)])
def test_products_are_those_of_the_values(
    rows: int, cols: int, group: int, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not here:
        monkeypatch.setattr(int4, "reason", lambda *_: REFUSED)
    elif found := int4.reason(CPU, torch.bfloat16, group):
        pytest.skip(f"torch has no product of 4 bits for this CPU: {found}")
    seat, stored = TorchSeat("cuda:0", "cpu", "int4"), made(rows, cols, group)
    values = seat.load_matrix(stored)
    assert isinstance(values, PackedInt4 if here else Int4)
    weight = torch.from_numpy(stored.dequantize())
    assert float((dense(values).float() - weight).norm() / weight.norm()) < 0.003
    for shape in [(1, cols), (7, cols), (2, 3, cols), (0, cols)]:
        x = torch.randn(*shape).bfloat16()
        y, wanted = product(x, values), x.float() @ weight.T
        assert y.shape == wanted.shape and y.dtype == torch.bfloat16
        if x.numel():
            assert float((y.float() - wanted).norm() / wanted.norm()) < 0.005
    assert seat.here_bytes == {"weights": values.nbytes}
    assert seat.bytes_of((rows, cols)) == values.nbytes


def test_rows_that_the_packing_has_no_place_for_are_kept_as_they_are() -> None:
    stored = made(8, 128, 128)
    values = TorchSeat("cuda:0", "cpu", "int4").load_matrix(stored)
    assert isinstance(values, Int4)
    x, weight = torch.randn(3, 128).bfloat16(), torch.from_numpy(stored.dequantize())
    wanted = x.float() @ weight.T
    assert float((product(x, values).float() - wanted).norm() / wanted.norm()) < 0.005


def test_a_product_that_is_wrong_or_missing_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    int4.reason.cache_clear()
    try:
        with monkeypatch.context() as patch:
            right = torch._weight_int4pack_mm_for_cpu
            patch.setattr(torch, "_weight_int4pack_mm_for_cpu", lambda x, *rest: right(-x, *rest))
            assert "other results" in int4.reason(CPU, torch.bfloat16, 128)
            assert "200.0% of their norm" in TorchSeat("cuda:0", "cpu", "int4").kernel.reason
            assert isinstance(StrictSeat("cuda:0", "int4").load_matrix(made(64, 256, 128)), Int4)

        def missing(*_: object) -> None:
            raise NotImplementedError(f"{REFUSED}\nand a long list")

        int4.reason.cache_clear()
        monkeypatch.setattr(torch, "_convert_weight_to_int4pack_for_cpu", missing)
        assert int4.reason(CPU, torch.bfloat16, 128) == REFUSED
        assert REFUSED in TorchSeat("cuda:0", "cpu", "int4").kernel.reason
    finally:
        int4.reason.cache_clear()
