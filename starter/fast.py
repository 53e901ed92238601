"""What makes training fast on a CPU: bfloat16 where the processor has it, and faster forms of two operations.

PyTorch's fused kernels lose here: RMS norm refuses a float32 gain on bfloat16 input, and the
attention kernel's backward pass costs more than its matrices for a hundred tokens. A graph
that is exported afterwards gets the product's own operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone gives it
from torch import Tensor

from pochade.export.modules import masked_transformer, ops
from pochade.machine import cpu_features

BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Features of processors that multiply in bfloat16. All others emulate it, many times slower than float32."""


def fast_dtype() -> torch.dtype:
    """What this processor multiplies fastest: bfloat16, or float32 where it has no bfloat16."""
    return torch.float32 if BFLOAT16.isdisjoint(cpu_features()) else torch.bfloat16


def autocast() -> torch.autocast:
    """Context in which products are computed in `fast_dtype`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() is torch.bfloat16)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis with the gain in x's dtype."""
    if torch.compiler.is_exporting():
        return ops.rms_norm(x, weight, eps)
    normed: Tensor = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return normed


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Unmasked attention with plain matrix products; all (batch, tokens, heads * head_dim)."""
    if torch.compiler.is_exporting():
        return ops.attention(q, k, v, heads)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    mixed: Tensor = scores.softmax(-1).to(v.dtype) @ v
    return mixed.transpose(1, 2).flatten(2)


def use_fast_operations() -> None:
    """Let the transformer module of this process compute with them."""
    masked_transformer.rms_norm = _rms_norm  # type: ignore[attr-defined]
    masked_transformer.attention = _attention  # type: ignore[attr-defined]
