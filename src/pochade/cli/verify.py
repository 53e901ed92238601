"""`pochade verify`: whether a bundle is whole and unchanged, and whether a picture can be painted again."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from pochade.bundle import Bundle
from pochade.cli.options import add_json, add_verbosity
from pochade.cli.progress import ProgressBar
from pochade.cli.text import human_size, plural
from pochade.errors import BundleInvalidError, UsageError


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "verify",
        help="check a bundle's files, or repeat a picture from its settings",
        description="Of a bundle: check the format and the sha256 of each file; ends with exit code 3 and a list of "
        "all faults if it is damaged. Of a PNG picture: paint it again from the settings it carries; ends with exit "
        "code 0 if the pixels are identical and 1 if they differ.",
    )
    parser.add_argument("target", metavar="BUNDLE|PICTURE", help="bundle folder, installed name, or PNG file")
    parser.add_argument("-m", "--model", help="bundle to repeat a picture with (default: the one it names)")
    parser.add_argument("--device", default="auto", help="device to repeat a picture on (default: auto)")
    add_json(parser, "the outcome as JSON")
    add_verbosity(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Verify a bundle or a picture and print the outcome."""
    path = Path(arguments.target)
    return _picture(path, arguments) if path.is_file() else _bundle(arguments)


def _picture(path: Path, arguments: argparse.Namespace) -> int:
    from pochade.runtime.receipt import repeat_picture

    with ProgressBar(arguments.quiet > 0) as bar:
        found = repeat_picture(
            path, arguments.model, arguments.device, lambda event: bar.update("painting", event.index, event.total)
        )
    if arguments.json:
        print(json.dumps(asdict(found), indent=2))
    elif found.identical:
        print("identical")
    else:
        print(f"different: {found.different_pixels:.1%} of the pixels, PSNR {found.psnr:.1f} dB")
    return 0 if found.identical else 1


def _bundle(arguments: argparse.Namespace) -> int:
    if arguments.model is not None:
        raise UsageError("--model has no effect on a bundle; it names the bundle to repeat a picture with")
    from pochade.runtime.locate import resolve

    folder = resolve(arguments.target)
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
