"""The best bits for a size, or the smallest size for a fidelity, found by measuring."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from pochade.bundle import Bundle
from pochade.errors import InputRefusedError, UsageError
from pochade.manifest import MANIFEST_NAME
from pochade.quant.allocate import Choice, Options, within_bytes, within_noise
from pochade.quant.component import decide
from pochade.quant.fidelity import Call, Progress
from pochade.quant.scheme import Scheme, Storage
from pochade.quant.scorecard import Scorecard
from pochade.quant.select import find_weights
from pochade.quant.sensitivity import Journal, layers_noise, measure, other_bytes, stored_bytes

RECIPE = "recipe.json"
"""File of a bundle that says which form each weight got, and why."""

MANIFEST_BYTES = 20_000
"""What the manifest and the recipe's head take, about."""

RECIPE_BYTES_PER_WEIGHT = 300

MARGIN = 0.97
"""By how much more than it missed the goal a further attempt is tightened."""


@dataclass(frozen=True)
class Goal:
    """What to reach; one of the two."""

    target_size: int | None = None
    """Bytes of the whole bundle."""
    min_snr: float | None = None
    """Signal-to-noise ratio in dB that every component with float outputs keeps."""

    def __post_init__(self) -> None:
        if (self.target_size is None) == (self.min_snr is None):
            raise UsageError("give a target size or a least signal-to-noise ratio, one of the two")
        if self.target_size is not None and self.target_size <= 0:
            raise UsageError(f"a bundle of {self.target_size} bytes is not possible")
        if self.min_snr is not None and not 0 < self.min_snr < 100:
            raise UsageError(f"a signal-to-noise ratio of {self.min_snr} dB cannot be meant; take 0 to 100")


class Search:
    """Options of every weight, measured once, and the choices they allow."""

    def __init__(
        self,
        bundle: Bundle,
        scheme: Scheme,
        goal: Goal,
        calls: Mapping[str, Sequence[Call]],
        journal: Journal,
        report: Progress,
    ) -> None:
        """Measure, or read from the journal.

        Args:
            bundle: of floats.
            scheme: decides what has no choice.
            goal: what to reach.
            calls: recorded runs by component.
            journal: keeps measurements.
            report: told about every weight.

        Raises:
            UsageError: layers kept in float16 leave more noise than the goal allows, whatever the weights.
        """
        self.scheme = scheme
        self.goal = goal
        self.options: dict[str, Options] = {}
        self._rule: dict[str, Storage] = {}
        """What the scheme would give each weight."""
        self._layers = self._layers_noise(bundle, calls) if goal.min_snr is not None and scheme.half_layers else {}
        self._fixed_bytes = MANIFEST_BYTES
        self._fixed_bytes += sum((bundle.path / file).stat().st_size for file in bundle.manifest.tokenizer_files)
        for name, component in bundle.manifest.components.items():
            path = bundle.component_path(name)
            model = ir.load(path)
            weights = find_weights(model)
            self._fixed_bytes += sum((bundle.path / graph).stat().st_size for graph in component.graphs)
            self._fixed_bytes += other_bytes(model, weights)
            self._rule |= {f"{name}/{weight.name}": decide(weight, name, scheme) for weight in weights}
            if gives_floats(calls.get(name, ())):

                def told(done: int, total: int, name: str = name) -> None:
                    report(f"trying {name}", done, total)

                found = measure(path, name, scheme, calls[name], journal, told)
                self.options[name] = {f"{name}/{weight}": options for weight, options in found.items()}
            else:
                self._fixed_bytes += sum(stored_bytes(w, self._rule[f"{name}/{w.name}"]) for w in weights)
        self._fixed_bytes += RECIPE_BYTES_PER_WEIGHT * sum(map(len, self.options.values()))
        self._budget = goal.target_size
        wanted = _noise_at(goal.min_snr or 0.0)
        self._limits = {name: wanted - self._layers.get(name, 0.0) for name in self.options}

    def choose(self) -> Scheme:
        """The scheme with the forms that reach the goal as far as the measurements tell.

        Raises:
            UsageError: nothing reaches it.
        """
        self.choice = self._within_size() if self._budget is not None else self._above_snr()
        forms = {path: option.storage for path, option in self.choice.items()}
        return replace(self.scheme, name="mixed", chosen=forms)

    def tighten(self, size: int, scorecard: Scorecard) -> bool:
        """Look at what really came out; ask for more where it missed the goal.

        Args:
            size: bytes of the finished bundle.
            scorecard: as measured.

        Returns:
            Whether to choose and quantize again.
        """
        if self._budget is not None:
            assert self.goal.target_size is not None
            excess = size - self.goal.target_size
            if excess > 0:
                # What was chosen may be smaller than it was allowed to be.
                predicted = self._fixed_bytes + sum(option.bytes for option in self.choice.values())
                self._budget = min(self._budget, predicted) - excess
            return excess > 0
        assert self.goal.min_snr is not None
        wanted, missed = _noise_at(self.goal.min_snr), False
        for name in self.options:
            measured = _noise_at(float(scorecard.components[name].get("snr_db", math.inf)))
            if measured > wanted:
                # Beside the weights' noise there is that of rounded activations, and a little they do to each other.
                self._limits[name] *= MARGIN * wanted / measured
                missed = True
        return missed

    def recipe(self) -> dict[str, Any]:
        """What was chosen and what every weight's options cost, for people to review and for `read_recipe`."""
        rows: dict[str, dict[str, Any]] = {}
        for options in self.options.values():
            for path, forms in options.items():
                rows[path] = dict(self.choice[path].storage.to_manifest())
                if len(forms) > 1:
                    rows[path]["noise_db"] = {
                        str(option.storage): round(10 * math.log10(option.noise), 1) for option in forms if option.noise
                    }
        goal = {key: value for key, value in vars(self.goal).items() if value is not None}
        return {"goal": goal, "rounding": self.scheme.rounding, "weights": rows}

    def _within_size(self) -> Choice:
        """The best within the budget; if it can be had, with no component worse off than by the fixed rule."""
        assert self._budget is not None
        pooled = {path: forms for options in self.options.values() for path, forms in options.items()}
        budget = self._budget - self._fixed_bytes
        choice = within_bytes(pooled, budget, self._as_good_as_the_rule()) or within_bytes(pooled, budget)
        if choice is None:
            least = self._fixed_bytes + sum(forms[0].bytes for forms in pooled.values())
            raise UsageError(f"the bundle cannot be as small as {self.goal.target_size} bytes: {least} is the least")
        return choice

    def _as_good_as_the_rule(self) -> Choice:
        """The fewest bytes with no more noise in any component than the scheme's own rule leaves."""
        out: Choice = {}
        for options in self.options.values():
            ruled = sum(
                option.noise for path in options for option in options[path] if option.storage == self._rule[path]
            )
            # Rounding of the sum must not rule the rule itself out.
            out |= within_noise(options, ruled * (1 + 1e-9)) or {path: forms[0] for path, forms in options.items()}
        return out

    def _layers_noise(self, bundle: Bundle, calls: Mapping[str, Sequence[Call]]) -> dict[str, float]:
        """Noise of layers kept in float16, by component; measured first, since it may rule the goal out."""
        assert self.goal.min_snr is not None
        out: dict[str, float] = {}
        for name, recorded in calls.items():
            if gives_floats(recorded):
                out[name] = layers_noise(bundle.component_path(name), recorded)
                if out[name] >= _noise_at(self.goal.min_snr):
                    raise self._layers_too_short(name, out[name])
        return out

    def _above_snr(self) -> Choice:
        out: Choice = {}
        for name, options in self.options.items():
            choice = within_noise(options, self._limits[name])
            if choice is None:
                layers = self._layers.get(name, 0.0)
                if within_noise(options, self._limits[name] + layers) is not None:
                    raise self._layers_too_short(name, layers)
                raise self._out_of_reach(name)
            out |= choice
        return out

    def _layers_too_short(self, name: str, noise: float) -> UsageError:
        return UsageError(
            f"{name} cannot keep {self.goal.min_snr:g} dB with float16 between its layers, which alone leaves "
            f"{-10 * math.log10(noise):.1f} dB; add --codec-layers 32, or ask for less"
        )

    def _out_of_reach(self, name: str) -> UsageError:
        return UsageError(
            f"{name} cannot keep {self.goal.min_snr:g} dB, since activations are rounded too; ask for less, or keep it "
            f"float with --keep '^{name}/=32'"
        )


def write_recipe(recipe: Mapping[str, Any], folder: Path) -> None:
    """Put a recipe into a bundle that is being made; one line per weight."""
    head = {key: value for key, value in recipe.items() if key != "weights"}
    rows = ",\n".join(f"  {json.dumps(path)}: {json.dumps(row)}" for path, row in recipe["weights"].items())
    text = json.dumps(head)[:-1] + ', "weights": {\n' + rows + "\n}}\n"
    (folder / RECIPE).write_text(text, "utf-8", newline="\n")


def read_recipe(path: Path, scheme: Scheme) -> tuple[Scheme, dict[str, Any]]:
    """The scheme with the forms that a recipe asks for, and the recipe.

    Args:
        path: a recipe, or a bundle that has one.
        scheme: for what the recipe does not name.

    Raises:
        InputRefusedError: it is no recipe.
    """
    file = path / RECIPE if path.is_dir() else path
    try:
        recipe = json.loads(file.read_text("utf-8"))
        chosen = {str(name): Storage.from_manifest(row) for name, row in recipe["weights"].items()}
        rounding = str(recipe["rounding"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise InputRefusedError(str(file), [f"it is no recipe ({error})"]) from None
    return replace(scheme, name="mixed", chosen=chosen, rounding=rounding), recipe


def folder_size(folder: Path) -> int:
    """Bytes of a bundle that is being made, and what its manifest will take."""
    files = [file for file in folder.iterdir() if file.name != MANIFEST_NAME]
    return MANIFEST_BYTES + sum(file.stat().st_size for file in files)


def _noise_at(snr_db: float) -> float:
    """Noise power as a share of the signal's."""
    return float(10 ** (-snr_db / 10))


def gives_floats(calls: Sequence[Call]) -> bool:
    """Whether a component gives what an error can be measured in; whole numbers say nothing of a small one."""
    return any(np.issubdtype(array.dtype, np.floating) for call in calls for array in call.outputs.values())
