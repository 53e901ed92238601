"""The few operations that ONNX Runtime has one fast kernel for.

In eager mode they are plain PyTorch, differentiable and checked against the goldens. While a component is traced
they become single `com.microsoft` nodes, so that no pattern matching has to find them again in the traced graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone gives it
from torch import Tensor


def _symbolic(
    op: str, inputs: Sequence[Tensor | None], shape: torch.Size, dtype: torch.dtype, **attrs: int | float
) -> Tensor:
    return torch.onnx.ops.symbolic(op, inputs, attrs={**attrs}, dtype=dtype, shape=shape, version=1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis; statistics in float32, result in x's dtype."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            "SimplifiedLayerNormalization",
            [x, weight],
            attrs={"axis": -1, "epsilon": eps, "stash_type": 1},
            dtype=x.dtype,
            shape=x.shape,
        )
    return F.rms_norm(x, weight.shape, weight, eps)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm over the last axis without weight and bias."""
    return F.layer_norm(x, x.shape[-1:], None, None, eps)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (Hendrycks and Gimpel 2016, section 2)."""
    if torch.compiler.is_exporting():
        return _symbolic("com.microsoft::FastGelu", [x], x.shape, x.dtype)
    return F.gelu(x, approximate="tanh")


def add_broadcast(x: Tensor, y: Tensor) -> Tensor:
    """`x + y`, of one shape while a component is traced; the graph takes any y that broadcasts to x."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic("Add", [x, y], dtype=x.dtype, shape=x.shape)
    return x + y


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotary embedding of neighbouring channel pairs (Su et al. 2021, section 3.4.2), evaluated in float32.

    Args:
        x: queries or keys, (batch, tokens, heads * head_dim).
        cos: (tokens, head_dim / 2).
        sin: as `cos`.
        heads: number of attention heads.
    """
    if torch.compiler.is_exporting():
        offset = torch.zeros(1, dtype=torch.int64)
        inputs = [x.float(), offset, cos, sin]
        rotated = _symbolic(
            "com.microsoft::RotaryEmbedding", inputs, x.shape, torch.float32, interleaved=1, num_heads=heads
        )
        return rotated.to(x.dtype)
    batch, tokens, dim = x.shape
    pairs = x.float().view(batch, tokens, heads, dim // heads // 2, 2)
    even, odd = pairs.unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.view(batch, tokens, dim).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Unmasked multi-head attention; all tensors (batch, tokens, heads * head_dim), heads joined head-major.

    No mask on purpose: ONNX Runtime's CPU kernel streams over the keys only without one, else it materializes
    tokens x tokens scores.
    """
    if torch.compiler.is_exporting():
        return _symbolic("com.microsoft::MultiHeadAttention", [q, k, v], q.shape, q.dtype, num_heads=heads)
    q_heads, k_heads, v_heads = (t.view(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q_heads, k_heads, v_heads).transpose(1, 2).reshape(q.shape)


def biased_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor, scale: float | None = None) -> Tensor:
    """Multi-head attention with something added to its scores; materializes tokens x tokens scores, see `attention`.

    Args:
        q: queries, (batch, tokens, heads * head_dim), heads joined head-major.
        k: keys, as `q`.
        v: values, as `q`.
        heads: number of attention heads.
        bias: added to scores, (batch or 1, heads or 1, tokens, tokens).
        scale: of the products of queries and keys; None divides them by the square root of `head_dim`.
    """
    if torch.compiler.is_exporting():
        attrs: dict[str, int | float] = {"num_heads": heads} | ({} if scale is None else {"scale": scale})
        # Between values and bias are the bias of projections and the padding mask.
        inputs = [q, k, v, None, None, bias]
        return _symbolic("com.microsoft::MultiHeadAttention", inputs, q.shape, q.dtype, **attrs)
    q_heads, k_heads, v_heads = (t.view(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(q_heads, k_heads, v_heads, attn_mask=bias, scale=scale)
    return mixed.transpose(1, 2).reshape(q.shape)


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores to hide keys whose mask is 0: (batch, tokens) int64 -> (batch, 1, tokens, tokens)."""
    # Finite, so that a row of masked keys alone has no NaN; far enough that no other score is seen beside it.
    hidden = (mask == 0).to(dtype) * torch.finfo(dtype).min
    return hidden[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
