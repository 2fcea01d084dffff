"""What can be chosen in the control room: one setting of the model, and a text to judge it on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ktlab.attention.cache import USUAL_FORMS
from ktlab.errors import ContextError, SettingError, nearest
from ktlab.kernels.dispatch import choose
from ktlab.kernels.request import AUTO
from ktlab.notebook.control_room_kernels import STORED, WORDS, all_formats, request_of
from ktlab.placement.presets import Preset, stand_ins
from ktlab.quantization import FORMATS, get_format
from ktlab.routing.rules import CumulativeProbability, FixedK, RelativeThreshold, SelectionRule

if TYPE_CHECKING:
    from ktlab.model.model import Model

RULES = {
    "fixed k": "the k best experts, as trained",
    "p > t·p₁": "experts while p_i > t·p_1 (smart expert reduction), at most k",
    "top-p": "the fewest experts that hold a share p of the k best scores",
}
OFFERED_FORMATS = (
    "bf16", "int8_channel", "q6_k", "q5_k", "q5_0", "q4_k", "q4_0", "int4_group32",
    "int4_group128", "q3_k", "q2_k",
)  # fmt: skip
DEFAULT_THRESHOLD = {"fixed k": 0.0, "p > t·p₁": 0.5, "top-p": 0.8}

OWN, ALL = "own text", "all domains"
CHARACTERS_PER_TOKEN = 5
"""More than a token of this kit's tokenizers holds on average: bounds what is encoded."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One setting of every switch in the room. Equal choices compare equal."""

    top_k: int
    rule: str = "fixed k"
    threshold: float = 0.0
    """t of "p > t·p₁", p of "top-p"; 0 for "fixed k", which has none."""
    attention: str = "absorbed"
    experts: str = STORED
    """Format of the routed experts' weights."""
    layout: str = AUTO
    backend: str = AUTO
    isa: str = AUTO
    placement: str = "cpu"
    """A name of `ktlab.placement.presets`; without a GPU another device stands in for it."""

    def __post_init__(self) -> None:
        Preset(self.placement)
        if self.rule not in RULES:
            raise SettingError(
                f"rule = {self.rule!r}: expected one of {', '.join(RULES)}"
                f"{nearest(self.rule, RULES)}"
            )
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int):
            raise SettingError(f"top_k = {self.top_k!r}: expected a whole number of experts")
        if self.rule == "fixed k":
            object.__setattr__(self, "threshold", 0.0)

    def with_(self, **changes: Any) -> "Choice":
        """A changed copy; another rule starts at that rule's usual threshold, and of the words that
        name a kernel an older one gives way where it cannot stand beside a newer one."""
        rule = changes.get("rule", self.rule)
        if rule != self.rule and "threshold" not in changes:
            changes["threshold"] = DEFAULT_THRESHOLD.get(rule, 0.0)
        named = {word: changes[word] for word in WORDS if word in changes}
        if named:
            request = request_of(self).with_(**named)
            changes.update({word: getattr(request, word) for word in WORDS})
        return replace(self, **changes)

    def selection(self) -> SelectionRule:
        """The rule as the router takes it."""
        if self.rule == "p > t·p₁":
            return RelativeThreshold(self.threshold, k_max=self.top_k)
        if self.rule == "top-p":
            return CumulativeProbability(self.threshold, k_max=self.top_k)
        return FixedK(self.top_k)

    def overrides(self) -> dict[str, Any]:
        """What `model.override` takes, complete."""
        changes: dict[str, Any] = {
            "rule": self.selection(),
            "attention": self.attention,
            **{word: getattr(self, word) for word in WORDS},
        }
        if self.placement != "cpu":
            changes |= {"placement": Preset(self.placement), "stand_in": stand_ins()}
        return changes if self.experts == STORED else {**changes, "quantize": self.experts}

    @property
    def expression(self) -> str:
        """The same as Python, without what is usual anyway."""
        parts = [
            f"top_k={self.top_k}" if self.rule == "fixed k" else f"rule=ktlab.{self.selection()!r}"
        ]
        if self.attention not in USUAL_FORMS:
            parts.append(f"attention={self.attention!r}")
        parts += [f"{w}={v!r}" for w in WORDS if (v := getattr(self, w)) != AUTO]
        if self.experts != STORED:
            parts.append(f"quantize={self.experts!r}")
        if self.placement != "cpu":
            parts.append(f"placement=ktlab.placement.{Preset(self.placement)!r}")
            parts += [f"stand_in={stand_ins()}"] if stand_ins() else []
        return f"dict({', '.join(parts)})"

    @property
    def label(self) -> str:
        """Short, for an axis or a heading: "k=6 · q4_k"."""
        if self.rule == "fixed k":
            name = f"k={self.top_k}"
        elif self.rule == "top-p":
            name = f"top-p {self.threshold:g}, k≤{self.top_k}"
        else:
            name = f"p>{self.threshold:g}·p₁, k≤{self.top_k}"
        extras = [
            value
            for value, usual in (
                (self.experts, (STORED,)),
                (self.attention, USUAL_FORMS),
                (self.placement, ("cpu",)),
                *((getattr(self, word), (AUTO,)) for word in WORDS),
            )
            if value not in usual
        ]
        return " · ".join([name, *extras])

    @property
    def other_weights(self) -> bool:
        """Whether it needs weights that are not as loaded: made when it is first chosen."""
        usual = (STORED, "cpu", *[AUTO] * len(WORDS))
        return (self.experts, self.placement, *(getattr(self, w) for w in WORDS)) != usual

    def check(self, model: "Model") -> "Choice":
        """This choice, or a `SettingError` that says why `model` cannot take it. Quick."""
        stored = self.experts == STORED
        if not stored and not get_format(self.experts).can_quantize:
            able = ", ".join(name for name in OFFERED_FORMATS if FORMATS[name].can_quantize)
            raise SettingError(
                f"experts as {self.experts}: this format can be read, not written; try {able}"
            )
        with model.clone().override(rule=self.selection(), attention=self.attention):
            # The kernels are asked for the formats alone: requantizing may take long.
            for formats in all_formats(model, self):
                choose(request_of(self), formats)
        return self


def formats(model: "Model") -> list[tuple[str, str]]:
    """(label, value) of the formats that the experts can be set to."""
    stored = "+".join(dict.fromkeys(block.experts.format for block in model.moe_blocks))
    smaller = [name for name in OFFERED_FORMATS if FORMATS[name].can_quantize and name != stored]
    return [(f"{stored}, as stored", STORED), *((name, name) for name in smaller)]


class Library(Mapping[str, str]):
    """The texts on offer by name: the domains, all of them together, and the reader's own."""

    def __init__(self, texts: Mapping[str, str], own: str = "") -> None:
        self.domains = texts
        self.own = own

    def __getitem__(self, name: str) -> str:
        return self.own if name == OWN else self.domains[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.domains
        if len(self.domains) > 1:
            yield ALL
        yield OWN

    def __len__(self) -> int:
        return len(list(iter(self)))

    def parts(self, name: str) -> dict[str, str]:
        """The texts behind a name: one, or every domain for "all domains"."""
        if name == ALL:
            return dict(self.domains)
        if name not in self:
            raise ContextError(
                f"text {name!r} is unknown; expected one of {', '.join(self)}{nearest(name, self)}"
            )
        if not self[name].strip():
            raise ContextError(
                f"{name} is empty: type or paste some text (2 tokens or more), or choose a domain"
            )
        return {name: self[name]}

    def ids(self, model: "Model", name: str, max_tokens: int) -> dict[str, list[int]]:
        """Token ids of each part, `max_tokens` predicted ones in all at the most."""
        parts = self.parts(name)
        share = max(2, max_tokens // len(parts) + 1)
        encode = model.tokenizer.encode
        ids = {
            part: encode(text[: share * CHARACTERS_PER_TOKEN])[:share]
            for part, text in parts.items()
        }
        short = [part for part, found in ids.items() if len(found) < 3]
        if short:
            raise ContextError(
                f"{', '.join(short)}: {len(ids[short[0]])} tokens with the one that opens a text; "
                "expected at least 3, so that a prediction can be judged; type a little more"
            )
        return ids
