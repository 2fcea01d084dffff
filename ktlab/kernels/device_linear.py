"""A matrix on a torch device: decoded once, multiplied there; its encoded values stay the source.

T tokens, H heads, K columns, N rows.
"""

from torch import Tensor

from ktlab.kernels.dispatch import Explanation
from ktlab.kernels.int4 import Values, dense, product
from ktlab.kernels.linear import Linear
from ktlab.kernels.request import Kernel
from ktlab.kernels.seat import DTYPES, Near, TorchSeat

_OWN = frozenset(("seat", "near", "values", "_dtype", "_format"))


class DeviceLinear(Linear):
    """`Linear` on a seat: takes and returns that device's tensors, float32.

    Products are of the seat's format with float32 results. What was asked of kernels is kept for
    the day when it is on the CPU again.
    """

    def __init__(self, linear: Linear, seat: TorchSeat, dtype: str | None = None) -> None:
        vars(self).update(vars(linear))
        self.seat, self.near, self._dtype = seat, Near(seat), dtype
        self._format = dtype or seat.format_of(self.stack.shape)
        self.values: Values
        """W, (N, K) or with leading axes, on the device."""
        if dtype is None:
            self.values = seat.load_matrix(self.stack.tensor)
        else:
            self.values = seat.load(self.stack.tensor, DTYPES[dtype])

    @property
    def kernel(self) -> Kernel:
        """The seat's; switches of kernels do not reach it."""
        return self.seat.kernel

    def explain(self, tokens: int = 1) -> Explanation:
        """See `Computed.explain`: there is one way."""
        return Explanation([self.seat.verdict])

    @property
    def weight_OI(self) -> Tensor:
        """W as float32, on the device."""
        return dense(self.values).float()

    def __call__(self, x: Tensor) -> Tensor:
        return product(x.to(self.values.dtype), self.values).float()

    def by_head(self, x_THK: Tensor) -> Tensor:
        """See `Linear.by_head`."""
        weight_HNK = dense(self.values)
        x_HTK = x_THK.transpose(0, 1).to(weight_HNK.dtype)
        return (x_HTK @ weight_HNK.transpose(1, 2)).transpose(0, 1).float()

    def quantized(self, format: str) -> "DeviceLinear":
        """The values of the matrix in another format, on the same device."""
        return DeviceLinear(self.on_host().quantized(format), self.seat, self._dtype)

    def on_host(self) -> Linear:
        """The same matrix for the CPU's kernels again."""
        linear = Linear.__new__(Linear)
        vars(linear).update({k: v for k, v in vars(self).items() if k not in _OWN})
        return linear

    @property
    def device_bytes(self) -> int:
        """Bytes on the device."""
        return self.values.nbytes

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {self._format} on {self.seat.word})"
