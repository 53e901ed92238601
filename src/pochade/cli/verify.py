"""`pochade verify`: whether a bundle is whole and unchanged."""

from __future__ import annotations

import argparse
import json
import sys

from pochade.bundle import Bundle
from pochade.cli.options import add_json, add_verbosity
from pochade.cli.progress import ProgressBar
from pochade.cli.text import human_size, plural
from pochade.errors import BundleInvalidError


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "verify",
        help="check that a bundle is whole and unchanged",
        description="Check the format of a bundle and the sha256 of each of its files. Ends with exit code 3 and a "
        "list of all faults if it is damaged.",
    )
    parser.add_argument("model", metavar="BUNDLE", help="bundle folder or installed name")
    add_json(parser, "the outcome as JSON")
    add_verbosity(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Verify the bundle and print the outcome."""
    from pochade.runtime.locate import resolve

    folder = resolve(arguments.model)
    try:
        with ProgressBar(arguments.quiet > 0) as bar:
            bundle = Bundle.open_verified(folder, lambda _path, done, total: _show(bar, done, total))
    except BundleInvalidError as error:
        if arguments.json:
            print(json.dumps({"ok": False, "faults": error.faults}, ensure_ascii=False, indent=2))
        else:
            lines = [f"{folder} is refused, {plural(len(error.faults), 'fault')}:", *error.faults]
            print("\n  ".join(lines), file=sys.stderr)
        return error.exit_code
    files = bundle.manifest.files
    if arguments.json:
        outcome = {"ok": True, "files": len(files), "size": bundle.size, "digest": bundle.digest}
        print(json.dumps(outcome, indent=2))
        return 0
    for entry in files if arguments.verbose else ():
        print(f"{entry.sha256}  {entry.path}")
    print(f"ok: {plural(len(files), 'file')}, {human_size(bundle.size)}")
    return 0


def _show(bar: ProgressBar, done: int, total: int) -> None:
    bar.update("verifying", done // 1_000_000, total // 1_000_000, " MB")
