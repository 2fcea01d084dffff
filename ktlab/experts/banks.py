"""The routed experts of all layers as one object: the same switches, all or none."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

from ktlab import html
from ktlab.experts.bank import ExpertBank
from ktlab.kernels.dispatch import Explanation

Check = Callable[[], None]
"""Called once everything is set: raises where what kernels would now make does not fit."""


class ExpertBanks(Sequence[ExpertBank]):
    """The banks of the layers with experts, in order; `by_layer` has them by layer number."""

    def __init__(
        self,
        banks: Sequence[ExpertBank],
        *,
        check: Callable[[Sequence[ExpertBank], Mapping[str, Any]], Check] | None = None,
    ) -> None:
        self._banks = tuple(banks)
        self._check = check

    @overload
    def __getitem__(self, index: int) -> ExpertBank: ...
    @overload
    def __getitem__(self, index: slice) -> "ExpertBanks": ...
    def __getitem__(self, index: int | slice) -> "ExpertBank | ExpertBanks":
        found = self._banks[index]
        return ExpertBanks(found, check=self._check) if isinstance(found, tuple) else found

    def __len__(self) -> int:
        return len(self._banks)

    def __iter__(self) -> Iterator[ExpertBank]:
        return iter(self._banks)

    @property
    def by_layer(self) -> Mapping[int, ExpertBank]:
        """{layer number: bank}."""
        return {bank.layer: bank for bank in self._banks}

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weights."""
        return sum(bank.nbytes for bank in self._banks)

    @property
    def prepared_bytes(self) -> dict[str, int]:
        """Bytes of the copies that kernels have made so far, by layout."""
        found: dict[str, int] = {}
        for bank in self._banks:
            for name, nbytes in bank.prepared_bytes.items():
                found[name] = found.get(name, 0) + nbytes
        return found

    def use(self, **words: Any) -> "ExpertBanks":
        """`ExpertBank.use` on every layer: format, layout, backend, isa, threads, numa, few.

        If one layer refuses, none is changed, nor where copies that this makes would not fit.
        """
        check = self._check(self._banks, words) if self._check is not None else None
        before = [(bank, dict(vars(bank))) for bank in self._banks]
        try:
            for bank in self._banks:
                bank.use(**words)
            if check is not None:
                check()
        except BaseException:
            for bank, state in before:
                vars(bank).update(state)
            raise
        return self

    def _alike(self) -> dict[tuple[Any, ...], list[ExpertBank]]:
        groups: dict[tuple[Any, ...], list[ExpertBank]] = {}
        for bank in self._banks:
            groups.setdefault((bank.formats, bank.request), []).append(bank)
        return groups

    def explain(self, tokens: int = 1) -> "BanksExplanation":
        """Each backend, isa and layout with its verdict; layers that are alike are told once."""
        return BanksExplanation(
            (tuple(bank.layer for bank in banks), banks[0].explain(tokens))
            for banks in self._alike().values()
        )

    def __repr__(self) -> str:
        lines = [
            f"ExpertBanks({len(self)} layers, "
            f"{sum(bank.num_experts for bank in self)} experts, {html.byte_size(self.nbytes)})"
        ]
        lines += [
            f"  layers {layers(bank.layer for bank in banks)}: {banks[0].format}, "
            f"{banks[0].kernel}, {banks[0].placement}"
            for banks in self._alike().values()
        ]
        return "\n".join(lines)

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        rows = []
        for banks in self._alike().values():
            kernel, formats = banks[0].kernel, banks[0].format
            where = layers(bank.layer for bank in banks)
            rows.append((where, formats, kernel.backend, kernel.isa, kernel.layout, kernel.reason))
        table = html.table(rows, ("layers", "format", "backend", "isa", "layout", "why"))
        return html.mimebundle(repr(self), html.card("routed experts", table))


class BanksExplanation(tuple[tuple[tuple[int, ...], Explanation], ...]):
    """(layers, their `Explanation`) for each group of layers that are alike."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "\n\n".join(f"layers {layers(where)}\n{found!r}" for where, found in self)

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        parts = [
            html.details(
                f"layers {layers(where)}",
                html.Raw(found._repr_mimebundle_()["text/html"]),
                open=len(self) == 1,
            )
            for where, found in self
        ]
        return html.mimebundle(repr(self), html.card("expert kernels", *parts))


def layers(numbers: "Iterator[int] | Sequence[int]") -> str:
    """(1, 2, 3, 7) -> "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
