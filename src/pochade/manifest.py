"""What `bundle.json` says, as typed values. docs/bundle-format.md is the normative text.

Reading collects every fault before it raises, so that a broken manifest is mended in one go.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pochade.errors import BundleInvalidError
from pochade.strict_json import JsonObject, parse_object

FORMAT_VERSION = 1
"""Newest format this reader understands, and the one the writer writes."""

MANIFEST_NAME = "bundle.json"

MAX_MANIFEST_BYTES = 4 << 20
"""Room for a scheme with a line per node; far below what would strain a phone."""

DTYPES = frozenset({"float32", "float16", "int64", "int32", "uint8", "bool"})

_COMPONENT_NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_DRIVE = re.compile(r"[A-Za-z]:", re.ASCII)
_DEVICE_NAMES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
_LITTER = frozenset({".ds_store", "thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a component."""

    name: str
    dtype: str
    """One of `DTYPES`, spelt as NumPy does."""
    shape: tuple[int | str, ...]
    """Axes in order; text names an axis whose length is known only when it runs."""
    optional: bool = False
    """Whether an input may be left out; the graph holds what it is then."""


@dataclass(frozen=True)
class AdaptedLayer:
    """Linear layers that a low-rank change can be added to, computed as one product."""

    inputs: int
    outputs: Mapping[str, int]
    """Width of each layer's result by its published name, in the order in which they stand side by side."""
    norms: Mapping[str, float]
    """Frobenius norm of each layer's weight before quantization."""

    @property
    def name(self) -> str:
        """What its inputs `<name>.lora_A` (inputs, rank) and `<name>.lora_B` (rank, outputs) are named after."""
        return next(iter(self.outputs))


@dataclass(frozen=True)
class GpuGraph:
    """Another graph of a component, on the same data files, in the operators and types of graphics cards."""

    file: str
    dtype: str
    """What its matrix products compute in: float32 or float16; its inputs and outputs are those of the first."""
    weights: int
    """Bytes that an open session holds of the weights."""


@dataclass(frozen=True)
class LoraGraph:
    """Another graph of a component, on the same data files, that takes low-rank changes as further inputs."""

    file: str
    dtype: str
    """Of the changes: float32 or float16."""
    layers: tuple[AdaptedLayer, ...]
    gpu: GpuGraph | None = None
    """The same for graphics cards; None where this one is as good there."""


@dataclass(frozen=True)
class Component:
    """One exported graph of a bundle."""

    name: str
    file: str
    external_data: tuple[str, ...]
    """Files that hold this graph's large tensors; like every path here, relative to the bundle."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str
    """Short name for people and for planning: fp32, fp16, int8, int4."""
    quantization: Mapping[str, Any] | None
    """The scheme as the quantizer wrote it; None where nothing is quantized."""
    num_parameters: int
    memory: Mapping[str, int] | None = None
    """What planning needs to know, in bytes: `weights`, what an open session holds of them; `per_pixel` and
    `per_pixel_recomputed`, of a codec, the layers kept at most while it works; `per_pixel_convolved`, how much of the
    first convolutions give, which may be kept in 8 bits. None in bundles made before."""
    lora: LoraGraph | None = None
    """None for a component that takes no LoRA."""
    gpu: GpuGraph | None = None
    """None where the first graph is as good on a graphics card, or is all there is."""

    @property
    def graphs(self) -> tuple[str, ...]:
        """Its graph files, the first one first."""
        others = [self.gpu, self.lora, self.lora.gpu if self.lora is not None else None]
        return (self.file, *(graph.file for graph in others if graph is not None))

    def graph_file(self, adapted: bool, on_gpu: bool) -> str:
        """The graph to open.

        Args:
            adapted: it has to take low-rank changes, which the component must be able to.
            on_gpu: it will run on a graphics card.
        """
        chosen: Component | LoraGraph = self
        if adapted:
            assert self.lora is not None, f"{self.name} takes no low-rank changes"
            chosen = self.lora
        return chosen.gpu.file if on_gpu and chosen.gpu is not None else chosen.file


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle and what it must be."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything `bundle.json` says."""

    format_version: int
    name: str
    family: str
    family_revision: int
    """Raised by a family when the names or the meaning of its components change."""
    task: str
    components: Mapping[str, Component]
    tokenizer: str | None
    """Path of the tokenizer.json, for families that read text; where there are several, of `text_encoder`."""
    scheduler: Mapping[str, Any]
    defaults: Mapping[str, Any]
    source: Mapping[str, Any]
    """Where the weights come from: checkpoint, revision, licence, exporter."""
    scorecard: Mapping[str, Any] | None
    """Measured fidelity against the fp32 bundle; None where nothing was measured."""
    files: tuple[FileEntry, ...]
    more_tokenizers: Mapping[str, str] = field(default_factory=dict)
    """Path of a tokenizer.json by the name of the component that reads its ids, for those that `tokenizer` is not
    for; bundles of one text encoder have none."""

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Paths of all tokenizers."""
        return (*(() if self.tokenizer is None else (self.tokenizer,)), *self.more_tokenizers.values())

    @property
    def digest(self) -> str:
        """sha256 over what decides a picture: the files, their roles, the scheduler; not the name or the scorecard."""
        values = self.to_dict()
        for component in values["components"].values():
            component.pop("memory", None)
        decisive = {key: values[key] for key in ("family", "family_revision", "components", "tokenizer", "scheduler")}
        if self.more_tokenizers:
            decisive["more_tokenizers"] = values["more_tokenizers"]
        decisive["files"] = sorted((entry.path, entry.sha256) for entry in self.files)
        text = json.dumps(decisive, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The manifest as values that JSON can write."""
        values = dataclasses.asdict(self)
        for component in values["components"].values():
            del component["name"]
            for spec in (*component["inputs"], *component["outputs"]):
                if not spec["optional"]:
                    del spec["optional"]
            if component["lora"] is not None and component["lora"]["gpu"] is None:
                del component["lora"]["gpu"]
            for optional in ("memory", "lora", "gpu"):
                if component[optional] is None:
                    del component[optional]
        if not self.more_tokenizers:
            del values["more_tokenizers"]
        return values

    def to_json(self) -> str:
        """The text of bundle.json.

        Raises:
            BundleInvalidError: A number in it is NaN or infinite.
        """
        try:
            return json.dumps(self.to_dict(), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
        except ValueError as error:
            raise BundleInvalidError(self.name, ["a number in its manifest is NaN or infinite: write null"]) from error

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """The manifest in this text.

        Args:
            text: Content of a bundle.json.
            where: What the error names, usually the folder.

        Raises:
            BundleInvalidError: With every fault of the text, or with the version alone where that is too new.
        """
        try:
            values = parse_object(text)
        except ValueError as error:
            raise BundleInvalidError(where, [f"{MANIFEST_NAME} {error}"]) from error
        faults: list[str] = []
        top = JsonObject(values, faults)
        version = top.count("format_version", least=1)
        if version > FORMAT_VERSION:
            # A newer layout may mean anything by the other keys, so nothing else can be said about it.
            newer = f"its format version is {version} and this pochade reads up to {FORMAT_VERSION}: upgrade pochade"
            raise BundleInvalidError(where, [newer])
        manifest = cls(
            format_version=version,
            name=top.text("name"),
            family=top.text("family"),
            family_revision=top.count("family_revision", least=1),
            task=top.text("task"),
            components=_components(top),
            tokenizer=None if top.is_null("tokenizer") else _path(top, "tokenizer"),
            scheduler=top.take("scheduler", dict, {}),
            defaults=top.take("defaults", dict, {}),
            source=top.take("source", dict, {}),
            scorecard=top.optional_object("scorecard"),
            files=tuple(_file_entry(item) for item in top.objects("files")),
            more_tokenizers=_more_tokenizers(top),
        )
        # How the parts fit together can only be judged where each part could be read.
        faults = faults or [*_list_faults(manifest), *_role_faults(manifest)]
        if faults:
            raise BundleInvalidError(where, faults)
        return manifest


def path_fault(path: str) -> str | None:
    """Why this path may not stand in a bundle, or None where it may."""
    parts = path.split("/")
    if "\\" in path:
        return "has a backslash, which separates on one system and is a letter on another"
    if path.startswith("/") or _DRIVE.match(path):
        return "is absolute"
    if ".." in parts:
        return "has '..' and may leave the bundle"
    if any(part in ("", ".") for part in parts):
        return "is not in its shortest form"
    if any(is_ignored(part) for part in parts):
        return "has a name that readers ignore"
    if not all(_is_portable(part) for part in parts):
        return "has a name that some system cannot hold"
    if unicodedata.normalize("NFC", path) != path:
        return "is not in Unicode's composed form (NFC)"
    return None


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is no part of a bundle: hidden (.git, .cache), or litter."""
    return name.startswith(".") or is_litter(name)


def is_litter(name: str) -> bool:
    """Whether a file manager leaves files of this name behind without being asked."""
    return name.startswith("._") or name.casefold() in _LITTER


def folder_prefix(path: str) -> str:
    """What the paths of a file's neighbours begin with: 'vae/' for 'vae/decoder.onnx', '' at the top."""
    return path[: path.rfind("/") + 1]


def _is_portable(name: str) -> bool:
    """Whether Windows, macOS and Linux can all hold a file of this name."""
    return (
        name.isprintable()
        and not set(name) & set('<>:"|?*')
        and not name.endswith((" ", "."))
        and not _DEVICE_NAMES.fullmatch(name)
    )


def _path(item: JsonObject, key: str) -> str:
    """A path that stays inside the bundle."""
    path = item.take(key, str, "-")
    if reason := path_fault(path):
        item.fault(key, f"{path!r} {reason}")
    return path


def _paths(item: JsonObject, key: str) -> tuple[str, ...]:
    """Paths that stay inside the bundle."""
    paths = item.strings(key)
    for path in paths:
        if reason := path_fault(path):
            item.fault(key, f"{path!r} {reason}")
    return tuple(paths)


def _components(top: JsonObject) -> dict[str, Component]:
    """The components by name."""
    items = top.children("components")
    for name in items:
        if not _COMPONENT_NAME.fullmatch(name):
            top.fault("components", f"has the name {name!r}, which is not a-z, 0-9 and _ with a letter first")
    return {name: _component(name, item) for name, item in items.items()}


def _component(name: str, item: JsonObject) -> Component:
    return Component(
        name=name,
        file=_path(item, "file"),
        external_data=_paths(item, "external_data"),
        inputs=_tensors(item, "inputs"),
        outputs=_tensors(item, "outputs"),
        precision=item.text("precision"),
        quantization=item.optional_object("quantization"),
        num_parameters=item.count("num_parameters", least=0),
        memory=_memory(item),
        lora=_lora(item),
        gpu=_gpu(item),
    )


def _more_tokenizers(top: JsonObject) -> dict[str, str]:
    """Paths by component, where there are any."""
    if "more_tokenizers" not in top.values:
        return {}
    paths = JsonObject(top.take("more_tokenizers", dict, {}), top.faults, "more_tokenizers.")
    return {name: _path(paths, name) for name in paths.values}


def _memory(item: JsonObject) -> dict[str, int] | None:
    """Byte counts by name, where there are any."""
    if "memory" not in item.values:
        return None
    memory = JsonObject(item.take("memory", dict, {}), item.faults, f"{item.at}memory.")
    return {name: memory.count(name, least=0) for name in memory.values}


def _lora(item: JsonObject) -> LoraGraph | None:
    """The graph that takes low-rank changes, where there is one."""
    if "lora" not in item.values:
        return None
    lora = JsonObject(item.take("lora", dict, {}), item.faults, f"{item.at}lora.")
    layers = tuple(_adapted_layer(layer) for layer in lora.objects("layers"))
    for name in _repeated(name for layer in layers for name in layer.outputs):
        lora.fault("layers", f"has {name!r} twice")
    return LoraGraph(_path(lora, "file"), _float_type(lora), layers, _gpu(lora))


def _gpu(item: JsonObject) -> GpuGraph | None:
    """The graph for graphics cards, where there is one."""
    if "gpu" not in item.values:
        return None
    gpu = JsonObject(item.take("gpu", dict, {}), item.faults, f"{item.at}gpu.")
    return GpuGraph(_path(gpu, "file"), _float_type(gpu), gpu.count("weights", least=0))


def _float_type(item: JsonObject) -> str:
    """float32 or float16."""
    dtype: str = item.take("dtype", str, "float32")
    if dtype not in ("float32", "float16"):
        item.fault("dtype", f"{dtype!r} is neither float32 nor float16")
    return dtype


def _adapted_layer(item: JsonObject) -> AdaptedLayer:
    outputs = JsonObject(item.take("outputs", dict, {}), item.faults, f"{item.at}outputs.")
    norms = JsonObject(item.take("norms", dict, {}), item.faults, f"{item.at}norms.")
    if not outputs.values or outputs.values.keys() != norms.values.keys():
        item.fault("outputs", "and norms do not name the same layers")
    return AdaptedLayer(
        item.count("inputs", least=1),
        {name: outputs.count(name, least=1) for name in outputs.values},
        {name: float(norms.take(name, float, 0.0)) for name in norms.values},
    )


def _tensors(item: JsonObject, key: str) -> tuple[TensorSpec, ...]:
    """The declared inputs or outputs, each with a name of its own."""
    specs = tuple(_tensor(tensor) for tensor in item.objects(key))
    if item.values.get(key) == []:
        item.fault(key, "is empty: what a component takes and gives must be declared")
    for name in _repeated(spec.name for spec in specs):
        item.fault(key, f"has {name!r} twice")
    for spec in specs if key == "outputs" else ():
        if spec.optional:
            item.fault(key, f"has {spec.name!r}, which is optional: only inputs can be left out")
    return specs


def _tensor(item: JsonObject) -> TensorSpec:
    dtype = item.take("dtype", str, "float32")
    if dtype not in DTYPES:
        item.fault("dtype", f"{dtype!r} is none of {', '.join(sorted(DTYPES))}")
    axes = item.take("shape", list, [])
    for index, axis in enumerate(axes):
        if not (type(axis) is int and axis > 0) and not (type(axis) is str and axis.strip() and axis.isprintable()):
            item.fault(f"shape[{index}]", "is neither a length above 0 nor the name of an axis")
    optional = item.take("optional", bool, False) if "optional" in item.values else False
    return TensorSpec(name=item.text("name"), dtype=dtype, shape=tuple(axes), optional=optional)


def _file_entry(item: JsonObject) -> FileEntry:
    sha256 = item.take("sha256", str, "0" * 64)
    if not _SHA256.fullmatch(sha256):
        item.fault("sha256", "is not 64 lower-case hexadecimal digits")
    return FileEntry(path=_path(item, "path"), size=item.count("size", least=0), sha256=sha256)


def _list_faults(manifest: Manifest) -> Iterator[str]:
    """Why the list of files cannot stand on every file system."""
    paths = [entry.path for entry in manifest.files]
    folders = {folder for path in paths for folder in _folders(path)}
    for path in _repeated(paths):
        yield f"{path!r} is listed twice"
    spellings: dict[str, str] = {}
    for path in sorted({*paths, *folders}):
        known = spellings.setdefault(path.casefold(), path)
        if known != path:
            yield f"{known!r} and {path!r} differ only in case, and are one file on Windows and macOS"
    for path in sorted(folders.intersection(paths)):
        yield f"{path!r} is listed as a file and is the folder of another"
    if MANIFEST_NAME in spellings:
        yield f"{spellings[MANIFEST_NAME]!r} is listed, and cannot hold its own hash"


def _role_faults(manifest: Manifest) -> Iterator[str]:
    """Why the listed files cannot play the parts they are given."""
    listed = {entry.path for entry in manifest.files}
    if not manifest.components:
        yield "it has no components"
    for component in manifest.components.values():
        for reason in _component_faults(component, listed):
            yield f"component {component.name}: {reason}"
    for path in manifest.tokenizer_files:
        if path not in listed:
            yield f"tokenizer {path!r} is not listed in files"
    for name in manifest.more_tokenizers:
        if name not in manifest.components:
            yield f"more_tokenizers names {name!r}, which is no component"
    if manifest.more_tokenizers and manifest.tokenizer is None:
        yield "more_tokenizers stands without a tokenizer"


def _component_faults(component: Component, listed: set[str]) -> Iterator[str]:
    """Why this component cannot be made of these files."""
    for path in component.graphs:
        if not path.endswith(".onnx"):
            # ONNX Runtime reads .ort as a format of its own, which nothing here looks into.
            yield f"{path!r} does not end in .onnx"
    for path in component.external_data:
        if not path.startswith(folder_prefix(component.file)):
            yield f"{path!r} is not below the folder of {component.file!r}"
    for path in component.graphs[1:]:
        if folder_prefix(path) != folder_prefix(component.file):
            yield f"{path!r} is not in the folder of {component.file!r}"
    for path in _repeated((*component.graphs, *component.external_data)):
        yield f"{path!r} is named twice"
    for path in sorted({*component.graphs, *component.external_data} - listed):
        yield f"{path!r} is not listed in files"


def _folders(path: str) -> Iterator[str]:
    """Every folder above a path, the nearest last."""
    parts = path.split("/")
    for depth in range(1, len(parts)):
        yield "/".join(parts[:depth])


def _repeated(values: Iterable[str]) -> list[str]:
    """The values that occur more than once."""
    return [value for value, times in Counter(values).items() if times > 1]
