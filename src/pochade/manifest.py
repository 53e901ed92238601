"""What `bundle.json` says, as typed values. docs/bundle-format.md is the normative text.

Reading collects every fault before it raises, so that a broken manifest is mended in one go.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pochade.bundle_paths import folders_above, read_path, repeated
from pochade.component import Component, component_faults, read_component
from pochade.errors import BundleInvalidError
from pochade.strict_json import JsonObject, parse_object

FORMAT_VERSION = 1
"""Newest format this reader understands, and the one the writer writes."""

MANIFEST_NAME = "bundle.json"

MAX_MANIFEST_BYTES = 4 << 20
"""Room for a scheme with a line per node; far below what would strain a phone."""

_COMPONENT_NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


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
            for values_of in (component["lora"] or {}, component):
                for optional in ("memory", "lora", "gpu", "int8", "float_attention"):
                    if values_of.get(optional, 0) is None:
                        del values_of[optional]
            if not component["parts"]:
                del component["parts"]
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
            tokenizer=None if top.is_null("tokenizer") else read_path(top, "tokenizer"),
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


def _components(top: JsonObject) -> dict[str, Component]:
    """The components by name."""
    items = top.children("components")
    for name in items:
        if not _COMPONENT_NAME.fullmatch(name):
            top.fault("components", f"has the name {name!r}, which is not a-z, 0-9 and _ with a letter first")
    return {name: read_component(name, item) for name, item in items.items()}


def _more_tokenizers(top: JsonObject) -> dict[str, str]:
    """Paths by component, where there are any."""
    if "more_tokenizers" not in top.values:
        return {}
    paths = JsonObject(top.take("more_tokenizers", dict, {}), top.faults, "more_tokenizers.")
    return {name: read_path(paths, name) for name in paths.values}


def _file_entry(item: JsonObject) -> FileEntry:
    sha256 = item.take("sha256", str, "0" * 64)
    if not _SHA256.fullmatch(sha256):
        item.fault("sha256", "is not 64 lower-case hexadecimal digits")
    return FileEntry(path=read_path(item, "path"), size=item.count("size", least=0), sha256=sha256)


def _list_faults(manifest: Manifest) -> Iterator[str]:
    """Why the list of files cannot stand on every file system."""
    paths = [entry.path for entry in manifest.files]
    folders = {folder for path in paths for folder in folders_above(path)}
    for path in repeated(paths):
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
        for reason in component_faults(component, listed):
            yield f"component {component.name}: {reason}"
    for path in manifest.tokenizer_files:
        if path not in listed:
            yield f"tokenizer {path!r} is not listed in files"
    for name in manifest.more_tokenizers:
        if name not in manifest.components:
            yield f"more_tokenizers names {name!r}, which is no component"
    if manifest.more_tokenizers and manifest.tokenizer is None:
        yield "more_tokenizers stands without a tokenizer"
