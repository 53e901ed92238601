"""ControlNets of HunyuanDiT (Zhang et al. 2023, arXiv 2302.05543): what they are given, and what they add to a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pochade.bundle import Bundle, Component
from pochade.errors import BundleInvalidError, UsageError
from pochade.runtime.arguments import check_number
from pochade.runtime.companion import Companion
from pochade.runtime.hunyuan_grid import rotary_tables
from pochade.runtime.painting import Condition
from pochade.runtime.session import ComponentSession

REVISIONS = (1,)
"""Of component and tensor names; pochade.export.families.hunyuandit_controlnet writes the last."""

MAX_SCALE = 10.0
REHEARSED_SIDE = 32
"""Latents per side of a rehearsal: a picture of 256 pixels."""
REHEARSED_WORDS = 12
REHEARSED_TIMESTEPS = (751.0, 501.0, 251.0, 1.0)

Latent = NDArray[np.float32]
"""(1, channels, height / factor, width / factor)"""


class HunyuanControlNet(Companion):
    """An opened ControlNet."""

    revisions: ClassVar = REVISIONS
    components: ClassVar = ("condition", "controlnet")
    use: ClassVar = (
        "is a ControlNet, which paints nothing by itself; give it beside a model of hunyuandit, with --controlnet or "
        "load(model, controlnets=[...])"
    )

    def _read_bundle(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        try:
            self._patch = int(manifest.scheduler["patch"])
            self.scale = float(manifest.defaults["controlnet_conditioning_scale"])
            controlnet = manifest.components["controlnet"]
            self._channels, self._angles = int(_shape(controlnet, "latent")[1]), int(_shape(controlnet, "rope_cos")[1])
            self.skips, self.dim = int(_shape(controlnet, "controls")[0]), int(_shape(controlnet, "modulation")[3])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise BundleInvalidError(str(bundle.path), [f"scheduler, defaults or inputs lack {error}"]) from None

    def check_model(self, model: Bundle) -> None:
        """Whether the net can be used with a model.

        Raises:
            UsageError: it is for another version, or of other widths.
        """
        transformer = {spec.name: spec.shape for spec in model.manifest.components["transformer"].inputs}
        ours, theirs = (
            {spec.name: spec.shape[1:] for spec in bundle.manifest.components["condition"].inputs}
            for bundle in (self.bundle, model)
        )
        where = f"ControlNet {self.bundle.path} cannot be used"
        if "controls" not in transformer or "vae_encoder" not in model.manifest.components:
            raise UsageError(f"{where}: {model.path} was exported before there were ControlNets; export it again")
        if ours.keys() != theirs.keys():
            versions = "HunyuanDiT 1.2", "HunyuanDiT up to 1.1"
            is_for, found = (versions["image_meta_size" in inputs] for inputs in (ours, theirs))
            raise UsageError(f"{where}: it is for {is_for}, and {model.path} is {found}; take the net of that version")
        skips, dim = transformer["controls"][0], transformer["modulation"][3]
        if ours != theirs or (self.skips, self.dim) != (skips, dim):
            raise UsageError(
                f"{where}: it is for a transformer of {self.skips} skips, {self.dim} wide, and that of {model.path} "
                f"has {skips}, {dim} wide, or other text encoders; take a net that was trained for it"
            )

    def rehearse(self, seed: int) -> None:
        """See `Companion`."""
        random = np.random.default_rng(seed)

        def normal(*shape: int) -> Latent:
            return random.standard_normal(shape).astype(np.float32)

        inputs: dict[str, NDArray[Any]] = {}
        for spec in self.bundle.manifest.components["condition"].inputs:
            sizes = (int(size) for size in spec.shape[1:])
            inputs[spec.name] = normal(1, *sizes)
            if "mask" in spec.name:
                inputs[spec.name] = (np.arange(inputs[spec.name].shape[1]) < REHEARSED_WORDS)[None]
        inputs["timesteps"] = np.array(REHEARSED_TIMESTEPS, np.float32)
        if "image_meta_size" in inputs:
            inputs["image_meta_size"] = np.array([[1024, 1024, 1024, 1024, 0, 0]], np.float32)
        told = self.run_component("condition", inputs)
        side = REHEARSED_SIDE // self._patch
        cosines, sines = rotary_tables(side, side, 2 * self._angles)
        shape = (1, self._channels, REHEARSED_SIDE, REHEARSED_SIDE)
        shared = {**told, "control": normal(*shape), "rope_cos": cosines, "rope_sin": sines, "scale": np.ones(1)}
        steps = range(len(REHEARSED_TIMESTEPS))
        self.run_calls("controlnet", [{**shared, "latent": normal(*shape), "step": np.array([i])} for i in steps])


@dataclass(frozen=True)
class Control:
    """A net at work: open, told the prompts, looking at its picture."""

    session: ComponentSession
    condition: Condition
    """From the net's own `condition`."""
    latent: Any
    """Of the control image, where the net reads it."""
    scale: float

    def add(self, text: str, inputs: Mapping[str, Any], controls: Mapping[str, Any]) -> dict[str, Any]:
        """Input `controls` of the transformer, with this net's added.

        Args:
            text: what is painted.
            inputs: of the transformer, for this step.
            controls: of the nets before; empty for the first.
        """
        own = {**self.condition[text], "control": self.latent}
        scale = {"scale": np.array([self.scale], np.float32)}
        return {"controls": self.session.run({**inputs, **own, **scale, **controls})["sums"]}


def read_controls(
    nets: Sequence[HunyuanControlNet],
    images: Image.Image | Sequence[Image.Image] | None,
    scales: float | Sequence[float] | None,
) -> tuple[tuple[Image.Image, ...], tuple[float, ...]]:
    """Control image and scale of every net; none of either where no image is given.

    Raises:
        UsageError: their numbers differ from that of the nets, or a scale cannot be meant.
    """
    if images is None:
        if scales is not None:
            raise UsageError("controlnet_conditioning_scale says how strictly to follow control_image; give that too")
        return (), ()
    if not nets:
        raise UsageError("a control image needs a ControlNet to read it; load the model with one, by --controlnet")
    pictures = (images,) * len(nets) if isinstance(images, Image.Image) else tuple(images)
    if scales is None:
        strengths = tuple(net.scale for net in nets)
    else:
        strengths = tuple(scales) if isinstance(scales, Sequence) else (scales,) * len(nets)
    for name, number in (("control images", len(pictures)), ("scales", len(strengths))):
        if number != len(nets):
            raise UsageError(f"{number} {name} for {len(nets)} ControlNets; give one for all, or one each")
    for scale in strengths:
        check_number("controlnet_conditioning_scale", scale, 0.0, MAX_SCALE)
    return pictures, tuple(float(scale) for scale in strengths)


def _shape(component: Component, name: str) -> Sequence[int | str]:
    return {spec.name: spec.shape for spec in component.inputs}[name]
