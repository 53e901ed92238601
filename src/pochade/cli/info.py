"""`pochade info`: what a bundle holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pochade.bundle import Bundle, Component
from pochade.cli.options import add_json
from pochade.cli.text import brief, human_count, human_size, pairs, plural, printable, table


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "info",
        help="tell what a bundle holds",
        description="Tell what a bundle holds: its components and their sizes, where it comes from, how it is meant to "
        "be used, and how faithful it is to the checkpoint.",
    )
    parser.add_argument("model", metavar="BUNDLE", help="bundle folder or installed name")
    add_json(parser, "the manifest and the sizes as JSON")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what the bundle holds."""
    from pochade.runtime.locate import resolve

    bundle = Bundle.open(resolve(arguments.model))
    if arguments.json:
        print(json.dumps(_as_json(bundle), ensure_ascii=False, indent=2))
    else:
        print("\n".join(_lines(bundle)))
    return 0


def _as_json(bundle: Bundle) -> dict[str, Any]:
    """The manifest, and what is not in it."""
    return {
        "path": str(bundle.path),
        "digest": bundle.digest,
        "size": bundle.size,
        "component_sizes": {name: bundle.component_size(name) for name in bundle.manifest.components},
        "manifest": bundle.manifest.to_dict(),
    }


def _lines(bundle: Bundle) -> Iterator[str]:
    """The page for people."""
    manifest = bundle.manifest
    facts = {
        "name": manifest.name,
        "folder": printable(str(bundle.path)),
        "task": manifest.task,
        "family": f"{manifest.family}, revision {manifest.family_revision}",
        "size": f"{human_size(bundle.size)} in {plural(len(manifest.files), 'file')}",
        "digest": bundle.digest,
    }
    yield table(facts.items())
    yield ""
    yield from _component_table(bundle)
    for title in ("defaults", "scheduler", "source"):
        yield from _section(title, getattr(manifest, title))
    if manifest.scorecard is not None:
        yield from _scorecard(manifest.scorecard)


def _component_table(bundle: Bundle) -> Iterator[str]:
    rows = [["component", "size", "parameters", "precision", "scheme"]]
    for name, component in bundle.manifest.components.items():
        size = human_size(bundle.component_size(name))
        rows.append([name, size, human_count(component.num_parameters), component.precision, _scheme(component)])
    yield table(rows)


def _scheme(component: Component) -> str:
    """How many weights are kept in which form, where the writer said so."""
    if not component.quantization:
        return "-"
    weights = component.quantization.get("weights")
    if isinstance(weights, dict):
        return printable(", ".join(f"{count} {form}" for form, count in weights.items()))
    return pairs(component.quantization)


def _section(title: str, values: Mapping[str, Any]) -> Iterator[str]:
    """A heading and one line for each value; nothing where there are none."""
    if values:
        yield ""
        yield title
        yield table(([printable(key), brief(value)] for key, value in values.items()), indent="  ")


def _scorecard(scorecard: Mapping[str, Any]) -> Iterator[str]:
    """Measures by component as a table, all else as sections."""
    components = scorecard.get("components")
    if isinstance(components, dict) and components and all(isinstance(row, dict) for row in components.values()):
        measures = list(dict.fromkeys(measure for row in components.values() for measure in row))
        yield ""
        yield "scorecard, against fp32"
        rows = [["component", *map(printable, measures)]]
        rows += [
            [printable(name), *(brief(row.get(measure)) for measure in measures)] for name, row in components.items()
        ]
        yield table(rows, indent="  ")
    for title, values in scorecard.items():
        if title != "components" and isinstance(values, dict):
            yield from _section(f"scorecard, {printable(title)}", values)
