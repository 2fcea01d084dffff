"""`ktlab predict`: what speed to expect, and how predicted speeds stand to published ones."""

import argparse
import json

import ktlab
from ktlab.errors import SettingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("model", nargs="?", help='"tiny", a .gguf file, or a shape such as deepseek-v3')
    add("--machine", default="this", metavar="NAME", help='"this", 2x6454s+4090d, a .json file ...')
    add("--engine", default="ktlab", metavar="NAME", help="ktlab, ktransformers-0.2, llama.cpp ...")
    add("--format", metavar="NAME", help="such as q4_k_m")
    add("--top-k", type=int, metavar="K", help="routed experts a token")
    add("--prompt", type=int, default=512, metavar="N", help="tokens; default: 512")
    add("--generate", type=int, default=128, metavar="N", help="tokens; default: 128")
    add("--placement", metavar="FILE", help="what goes where, as YAML or JSON")
    add("--published", action="store_true", help="every published speed beside ours, with errors")
    add("--fit", action="store_true", help="find the free efficiencies anew from published speeds")
    add("--check", action="store_true", help="measure the model here, too; ktlab on this machine")
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the prediction, the published table, or the fit."""
    from ktlab.placement.published import fit, published

    if options.fit:
        found = fit()
        lines = [f"{name:13} {value:.4g}" for name, value in found.items()]
        print(json.dumps(found, indent=2) if options.json else "\n".join(lines))
        return 0
    if options.published:
        table = published()
        print(table.to_json() if options.json else table)
        return 0
    if options.model is None:
        raise SettingError("predict: name a model, such as deepseek-v3, or ask for --published")
    if options.check:
        return _check(options)
    prediction = ktlab.predict(
        options.model,
        machine=options.machine,
        engine=options.engine,
        format=options.format,
        top_k=options.top_k,
        prompt=options.prompt,
        generate=options.generate,
        placement=ktlab.Placement.read(options.placement) if options.placement else None,
    )
    print(prediction.to_json() if options.json else prediction)
    return 0


def _check(options: argparse.Namespace) -> int:
    """Predicted beside measured, here; exit code 1 where they are apart by more than `NEAR`."""
    from ktlab.measurement.predicted import NEAR, predicted_here

    counts = (8, 6, 4) if options.top_k is None else (options.top_k,)
    found = predicted_here(
        options.model, top_k=counts, prompt=options.prompt, generate=options.generate
    )
    errors = found.errors(options.model)
    if options.json:
        print(json.dumps({**found.to_dict(), "errors": errors}, indent=2))
    else:
        print(found.text(options.model))
    apart = [error for of_k in errors.values() for error in of_k.values() if abs(error) > NEAR]
    return 1 if apart else 0
