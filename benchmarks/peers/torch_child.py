"""A picture with PyTorch as the published pipeline runs: all resident, modulation in every pass.

On a graphics card the sampler computes there too, and `compiled` has the transformer and the codec compiled for the
size of the picture first, which counts as opening them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pochade.benchmarks.peers.loop import Clock, Networks, Step, run, sample
from pochade.export.checkpoint import empty
from pochade.export.families.meissonic import FOREIGN_TEXT_KEYS, Meissonic
from pochade.export.modules.clip_text import ClipTextEncoder
from pochade.export.modules.masked_transformer import MaskedTransformer
from pochade.export.modules.vq import VQModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Array = NDArray[Any]


class TorchNetworks:
    """The three networks of a checkpoint in one dtype, on one device."""

    def __init__(self, checkpoint: Meissonic, dtype: torch.dtype, clock: Clock, device: str = "cpu") -> None:
        self._device = torch.device(device)
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
                module.to(self._device)
        self._decode: Any = self._codec.decode

    def compile(self, ids: Array, grid: tuple[int, int], backend: str = "inductor") -> None:
        """Have transformer and decoder compiled, by using them once.

        Args:
            ids: of a prompt, (1, tokens).
            grid: rows and columns of tokens.
            backend: of torch.compile.
        """
        self._transformer = torch.compile(self._transformer, backend=backend)  # type: ignore[assignment]
        self._decode = torch.compile(self._codec.decode, backend=backend)
        tokens = np.zeros((1, *grid), np.int64)
        self.logits(tokens, *self.encode(ids), np.ones((1, 5), np.float32), np.ones(1, np.float32))
        self.decode(tokens)

    def encode(self, input_ids: Array) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Networks`."""
        with torch.inference_mode():
            states, pooled = self._text(self._given(input_ids))
            self._wait()
        return states, pooled

    def logits(
        self, tokens: Array, states: torch.Tensor, pooled: torch.Tensor, micro_conds: Array, timestep: Array
    ) -> Any:
        """See `Networks`; on a card they stay there."""
        with torch.inference_mode():
            given = (self._given(array) for array in (micro_conds, timestep))
            logits = self._transformer(self._given(tokens), states, pooled, *given)
            rows = logits.permute(0, 2, 3, 1).flatten(0, 2).float()
            self._wait()
        return rows.numpy() if self._device.type == "cpu" else rows

    def decode(self, tokens: Array) -> Array:
        """See `Networks`."""
        with torch.inference_mode():
            picture: Array = self._decode(self._given(tokens)).float().cpu().numpy()
        return picture

    def sample(self, step: Step, logits: list[Any]) -> Array:
        """See `Networks`."""
        if self._device.type == "cpu":
            return sample(step, logits)
        return self.sample_there(step, logits)

    def sample_there(self, step: Step, logits: list[torch.Tensor]) -> Array:
        """The same where the logits are, for all cells at once, as a card likes it."""
        with torch.inference_mode():
            mixed = logits[0]
            if len(logits) > 1:
                mixed = logits[1] + step.guidance * (mixed - logits[1])
            flat = self._given(step.tokens).flatten()
            masked = flat == step.mask_token_id
            upto = mixed.softmax(-1).cumsum(-1)
            codes = (upto <= self._given(step.draw)[:, None] * upto[:, -1:]).sum(-1).clamp(max=mixed.shape[1] - 1)
            chosen = mixed.log_softmax(-1).gather(1, codes[:, None])[:, 0]
            confidence = torch.where(masked, chosen, torch.inf)
            tokens = torch.where(masked, codes, flat)
            if step.num_masked:
                noise = -self._given(step.keep).clamp(min=1e-20).log()
                confidence = confidence - step.temperature * noise.clamp(min=1e-20).log()
                count = max(1, min(int(masked.sum()) - 1, step.num_masked))
                tokens[confidence < confidence.sort().values[count]] = step.mask_token_id
            grid: Array = tokens.reshape(step.tokens.shape).cpu().numpy()
        return grid

    def _given(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def _wait(self) -> None:
        """Kernels of a card run on after the call that started them."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def load(job: Mapping[str, Any], clock: Clock) -> tuple[Networks, Array, Mapping[str, Any]]:
    """Networks, token ids and scheduler of a job."""
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    checkpoint = Meissonic.open(Path(job["checkpoint"]))
    encodings = checkpoint.tokenizer().encode_batch([job["prompt"], ""])
    ids = np.array([encoding.ids for encoding in encodings], np.int64)
    dtype, _, compiled = job["variant"].partition(" ")
    networks = TorchNetworks(checkpoint, DTYPES[dtype], clock, job["device"])
    scheduler = checkpoint.scheduler_manifest()
    if compiled:
        with clock("transformer", "opened"):
            height, width = (int(job["settings"][side]) // scheduler["codec_factor"] for side in ("height", "width"))
            networks.compile(ids[:1], (height, width))
    return networks, ids, scheduler


if __name__ == "__main__":
    run(load)
