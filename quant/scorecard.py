"""What quantization cost, measured on the inputs that components really get while painting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pochade.bundle import Bundle
from pochade.quant.fidelity import Call, Progress, Recorder, open_pipeline, psnr, record, replay
from pochade.quant.trial import SEED, small_settings, typical_prompts
from pochade.runtime.companion import Companion


@dataclass(frozen=True)
class Scorecard:
    """Fidelity of each component and of the whole pipeline."""

    components: Mapping[str, Mapping[str, float]]
    """Per component: `snr_db` over its float outputs, `agreement` over its integer outputs."""
    pipeline: Mapping[str, float]
    """`psnr_db` of pictures and `token_agreement` of final grids painted with the same noise, and
    `forced_agreement` of the draws when every step starts from the reference's grid; nothing for what paints no
    picture by itself."""
    settings: Mapping[str, Any]

    @classmethod
    def measure(cls, reference: Bundle, quantized: Bundle, progress: Progress) -> Scorecard:
        """Paint with both, and feed the reference's component inputs to the quantized components.

        What paints nothing by itself is given random numbers instead.

        Args:
            reference: the float bundle.
            quantized: the same with quantized components; need not be finished.
            progress: called with what is being measured.
        """
        progress("measuring the float bundle", 0, 0)
        ours = open_pipeline(reference)
        if isinstance(ours, Companion):
            recorder = Recorder()
            ours.observer = recorder
            ours.rehearse(SEED)
            components = _replayed(quantized, recorder.calls, progress)
            return cls(components, {}, {"inputs": "random", "seed": SEED, "reference": reference.manifest.name})
        small, prompt = small_settings(reference), typical_prompts(reference)[0]
        calls, expected = record(ours, prompt, SEED, **small)
        pipe = open_pipeline(quantized)
        replayed = replay(pipe, calls, progress)
        progress("measuring the whole pipeline", 0, 0)
        found = pipe(prompt, seed=SEED, **small)
        pipeline = {"psnr_db": round(psnr(expected.images[0], found.images[0]), 2)}
        if expected.tokens:
            pipeline["token_agreement"] = round(float((expected.tokens[0] == found.tokens[0]).mean()), 4)
        if replayed.forced.counted:
            pipeline["forced_agreement"] = round(replayed.forced.agreement, 4)
        settings = {key: expected.settings[key] for key in ("prompt", "seed", "num_inference_steps", "width", "height")}
        return cls(
            {name: difference.to_json() for name, difference in replayed.components.items()},
            pipeline,
            settings | {"reference": reference.manifest.name},
        )

    def to_manifest(self) -> dict[str, Any]:
        """For `bundle.json`."""
        return {
            "components": {name: dict(values) for name, values in self.components.items()},
            "pipeline": dict(self.pipeline),
            "settings": dict(self.settings),
        }


def _replayed(quantized: Bundle, calls: Sequence[Call], progress: Progress) -> dict[str, Mapping[str, float]]:
    """What each component makes of the inputs of these calls."""
    replayed = replay(open_pipeline(quantized), calls, progress)
    return {name: difference.to_json() for name, difference in replayed.components.items()}
