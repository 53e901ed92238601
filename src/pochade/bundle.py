"""The bundle: one folder that holds an image model, opened, verified and written. See docs/bundle-format.md.

Nothing here trusts the folder: it is checked before a single graph reaches ONNX Runtime, which is no sandbox.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from pochade.bundle_folder import file_sha256, flush_names, flush_tree, kind_fault, regular_files
from pochade.bundle_paths import folder_prefix, is_ignored, is_litter, path_fault
from pochade.component import Component, TensorSpec
from pochade.errors import BundleInvalidError, BundleNotFoundError, OutputError, PochadeError, UsageError
from pochade.manifest import FORMAT_VERSION, MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, Manifest
from pochade.onnx_external import MalformedModelError, read_model_facts
from pochade.strict_json import parse_object

__all__ = ["Bundle", "BundleWriter", "Component", "FileEntry", "Manifest", "TensorSpec"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Told the file being hashed, the bytes hashed so far, and the bytes in all."""

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Operators that make a graph more than a graph: a blob compiled for a device, read from a path nobody checks.
_REFUSED_OPERATORS = {"EPContext"}


@dataclass(frozen=True)
class Bundle:
    """A bundle folder whose manifest has been read."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """The bundle in this folder, checked in all that needs no reading of the weights.

        Raises:
            BundleNotFoundError: There is no such folder, or it holds no bundle.json.
            BundleInvalidError: With every fault found.
        """
        bundle = cls._read(path)
        sizes, faults = regular_files(bundle.path)
        faults += bundle._layout_faults(sizes)
        if faults:
            raise BundleInvalidError(str(path), faults)
        return bundle

    @classmethod
    def open_verified(cls, path: str | os.PathLike[str], progress: Progress | None = None) -> Bundle:
        """The bundle in this folder, with every byte of it checked; raises as `open` does."""
        bundle = cls._read(path)
        bundle.verify(progress)
        return bundle

    @classmethod
    def _read(cls, path: str | os.PathLike[str]) -> Bundle:
        folder = Path(path)
        if not os.path.lexists(folder / MANIFEST_NAME):
            raise _not_found(folder)
        # A link to the whole folder is its owner's affair: resolved here, so that nothing below starts with a link.
        folder = folder.resolve()
        return cls(folder, Manifest.from_json(_manifest_text(folder, str(path)), str(path)))

    def verify(self, progress: Progress | None = None) -> None:
        """Check every byte of every file against the manifest.

        Args:
            progress: Called after each piece; what it raises ends the work.

        Raises:
            BundleInvalidError: With every fault found.
        """
        sizes, faults = regular_files(self.path)
        faults += [*self._layout_faults(sizes), *self._hash_faults(sizes, progress)]
        if faults:
            raise BundleInvalidError(str(self.path), faults)

    def component_path(self, name: str, adapted: bool = False, on_gpu: bool = False) -> Path:
        """The ONNX file of a component.

        Args:
            name: of the component.
            adapted: the graph that takes low-rank changes, which the component must have.
            on_gpu: the graph to run on a graphics card.

        Raises:
            BundleInvalidError: The bundle has no such component.
        """
        component = self.manifest.components.get(name)
        if component is None:
            known = ", ".join(sorted(self.manifest.components))
            raise BundleInvalidError(str(self.path), [f"it has no component {name!r}, only {known}"])
        return self.path / component.graph_file(adapted, on_gpu)

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer.json, or None for a family that reads no text."""
        return None if self.manifest.tokenizer is None else self.path / self.manifest.tokenizer

    @property
    def more_tokenizer_paths(self) -> dict[str, Path]:
        """The tokenizer.json of each further text encoder, by the name of its component."""
        return {name: self.path / path for name, path in self.manifest.more_tokenizers.items()}

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.manifest.files)

    def component_size(self, name: str) -> int:
        """Bytes of a component's graph and its external data."""
        component = self.manifest.components[name]
        parts = {*component.graphs, *component.external_data}
        return sum(entry.size for entry in self.manifest.files if entry.path in parts)

    @property
    def digest(self) -> str:
        """Identity of the bundle, the same wherever it lies and whatever it is called."""
        return self.manifest.digest

    def _layout_faults(self, sizes: Mapping[str, int]) -> list[str]:
        """Where the files found, by path and size, are not what the manifest says."""
        declared = {MANIFEST_NAME, *(entry.path for entry in self.manifest.files)}
        faults = [f"{path!r} is not declared in {MANIFEST_NAME}" for path in sorted(sizes.keys() - declared)]
        for entry in self.manifest.files:
            if entry.path not in sizes:
                faults.append(f"{entry.path!r} is missing")
            elif sizes[entry.path] != entry.size:
                faults.append(f"{entry.path!r} has {sizes[entry.path]} bytes instead of {entry.size}")
        for component in self.manifest.components.values():
            for file in component.graphs:
                if file in sizes:
                    faults += [f"{file!r} {reason}" for reason in _graph_faults(self.path, component, file, sizes)]
        return faults

    def _hash_faults(self, sizes: Mapping[str, int], progress: Progress | None) -> Iterator[str]:
        """Where the content is not the declared one; files of another size are the layout's to report."""
        done = 0
        for entry in self.manifest.files:
            if sizes.get(entry.path) == entry.size:
                meter = None if progress is None else _meter(progress, entry.path, done, self.size)
                try:
                    if file_sha256(self.path / entry.path, meter) != entry.sha256:
                        yield f"{entry.path!r} is damaged or was changed: its sha256 is not the declared one"
                except OSError as error:
                    yield f"{entry.path!r} cannot be read: {error.strerror}"
            done += entry.size


class BundleWriter:
    """A bundle in the making: fill the folder `path`, then call `finish`.

    Until then nothing stands under the final name, and a block that ends without `finish` leaves nothing at all.
    A folder left over by a killed process (hidden, ending in .partial) never blocks the next writer and may be
    deleted by hand; it is not deleted here, since another process may still be filling it.
    """

    path: Path
    """The temporary folder, beside the final one, so that finishing is a rename."""

    def __init__(self, target: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Check that the target may be written.

        Raises:
            UsageError: It exists, and `overwrite` is not given or would delete more than a bundle.
        """
        # Resolved, so that overwriting a linked folder replaces the folder and not the link.
        self.target = Path(target).resolve()
        self.overwrite = overwrite
        self._refuse_target()
        self._stem = f".{self.target.name}.{secrets.token_hex(4)}"
        self.path = self.target.with_name(f"{self._stem}.partial")
        self._finished = False

    def __enter__(self) -> BundleWriter:
        """The writer, with an empty folder to fill."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()
        except OSError as error:
            raise self._output_error(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove what was not finished, and say a full disk in our own words."""
        if not self._finished:
            shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, PochadeError) and self._came_from_writing(error):
            raise self._output_error(error) from error

    def finish(
        self,
        *,
        name: str,
        family: str,
        family_revision: int,
        task: str,
        components: Mapping[str, Component],
        tokenizer: str | None,
        scheduler: Mapping[str, Any],
        defaults: Mapping[str, Any],
        source: Mapping[str, Any],
        scorecard: Mapping[str, Any] | None = None,
        more_tokenizers: Mapping[str, str] | None = None,
    ) -> Bundle:
        """The bundle, complete under its final name; the arguments are the fields of `Manifest`.

        Raises:
            BundleInvalidError: The folder and the arguments do not make a bundle that `Bundle.open` would take.
            OutputError: It cannot be written; what stood under the name before still does.
            UsageError: Something took the name while the folder was being filled.
        """
        try:
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                name=name,
                family=family,
                family_revision=family_revision,
                task=task,
                components=components,
                tokenizer=tokenizer,
                scheduler=scheduler,
                defaults=defaults,
                source=source,
                scorecard=scorecard,
                files=self._hash_files(),
                more_tokenizers=more_tokenizers or {},
            )
            (self.path / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8", newline="\n")
            checked = Bundle.open(self.path)
            flush_tree(self.path)
            self._move_into_place()
        except BundleInvalidError as error:
            raise BundleInvalidError(str(self.target), error.faults) from error
        except OSError as error:
            if isinstance(error, PochadeError):
                raise
            raise self._output_error(error) from error
        return Bundle(self.target, checked.manifest)

    def _refuse_target(self) -> None:
        """Raise where writing would take something away that nobody said to take."""
        if not os.path.lexists(self.target):
            return
        if not self.overwrite:
            raise UsageError(f"{self.target} exists: choose another name, or replace it with --overwrite")
        if not self.target.is_dir():
            raise UsageError(f"{self.target} is a file, and a bundle is a folder: choose another name")
        if foreign := _foreign_files(self.target):
            raise UsageError(
                f"{self.target} holds more than a bundle ({', '.join(foreign[:3])}), and --overwrite would delete it: "
                "move that elsewhere or choose another name"
            )

    def _hash_files(self) -> tuple[FileEntry, ...]:
        sizes, faults = regular_files(self.path)
        if faults:
            raise BundleInvalidError(str(self.target), faults)
        return tuple(FileEntry(path, sizes[path], file_sha256(self.path / path)) for path in sorted(sizes))

    def _move_into_place(self) -> None:
        """Give the folder its final name; the old bundle comes back if that fails, and goes only afterwards."""
        self._refuse_target()
        aside = self.target.with_name(f"{self._stem}.old")
        try:
            if self.target.exists():
                self.target.rename(aside)
            self.path.rename(self.target)
        except BaseException:
            if aside.exists() and not self.target.exists():
                aside.rename(self.target)
            raise
        self._finished = True
        flush_names(self.target.parent)
        shutil.rmtree(aside, ignore_errors=True)

    def _came_from_writing(self, error: OSError) -> bool:
        """Whether this is about our folder, and not about some checkpoint read meanwhile."""
        if error.errno in _FULL_DISK:
            return True
        return isinstance(error.filename, str) and Path(error.filename).is_relative_to(self.path)

    def _output_error(self, error: OSError) -> OutputError:
        full = error.errno in _FULL_DISK
        fix = "free some space there or choose another disk" if full else "choose another folder or mend its rights"
        return OutputError(f"cannot write {self.target}: {error.strerror or error}; {fix}")


def _not_found(folder: Path) -> BundleNotFoundError:
    """The error for a folder that is no bundle, with those nearby that are."""
    if folder.is_file():
        return BundleNotFoundError(f"{folder} is a file: give the folder that holds {MANIFEST_NAME}")
    reason = f"has no {MANIFEST_NAME}" if folder.is_dir() else "does not exist"
    nearest = next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), folder)
    found = [path.parent for path in nearest.glob(f"*/{MANIFEST_NAME}")]
    near = sorted(str(path) for path in found if not is_ignored(path.name))[:5]
    hint = f"bundles nearby: {', '.join(near)}" if near else "`pochade models` lists what is installed"
    return BundleNotFoundError(f"no bundle at {folder}, which {reason}; {hint}")


def _manifest_text(folder: Path, where: str) -> str:
    """The text of bundle.json, read only if that is an ordinary file of an ordinary size."""
    path = folder / MANIFEST_NAME
    if reason := kind_fault(path.lstat()):
        raise BundleInvalidError(where, [f"{MANIFEST_NAME} {reason}"])
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise BundleInvalidError(where, [f"{MANIFEST_NAME} cannot be read: {error.strerror}"]) from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleInvalidError(where, [f"{MANIFEST_NAME} is larger than {MAX_MANIFEST_BYTES} bytes"])
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BundleInvalidError(where, [f"{MANIFEST_NAME} is not UTF-8"]) from error


def _graph_faults(folder: Path, component: Component, file: str, sizes: Mapping[str, int]) -> Iterator[str]:
    """Where a graph reaches outside of what its component declares."""
    try:
        facts = read_model_facts(folder / file)
    except MalformedModelError as error:
        yield f"is no readable ONNX model: it {error}"
        return
    except OSError as error:
        yield f"cannot be read: {error.strerror}"
        return
    prefix = folder_prefix(file)
    for location, needed in facts.external.items():
        path = prefix + location
        if reason := path_fault(location):
            yield f"reads tensors from {location!r}, which {reason}"
        elif path not in component.external_data and (path != component.file or file == path):
            yield f"reads tensors from {path!r}, which its component does not declare"
        elif path in sizes and needed > sizes[path]:
            yield f"reads tensors up to byte {needed} of {path!r}, which has {sizes[path]}"
    for path in component.external_data if file == component.file else ():
        if path.removeprefix(prefix) not in facts.external:
            yield f"reads nothing from {path!r}, which its component declares"
    for operator in sorted(facts.operators & _REFUSED_OPERATORS):
        yield f"has the operator {operator}, compiled for one device and not checkable"


def _foreign_files(folder: Path) -> list[str]:
    """What lies in a folder besides the bundle it may hold; deliberately lenient about that bundle being sound."""
    sizes, faults = regular_files(folder, skip=is_litter)
    try:
        values = parse_object(_manifest_text(folder, str(folder)))
        ours = {MANIFEST_NAME, *(entry["path"] for entry in values["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    return [*sorted(sizes.keys() - ours), *faults]


def _meter(progress: Progress, path: str, before: int, total: int) -> Callable[[int], None]:
    """The progress of one file, told as progress of the whole."""
    return lambda done: progress(path, before + done, total)
