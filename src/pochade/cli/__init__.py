"""The program `pochade`: one verb per module, results on stdout, everything else on stderr.

Exit codes: 0 done, 2 wrong usage, 3 bundle not found or damaged, 4 device not available, 5 does not fit the memory
budget, 6 input file refused, 7 would need the network, 130 cancelled, 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence

from pochade import __version__
from pochade.cli import bench, doctor, export, generate, info, models, quantize, verify
from pochade.cli.text import printable
from pochade.errors import PochadeError

VERBS = (generate, export, quantize, bench, info, verify, doctor, models)


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
    arguments = build_parser().parse_args(bench.with_kind(sys.argv[1:] if argv is None else argv))
    verbosity = getattr(arguments, "verbose", 0) - getattr(arguments, "quiet", 0)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING - 10 * verbosity)
    _let_any_name_through(sys.stdout)
    try:
        code = int(arguments.func(arguments))
        if sys.stdout is not None:  # as it is in windowed programs
            sys.stdout.flush()
        return code
    except PochadeError as error:
        return _end(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _end("cancelled", 130)
    except BrokenPipeError:
        _drop_output()
        return 1
    except OSError as error:
        _drop_output()
        return _end(str(error), 1)


def _end(reason: str, code: int) -> int:
    """Say why in one line, whatever a path or a prompt in it holds."""
    print(f"pochade: {printable(reason)}", file=sys.stderr)
    return code


def _let_any_name_through(stream: object) -> None:
    """Keep file names that the stream's encoding has no letters for from ending the program when they are printed."""
    if isinstance(stream, io.TextIOWrapper):
        # Names that are no text come back as the bytes they were.
        stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "backslashreplace")


def _drop_output() -> None:
    """Send to nowhere what stdout could not take, or Python complains again while it flushes at exit."""
    with contextlib.suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
