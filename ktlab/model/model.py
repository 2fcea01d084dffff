"""The model: layers that can be looked into, switches that are live, a forward pass, a cache.

B batch, T tokens, D hidden, V vocabulary.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import groupby
from os import PathLike
from time import perf_counter
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktlab import html
from ktlab.attention.cache import Cache
from ktlab.checkpoint.checkpoint import Checkpoint
from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.tokenizer import Tokenizer
from ktlab.errors import CheckpointError, ContextError, SettingError, TraceError, nearest
from ktlab.experts.banks import ExpertBanks
from ktlab.experts.placed_bank import Overlap, PlacedBank
from ktlab.kernels.device_linear import DeviceLinear
from ktlab.kernels.int4 import dense
from ktlab.kernels.linear import Linear
from ktlab.kernels.norm import rms_norm
from ktlab.kernels.pack_run import PackReport
from ktlab.kernels.seat import HOST, Seat, TorchSeat
from ktlab.model import generation
from ktlab.model.block import Layer, MoEBlock
from ktlab.model.build import build_layers, vector
from ktlab.model.byte_ledger import ByteLedger, byte_ledger
from ktlab.model.copies import check_use
from ktlab.model.cost import Cost, cost
from ktlab.model.deferral import Later
from ktlab.model.pack import pack_model
from ktlab.model.place import Moved, PlacementLike, place
from ktlab.model.placed_block import move, on_seat, placed_forward
from ktlab.model.residency import Residency, residency
from ktlab.model.settings import SWITCHES, Change, Settings, apply, current
from ktlab.model.trace import ModelIdentity, Trace
from ktlab.model.whole_layer import WholeLayer
from ktlab.probe import NO_PROBE, Probe, Recorder
from ktlab.quantization import QTensor

Ids = Sequence[int] | NDArray[np.integer[Any]] | Tensor

ROUTER_NAMES = ("layers.*.router.*",)
HEAD_NAMES = ("norm", "logits")
"""Activations behind the layers."""
CHUNK, HEAD_TOKENS = 512, 256
"""Tokens of a prompt that pass the layers at a time, and of a traced text the output matrix."""


class Model:
    """A mixture-of-experts model on this machine.

    Everything printed is an attribute: `layers[i].router`, `.experts`, `.shared`, `.attention`.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config: ModelConfig = checkpoint.config
        self.embedding: QTensor = checkpoint.tensor("token_embd.weight")
        self.layers: list[Layer] = build_layers(checkpoint)
        head = "token_embd.weight" if self.config.tied_output else "output.weight"
        self.output_norm_D = vector(checkpoint, "output_norm.weight")
        self.output = Linear(checkpoint.tensor(head))
        self.embedding_table: DeviceLinear | None = None
        """The embedding on a device, where a placement puts it there."""
        self.placement: PlacementLike | None = None
        """Where everything is (`place`); None: on the host, as loaded."""
        self.seats: dict[str, TorchSeat] = {}
        """The devices that are in use, by device word."""
        self.caches: WeakSet[Cache] = WeakSet()
        """Those that are alive: for the ledger."""
        self.watch: Callable[[Probe], Probe] | None = None
        """Wraps the probe of everything this model does, e.g. to stop it; clones inherit it."""

    # What is there ---------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; `CheckpointError` if it has none."""
        if self.checkpoint.tokenizer is None:
            raise CheckpointError(
                f"{self.name}: the checkpoint has no tokenizer; pass token ids instead of text"
            )
        return self.checkpoint.tokenizer

    @property
    def moe_blocks(self) -> list[MoEBlock]:
        """The layers with experts."""
        return [block for block in self.layers if isinstance(block, MoEBlock)]

    @property
    def experts(self) -> ExpertBanks:
        """The routed experts of all layers: `.use(...)`, `.explain()`."""
        banks = [block.experts for block in self.moe_blocks]
        return ExpertBanks(banks, check=partial(check_use, self))

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weights as set now."""
        layers = sum(block.nbytes for block in self.layers)
        return self.embedding.nbytes + layers + self.output.nbytes

    @property
    def settings(self) -> Settings:
        """How every switch stands, read off the stages."""
        return current(self)

    @cached_property
    def identity(self) -> ModelIdentity:
        """Which weights these are: name, fingerprint of the checkpoint, shape of the routing."""
        return ModelIdentity(
            name=self.name,
            fingerprint=self.checkpoint.fingerprint,
            num_experts=self.config.num_experts,
            top_k=self.config.top_k,
            moe_layers=tuple(self.config.moe_layers),
        )

    def cost(self, tokens: int = 1, context: int = 512) -> Cost:
        """FLOP and bytes of each stage for a call of `tokens` tokens ending at `context`."""
        return cost(self, tokens, context)

    def residency(self) -> Residency:
        """Bytes mapped, resident and converted now; what decode would wait for from disk."""
        return residency(self)

    def ledger(self) -> ByteLedger:
        """Bytes on each device now: by what they are for, and in all as the system says."""
        return byte_ledger(self)

    # Running it ------------------------------------------------------------------------------

    def new_cache(self, batch: int = 1, context: int | None = None) -> Cache:
        """An empty cache in the layers' present forms; `context` defaults to the model's."""
        forms = [block.attention.form for block in self.layers]
        seats = [block.attention.seat for block in self.layers]
        length = self.config.context_length if context is None else context
        cache = Cache(self.config, forms, batch, length, seats)
        self.caches.add(cache)
        return cache

    @torch.inference_mode()
    def forward(
        self,
        ids: Ids,
        cache: Cache | None = None,
        *,
        lengths: Sequence[int] | None = None,
        probe: Probe = NO_PROBE,
        chunk: int = CHUNK,
    ) -> Tensor:
        """Logits, float32: (T,) ids give (T, V), (B, T) ids give (B, T, V).

        Continues after what `cache` holds, and fills it; prefill goes in pieces of `chunk` tokens.
        `lengths` are the true lengths of right-padded sequences: what follows is ignored.
        """
        ids_BT, squeeze = self._ids(ids)
        cache = self._cache_for(ids_BT, cache)
        hidden_BTD = self._hidden(ids_BT, cache, lengths, probe, chunk)
        logits_BTV = self._head(hidden_BTD, probe)
        return logits_BTV[0] if squeeze else logits_BTV

    @torch.inference_mode()
    def logits_in_pieces(self, ids: Ids, count: int) -> Iterator[Tensor]:
        """`forward` of (T,) ids, whose logits come in `count` pieces of nearly the same length.

        With a large vocabulary all at once would take more room than the pass itself.
        """
        ids_BT, _ = self._ids(ids)
        hidden_BTD = self._hidden(ids_BT, self._cache_for(ids_BT, None), None, NO_PROBE, CHUNK)
        for some_TD in hidden_BTD[0].tensor_split(count):
            yield self._head(some_TD, NO_PROBE)

    @torch.inference_mode()
    def next_logits(
        self,
        ids: Ids,
        cache: Cache,
        *,
        lengths: Sequence[int] | None = None,
        probe: Probe = NO_PROBE,
        chunk: int = CHUNK,
    ) -> Tensor:
        """(B, V) logits after the last (true) token of each sequence: what decoding needs."""
        ids_BT, _ = self._ids(ids)
        hidden_BTD = self._hidden(ids_BT, cache, lengths, probe, chunk)
        last = torch.tensor(lengths) - 1 if lengths is not None else ids_BT.shape[1] - 1
        return self._head(hidden_BTD[torch.arange(len(ids_BT)), last], probe)

    def _ids(self, ids: Ids) -> tuple[Tensor, bool]:
        if isinstance(ids, str):
            raise TypeError(
                "forward takes token ids; encode the text: model.tokenizer.encode(text)"
            )
        ids_T = torch.as_tensor(np.asarray(ids))
        whole = not (ids_T.is_floating_point() or ids_T.is_complex() or ids_T.dtype == torch.bool)
        if ids_T.numel() and not whole:
            raise ContextError(f"ids are {ids_T.dtype}: expected whole numbers, token ids")
        if ids_T.ndim not in (1, 2) or ids_T.numel() == 0:
            raise ContextError(
                f"ids of shape {tuple(ids_T.shape)}: expected (T,) or (B, T) with at least 1 token"
            )
        ids_T = ids_T.to(torch.int64)
        low, high = int(ids_T.min()), int(ids_T.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ContextError(
                f"token ids from {low} to {high}: {self.name} has 0 to {self.config.vocab_size - 1}"
            )
        return (ids_T[None], True) if ids_T.ndim == 1 else (ids_T, False)

    def _cache_for(self, ids_BT: Tensor, cache: Cache | None) -> Cache:
        if cache is None:
            return self.new_cache(*ids_BT.shape)
        if cache.batch != len(ids_BT):
            raise ContextError(
                f"{len(ids_BT)} sequences and a cache for {cache.batch}; make one with "
                f"new_cache(batch={len(ids_BT)})"
            )
        return cache

    def _hidden(
        self,
        ids_BT: Tensor,
        cache: Cache,
        lengths: Sequence[int] | None,
        probe: Probe,
        chunk: int,
    ) -> Tensor:
        self.checkpoint.check_unchanged()
        probe = self._watched_by(probe)
        tokens = ids_BT.shape[1]
        positions_BT = cache.positions(tokens)  # refuses before anything is written
        pieces = []
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            part_BT = positions_BT[:, part]
            with probe.stage("embedding"):
                hidden_BTD = self._embed(ids_BT[:, part])
            probe.record("embedding", hidden_BTD.flatten(0, 1))
            pieces.append(self._through_layers(hidden_BTD, cache, part_BT, probe))
        cache.lengths_B += torch.tensor(lengths) if lengths is not None else tokens
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _through_layers(
        self, hidden_BTD: Tensor, cache: Cache, positions_BT: Tensor, probe: Probe
    ) -> Tensor:
        """From host memory to host memory; between layers on one device it stays there."""
        if hidden_BTD.shape[:2] == (1, 1) and probe is NO_PROBE:
            passed = self._at_once(hidden_BTD, cache, positions_BT)
            if passed is not None:
                return passed
        here: Seat = HOST
        later = Later()
        for index, block in enumerate(self.layers):
            cache.layers[index] = layer_cache = cache.layers[index].on(block.attention.seat)
            if (seats := block.seats) is None:
                hidden_BTD = move(hidden_BTD, here, HOST)
                hidden_BTD = block.forward(hidden_BTD, layer_cache, positions_BT, probe, later)
                here = HOST
                continue
            given = (block, seats, hidden_BTD, here, layer_cache, positions_BT, probe, later)
            hidden_BTD, here = placed_forward(*given), seats.attention
        return move(hidden_BTD, here, HOST)

    def _at_once(self, hidden_11D: Tensor, cache: Cache, positions_11: Tensor) -> Tensor | None:
        """A decoded token through all layers in one native call; None where one of them is placed
        elsewhere, defers experts, or is not the C core's."""
        layers = []
        for block in self.layers:
            whole = None if block.moved or block.deferred else block.whole()
            if whole is None:
                return None
            layers.append(whole)
        if not WholeLayer.together(layers):
            return None
        for block, layer_cache in zip(self.layers, cache.layers, strict=True):
            if layer_cache.seat is not HOST:
                return None
            block.attention.check_cache(layer_cache)
        return WholeLayer.through(layers, cache.layers, hidden_11D, positions_11)

    def _embed(self, ids_BT: Tensor) -> Tensor:
        if self.embedding_table is not None:
            seat = self.embedding_table.seat
            rows_TD = dense(self.embedding_table.values)[seat.take(ids_BT.reshape(-1))].float()
            return seat.give(rows_TD)()[0].view(*ids_BT.shape, -1)
        rows = self.embedding[ids_BT.reshape(-1).numpy()].dequantize()
        return torch.from_numpy(rows).view(*ids_BT.shape, -1)

    def _watched_by(self, probe: Probe) -> Probe:
        return self.watch(probe) if self.watch is not None else probe

    def _head(self, hidden: Tensor, probe: Probe) -> Tensor:
        at: Seat = HOST
        probe = self._watched_by(probe)
        norm_D = self.output_norm_D
        if isinstance(self.output, DeviceLinear):
            at, norm_D = self.output.seat, self.output.near(norm_D)
        with probe.stage("output"):
            normed = rms_norm(at.take(hidden), norm_D, self.config.rms_eps)
            logits = at.give(self.output(normed))()[0]
        on_seat(probe, at).record("norm", normed.flatten(0, -2))
        probe.record("logits", logits.flatten(0, -2))
        return logits

    # Switching -------------------------------------------------------------------------------

    @contextmanager
    def override(self, **changes: Any) -> Iterator["Model"]:
        """Change switches for the length of a `with`; restored on leaving, whatever happens.

        top_k=6 or {layer: k} · rule=RelativeThreshold(0.2) or {layer: rule} · attention="naive" ·
        format="q4_0" (experts; also named quantize), {"attention": "q8_0"} or {layer: "q4_0"} ·
        mask={layer: [ids]} · force={layer: [ids]} · deferred=2 or {layer: n} (so many experts of
        each token are added by the next layer; the last one keeps its own) · rules=RuleSet ·
        placement=Placement or Plan (see `place`), with stand_in={"cuda:0": "cpu"}, dtype, nodes ·
        backend, isa, layout, threads, numa, few: one value for all matrices, {layer: value} for the
        experts of layers, {"attention": value} for components.
        Nestable. Raises `SettingError` before anything has changed.
        """
        change = self.set(**changes)
        try:
            yield self
        finally:
            change.undo()

    def set(self, **changes: Any) -> Change:
        """The same for good: returns what can be undone with `.undo()`."""
        unknown = [name for name in changes if name not in SWITCHES]
        if unknown:
            raise SettingError(
                f"unknown switches {unknown}; expected some of {', '.join(SWITCHES)}"
                f"{nearest(unknown[0], SWITCHES)}"
            )
        self.checkpoint.check_unchanged()
        change = Change()
        try:
            apply(self, change, **changes)
        except BaseException:
            change.undo()
            raise
        return change

    def place(
        self,
        placement: "PlacementLike",
        *,
        stand_in: "Mapping[str, str | TorchSeat] | None" = None,
        dtype: str | None = None,
        nodes: str | None = None,
    ) -> Moved:
        """Put every stage where `placement` (a `Placement` or a `Plan`) says; live.

        Only what changed is moved, and all of it is made before anything is exchanged: after an
        error, out of memory for instance, the model is whole and where it was. On a GPU matrices
        are `dtype`: "bf16", "f16", "f32", or "int4": a quarter of the room, multiplied by torch's
        product of 4 bits where it passes a check there (`explain()` says); None means what a plan
        counts, or what the device has, or bf16. `stand_in` names another torch device that computes
        in a GPU's stead, {"cuda:0": "cpu"}. `nodes` says how NUMA nodes share the CPU's experts:
        "interleave", "split", "copy" (`ktlab.experts.nodes`) or "none"; None leaves it.
        Raises `PlacementError`. `override(placement=...)` does the same for the length of a `with`.
        """
        self.checkpoint.check_unchanged()
        return place(self, placement, stand_in=stand_in, dtype=dtype, nodes=nodes)

    @contextmanager
    def watch_overlap(self) -> Iterator[Overlap]:
        """Measure how much of the devices' work passes beside the host's experts, over all layers;
        the figures are there on leaving the `with`. GPUs are waited for meanwhile."""
        found = Overlap(on=True)
        banks = [b.experts for b in self.moe_blocks if isinstance(b.experts, PlacedBank)]
        before = [(bank, bank.overlap) for bank in banks]
        try:
            for bank in banks:
                bank.overlap = found
            yield found
        finally:
            for bank, overlap in before:
                bank.overlap = overlap

    def requantized(self, stage: Any, format: str) -> Any:
        """One stage in another format: computed once for all clones, with the stage's switches."""
        self.checkpoint.check_unchanged()  # each stage: all of them may take minutes
        with self._watched_by(NO_PROBE).stage("requantize"):
            return stage.quantized(format)

    def pack(
        self, *, cache: str | PathLike[str] | None = None, threads: int | None = None
    ) -> PackReport:
        """Pack every matrix that kernels compute, layer by layer, and set layout="packed".

        Each tensor's blocks are let go once it is packed, so two copies of the model never exist at
        once; `override(layout="ggml_blocks")` brings them back. With `cache`, a folder for this
        model, packed tensors are kept in files and mapped again at the next start. `SettingError`
        on threads that cannot be, `CheckpointError` on a folder that cannot be written to.
        """
        self.checkpoint.check_unchanged()
        return pack_model(self, cache=cache, threads=threads)

    def clone(self) -> "Model":
        """A second model over the same weights with switches of its own, e.g. for a thread."""
        twin = copy.copy(self)
        twin.layers = [block.clone() for block in self.layers]
        twin.output = self.output.clone()
        return twin

    # Using it --------------------------------------------------------------------------------

    def stream(
        self,
        prompt: str | Ids,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        cancel: threading.Event | None = None,
        stop_at_eos: bool = True,
    ) -> Iterator[generation.Token]:
        """Tokens as they come. Greedy at temperature 0; `cancel` is looked at before each token."""
        generation.check_sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
        )
        return generation.stream(
            self,
            self._prompt_ids(prompt),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            cancel=cancel,
            stop_at_eos=stop_at_eos,
        )

    def generate(self, prompt: str | Ids, **options: Any) -> generation.Generation:
        """`stream` to its end; takes the same options."""
        ids = self._prompt_ids(prompt)
        tokens = list(self.stream(ids, **options))
        return generation.Generation(
            prompt=prompt if isinstance(prompt, str) else "",
            text="".join(token.text for token in tokens),
            ids=tuple(token.id for token in tokens),
            prompt_tokens=len(ids),
            prefill_s=tokens[0].seconds if tokens else 0.0,
            decode_s=sum(token.seconds for token in tokens[1:]),
            settings=str(self.settings),
        )

    def _prompt_ids(self, text_or_ids: str | Ids) -> Tensor:
        if isinstance(text_or_ids, str):
            if not text_or_ids:
                raise ContextError("the text is empty; expected at least one character")
            text_or_ids = self.tokenizer.encode(text_or_ids)
        ids_BT, single = self._ids(text_or_ids)
        if not single:
            raise ContextError("expected one text, found a batch; use forward for batches")
        if ids_BT.shape[1] > self.config.context_length:
            raise ContextError(
                f"the text has {ids_BT.shape[1]} tokens, {self.name} has a context of "
                f"{self.config.context_length}; cut it"
            )
        return ids_BT[0]

    def trace(
        self,
        text_or_ids: str | Ids,
        *,
        names: Sequence[str] | str | None = None,
        domain: str | None = None,
    ) -> Trace:
        """Run a text and keep what happened: by default every router's decision and stage times.

        `names` are shell patterns over activations, e.g. "layers.3.*"; `domain` labels the tokens.
        The output matrix is multiplied where `names` ask for something of it, or are not given.
        """
        ids_T = self._prompt_ids(text_or_ids)
        patterns = ROUTER_NAMES if names is None else (names,) if isinstance(names, str) else names
        recorder = Recorder(tuple(patterns))
        start = perf_counter()
        self._watched(ids_T, recorder, head=names is None or any(map(recorder.wants, HEAD_NAMES)))
        seconds = perf_counter() - start
        arrays = recorder.joined()
        if not arrays:
            some = ", ".join(sorted(recorder.seen)[:6])
            near = nearest(patterns[0], recorder.seen) if patterns else ""
            raise TraceError(
                f"no activation matches {list(patterns)}; this model has {some}, ...{near}"
            )
        return Trace(
            ids_T=ids_T.numpy(),
            arrays={name: values.numpy() for name, values in arrays.items()},
            stages={**recorder.seconds, "total": seconds},
            domain_T=None if domain is None else np.full(len(ids_T), domain),
            model=self.identity,
            settings=self.settings.to_dict(),
        )

    @torch.inference_mode()
    def _watched(self, ids_T: Tensor, probe: Probe, *, head: bool) -> None:
        """A forward pass for the probe alone, which never holds the logits of all tokens."""
        ids_BT, _ = self._ids(ids_T)
        hidden_BTD = self._hidden(ids_BT, self._cache_for(ids_BT, None), None, probe, CHUNK)
        for some_BTD in hidden_BTD.split(HEAD_TOKENS, dim=1) if head else ():
            self._head(some_BTD, probe)

    # Showing it ------------------------------------------------------------------------------

    def __repr__(self) -> str:
        config = self.config
        lines = [
            f"Model({config.name}: {config.architecture}, {config.num_layers} layers "
            f"({config.first_dense_layers} dense), {config.num_experts} experts, trained k = "
            f"{config.top_k}, {html.byte_size(self.nbytes)})",
            f"  set to: {self.settings}",
            *(f"  memory: {line}" for line in str(self.residency()).splitlines()),
        ]
        for said, alike in groupby(self.layers, self._line):
            numbers = [block.index for block in alike]
            first, after = numbers[0], numbers[-1] + 1
            where = f"{first}" if len(numbers) == 1 else f"{first}:{after}"
            lines.append(f"  layers[{where}]: {said}{' each' * (len(numbers) > 1)}")
        return html.wrapped("\n".join(lines))

    @staticmethod
    def _line(block: Layer) -> str:
        attention = f"{block.attention.kind} {block.attention.form}"
        if not isinstance(block, MoEBlock):
            return f"{attention}, dense, {html.byte_size(block.nbytes)}"
        bank = block.experts
        return (
            f"{attention}, {bank.num_experts} experts {bank.format} on {bank.placement}, "
            f"{block.router.rule}{f', {block.deferred} deferred' * (block.deferred > 0)}, "
            f"{bank.computed_by}, {html.byte_size(block.nbytes)}"
        )

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        config = self.config
        facts: Mapping[str, object] = {
            "architecture": f"{config.architecture}, hidden {config.hidden_size}, "
            f"{config.attention}, vocabulary {config.vocab_size:,}, context "
            f"{config.context_length:,}",
            "experts": f"{config.num_experts} routed (trained k = {config.top_k}) + "
            f"{config.num_shared_experts} shared, {config.topk_group} of {config.n_group} groups",
            "weights": html.byte_size(self.nbytes),
            "memory": str(self.residency()),
            "set to": str(self.settings),
        }
        rows = []
        for block in self.layers:
            attention = f"{block.attention.kind} {block.attention.form}"
            row = [f"layers[{block.index}]", attention]
            if isinstance(block, MoEBlock):
                bank = block.experts
                rule = str(block.router.rule).replace(" = ", "\xa0=\xa0")
                row += [f"{bank.num_experts} experts {bank.format}", rule]
                row += [bank.computed_by]
            else:
                row += ["dense", "", ""]
            rows.append([*row, html.byte_size(block.nbytes)])
        headers = ("layer", "attention", "feed-forward", "rule", "kernel", "bytes")
        body = html.card(f"Model {config.name}", html.pairs(facts), html.table(rows, headers))
        return html.mimebundle(repr(self), body)
