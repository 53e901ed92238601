"""The PyTorch modules against every recorded intermediate value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pochade.export.families.meissonic import Meissonic
from pochade.export.modules.clip_text import ClipTextEncoder
from pochade.export.modules.masked_transformer import FREQUENCIES as ROUNDED_FREQUENCIES
from pochade.export.modules.masked_transformer import MaskedTransformer, sinusoid
from pochade.export.modules.vq import VQModel
from tests.golden import GOLDEN, TOLERANCE, arrays


def golden(model: str, name: str) -> Tensor:
    return torch.from_numpy(arrays(model)[name])


@pytest.fixture
def checkpoint(model: str) -> Meissonic:
    return Meissonic.open(GOLDEN / model)


@pytest.fixture
def transformer(checkpoint: Meissonic) -> MaskedTransformer:
    module = MaskedTransformer(checkpoint.transformer)
    checkpoint.transformer_weights.load_into(module)
    return module.requires_grad_(False)


def forward_inputs(model: str, case: str) -> list[Tensor]:
    names = ("tokens", "encoder_hidden_states", "pooled", "micro_conds", "timestep")
    values = [golden(model, f"{case}.in.{name}") for name in names]
    return [values[0].long(), *values[1:]]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["fwd", "fwd_b"])
def test_transformer_gives_the_recorded_logits(model: str, transformer: MaskedTransformer, case: str) -> None:
    close(transformer(*forward_inputs(model, case)), golden(model, f"{case}.logits"))


@pytest.mark.parametrize("timestep", [0, 1, 63])
def test_transformer_at_other_steps(model: str, transformer: MaskedTransformer, timestep: int) -> None:
    inputs = [*forward_inputs(model, "fwd")[:-1], torch.tensor([timestep])]
    close(transformer(*inputs), golden(model, f"fwd_t{timestep}.logits"))


def test_stages_of_the_transformer(model: str, transformer: MaskedTransformer) -> None:
    tokens, states, pooled, micro, timestep = forward_inputs(model, "fwd")
    close(transformer.condition(pooled, micro, timestep), golden(model, "fwd.temb"))
    close(transformer.context(states), golden(model, "fwd.context_out"))
    close(transformer.embed(tokens).permute(0, 3, 1, 2), golden(model, "fwd.embed_out"))
    close(transformer.stem(transformer.embed(tokens)), golden(model, "fwd.project_to_hidden_out"))
    patch = transformer.config.patch
    cos, sin = transformer.rope(77, tokens.shape[1] // patch, tokens.shape[2] // patch)
    # Recorded with every column twice: pairs are neighbours, not halves.
    assert torch.equal(cos.repeat_interleave(2, -1), golden(model, "fwd.rope_cos"))
    assert torch.equal(sin.repeat_interleave(2, -1), golden(model, "fwd.rope_sin"))


def test_blocks_one_by_one(model: str, transformer: MaskedTransformer) -> None:
    tokens, states, pooled, micro, timestep = forward_inputs(model, "fwd")
    patch = transformer.config.patch
    rope = transformer.rope(77, tokens.shape[1] // patch, tokens.shape[2] // patch)
    rows = transformer.modulation(transformer.condition(pooled, micro, timestep)).split(1, dim=1)
    x, y = transformer.stem(transformer.embed(tokens)), transformer.context(states)
    for i, block in enumerate(transformer.transformer_blocks):
        x, y = block(x, y, rows[12 * i : 12 * i + 12], rope)
        close(x, golden(model, f"fwd.double{i}.img"))
        close(y, golden(model, f"fwd.double{i}.txt"))
    z = torch.cat((y, x), dim=1)
    first = 12 * len(transformer.transformer_blocks)
    for i, block in enumerate(transformer.single_transformer_blocks):
        z = block(z, rows[first + 3 * i : first + 3 * i + 3], rope)
        close(z, golden(model, f"fwd.single{i}.out"))


def test_text_encoder(model: str, checkpoint: Meissonic) -> None:
    module = ClipTextEncoder(checkpoint.text)
    checkpoint.text_weights.load_into(module)
    with torch.no_grad():
        states, pooled = module(golden(model, "text.input_ids").long())
    close(pooled, golden(model, "text.text_embeds"))
    close(states[:4], golden(model, "text.hidden_states_m2"))


def test_padding_reaches_the_text_states(model: str, checkpoint: Meissonic) -> None:
    """Padding is not masked, so the padding id matters (id 0, not the end token)."""
    module = ClipTextEncoder(checkpoint.text)
    checkpoint.text_weights.load_into(module)
    ids = golden(model, "text.input_ids").long()[2:3]
    with torch.no_grad():
        states, _ = module(ids)
        padded_with_end, _ = module(torch.where(ids == 0, ids.max(), ids))
    assert (states - padded_with_end).abs().max() > 0.1


def test_codec(model: str, checkpoint: Meissonic) -> None:
    module = VQModel(checkpoint.codec)
    checkpoint.codec_weights.load_into(module)
    with torch.no_grad():
        close(module.decode(golden(model, "vq.decode.tokens").long()), golden(model, "vq.decode.sample"))
        latents = module.encode(golden(model, "vq.encode.image"))
        close(latents, golden(model, "vq.encode.latents"))
        assert torch.equal(module.nearest_codes(latents), golden(model, "vq.encode.tokens").long())


def test_sinusoid_frequencies_are_the_recorded_ones() -> None:
    from safetensors.torch import load_file

    tables = load_file(GOLDEN / "scheduler" / "tables.safetensors")
    recorded = tables["sinusoid.freqs"]
    # Computed on one processor in float32, so two of them are the second nearest float; everything else here uses them.
    exact = torch.from_numpy(np.exp(-math.log(10000.0) * np.arange(128, dtype=np.float32) / 128, dtype=np.float64))
    assert (recorded - exact).abs().div(exact).max() < 2**-23
    assert torch.equal(ROUNDED_FREQUENCIES, exact.float())
    for name in ("t1000", "micro"):
        found = sinusoid(tables[f"sinusoid.{name}.values"])
        torch.testing.assert_close(found, tables[f"sinusoid.{name}"], rtol=0, atol=1e-6)


def test_step_number_stays_float32_in_half_precision(transformer: MaskedTransformer) -> None:
    """1000 * 100 overflows float16; the reference then paints NaN after step 66."""
    config = transformer.config
    half = transformer.half()
    temb = half.condition(torch.zeros(1, config.pooled_projection_dim).half(), torch.zeros(1, 5), torch.tensor([100]))
    assert temb.isfinite().all()
