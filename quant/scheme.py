"""What a quantization scheme is: which form each weight of a component is kept in.

A weight is known by its path, `component/initializer name`. These questions are asked in this order, and the first
answer counts: does a `Keep` rule name it, did a search choose its form, is it exact, is it sensitive, what form does
its use get.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from pochade.errors import UsageError


class Use(StrEnum):
    """What the nodes that read a weight do with it."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    CONV = "conv"


class Kind(StrEnum):
    """Forms a weight can be kept in."""

    FLOAT = "float"
    """As it came."""
    HALF = "half"
    """float16 in the file, float32 again when the session opens."""
    CHANNELS = "channels"
    """int8 with a scale per output channel in the file, float again when the session opens."""
    BLOCKS = "blocks"
    """4 or 8 bits with a scale per block of inputs; `MatMulNBits` or `GatherBlockQuantized` computes from them."""
    DYNAMIC = "dynamic"
    """int8 with a scale per output channel; `DynamicQuantizeMatMul` also rounds the activations, at run time."""
    STATIC = "static"
    """The same with the range of the activations measured beforehand. Where it could not be, linear layers are
    `dynamic`, and convolutions as others of the scheme."""


FORMS = {
    Use.LINEAR: {Kind.FLOAT, Kind.HALF, Kind.BLOCKS, Kind.DYNAMIC, Kind.STATIC},
    Use.EMBEDDING: {Kind.FLOAT, Kind.HALF, Kind.BLOCKS},
    Use.CONV: {Kind.FLOAT, Kind.HALF, Kind.CHANNELS, Kind.STATIC},
}
"""The forms each use can take."""


@dataclass(frozen=True)
class Storage:
    """How one weight is kept."""

    kind: Kind
    bits: int
    """Bits per number, scales not counted."""
    block_size: int | None = None
    """Neighbours along the input axis that share a scale; the last block may be partly padding. Blocks only."""
    accuracy_level: int | None = None
    """`MatMulNBits`: 4 rounds activations to int8 per block, 1 computes in float32. Blocks only."""

    def __post_init__(self) -> None:
        if (self.block_size is not None) != (self.kind is Kind.BLOCKS):
            raise UsageError(f"{self.kind} storage and block size {self.block_size} do not go together")
        if self.kind is not Kind.BLOCKS or self.block_size is None:
            return
        if self.bits not in (4, 8):
            raise UsageError(f"blocks of {self.bits} bits are not supported: take 4 or 8")
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise UsageError(f"block size {self.block_size} is not supported: take 16, 32, 64, 128 or 256")

    def __str__(self) -> str:
        """Short form for reports, such as `blocks int4/128` or `channels int8`."""
        if self.kind is Kind.FLOAT:
            return f"float{self.bits}"
        number = "float" if self.kind is Kind.HALF else "int"
        return f"{self.kind} {number}{self.bits}" + (f"/{self.block_size}" if self.block_size else "")

    @classmethod
    def from_manifest(cls, fields: Mapping[str, Any]) -> Storage:
        """What `to_manifest` gave.

        Raises:
            UsageError: the fields make no storage.
        """
        try:
            return cls(Kind(fields["kind"]), fields["bits"], fields.get("block_size"), fields.get("accuracy_level"))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"{fields!r} is no way to keep a weight ({error})") from None

    def to_manifest(self) -> dict[str, str | int]:
        """The fields that are set, for `bundle.json`."""
        fields: dict[str, str | int | None] = {
            "kind": str(self.kind),
            "bits": self.bits,
            "block_size": self.block_size,
            "accuracy_level": self.accuracy_level,
        }
        return {name: value for name, value in fields.items() if value is not None}


FLOAT = Storage(Kind.FLOAT, 32)
HALF = Storage(Kind.HALF, 16)
CHANNELS = Storage(Kind.CHANNELS, 8)
DYNAMIC = Storage(Kind.DYNAMIC, 8)
STATIC = Storage(Kind.STATIC, 8)


def blocks(bits: int, block_size: int = 128) -> Storage:
    """Symmetric blocks at accuracy level 4, the fast one on CPU.

    Measured with 1101 rows on an AVX512-VNNI core: blocks of 128 run 1.4 times as fast as blocks of 32, and
    level 4 runs 1.5 (4 bits) to 1.9 (8 bits) times as fast as levels 0 and 1. Below level 4, 8-bit weights are even
    expanded anew on every call.
    """
    return Storage(Kind.BLOCKS, bits, block_size, accuracy_level=4)


ROUNDINGS = ("rtn", "search", "hqq", "gptq")
"""Ways to round linear weights to 4 bits, worst first; `rounding.METHODS` has them."""

CALIBRATED = ("search", "gptq")
"""Those that look at what layers are given while the float model paints."""


@dataclass(frozen=True)
class Keep:
    """A user's rule: weights whose path contains a match of `pattern` are kept in `bits` (8, 16 or 32)."""

    pattern: str
    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (8, 16, 32):
            raise UsageError(f"weights cannot be kept in {self.bits} bits: take 8, 16 or 32")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UsageError(f"{self.pattern!r} is not a regular expression: {error}") from error

    def matches(self, path: str) -> bool:
        """Whether the rule is about the weight at `component/name`."""
        return re.search(self.pattern, path) is not None


SENSITIVE = (
    # Whole components: `condition` steers every block of every step, `sampler` holds the head.
    r"^(condition|sampler)/",
    # First and last layers by their published names, and the products that an export folds them into. Not inside a
    # longer name: only the outermost layers have nothing after them that averages their error out.
    r"(?<![\w.])(embed|down_block|project_to_hidden|down_kernel)\b",
    r"(?<![\w.])(project_from_hidden|up_block|mlm_layer|head_kernel)\b",
    r"(?<![\w.])(cond_embed|time_text_embed|context_embedder|text_projection)\b",
    # What a ControlNet sees of its picture comes through this one layer.
    r"(?<![\w.])input_block\b",
    r"\bnorm\w*\.linear\b",  # modulation
    # What HunyuanDiT's long skips join has outliers from two sources; 75 M of its 1500 M weights.
    r"\bskip_linear\b",
)
"""Linear layers of transformers and their text encoders that stay at 8 bits."""

EXACT = (
    # The VQ encoder picks the nearest code, and a rounded code book has other neighbours. Four megabytes.
    r"^vq_\w+/code_(table|kernel)\b",
    # A third of a megabyte that is added to every token.
    r"(?<![\w.])text_model\.embeddings\.position_embedding\b",
    # First and last layer of HunyuanDiT: 16 numbers per cell, 90 KB each.
    r"^(transformer|controlnet)/patch_(in|out)\b",
)
"""Weights that are never rounded: small, and used for more than a product."""


SPIKY = (
    r"^text_encoder_2/",  # mT5
    r"^text_encoder/encoder\.layer\.",  # BERT
    r"^condition/(text_embedder|time_extra_emb\.pooler)\b",  # what mT5 answers
)
"""Linear layers that are given a few numbers far above all others: those of mT5 leave the range of float16, those of
BERT are the subject of Bondarenko et al. 2021, arXiv 2109.12948.

With one scale for a whole tensor little would be left of the others. They get 8-bit blocks where the scheme says
`dynamic` or `static`: one large number then costs its own block of activations its precision, and no other.
"""

WIDE_CONVS = (r"^\w+_decoder/.*\b(conv1|conv2|upsamplers\.0\.conv)\b",)
"""Convolutions of 3x3 pixels in decoders, 98 % of Meissonic's. Left out are the first and the last one, and those of
1x1 pixels, which are given what no normalization has brought into a common range."""

ENCODER_CONVS = (r"^(vq|vae)_encoder/.*\b(conv1|conv2|downsamplers\.0\.conv)\b",)
"""The same in encoders of pictures."""

LARGE_TABLES = (r"^text_encoder_2/shared\b",)
"""Lookup tables that would be the largest weight of a bundle: 250 112 rows in mT5."""


ROUNDED_ATTENTION_FAMILIES = frozenset({"meissonic"})
"""Families whose attention multiplies 8-bit numbers unless the user says otherwise: those with pictures to judge by."""


@dataclass(frozen=True)
class Scheme:
    """How the weights of a bundle are kept."""

    name: str
    linear: Storage
    sensitive: Storage
    """Linear layers that match `sensitive_layers`; always 8 bits."""
    embedding: Storage
    conv: Storage
    large_table: Storage | None = None
    """Lookup tables that match `large_tables`; None keeps them as `embedding`."""
    sensitive_layers: tuple[str, ...] = SENSITIVE
    """Regular expressions, searched in the path."""
    exact_layers: tuple[str, ...] = EXACT
    """As `sensitive_layers`, for weights of any use that stay float."""
    spiky_layers: tuple[str, ...] = SPIKY
    """As `sensitive_layers`, for linear layers whose inputs are never rounded with one scale for all."""
    large_tables: tuple[str, ...] = LARGE_TABLES
    keep: tuple[Keep, ...] = ()
    """The user's rules; the first that matches overrules everything else."""
    min_elements: int = 4096
    """Smaller weights stay float: at most 12 KB to gain, and another node to run."""
    min_width: int = 16
    """Linear layers with fewer inputs stay float: less than the smallest block, mostly padding."""
    rounding: str = "rtn"
    """How linear weights become 4-bit blocks: one of `rounding.METHODS`. All else is rounded to nearest."""
    chosen: Mapping[str, Storage] = field(default_factory=dict)
    """Forms found by measuring, by path; they come after the user's rules and before all else."""
    smoothing: float = 0.0
    """Strength of the smoothing of inputs of `dynamic` linear layers, 0 to 1; 0 for none."""
    int8_attention: bool | None = None
    """Whether attention multiplies 8-bit numbers, see `attention`; None for as the family allows."""
    half_layers: bool = True
    """Whether codecs keep in float16 what one layer gives the next, see `half_layers`."""
    int8_codec: bool = True
    """Whether the convolutions that match `wide_convs` multiply 8-bit numbers, see `int8_conv`."""
    wide_convs: tuple[str, ...] = WIDE_CONVS
    """Regular expressions, searched in the path."""
    int8_encoder: bool = False
    """Whether the convolutions that match `encoder_convs` do so too."""
    encoder_convs: tuple[str, ...] = ENCODER_CONVS
    """As `wide_convs`."""
    low_rank: int = 0
    """Columns of the branch beside a 4-bit linear layer that carries its rounding error."""

    def __post_init__(self) -> None:
        for use, storage in (
            (Use.LINEAR, self.linear),
            (Use.LINEAR, self.sensitive),
            (Use.EMBEDDING, self.embedding),
            (Use.EMBEDDING, self.large_table or self.embedding),
            (Use.CONV, self.conv),
        ):
            if storage.kind not in FORMS[use]:
                raise UsageError(f"scheme {self.name}: {use} weights cannot be kept as {storage}")
        if self.rounding not in ROUNDINGS:
            raise UsageError(f"rounding {self.rounding!r} is unknown: take {', '.join(ROUNDINGS)}")
        if not 0 <= self.smoothing <= 1:
            raise UsageError(f"smoothing of strength {self.smoothing} is not possible: take 0 to 1")
        if self.low_rank < 0:
            raise UsageError(f"a low-rank branch of {self.low_rank} columns is not possible")
        if self.sensitive.bits != 8:
            raise UsageError(f"scheme {self.name}: sensitive layers take 8 bits, not {self.sensitive.bits}")

    @property
    def is_calibrated(self) -> bool:
        """Whether quantizing needs recorded runs of the float model."""
        return self.int8_codec or self.int8_encoder or self.is_fitted

    @property
    def is_fitted(self) -> bool:
        """Whether linear layers are rounded by what they are given, for which more is recorded than for ranges."""
        return any(self.looks_at_inputs(storage) for storage in (self.linear, self.sensitive, *self.chosen.values()))

    def looks_at_inputs(self, storage: Storage) -> bool:
        """Whether keeping a linear weight like this needs to know what the layer is given."""
        match storage.kind:
            case Kind.BLOCKS:
                # Eight bits gain nothing: activations are no finer.
                return storage.bits == 4 and (self.rounding in CALIBRATED or self.low_rank > 0)
            case Kind.DYNAMIC:
                return self.smoothing > 0
            case _:
                return storage.kind is Kind.STATIC

    def storage(self, use: Use, path: str) -> Storage:
        """Form of the weight at `path` (`component/initializer name`)."""
        for rule in self.keep:
            if rule.matches(path):
                return self._kept(use, path, rule.bits)
        if path in self.chosen:
            return self.chosen[path]
        if _matches(self.exact_layers, path):
            return FLOAT
        if use is Use.LINEAR:
            sensitive = _matches(self.sensitive_layers, path)
            return self._without_spikes(path, self.sensitive if sensitive else self.linear)
        if use is Use.EMBEDDING:
            return self.large_table or self.embedding if _matches(self.large_tables, path) else self.embedding
        wide = (*(self.wide_convs if self.int8_codec else ()), *(self.encoder_convs if self.int8_encoder else ()))
        return STATIC if _matches(wide, path) else self.conv

    def with_block_size(self, block_size: int) -> Scheme:
        """The same scheme with another block size wherever there are blocks."""

        def resized(storage: Storage) -> Storage:
            return replace(storage, block_size=block_size) if storage.kind is Kind.BLOCKS else storage

        return replace(
            self,
            linear=resized(self.linear),
            sensitive=resized(self.sensitive),
            embedding=resized(self.embedding),
            large_table=None if self.large_table is None else resized(self.large_table),
        )

    def for_family(self, family: str) -> Scheme:
        """The same scheme with nothing left to the model's family."""
        wanted = family in ROUNDED_ATTENTION_FAMILIES if self.int8_attention is None else self.int8_attention
        return replace(self, int8_attention=wanted)

    def keeping(self, rules: Sequence[Keep]) -> Scheme:
        """The same scheme with more of the user's rules, after those it has."""
        return replace(self, keep=(*self.keep, *rules))

    def to_manifest(self) -> dict[str, object]:
        """Everything needed to repeat the quantization, for `bundle.json`."""
        return {
            "name": self.name,
            "linear": self.linear.to_manifest(),
            "sensitive": self.sensitive.to_manifest(),
            "embedding": self.embedding.to_manifest(),
            "large_table": None if self.large_table is None else self.large_table.to_manifest(),
            "conv": self.conv.to_manifest(),
            "sensitive_layers": list(self.sensitive_layers),
            "exact_layers": list(self.exact_layers),
            "spiky_layers": list(self.spiky_layers),
            "large_tables": list(self.large_tables),
            "keep": [{"pattern": rule.pattern, "bits": rule.bits} for rule in self.keep],
            "min_elements": self.min_elements,
            "min_width": self.min_width,
            "chosen": len(self.chosen),
            "rounding": self.rounding,
            "smoothing": self.smoothing,
            "low_rank": self.low_rank,
            "int8_attention": self.int8_attention,
            "half_layers": self.half_layers,
            "int8_codec": self.int8_codec,
            "wide_convs": list(self.wide_convs),
            "int8_encoder": self.int8_encoder,
            "encoder_convs": list(self.encoder_convs),
        }

    def is_spiky(self, path: str) -> bool:
        """Whether the linear layer of the weight at `path` must not be given inputs of one scale."""
        return _matches(self.spiky_layers, path)

    def _without_spikes(self, path: str, storage: Storage) -> Storage:
        """The storage, or blocks where its rounding of activations would not do."""
        one_scale = storage.kind in (Kind.DYNAMIC, Kind.STATIC)
        return blocks(8) if one_scale and _matches(self.spiky_layers, path) else storage

    def _kept(self, use: Use, path: str, bits: int) -> Storage:
        if bits != 8:
            return HALF if bits == 16 else FLOAT
        if use is Use.LINEAR:
            return self._without_spikes(path, self.sensitive)
        if use is Use.CONV:
            return CHANNELS
        return replace(self.embedding, bits=8) if self.embedding.kind is Kind.BLOCKS else blocks(8)


def _matches(patterns: Sequence[str], path: str) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", linear=DYNAMIC, sensitive=DYNAMIC, embedding=blocks(8), conv=HALF),
        # 8-bit blocks rather than `dynamic` for the sensitive layers: GPUs have a kernel for these.
        Scheme(
            "int4",
            linear=blocks(4),
            sensitive=blocks(8),
            embedding=blocks(8),
            conv=CHANNELS,
            # Half of what 8 bits take, 260 MB less at the size of mT5's; small blocks, since rows are as uneven as
            # words are.
            large_table=blocks(4, 32),
            rounding="gptq",
        ),
    )
}
"""The schemes, by name."""
