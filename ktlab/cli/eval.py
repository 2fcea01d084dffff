"""`ktlab eval`: perplexity of a text, and KL divergence against a saved baseline."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> int:
    raise NotImplementedError
