"""The sampler of continuous diffusion as a graph: guidance, and the weighted sum that a step is.

It lives beside the transformer, so that latents and predictions never leave the device: per step the host sends six
weights, and noise where a sampler adds some.
"""

from __future__ import annotations

import onnx_ir as ir

from pochade.export.graph_ops import GraphOps, component_model, port
from pochade.runtime.schedulers.diffusion import StepWeights

TINY = 1e-30
"""Least variance that is divided by."""


def build_diffusion_sampler(channels: int) -> ir.Model:
    """Graph of one sampler step, `StepWeights` for the weights of it.

    Args:
        channels: of the latents.

    The prediction is guided as by Ho and Salimans (2022, arXiv 2207.12598) and then, as far as `guidance_rescale` says,
    brought to the standard deviation of the one for the prompt, each sample over all of its values (Lin et al. 2023,
    arXiv 2305.08891, section 3.4).
    """
    f32, count = ir.DataType.FLOAT, len(StepWeights._fields)
    shape: tuple[str | int, ...] = ("batch", channels, "height", "width")
    latents = ("latent", "noise_pred", "negative_noise_pred", "picture_before", "noise")
    inputs = {name: port(name, f32, shape) for name in latents} | {
        "guidance_scale": port("guidance_scale", f32, (1,)),
        "guidance_rescale": port("guidance_rescale", f32, (1,)),
        "step_weights": port("step_weights", f32, (count,)),
    }
    op = GraphOps()
    wanted, away = inputs["noise_pred"], inputs["negative_noise_pred"]
    mixed = op.Add(away, op.Mul(inputs["guidance_scale"], op.Sub(wanted, away)))
    axes = op.ints("all_but_samples", [1, 2, 3])

    def variance(values: ir.Value) -> ir.Value:
        apart = op.Sub(values, op.ReduceMean(values, axes, keepdims=1))
        found: ir.Value = op.ReduceMean(op.Mul(apart, apart), axes, keepdims=1)
        return found

    # Guided to a constant, a prediction has no deviation to divide by.
    ratio = op.Sqrt(op.Div(variance(wanted), op.Max(variance(mixed), op.floats("tiny", TINY))))
    share = inputs["guidance_rescale"]
    velocity = op.Mul(mixed, op.Add(op.Mul(share, ratio), op.Sub(op.floats("one", [1.0]), share)))
    weights = StepWeights(*op.Split(inputs["step_weights"], num_outputs=count, _outputs=count))
    parts = (
        (weights.sample, inputs["latent"]),
        (weights.velocity, velocity),
        (weights.before, inputs["picture_before"]),
        (weights.noise, inputs["noise"]),
    )
    following, *more = (op.Mul(weight, value) for weight, value in parts)
    for part in more:
        following = op.Add(following, part)
    picture = op.Add(op.Mul(weights.picture_sample, inputs["latent"]), op.Mul(weights.picture_velocity, velocity))
    outputs = {"next_latent": following, "picture": picture}
    return component_model("sampler", op, inputs, outputs, f32, shape)
