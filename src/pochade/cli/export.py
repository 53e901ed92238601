"""`pochade export`: a checkpoint folder becomes a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from pochade.cli.options import add_verbosity
from pochade.cli.progress import ProgressBar
from pochade.cli.quantize import add_scheme_options, read_scheme
from pochade.errors import MissingExtraError


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "export",
        help="turn a checkpoint folder into a bundle",
        description="Turn a checkpoint in its published folder layout into a bundle. Needs PyTorch: pochade[export].",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder as published, or file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="folder to make")
    parser.add_argument("--dtype", choices=["fp32", "fp16"], default="fp32", help="precision of the graphs")
    parser.add_argument("--recipe", help="row of models.yaml (default: the one that fits)")
    parser.add_argument("--text-encoder", type=Path, metavar="FOLDER", help="take the text tower from another folder")
    parser.add_argument("--transformer", type=Path, metavar="FOLDER", help="take the transformer from another folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    add_scheme_options(parser)
    add_verbosity(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Export, and quantize when a scheme is given."""
    try:
        from pochade.export.write import export_checkpoint
        from pochade.quant.bundle import export_and_quantize
    except ImportError as error:
        raise MissingExtraError(f'export needs more packages ({error}): pip install "pochade[cpu,export]"') from None

    chosen = read_scheme(arguments)
    with ProgressBar(quiet=bool(arguments.quiet)) as bar:

        def export(target: Path, overwrite: bool) -> object:
            return export_checkpoint(
                arguments.checkpoint,
                target,
                dtype=arguments.dtype,
                recipe=arguments.recipe,
                text_encoder=arguments.text_encoder,
                transformer=arguments.transformer,
                overwrite=overwrite,
                progress=lambda what, done, total: bar.update(f"exporting {what}", done, total),
            )

        if chosen is None:
            export(arguments.output, arguments.overwrite)
        else:
            scheme, options = chosen
            export_and_quantize(
                lambda target: export(target, False),
                arguments.output,
                scheme,
                arguments.overwrite,
                bar.update,
                **options,
            )
    print(arguments.output)
    return 0
