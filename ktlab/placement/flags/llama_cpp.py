"""llama.cpp's words for where a model goes: -ngl, -ts, -ot (--override-tensor), --n-cpu-moe.

    LlamaCpp.parse("-ngl 99 --n-cpu-moe 20").placement(config)
    LlamaCpp.of(placement)              # prints as a command line; `left_out` cannot be said so

What they mean (llama.cpp's src/llama-model.cpp and common/arg.cpp, early 2026):
- The output counts as the layer behind the last one. -ngl N takes the last N of all these to the
  GPUs (before December 2025 the last N layers, and the output from layers + 1 on). The embedding
  stays on the CPU.
- -ts divides those among the GPUs in order, by shares. A layer's cache is with the layer.
- -ot takes pairs PATTERN=BUFFER, divided by commas; the first pattern found anywhere in a tensor's
  name decides, whatever -ngl says. --cpu-moe and --n-cpu-moe N are such patterns for the experts of
  all, and of the first N layers.
Decode and prompts are alike but for large batches, whose weights may be copied to a GPU.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod

from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.names import expected_tensors
from ktlab.errors import PlacementError, nearest, short
from ktlab.placement.flags import llama_cpp_writing
from ktlab.placement.flags.shown import shown
from ktlab.placement.parts import component_of
from ktlab.placement.patterns import PATTERN_ERRORS, Pattern
from ktlab.placement.placement import FOLLOW, Placement
from ktlab.placement.ranges import write_ranges
from ktlab.record import Record

OPTIONS: Mapping[str, str] = {
    "-ngl": "-ngl", "--gpu-layers": "-ngl", "--n-gpu-layers": "-ngl",
    "-ts": "-ts", "--tensor-split": "-ts",
    "-ot": "-ot", "--override-tensor": "-ot",
    "-cmoe": "-cmoe", "--cpu-moe": "-cmoe",
    "-ncmoe": "-ncmoe", "--n-cpu-moe": "-ncmoe",
}  # fmt: skip
"""All spellings -> one."""
ALL_LAYERS = 1 << 16
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
"""What --cpu-moe looks for."""
LIMIT_PATTERN = 2000
LIMIT_MOE = 1000
"""Layers of --n-cpu-moe: 999 means all."""
_BUFFER = re.compile(r"CPU|CUDA_Host|CUDA(\d{1,3})")
_BUFFERS = ("CPU", "CUDA_Host", *(f"CUDA{number}" for number in range(8)))
_OTHERS = re.compile(r"(Vulkan|ROCm|HIP|SYCL|MUSA|CANN|Metal|OpenCL|BLAS|RPC|CPU_).*")
_NOT_ECMASCRIPT = re.compile(r"\(\?(?![:=!])|\\[AZ]|[*+?}]\+")
_POSIX = re.compile(r"\[\[[:.=]")


@dataclass(frozen=True, kw_only=True)
class Override(Record):
    """One pair of -ot; `device` in our words."""

    pattern: str
    device: str

    def __str__(self) -> str:
        return f"{self.pattern}={buffer_of(self.device)}"


@dataclass(frozen=True, kw_only=True, repr=False)
class LlamaCpp(Record):
    """The words of one command line; comparable, to JSON and back."""

    gpu_layers: int | None = None
    """-ngl; None where it isn't given: llama.cpp then takes what fits, here all."""
    overrides: tuple[Override, ...] = ()
    """In the order in which they are asked, --cpu-moe and --n-cpu-moe among them."""
    split: tuple[float, ...] = ()
    """-ts; () is one GPU."""
    left_out: tuple[str, ...] = field(default=(), compare=False)
    """What of the placement that this was made of cannot be said so."""

    @classmethod
    def parse(cls, words: str | Sequence[str]) -> "LlamaCpp":
        """A command line, whole or cut at spaces. PlacementError with everything that is wrong."""
        try:
            cut = shlex.split(words) if isinstance(words, str) else list(words)
        except ValueError as error:
            raise PlacementError(f"llama.cpp's options: {error}: {short(words)}") from error
        reader = _Reader(cut)
        found = reader.read()
        if reader.problems:
            raise PlacementError("llama.cpp's options: " + ";\n  ".join(reader.problems))
        return found

    @classmethod
    def of(cls, placement: Placement) -> "LlamaCpp":
        """The words that put a model so, as near as they come; see `left_out`."""
        written = llama_cpp_writing.write(placement.placement)
        return cls(
            gpu_layers=written.gpu_layers,
            overrides=tuple(Override(pattern=p, device=d) for p, d in written.overrides),
            split=tuple(map(float, written.split)),
            left_out=tuple(written.left_out),
        )

    def placement(self, config: ModelConfig) -> Placement:
        """Where a model's components go; what `notes` tells is lost."""
        return self._read(config)[0]

    def notes(self, config: ModelConfig) -> tuple[str, ...]:
        """What a placement cannot say of it, and patterns that do nothing on this model."""
        return tuple(self._read(config)[1])

    # Reading -----------------------------------------------------------------------------------

    def _read(self, config: ModelConfig) -> tuple[Placement, list[str]]:
        sizes: dict[tuple[int | None, str], dict[str, int]] = {}
        names: dict[tuple[int | None, str], dict[str, list[str]]] = {}
        used = [0] * len(self.overrides)
        # Compiled once: --n-cpu-moe 999 is more than `re` keeps.
        patterns = [Pattern(override.pattern) for override in self.overrides]
        for name, shape in expected_tensors(config).items():
            layer, component = component_of(name, config)
            at = next((n for n, each in enumerate(patterns) if each.search(name)), None)
            if at is not None:
                used[at] += 1
            device = self._device(name, layer, config) if at is None else self.overrides[at].device
            seat = (layer, component)
            sizes.setdefault(seat, {}).setdefault(device, 0)
            sizes[seat][device] += prod(shape)
            part = re.sub(r"^blk\.\d+\.|\.(weight|bias)$", "", name)
            names.setdefault(seat, {}).setdefault(device, []).append(part)
        notes = list(self._apart(sizes, names))
        where = {seat: max(found, key=lambda d: found[d]) for seat, found in sizes.items()}
        if config.tied_output:  # the embedding once more, with the output's layer
            where[None, "output"] = self._by_layer(config.num_layers, config)
        notes += self._caches(where, config)
        counted = {of_first(layer).pattern for layer in range(len(self.overrides))}
        for override, count in zip(self.overrides, used, strict=True):
            if not count and override.pattern not in counted:
                notes.append(f"{override}: decides for no tensor of {config.name}")
        if self.gpu_layers is None:
            notes.append("no -ngl: all layers on the GPU, of which llama.cpp takes what fits")
        return _placed(where, config), notes

    def _device(self, name: str, layer: int | None, config: ModelConfig) -> str:
        """Of a tensor that no pattern names."""
        if name.startswith("token_embd"):
            return "cpu"
        return self._by_layer(config.num_layers if layer is None else layer, config)

    def _by_layer(self, layer: int, config: ModelConfig) -> str:
        """Of a layer; the output comes behind the last, and layers for prediction before it."""
        every = config.num_layers + config.num_nextn_layers + 1
        layer = every - 1 if layer == config.num_layers else layer
        taken = min(every, ALL_LAYERS if self.gpu_layers is None else self.gpu_layers)
        at = layer - (every - taken)
        if at < 0:
            return "cpu"
        total, upto = sum(self.split), 0.0
        for gpu, share in enumerate(self.split):
            upto += share
            if at / taken < upto / total:
                return f"cuda:{gpu}"
        return "cuda:0"

    def _apart(
        self,
        sizes: Mapping[tuple[int | None, str], Mapping[str, int]],
        names: Mapping[tuple[int | None, str], Mapping[str, Sequence[str]]],
    ) -> Iterator[str]:
        """Components whose tensors lie apart: a placement has them as a whole."""
        found: dict[tuple[str, str], list[int]] = {}
        for (layer, component), devices in sizes.items():
            if len(devices) > 1:
                parts = names[layer, component]
                told = ", ".join(f"{' '.join(parts[device])} on {device}" for device in devices)
                most = max(devices, key=lambda device: devices[device])
                at = found.setdefault((f"{component}: {told}", most), [])
                at += [] if layer is None else [layer]
        for (told, most), layers in found.items():
            where = f" in layers {write_ranges(layers)}" if layers else ""
            yield f"{told}{where}; as a whole on {most} here"

    def _caches(
        self, where: Mapping[tuple[int | None, str], str], config: ModelConfig
    ) -> Iterator[str]:
        apart: dict[tuple[str, str], list[int]] = {}
        for layer in range(config.num_layers):
            cache, attention = self._by_layer(layer, config), where[layer, "attention"]
            if cache != attention:
                apart.setdefault((cache, attention), []).append(layer)
        for (cache, attention), layers in apart.items():
            yield (
                f"the cache of layers {write_ranges(layers)} on {cache}, with the layer; here it "
                f"is with attention on {attention}"
            )

    # Showing -----------------------------------------------------------------------------------

    @property
    def args(self) -> tuple[str, ...]:
        """Cut as a shell cuts them; the first layers' experts on the CPU as --n-cpu-moe."""
        found = [] if self.gpu_layers is None else ["-ngl", str(self.gpu_layers)]
        if self.split:
            found += ["-ts", ",".join(f"{share:g}" for share in self.split)]
        rest = list(self.overrides)
        while rest:
            count = 0
            while count < len(rest) and rest[count] == of_first(count):
                count += 1
            if count:
                found += ["--n-cpu-moe", str(count)]
            elif rest[0] == Override(pattern=EXPERTS, device="cpu"):
                found += ["--cpu-moe"]
            else:
                found += ["-ot", str(rest[0])]
            rest = rest[max(count, 1) :]
        return tuple(found)

    def __str__(self) -> str:
        return shlex.join(self.args)

    def __repr__(self) -> str:
        return shown(self.args, self.left_out)


def of_first(layer: int) -> Override:
    """What --n-cpu-moe makes for one layer."""
    return Override(pattern=rf"blk\.{layer}{EXPERTS}", device="cpu")


def buffer_of(device: str) -> str:
    """cuda:1 -> CUDA1; all else is host memory."""
    return f"CUDA{device.removeprefix('cuda:')}" if device.startswith("cuda:") else "CPU"


def _placed(where: Mapping[tuple[int | None, str], str], config: ModelConfig) -> Placement:
    placement = Placement.everywhere(config)
    groups: dict[tuple[str, str], list[int | None]] = {}
    for (layer, component), device in where.items():
        leader = "output" if layer is None else FOLLOW.get(component, "")
        if component in FOLLOW and where.get((layer, leader)) == device:
            continue  # and follows when that is put elsewhere
        groups.setdefault((component, device), []).append(layer)
    for (component, device), layers in groups.items():
        placement = placement.put(component, device, layers=layers)
    return placement


@dataclass
class _Reader:
    """Takes options one by one, and collects what is wrong."""

    words: list[str]
    problems: list[str] = field(default_factory=list)

    def read(self) -> LlamaCpp:
        layers: int | None = None
        split: tuple[float, ...] = ()
        overrides: list[Override] = []
        rest = list(self.words)
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
            option = OPTIONS.get(name)
            if option is None:
                self.problems.append(
                    f"{short(word)} is unknown{nearest(name, OPTIONS)} (expected -ngl N, "
                    "-ts N,N, -ot PATTERN=BUFFER, --cpu-moe, --n-cpu-moe N)"
                )
                while rest and not rest[0].startswith("-"):
                    rest.pop(0)  # its values
                continue
            if option == "-cmoe":
                overrides.append(Override(pattern=EXPERTS, device="cpu"))
                continue
            given = value if equals else rest.pop(0) if rest else None
            if given is None:
                self.problems.append(f"{name} needs a value")
            elif option == "-ngl":
                layers = self.layers(given)
            elif option == "-ts":
                split = self.split(given)
            elif option == "-ncmoe":
                overrides += [
                    of_first(layer) for layer in range(min(LIMIT_MOE, self.number(name, given)))
                ]
            else:
                overrides += self.overrides(given)
        return LlamaCpp(gpu_layers=layers, overrides=tuple(overrides), split=split)

    def layers(self, text: str) -> int | None:
        """None is auto; all and less than nothing are all."""
        if text == "auto":
            return None
        if text == "all" or re.fullmatch(r"-\d{1,9}", text):
            return ALL_LAYERS
        return self.number("-ngl", text)

    def number(self, option: str, text: str) -> int:
        if re.fullmatch(r"\d{1,9}", text):
            return min(int(text), ALL_LAYERS)
        self.problems.append(f"{option} {short(text)}: expected a whole number of layers")
        return 0

    def split(self, text: str) -> tuple[float, ...]:
        try:
            found = tuple(float(part) for part in re.split("[,/]", text))
        except ValueError:
            found = ()
        if found and all(isfinite(x) and x >= 0 for x in found) and sum(found) > 0:
            return found
        self.problems.append(f"-ts {short(text)}: expected shares of the GPUs, such as 3,1")
        return ()

    def overrides(self, text: str) -> Iterator[Override]:
        for part in text.split(","):
            pattern, equals, buffer = part.partition("=")
            if not equals or not pattern or not buffer:
                self.problems.append(
                    f"-ot {short(part)}: expected PATTERN=BUFFER, such as exps=CPU; a comma ends "
                    "a pair, the first = ends its pattern"
                )
                continue
            wrong = [*_wrong_pattern(pattern), *_wrong_buffer(buffer)]
            self.problems += [f"-ot {short(part)}: {what}" for what in wrong]
            if not wrong:
                yield Override(pattern=pattern, device=_device_of(buffer))


def _wrong_pattern(pattern: str) -> Iterator[str]:
    if len(pattern) > LIMIT_PATTERN:
        yield f"a pattern of {len(pattern):,} characters; at most {LIMIT_PATTERN:,}"
        return
    if found := _POSIX.search(pattern):
        yield f"{found[0]} at character {found.start() + 1}: write out the class, such as [0-9]"
        return
    try:
        Pattern(pattern)
    except PATTERN_ERRORS as error:
        place = getattr(error, "pos", None)
        where = "" if place is None else f" at character {place + 1}"
        yield f"no regular expression{where}: {getattr(error, 'msg', error)}"
        return
    if found := _NOT_ECMASCRIPT.search(pattern):
        yield (
            f"{found[0]} at character {found.start() + 1} is not among what llama.cpp's regular "
            "expressions (ECMAScript's) know"
        )


def _wrong_buffer(buffer: str) -> Iterator[str]:
    if _BUFFER.fullmatch(buffer):
        return
    if _OTHERS.fullmatch(buffer):
        yield f"buffer {short(buffer)} has no counterpart here; there are CPU and CUDA0, CUDA1, ..."
        return
    near = nearest(buffer.upper(), _BUFFERS)
    yield f"buffer {short(buffer)} is unknown{near} (expected CPU, CUDA_Host, or CUDA0, CUDA1, ...)"


def _device_of(buffer: str) -> str:
    found = _BUFFER.fullmatch(buffer)
    assert found is not None
    return f"cuda:{int(found[1])}" if found[1] else "cpu"
