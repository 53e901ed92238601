"""How adapters name the layers of HunyuanDiT: as diffusers does, or as Tencent."""

from __future__ import annotations

from pochade.runtime.lora import NETWORK, PREFIXES, LoraNames

_BLOCK = r"blocks\.(\d+)\."
LORA_NAMES = LoraNames(
    # Of Tencent's demo.
    PREFIXES | {"unet.": NETWORK},
    # Tencent's names (spec section 2.4); there queries, keys and values are one layer.
    (
        (_BLOCK + r"attn1\.Wqkv", tuple(rf"blocks.\1.attn1.to_{x}" for x in "qkv")),
        (_BLOCK + r"attn2\.kv\.proj", tuple(rf"blocks.\1.attn2.to_{x}" for x in "kv")),
        (_BLOCK + r"attn2\.q\.proj", (r"blocks.\1.attn2.to_q",)),
        (_BLOCK + r"attn([12])\.out\.proj", (r"blocks.\1.attn\2.to_out.0",)),
        (_BLOCK + r"mlp\.fc1", (r"blocks.\1.ff.net.0.proj",)),
        (_BLOCK + r"mlp\.fc2", (r"blocks.\1.ff.net.2",)),
        (_BLOCK + r"default\.modulation\.1", (r"blocks.\1.norm1.linear",)),
        (r"pooler\.([qkvc])\.proj", (r"time_extra_emb.pooler.\1_proj",)),
        (r"mlp\.t5\.0", ("text_embedder.linear_1",)),
        (r"mlp\.t5\.2", ("text_embedder.linear_2",)),
        (r"t\.embedder\.mlp\.0", ("time_extra_emb.timestep_embedder.linear_1",)),
        (r"t\.embedder\.mlp\.2", ("time_extra_emb.timestep_embedder.linear_2",)),
        (r"extra\.embedder\.2", ("time_extra_emb.extra_embedder.linear_2",)),
    ),
)
