"""`ktlab chat MODEL`: the chat in a terminal or a pipe."""

import argparse

from ktlab.cli.arguments import add_model, loaded
from ktlab.model.words import EXAMPLES, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("-k", "--experts", type=int, metavar="K", help="routed experts a token")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help=EXAMPLES)
    parser.add_argument("--rules", metavar="FILE", help="a rule file, as KTransformers writes them")
    parser.add_argument("-s", "--system", default="", metavar="TEXT", help="system message")
    parser.add_argument("-c", "--context", type=int, metavar="N", help="tokens; default 8192")
    parser.add_argument("-n", "--max-new-tokens", type=int, default=512, metavar="N")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="default: one a core")
    parser.add_argument("--temperature", type=float, default=0.6, metavar="X", help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--think", action="store_true", help="begin every answer with <think>")
    parser.add_argument(
        "--template", nargs="+", default=[], metavar="NAME=VALUE",
        help="variables for the chat template, such as enable_thinking=False",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from ktlab.chat import ChatSession
    from ktlab.chat.terminal import inject, talk
    from ktlab.placement.rules import RuleSet

    changes = settings(options.set)
    for name, value in (("top_k", options.experts), ("threads", options.threads)):
        if value is not None:
            changes[name] = value
    rules = RuleSet.read(options.rules) if options.rules else None
    model = loaded(options)
    if rules is not None:
        inject(rules, model)
    model.set(**changes)
    chat = ChatSession(
        model,
        system=options.system,
        context=options.context,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        force_think=options.think,
        extra=settings(options.template),
    )
    talk(chat)
    return 0
