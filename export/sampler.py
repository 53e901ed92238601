"""The sampler of masked image tokens as a graph: guidance, categorical draw, choice of tokens to keep.

It lives beside the transformer, so that logits never leave the device and any language binding runs the same
loop: per step the host adds two uniform numbers per cell. Logits exist only for cells that are still masked, and
only `CHUNK` rows of them at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch

from pochade.export.component import WeightSource
from pochade.export.graph_ops import GraphOps, component_model, port
from pochade.export.trace import lazy

CHUNK = 512
"""Cells per product with the head: 16 MB of logits at 8192 codes, and enough rows for full speed."""

BELOW_ONE = 1.0 - 2.0**-23
"""Keeps a draw strictly below the total, however the products round."""


def build_sampler(dim: int, codebook_size: int, mask_token_id: int, head: WeightSource) -> ir.Model:
    """Graph of one sampler step (Chang et al. 2022, arXiv 2202.04200, section 3.2, as the released scheduler does it).

    Args:
        dim: width of the features.
        codebook_size: number of codes.
        mask_token_id: id of a cell that is not decided yet.
        head: last linear layer, (codebook_size, dim).

    The draw inverts the cumulative distribution in two levels, blocks of codes and codes of a block, which gives
    the law of a plain categorical draw with one uniform number per cell.
    """
    f32, i64 = ir.DataType.FLOAT, ir.DataType.INT64
    grid: tuple[str | int, ...] = ("batch", "height", "width")
    inputs = {
        "tokens": port("tokens", i64, grid),
        "features": port("features", f32, ("batch", "cells", dim)),
        "negative_features": port("negative_features", f32, ("batch", "cells", dim)),
        "guidance_scale": port("guidance_scale", f32, (1,)),
        "draw_noise": port("draw_noise", f32, ("batch", "cells")),
        "keep_noise": port("keep_noise", f32, ("batch", "cells")),
        "temperature": port("temperature", f32, (1,)),
        "num_masked": port("num_masked", i64, (1,)),
    }
    op = GraphOps()
    flat = op.Reshape(inputs["tokens"], op.ints("flat", [0, -1]))
    unknown = op.Equal(flat, op.ints("mask_token_id", [mask_token_id]))
    everywhere = op.ints("everywhere", [-1])
    rows = op.Squeeze(op.NonZero(op.Reshape(unknown, everywhere)), op.ints("axis0", [0]))
    wide = op.ints("feature_rows", [-1, dim])
    features, negative = op.Reshape(inputs["features"], wide), op.Reshape(inputs["negative_features"], wide)

    def mixed(body: GraphOps, here: ir.Value) -> ir.Value:
        plain, guided = body.Gather(negative, here, axis=0), body.Gather(features, here, axis=0)
        guidance: ir.Value = body.Add(plain, body.Mul(inputs["guidance_scale"], body.Sub(guided, plain)))
        return guidance

    weight = _head(head, dim, codebook_size)
    drawn, log_p = _draw_loop(op, mixed, inputs["draw_noise"], weight, rows, op.Reshape(flat, everywhere))
    codes = op.Reshape(drawn, op.Shape(flat))
    following = _remask(op, inputs, unknown, codes, op.Reshape(log_p, op.Shape(flat)), mask_token_id)
    shape = op.Shape(inputs["tokens"])
    outputs = [op.Reshape(following, shape), op.Reshape(codes, shape)]
    named = dict(zip(("next_tokens", "codes"), outputs, strict=True))
    return component_model("sampler", op, inputs, named, i64, grid, [weight])


def build_one_step_sampler(dim: int, codebook_size: int, head: WeightSource) -> ir.Model:
    """Graph that draws every cell from softmax(logits / temperature), once and for all.

    Args:
        dim: width of the features.
        codebook_size: number of codes.
        head: last linear layer, (codebook_size, dim).

    The draw is that of `build_sampler`, in as many chunks.
    """
    f32 = ir.DataType.FLOAT
    cells: tuple[str | int, ...] = ("batch", "cells")
    inputs = {
        "features": port("features", f32, (*cells, dim)),
        "draw_noise": port("draw_noise", f32, cells),
        "temperature": port("temperature", f32, (1,)),
    }
    op = GraphOps()
    features = op.Reshape(inputs["features"], op.ints("feature_rows", [-1, dim]))
    count = op.Squeeze(op.Shape(features, end=1))
    rows = op.Range(op.ints("first", 0), count, op.ints("step", 1))

    # The head is linear and has no bias, so the temperature may divide what it is given.
    def cooled(body: GraphOps, here: ir.Value) -> ir.Value:
        divided: ir.Value = body.Div(body.Gather(features, here, axis=0), inputs["temperature"])
        return divided

    weight = _head(head, dim, codebook_size)
    drawn, _ = _draw_loop(op, cooled, inputs["draw_noise"], weight, rows, rows)
    codes = op.Reshape(drawn, op.Shape(inputs["draw_noise"]))
    return component_model("sampler", op, inputs, {"codes": codes}, ir.DataType.INT64, cells, [weight])


def _head(head: WeightSource, dim: int, codebook_size: int) -> ir.Value:
    """The last linear layer as a product takes it, (dim, codebook_size)."""
    weight = port("mlm_layer.conv2.weight.T", ir.DataType.FLOAT, (dim, codebook_size))
    weight.const_value = lazy(
        str(weight.name), torch.Size((dim, codebook_size)), torch.float32, lambda: head().float().flatten(1).T
    )
    return weight


def _draw_loop(
    op: GraphOps,
    head_input: Callable[[GraphOps, ir.Value], ir.Value],
    draw_noise: ir.Value,
    weight: ir.Value,
    rows: ir.Value,
    tokens: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """Codes (cells of all samples) with a fresh draw in each of `rows`, and the log-probability of each draw.

    `head_input` gives, inside the loop, what the head is multiplied with for some of the cells. Cells outside `rows`
    keep their token and get the log of the largest float, as the reference gives them.
    """
    noise = op.Reshape(draw_noise, op.ints("all_cells", [-1]))
    count = op.Squeeze(op.Shape(rows))
    chunk = op.ints("chunk", CHUNK)
    trips = op.Div(op.Add(count, op.ints("chunk_less_one", CHUNK - 1)), chunk)
    known = op.floats("log_largest_float", math.log(np.finfo(np.float32).max))
    log_p = op.Expand(known, op.Shape(tokens))

    i = port("i", ir.DataType.INT64, ())
    keep_going = port("keep_going", ir.DataType.BOOL, ())
    state = [port("codes_so_far", ir.DataType.INT64, ("all",)), port("log_p_so_far", ir.DataType.FLOAT, ("all",))]
    body = GraphOps("chunk_")
    first = body.Mul(i, chunk)
    axis = op.ints("rows_axis", [0])
    here = body.Slice(rows, body.Unsqueeze(first, axis), body.Unsqueeze(body.Add(first, chunk), axis), axis)
    p = body.Softmax(body.MatMul(head_input(body, here), weight), axis=-1)
    code, p_code = _invert(op, body, p, body.Gather(noise, here, axis=0), weight)
    log_code = body.Log(body.Max(p_code, op.floats("least_p", 1e-20)))
    outputs = [
        body.Identity(keep_going),
        body.ScatterElements(state[0], here, code, axis=0),
        body.ScatterElements(state[1], here, log_code, axis=0),
    ]
    for value, like in zip(outputs, (keep_going, *state), strict=True):
        value.type, value.shape = like.type, like.shape
    graph = ir.Graph([i, keep_going, *state], outputs, nodes=body.nodes, name="draw_chunk")
    always = op.true("always")
    drawn, log_drawn = op.Loop(trips, always, tokens, log_p, body=graph, _outputs=2)
    return drawn, log_drawn


def _invert(
    op: GraphOps, body: GraphOps, p: ir.Value, uniform: ir.Value, weight: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """First code whose cumulative probability exceeds the uniform number, and its probability, both (rows)."""
    assert weight.shape is not None
    codebook_size = weight.shape.numpy()[1]
    width = _block_width(codebook_size)
    last = op.ints("last_axis", [1])
    one = op.ints("one_axis", 1)
    below_one = op.floats("below_one", BELOW_ONE)
    blocks = body.Reshape(p, op.ints("block_shape", [0, codebook_size // width, width]))
    mass = body.ReduceSum(blocks, op.ints("within_block", [2]), keepdims=0)
    upto = body.CumSum(mass, one)
    total = body.Gather(upto, op.ints("last_block", [-1]), axis=1)
    target = body.Mul(body.Min(body.Unsqueeze(uniform, last), below_one), total)
    block = body.ReduceSum(body.Cast(body.LessOrEqual(upto, target), to=int(ir.DataType.INT64)), last, keepdims=1)
    before = body.GatherElements(body.CumSum(mass, one, exclusive=1), block, axis=1)
    # (rows, 1, width): the probabilities of the one block that the target falls into.
    index = body.Expand(body.Unsqueeze(block, last), op.ints("block_row", [1, 1, width]))
    inside = body.Squeeze(body.GatherElements(blocks, index, axis=1), last)
    upto_code = body.CumSum(inside, one)
    rest = body.Max(body.Sub(target, before), op.floats("nothing", 0.0))
    rest = body.Min(rest, body.Mul(body.Gather(upto_code, op.ints("last_code", [-1]), axis=1), below_one))
    code = body.ReduceSum(body.Cast(body.LessOrEqual(upto_code, rest), to=int(ir.DataType.INT64)), last, keepdims=1)
    p_code = body.Squeeze(body.GatherElements(inside, code, axis=1), last)
    whole = body.Add(body.Mul(block, op.ints("block_width", [width])), code)
    return body.Squeeze(whole, last), p_code


def _block_width(codebook_size: int) -> int:
    """Divisor of the code book size nearest its square root; 8192 codes are 64 blocks of 128."""
    divisors = [d for d in range(1, codebook_size + 1) if codebook_size % d == 0]
    return min(divisors, key=lambda d: (abs(math.log(d * d / codebook_size)), -d))


def _remask(
    op: GraphOps,
    inputs: dict[str, ir.Value],
    unknown: ir.Value,
    codes: ir.Value,
    log_p: ir.Value,
    mask_token_id: int,
) -> ir.Value:
    """Codes with the `num_masked` least confident ones masked again, (batch, cells).

    Confidence is log-probability plus temperature times Gumbel noise. A sample masks at least one cell and fewer
    than were masked before; `num_masked` 0 is the last step and masks none (spec section 7).
    """
    least = op.floats("least_uniform", 1e-20)
    gumbel = op.Neg(op.Log(op.Max(op.Neg(op.Log(op.Max(inputs["keep_noise"], least))), least)))
    confidence = op.Add(log_p, op.Mul(inputs["temperature"], gumbel))
    across = op.ints("cells_axis", [1])
    masked = op.ReduceSum(op.Cast(unknown, to=int(ir.DataType.INT64)), across, keepdims=1)
    one, zero = op.ints("one", [1]), op.ints("zero", [0])
    count = op.Max(op.Min(op.Sub(masked, one), inputs["num_masked"]), one)
    count = op.Where(op.Equal(inputs["num_masked"], zero), zero, count)
    count = op.Expand(count, op.Concat(op.Shape(confidence, end=1), one, axis=0))
    cells = op.Shape(confidence, start=1)
    ascending, _ = op.TopK(confidence, cells, axis=1, largest=0, sorted=1, _outputs=2)
    cut = op.GatherElements(ascending, count, axis=1)
    kept: ir.Value = op.Where(op.Less(confidence, cut), op.ints("mask", [mask_token_id]), codes)
    return kept
