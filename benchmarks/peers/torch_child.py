"""A picture with PyTorch in eager mode as the published pipeline runs: all resident, modulation in every pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pochade.benchmarks.peers.loop import Clock, Networks, run
from pochade.export.checkpoint import empty
from pochade.export.families.meissonic import FOREIGN_TEXT_KEYS, Meissonic
from pochade.export.modules.clip_text import ClipTextEncoder
from pochade.export.modules.masked_transformer import MaskedTransformer
from pochade.export.modules.vq import VQModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Array = NDArray[Any]


class TorchNetworks:
    """The three networks of a checkpoint in one dtype."""

    def __init__(self, checkpoint: Meissonic, dtype: torch.dtype, clock: Clock) -> None:
        self._dtype = dtype
        with clock("transformer", "opened"):
            self._text = empty(ClipTextEncoder, checkpoint.text, dtype)
            self._transformer = empty(MaskedTransformer, checkpoint.transformer, dtype)
            self._codec = empty(VQModel, checkpoint.codec, dtype)
            for module, source, foreign in (
                (self._text, checkpoint.text_weights, FOREIGN_TEXT_KEYS),
                (self._transformer, checkpoint.transformer_weights, ()),
                (self._codec, checkpoint.codec_weights, ()),
            ):
                source.check(module, foreign)
                for name, value in module.state_dict().items():
                    value.copy_(source[name])

    def encode(self, input_ids: Array) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Networks`."""
        with torch.inference_mode():
            states, pooled = self._text(torch.from_numpy(input_ids))
        return states, pooled

    def logits(
        self, tokens: Array, states: torch.Tensor, pooled: torch.Tensor, micro_conds: Array, timestep: Array
    ) -> Array:
        """See `Networks`."""
        with torch.inference_mode():
            given = (torch.from_numpy(array) for array in (micro_conds, timestep))
            logits = self._transformer(torch.from_numpy(tokens), states, pooled, *given)
            rows: Array = logits.permute(0, 2, 3, 1).flatten(0, 2).float().numpy()
        return rows

    def decode(self, tokens: Array) -> Array:
        """See `Networks`."""
        with torch.inference_mode():
            picture: Array = self._codec.decode(torch.from_numpy(tokens)).float().numpy()
        return picture


def load(job: Mapping[str, Any], clock: Clock) -> tuple[Networks, Array, Mapping[str, Any]]:
    """Networks, token ids and scheduler of a job."""
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    checkpoint = Meissonic.open(Path(job["checkpoint"]))
    encodings = checkpoint.tokenizer().encode_batch([job["prompt"], ""])
    ids = np.array([encoding.ids for encoding in encodings], np.int64)
    return TorchNetworks(checkpoint, DTYPES[job["variant"]], clock), ids, checkpoint.scheduler_manifest()


if __name__ == "__main__":
    run(load)
