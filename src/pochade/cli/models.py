"""`pochade models`: what can be exported, and what is installed."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from pochade.cli.options import add_json
from pochade.errors import MissingExtraError, PochadeError


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "models",
        help="list installed bundles and known checkpoints",
        description="List installed bundles (names for --model) and the checkpoints that models.yaml knows.",
    )
    add_json(parser, "both lists as JSON")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print both lists."""
    bundles, recipes = _bundles(), _recipes()
    if arguments.json:
        print(json.dumps({"installed": bundles, "recipes": recipes}, ensure_ascii=False, indent=2))
        return 0
    print("Installed bundles (pochade generate -m NAME):")
    for row in bundles:
        note = row.get("fault") or f"{row['family']:<12}{row['precision']:<12}{row['bytes'] / 1e6:8.1f} MB"
        print(f"  {row['name']:<24}{note}  {row['path']}")
    if recipes is None:
        print('Recipes: pip install "pochade[export]" to read models.yaml', file=sys.stderr)
        return 0
    print("\nCheckpoints with a recipe (pochade export FOLDER -o BUNDLE):")
    for name, recipe in recipes.items():
        print(f"  {name:<24}{recipe['family']:<12}{recipe['licence']:<12}{recipe['checkpoint']}")
    return 0


def _bundles() -> list[dict[str, Any]]:
    from pochade.bundle import Bundle
    from pochade.runtime.locate import installed

    rows: list[dict[str, Any]] = []
    for path in installed():
        row: dict[str, Any] = {"name": path.name, "path": str(path)}
        try:
            bundle = Bundle.open(path)
        except PochadeError as error:
            rows.append(row | {"fault": str(error)})
            continue
        precisions = sorted({c.precision for c in bundle.manifest.components.values()})
        rows.append(
            row
            | {
                "family": bundle.manifest.family,
                "precision": "+".join(precisions),
                "bytes": bundle.size,
                "licence": bundle.manifest.source.get("licence"),
            }
        )
    return rows


def _recipes() -> dict[str, dict[str, Any]] | None:
    """Rows of models.yaml; None without the packages to read it."""
    try:
        from pochade.export.recipes import read_recipes

        recipes = read_recipes()
    except (MissingExtraError, ImportError):
        return None
    fields = ("family", "checkpoint", "licence", "scheme", "defaults")
    return {name: {field: getattr(recipe, field) for field in fields} for name, recipe in recipes.items()}
