"""A layer whose stages are on several devices: hidden numbers go where each of them is.

Everything of a layer follows attention's device; the routed experts' sum comes back there. While
devices compute shared and routed experts, the host's kernels compute theirs in a thread.
B batch, T tokens, D hidden.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ktlab.attention.cache import LayerCache
from ktlab.experts.placed_bank import PlacedBank, Running, start_experts
from ktlab.kernels.device_linear import DeviceLinear
from ktlab.kernels.norm import rms_norm
from ktlab.kernels.seat import HOST, Seat, TorchSeat, synchronize
from ktlab.model.deferral import Later, split
from ktlab.probe import NO_PROBE, Probe

if TYPE_CHECKING:
    from ktlab.model.block import Block


@dataclass(frozen=True, kw_only=True)
class BlockSeats:
    """Where a layer's stages are. Routed experts know for themselves."""

    attention: Seat
    router: Seat
    feed: Mapping[str, Seat]
    """Of the shared expert, or of a dense layer's network, by phase."""

    @staticmethod
    def of(block: "Block") -> "BlockSeats | None":
        """Read off the stages; None where all of the layer is on the host, undivided."""
        stages = block.stages()
        attention = getattr(block.attention, "seat", HOST)
        router = seat_of(getattr(stages.get("router"), "gate", None))
        feed = _feed_seat(stages)
        later = _feed_seat(block.stages_in("prefill")) if block.in_prefill else feed
        divided = isinstance(stages.get("experts"), PlacedBank) or block.in_prefill
        if not divided and attention.host and router.host and feed.host:
            return None
        return BlockSeats(
            attention=attention, router=router, feed={"decode": feed, "prefill": later}
        )


def seat_of(linear: Any) -> Seat:
    """Where a matrix is."""
    return linear.seat if isinstance(linear, DeviceLinear) else HOST


def _feed_seat(stages: Mapping[str, Any]) -> Seat:
    return seat_of(getattr(stages.get("shared", stages.get("mlp")), "gate", None))


def phase_of(hidden_BTD: Tensor) -> str:
    """ "decode" for one token a sequence, else "prefill"."""
    return "decode" if hidden_BTD.shape[1] == 1 else "prefill"


def move(values: Tensor, here: Seat, there: Seat) -> Tensor:
    """From one device to another; through host memory where both are none."""
    if here is there:
        return values
    return there.take(here.give(values)()[0])


class Twins(dict[str, Any]):
    """Stages of one phase, by name; a switch sets them as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class OnSeat(Probe):
    """Shows a probe what is on a device: brought to the host where it is wanted, and waited for
    where it is timed."""

    def __init__(self, probe: Probe, seat: Seat) -> None:
        self._probe, self._seat = probe, seat
        self.inside = probe.inside

    def record(self, name: str, values: Tensor) -> None:
        """See `Probe.record`."""
        wanted = self._probe.wants(name)
        self._probe.record(name, self._seat.give(values)()[0] if wanted else values)

    def stage(self, name: str) -> AbstractContextManager[None]:
        """See `Probe.stage`."""
        return self._stage(name) if self.inside else self._probe.stage(name)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        with self._probe.stage(name):
            yield
            synchronize([self._seat])


def on_seat(probe: Probe, seat: Seat) -> Probe:
    """A probe for what happens on `seat`."""
    return probe if seat.host or probe is NO_PROBE else OnSeat(probe, seat)


def placed_forward(
    block: "Block",
    seats: BlockSeats,
    hidden_BTD: Tensor,
    here: Seat,
    cache: LayerCache,
    positions_BT: Tensor,
    probe: Probe,
    later: Later | None,
) -> Tensor:
    """(B, T, D) on `here` to (B, T, D) on attention's seat; writes the layer's cache."""
    at, eps, name = seats.attention, block.config.rms_eps, f"layers.{block.index}"
    watched, near = on_seat(probe, at), block.attention.near
    left = None if later is None else later.take()
    hidden_BTD = move(hidden_BTD, here, at)
    with watched.stage(f"{name}.attention"):
        normed = rms_norm(hidden_BTD, near(block.attention_norm_D), eps)
        hidden_BTD = hidden_BTD + block.attention.forward(normed, cache, positions_BT, watched)
    normed_TD = rms_norm(hidden_BTD, near(block.mlp_norm_D), eps).flatten(0, 1)
    given = later if block.deferred > 0 else None
    mixed_TD = _feed(block, seats, normed_TD, phase_of(hidden_BTD), probe, given)
    hidden_BTD = hidden_BTD + mixed_TD.view_as(hidden_BTD)
    if left is not None:
        hidden_BTD = hidden_BTD + left(at).view_as(hidden_BTD)
    watched.record(f"{name}.hidden", hidden_BTD.flatten(0, 1))
    return hidden_BTD


def _feed(
    block: "Block",
    seats: BlockSeats,
    normed_TD: Tensor,
    phase: str,
    probe: Probe,
    later: Later | None,
) -> Tensor:
    """What comes after attention, from its seat to its seat."""
    at, feed_at = seats.attention, seats.feed[phase]
    stages = block.stages_in(phase)
    if "router" not in stages and "mlp" not in stages:  # a block of the user's own
        more = () if later is None else (later,)
        return at.take(block.feed_forward(move(normed_TD, at, HOST), probe, *more))
    name = f"layers.{block.index}"
    if "router" in stages:
        return _experts(block, seats, stages, normed_TD, phase, probe, later)
    watched = on_seat(probe, feed_at)
    with watched.stage(f"{name}.mlp"):
        output_TD = stages["mlp"].forward(move(normed_TD, at, feed_at))
    watched.record(f"{name}.mlp.output", output_TD)
    return move(output_TD, feed_at, at)


def _experts(
    block: "Block",
    seats: BlockSeats,
    stages: dict[str, Any],
    normed_TD: Tensor,
    phase: str,
    probe: Probe,
    later: Later | None,
) -> Tensor:
    at, routed_at, shared_at = seats.attention, seats.router, seats.feed[phase]
    name, watched = f"layers.{block.index}", on_seat(probe, routed_at)
    routed_in_TD = move(normed_TD, at, routed_at)
    with watched.stage(f"{name}.router"):
        routing = stages["router"].forward(routed_in_TD)
    for what in ("logits_TE", "scores_TE", "ids_TK", "weights_TK"):
        watched.record(f"{name}.router.{what.partition('_')[0]}", getattr(routing, what))
    shared: Any = stages.get("shared")
    shared_in_TD = shared_TD = None
    if shared is not None and isinstance(shared_at, TorchSeat):
        shared_in_TD = move(normed_TD, at, shared_at)  # not behind what `at` is given below
    with watched.stage(f"{name}.experts"):
        # The host waits once for all of it, before devices have experts to compute.
        host_TD, ids_TK, weights_TK = routed_at.give(
            routed_in_TD, routing.ids_TK, routing.weights_TK
        )()
        light_TK = None
        if later is not None:
            ids_TK, light_TK = split(ids_TK, weights_TK, block.deferred)
        start = partial(
            start_experts, stages["experts"], routed_in_TD, host_TD,
            weights_TK=weights_TK, here=routed_at, phase=phase,
        )  # fmt: skip
        running = start(ids_TK, beside=light_TK is not None or shared_in_TD is not None)
        if shared_in_TD is not None and isinstance(shared_at, TorchSeat):
            with running.beside(shared_at):
                shared_TD = shared.forward(shared_in_TD)
        if later is not None and light_TK is not None:
            # The host goes on with them while the next layer's attention is computed.
            light = start(light_TK, beside=True, after=running)
            later.leave(partial(_light, name, light, probe))
        routed_TD = running.finish()
    watched.record(f"{name}.experts.output", routed_TD)
    mixed_TD = move(routed_TD, routed_at, at)
    if shared is None:
        return mixed_TD
    watched = on_seat(probe, shared_at)
    with watched.stage(f"{name}.shared"):
        if shared_TD is None:
            shared_TD = shared.forward(move(normed_TD, at, shared_at))
    watched.record(f"{name}.shared.output", shared_TD)
    return mixed_TD + move(shared_TD, shared_at, at)


def _light(name: str, light: Running, probe: Probe, to: Seat) -> Tensor:
    """What the next layer adds, there; waits for the rest of it."""
    watched = on_seat(probe, to)
    with watched.stage(f"{name}.deferred"):
        light_TD = light.finish(to)
    watched.record(f"{name}.deferred.output", light_TD)
    return light_TD
