"""What a model did on a text, token by token: recorded activations with where they come from.

A `Trace` is made by `model.trace(text)` (ktlab/model/probe.py) and knows nothing of the model but
its identity. Letters: T tokens, K selected.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktlab import html
from ktlab.errors import TraceError
from ktlab.experts.banks import layers as ranges
from ktlab.model import trace_file
from ktlab.model.trace_checks import (
    by_number,
    cannot_join,
    joined,
    need_known,
    why_not,
    wrong_ids,
    wrong_lengths,
)
from ktlab.routing.statistics import RoutingStatistics


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which model a trace is of. Expert numbers mean something under one `fingerprint` only."""

    name: str
    fingerprint: str
    num_experts: int
    top_k: int
    """Routed experts a token, as trained."""
    moe_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "moe_layers", tuple(int(i) for i in self.moe_layers))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Trace:
    """Activations of `model` on some texts, tokens on axis 0 of every array."""

    ids_T: NDArray[np.int64]
    arrays: Mapping[str, NDArray]
    """By probe name, e.g. "layers.3.router.ids" (T, K); -1 there marks a place left empty."""
    model: ModelIdentity
    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage and in "total", over all tokens of the recording; empty after `where`."""
    domain_T: NDArray[np.str_] | None = None
    segment_T: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Which text a token came from, never decreasing. Default: all from one."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids_T = np.asarray(self.ids_T, np.int64)
        segment_T = np.asarray(self.segment_T, np.int64)
        if not segment_T.size:
            segment_T = np.zeros(ids_T.shape, np.int64)
        domain_T = None if self.domain_T is None else np.asarray(self.domain_T).astype(np.str_)
        for name, value in [("ids_T", ids_T), ("segment_T", segment_T), ("domain_T", domain_T)]:
            object.__setattr__(self, name, value)
        for name in (
            "settings",
            "provenance",
        ):  # plain JSON, so that a saved trace comes back equal
            plain = json.loads(json.dumps(dict(getattr(self, name)), default=str))
            object.__setattr__(self, name, plain)
        object.__setattr__(self, "arrays", {n: np.asarray(a) for n, a in self.arrays.items()})
        if not ids_T.size:
            raise TraceError("empty trace: expected at least one token; trace a longer text")
        problems = [*wrong_lengths(self), *wrong_ids(self)]
        if (np.diff(segment_T) < 0).any():
            problems.append("segment_T goes back; tokens of one text must follow one another")
        if problems:
            raise TraceError(f"trace of {self.model.name}: " + "; ".join(problems))

    def __getitem__(self, name: str) -> NDArray:
        if name in self.arrays:
            return self.arrays[name]
        raise TraceError(why_not(self, str(name)))

    def __contains__(self, name: object) -> bool:
        return name in self.arrays

    def __len__(self) -> int:
        return len(self.ids_T)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the recorded arrays, layers in numerical order."""
        return tuple(sorted(self.arrays, key=by_number))

    @property
    def domains(self) -> tuple[str, ...]:
        return () if self.domain_T is None else tuple(str(d) for d in np.unique(self.domain_T))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @cached_property
    def routing(self) -> RoutingStatistics:
        """Statistics of the selected experts."""
        return RoutingStatistics(self)

    def require(self, model: ModelIdentity) -> "Trace":
        """This trace, or TraceError if it is of another model."""
        if model.fingerprint != self.model.fingerprint:
            raise TraceError(
                f"expected a trace of {model.name} ({model.fingerprint}), found one of "
                f"{self.model.name} ({self.model.fingerprint}); record one with model.trace(text)"
            )
        return self

    def where(
        self,
        *,
        domain: str | Iterable[str] | None = None,
        segment: int | Iterable[int] | None = None,
    ) -> "Trace":
        """The tokens of some domains and texts. Stage seconds, taken over all tokens, are dropped.

        Tokens that were not neighbours before do not become neighbours: texts with a hole are cut.
        """
        keep_T = np.ones(len(self), bool)
        if domain is not None:
            wanted = [domain] if isinstance(domain, str) else list(domain)
            need_known("domain", wanted, self.domains, "trace with model.trace(text, domain=...)")
            keep_T &= np.isin(self.domain_T, wanted) if self.domain_T is not None else False
        if segment is not None:
            texts = [segment] if isinstance(segment, int) else [int(s) for s in segment]
            known = [str(s) for s in np.unique(self.segment_T)]
            need_known("text (segment)", [str(s) for s in texts], known, "see trace.segment_T")
            keep_T &= np.isin(self.segment_T, texts)
        if not keep_T.any():
            raise TraceError("no token is in all of the wanted domains and texts; ask for fewer")
        index = np.flatnonzero(keep_T)
        cut = (np.diff(index) > 1) | (np.diff(self.segment_T[index]) != 0)
        return replace(
            self,
            ids_T=self.ids_T[index],
            arrays={name: array[index] for name, array in self.arrays.items()},
            stages={},
            domain_T=None if self.domain_T is None else self.domain_T[index],
            segment_T=np.r_[0, np.cumsum(cut)],
        )

    def merge(self, *others: "Trace") -> "Trace":
        """This trace followed by `others`, of the same model, settings and names."""
        traces = (self, *others)
        problems = [p for i, other in enumerate(others) for p in cannot_join(self, i + 1, other)]
        if problems:
            raise TraceError("these traces do not merge: " + "; ".join(problems))
        offsets = np.cumsum([0, *(int(t.segment_T[-1]) + 1 for t in traces[:-1])])
        labels = [np.full(len(t), "") if t.domain_T is None else t.domain_T for t in traces]
        alike = all(t.provenance == self.provenance for t in others)
        stages: dict[str, float] = {}
        for trace in traces:
            for stage, seconds in trace.stages.items():
                stages[stage] = stages.get(stage, 0.0) + seconds
        return Trace(
            ids_T=np.concatenate([t.ids_T for t in traces]),
            arrays={name: joined(name, [t.arrays[name] for t in traces]) for name in self.names},
            stages=stages,
            domain_T=np.concatenate(labels) if any(t.domains for t in traces) else None,
            segment_T=np.concatenate(
                [t.segment_T + offset for t, offset in zip(traces, offsets, strict=True)]
            ),
            model=self.model,
            settings=self.settings,
            provenance=self.provenance
            if alike
            else {"merged": [dict(t.provenance) for t in traces]},
        )

    def save(self, path: str | Path) -> Path:
        """Write one compressed .npz with JSON metadata (no pickle); returns the path."""
        arrays: dict[str, NDArray] = {"ids_T": self.ids_T, "segment_T": self.segment_T}
        if self.domain_T is not None:
            arrays["domain_T"] = self.domain_T
        metadata = {
            "model": {k: getattr(self.model, k) for k in ModelIdentity.__dataclass_fields__},
            "stages": dict(self.stages),
            "settings": dict(self.settings),
            "provenance": dict(self.provenance),
        }
        return trace_file.write(Path(path), metadata, arrays, self.arrays)

    @classmethod
    def load(cls, path: str | Path, *, model: ModelIdentity | None = None) -> "Trace":
        """Read what `save` wrote; with `model`, refuse the trace of another one."""
        metadata, own, arrays = trace_file.read(Path(path))
        try:
            trace = cls(
                arrays=arrays,
                model=ModelIdentity(**metadata.pop("model")),
                ids_T=own["ids_T"],
                segment_T=own["segment_T"],
                domain_T=own.get("domain_T"),
                **metadata,
            )
        except (KeyError, TypeError) as error:
            raise TraceError(f"{path}: not a trace that this version reads: {error}") from error
        return trace if model is None else trace.require(model)

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each selected expert of each token and layer.

        Columns: token, id, segment, domain (if labelled), layer, rank (0 = first choice), expert,
        and weight and score where they were recorded.
        """
        import pandas as pd

        frames = []
        for layer in self.model.moe_layers:
            if f"layers.{layer}.router.ids" not in self:
                continue
            ids_TK = self[f"layers.{layer}.router.ids"]
            token, rank = np.nonzero(ids_TK >= 0)
            columns: dict[str, Any] = {"token": token, "id": self.ids_T[token]}
            columns["segment"] = self.segment_T[token]
            if self.domain_T is not None:
                columns["domain"] = self.domain_T[token]
            columns |= {"layer": np.full(len(token), layer), "rank": rank}
            columns["expert"] = ids_TK[token, rank]
            if f"layers.{layer}.router.weights" in self:
                columns["weight"] = self[f"layers.{layer}.router.weights"][token, rank]
            if f"layers.{layer}.router.scores" in self:
                scores_TE = self[f"layers.{layer}.router.scores"]
                columns["score"] = scores_TE[token, columns["expert"]]
            frames.append(pd.DataFrame(columns))
        if not frames:
            raise TraceError(why_not(self, "layers.*.router.ids"))
        return pd.concat(frames, ignore_index=True)

    def __repr__(self) -> str:
        rows = (f"  {name}: {value}" for name, value in self._rows().items())
        return html.wrapped("\n".join([self._title(), *rows]))

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return html.mimebundle(repr(self), html.card(self._title(), html.pairs(self._rows())))

    def _title(self) -> str:
        texts = len(np.unique(self.segment_T))
        return f"Trace of {self.model.name}: {len(self):,} tokens, {texts} text{'s'[: texts > 1]}"

    def _rows(self) -> dict[str, object]:
        kinds: dict[str, list[str]] = {}
        for name in self.names:
            parts = name.split(".")
            layered = parts[0] == "layers" and len(parts) > 2
            key = ".".join(["layers.*", *parts[2:]]) if layered else name
            kinds.setdefault(key, []).append(parts[1] if layered else "")
        rows: dict[str, object] = {"domains": ", ".join(self.domains)} if self.domains else {}
        rows["arrays"] = ", ".join(
            f"{kind} (layers {ranges(map(int, layers))})" if layers[0] else kind
            for kind, layers in kinds.items()
        )
        rows["settings"] = "; ".join(_said(self.settings)) or "as trained"
        rows["size"] = html.byte_size(self.nbytes)
        if self.stages:
            own = [seconds for stage, seconds in self.stages.items() if stage != "total"]
            total = self.stages.get("total", sum(own))
            rows["timed stages"] = f"{len(own)}, {total:.3g} s in all"
        return rows


def _said(settings: Mapping[str, Any]) -> list[str]:
    """Settings in words, without those that nobody has set; what all of a kind share once."""
    said = []
    for name, value in settings.items():
        if value in ("auto", None) or (isinstance(value, (dict, list)) and not value):
            continue
        if isinstance(value, dict):
            kinds = list(dict.fromkeys(map(str, value.values())))
            value = kinds[0] if len(kinds) == 1 else ", ".join(f"{k} {v}" for k, v in value.items())
        said.append(f"{name.replace('_', ' ')} {value}")
    return said
