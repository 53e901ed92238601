"""The program `pochade`: one verb per module, results on stdout, everything else on stderr.

Exit codes: 0 done, 2 wrong usage, 3 bundle not found or damaged, 4 device not available, 5 does not fit the memory
budget, 6 input file refused, 7 would need the network, 130 cancelled, 1 anything else.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from pochade import __version__
from pochade.cli import doctor, export, generate, info, models, quantize, verify
from pochade.errors import PochadeError

VERBS = (generate, export, quantize, info, verify, doctor, models)


def build_parser() -> argparse.ArgumentParser:
    """Parser of the whole program."""
    parser = argparse.ArgumentParser(
        prog="pochade",
        description="Paint pictures from words, offline and without PyTorch.",
        epilog="pochade VERB --help tells more. Exit codes: " + (__doc__ or "").split("Exit codes: ")[1].strip(),
    )
    parser.add_argument("--version", action="version", version=f"pochade {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in VERBS:
        module.register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    arguments = build_parser().parse_args(argv)
    verbosity = getattr(arguments, "verbose", 0) - getattr(arguments, "quiet", 0)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING - 10 * verbosity)
    try:
        return int(arguments.func(arguments))
    except PochadeError as error:
        print(f"pochade: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("pochade: cancelled", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone; without this Python complains again while it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
