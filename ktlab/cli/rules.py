"""`ktlab rules`: what a rule file would do to a model, and whether it can be read at all."""

import argparse
from pathlib import Path

from ktlab.cli.arguments import add_model, loaded
from ktlab.errors import SettingError


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Its one command so far."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    text = "what each rule would do; nothing changes"
    preview = commands.add_parser("preview", help=text, description=text)
    preview.add_argument("rules", metavar="FILE", help="YAML, or the name of one of ktlab's own")
    add_model(preview, "or a shape such as deepseek-v3, of which no file is needed")
    preview.add_argument("--format", metavar="NAME", help="of a shape: such as q4_k_m")
    preview.add_argument("--strict", action="store_true", help="fail where a rule asks for more")
    preview.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    from ktlab.checkpoint.facts import read_facts
    from ktlab.checkpoint.published import published_models
    from ktlab.model.shape_alone import shape_alone
    from ktlab.placement.rules import RuleSet

    name = options.model
    if name.lower() in published_models() and not Path(name).exists():
        model = shape_alone(read_facts(name, format=options.format))
    elif options.format is not None:
        raise SettingError(f"--format is of a shape, {name} has its own; see --quantize")
    else:
        model = loaded(options)
    rules = RuleSet.read(options.rules, model=model)
    preview = rules.preview(model, strict=options.strict)
    print(preview.to_json() if options.json else preview)
    return 0
