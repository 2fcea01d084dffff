"""`ktlab machine`: what a machine can do: the one at hand, measured, or a listed one."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("name", nargs="?", default="this", help='"this" (measured), a listed one, a .json file')
    add("--again", action="store_true", help="measure even if this machine was measured before")
    add("--json", action="store_true", help="print JSON, which --machine FILE.json reads back")


def run(options: argparse.Namespace) -> int:
    """Print the machine."""
    from ktlab.placement.machine import THIS, Machine, get_machine
    from ktlab.placement.machine_view import text

    if options.name == THIS:
        machine = Machine.measure(again=options.again)
    else:
        machine = get_machine(options.name)
    print(machine.to_json() if options.json else text(machine))
    return 0
