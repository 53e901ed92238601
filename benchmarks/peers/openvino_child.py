"""A picture with OpenVINO: compiled for latency, computing in bfloat16, its fastest where processors have it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pochade.benchmarks.peers.loop import Clock, Networks, Step, run, sample

Array = NDArray[Any]


class OpenVinoNetworks:
    """The three networks, compiled for one size of picture, which is faster than for any."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], threads: int | None, clock: Clock) -> None:
        # Its tools report to their makers, unless they believe to be in somebody's CI.
        os.environ.setdefault("CI", "true")
        import openvino as ov
        from openvino.preprocess import PrePostProcessor

        core = ov.Core()
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        self._compiled = {}
        for part in ("text_encoder", "transformer", "vq_decoder"):
            with clock(part, "opened"):
                model = core.read_model(folder / f"{part}.xml")
                model.reshape({port: shape for port in model.inputs if (shape := _shape(port, facts)) is not None})
                if part == "transformer":
                    # Logits of a cell side by side, as the sampler reads them: apart, it took four times as long.
                    turned = PrePostProcessor(model)
                    turned.output().postprocess().convert_layout([0, 2, 3, 1])
                    model = turned.build()
                self._compiled[part] = core.compile_model(model, "CPU", options)

    def encode(self, input_ids: Array) -> tuple[Array, Array]:
        """See `Networks`."""
        found = self._compiled["text_encoder"]([input_ids])
        return found[0].copy(), found[1].copy()

    def logits(self, tokens: Array, states: Array, pooled: Array, micro_conds: Array, timestep: Array) -> Array:
        """See `Networks`."""
        logits = self._compiled["transformer"]([tokens, states, pooled, micro_conds, timestep])[0]
        rows: Array = logits.reshape(-1, logits.shape[-1])
        return rows

    def decode(self, tokens: Array) -> Array:
        """See `Networks`."""
        picture: Array = self._compiled["vq_decoder"]([tokens])[0]
        return picture

    def sample(self, step: Step, logits: list[Array]) -> Array:
        """See `Networks`."""
        return sample(step, logits)


def _shape(port: Any, facts: Mapping[str, Any]) -> list[int] | None:
    """The shape of an input that depends on the picture, None of one that is what it was converted with."""
    name = port.get_any_name()
    columns, rows = (side // facts["scheduler"]["codec_factor"] for side in facts["size"])
    return {"tokens": [1, rows, columns], "input_ids": [1, len(facts["ids"][0])]}.get(name)


def load(job: Mapping[str, Any], clock: Clock) -> tuple[Networks, Array, Mapping[str, Any]]:
    """Networks, token ids and scheduler of a job."""
    folder = Path(job["models"]) / job["variant"]
    facts = json.loads((folder / "facts.json").read_text("utf-8"))
    return OpenVinoNetworks(folder, facts, job["threads"], clock), np.array(facts["ids"], np.int64), facts["scheduler"]


if __name__ == "__main__":
    run(load)
