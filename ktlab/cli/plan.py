"""`ktlab plan`: will it fit?"""

import argparse

import ktlab
from ktlab.model.words import settings
from ktlab.placement.placement_file import read_placement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("model", help='a .gguf file, any shard, a folder, "tiny", or a shape such as deepseek-v3')
    add("--format", metavar="NAME", help="such as q4_k_m; of a shape, or as if made anew")
    add("--placement", metavar="FILE", help="what goes where, as YAML or JSON")
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


def run(options: argparse.Namespace) -> int:
    """Print the plan; exit code 1 where the model does not fit."""
    plan = ktlab.plan(
        options.model,
        placement=read_placement(options.placement) if options.placement else None,
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
    print(plan.to_json() if options.json else plan)
    return 0 if plan.fits is not False else 1
