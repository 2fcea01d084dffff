"""`ktlab rules`: what a rule file would do to a model, and whether it can be read at all."""

import argparse

from ktlab.cli.arguments import add_model, loaded


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Its one command so far."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    text = "what each rule would do; nothing changes"
    preview = commands.add_parser("preview", help=text, description=text)
    preview.add_argument("rules", metavar="FILE", help="YAML, or the name of one of ktlab's own")
    add_model(preview)
    preview.add_argument("--strict", action="store_true", help="fail where a rule asks for more")
    preview.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    from ktlab.placement.rules import RuleSet

    rules = RuleSet.read(options.rules)
    preview = rules.preview(loaded(options), strict=options.strict)
    print(preview.to_json() if options.json else preview)
    return 0
