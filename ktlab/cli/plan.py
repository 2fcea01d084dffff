"""`ktlab plan`: will it fit?"""

import argparse
import sys
from typing import TYPE_CHECKING, Any

import ktlab
from ktlab.errors import SettingError
from ktlab.model.words import settings

if TYPE_CHECKING:
    from ktlab.placement.placement import Placement

WORDS = ("llama.cpp", "sglang", "yaml", "json")
"""What a placement can be printed as."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("model", help='a .gguf file, any shard, a folder, "tiny", or a shape such as deepseek-v3')
    add("--format", metavar="NAME", help="such as q4_k_m; of a shape, or as if made anew")
    add("--placement", metavar="FILE", help="what goes where, as YAML or JSON")
    add("--rules", metavar="FILE", help="what goes where, as the devices of a rule file say")
    add("--ram", metavar="SIZE", help="such as 382GB or 128GiB")
    add("--vram", metavar="SIZE", help="such as 14GB; routed experts then stay on the CPU")
    add("--machine", metavar="NAME", help='"this": what is available here, now')
    add("--context", type=int, metavar="N", help="tokens; default: 8192")
    add("--attention", metavar="FORM", help="whose cache counts: absorbed, naive, grouped")
    add("--convert", nargs="+", default=[], metavar="FROM=TO", help="as load, iq1_m=q8_0")
    add("--quantize", metavar="FORMAT", help="floats while loading, as load: int8_channel")
    add("--gpu-formats", nargs="+", default=[], metavar="PART=FORMAT", help="attention=bf16")
    add("--numa-copies", type=int, default=1, metavar="N", help="of the experts in host memory")
    add("--json", action="store_true", help="print JSON")
    add("--as", dest="words", choices=WORDS, help="print the placement alone, for others to use")
    group = parser.add_argument_group("llama.cpp's options, as it reads them")
    for names, metavar, text in (
        (("-ngl", "--n-gpu-layers"), "N", "the last N layers on the GPU, the output first"),
        (("-ts", "--tensor-split"), "N,N", "shares of the GPUs"),
        (("-ot", "--override-tensor"), "PATTERN=BUFFER,...", "such as exps=CPU; the first counts"),
        (("-ncmoe", "--n-cpu-moe"), "N", "the experts of the first N layers on the CPU"),
    ):
        group.add_argument(*names, metavar=metavar, action=_Kept, dest="llama_cpp", help=text)
    text = "the experts of all layers on the CPU"
    group.add_argument("-cmoe", "--cpu-moe", nargs=0, action=_Kept, dest="llama_cpp", help=text)


class _Kept(argparse.Action):
    """Options in the order in which they came, which counts."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        words = [option, *([] if self.nargs == 0 else [values])]
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *words])


def run(options: argparse.Namespace) -> int:
    """Print the plan; exit code 1 where the model does not fit."""
    plan = ktlab.plan(
        options.model,
        placement=_placement(options),
        format=options.format,
        ram=options.ram,
        vram=options.vram,
        machine=options.machine,
        context=options.context,
        attention=options.attention,
        convert=settings(options.convert),
        quantize=options.quantize,
        gpu_formats=settings(options.gpu_formats),
        numa_copies=options.numa_copies,
    )
    if options.words:
        _print(plan.placement, options.words)
        return 0
    print(plan.to_json() if options.json else plan)
    return 0 if plan.fits is not False else 1


def _placement(options: argparse.Namespace) -> "Placement | None":
    given = {
        "--placement": options.placement,
        "--rules": options.rules,
        (options.llama_cpp or ("",))[0]: options.llama_cpp,
    }
    said = [name for name, value in given.items() if value]
    if len(said) > 1:
        raise SettingError(f"{' and '.join(said)} both say what goes where; give one of them")
    if options.placement:
        return ktlab.Placement.read(options.placement)
    if not said:
        return None
    from ktlab.checkpoint.facts import read_facts

    facts = read_facts(options.model, format=options.format)
    if options.rules:
        from ktlab.model.shape_alone import shape_alone

        shape = shape_alone(facts)
        preview = ktlab.RuleSet.read(options.rules, model=shape).preview(shape)
        notes, placement = preview.notes, preview.placement
    else:
        from ktlab.placement.flags import LlamaCpp

        words = LlamaCpp.parse(options.llama_cpp)
        notes, placement = words.notes(facts.config), words.placement(facts.config)
    if placement is None:
        raise SettingError(f"{options.rules}: {'; '.join(notes)}")
    for note in notes:
        print(f"ktlab: {note}", file=sys.stderr)
    return placement


def _print(placement: "Placement", words: str) -> None:
    """To be used elsewhere; what cannot be said there is a remark."""
    from ktlab.placement.flags import LlamaCpp, SGLang

    if words in ("yaml", "json"):
        print(placement.to_yaml().rstrip() if words == "yaml" else placement.to_json())
        return
    written = LlamaCpp.of(placement) if words == "llama.cpp" else SGLang.of(placement)
    print(written)
    for note in written.left_out:
        print(f"ktlab: left out: {note}", file=sys.stderr)
