"""A published checkpoint folder: JSON files and tensors, refused in words when they are not what they should be."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pochade.errors import InputRefusedError
from pochade.export.tensor_files import TensorReader, open_tensors

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

MAX_JSON_BYTES = 64 << 20
"""An index of a sharded checkpoint has about a hundred bytes per tensor; anything near this is no index."""

STEMS = ("diffusion_pytorch_model", "model")

PICKLE_NAME = "pytorch_model.bin"


class Checkpoint:
    """A folder with `model_index.json` and one sub-folder per part."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path, parts: Collection[str]) -> Checkpoint:
        """Checkpoint at `path`, once everything a pipeline of these `parts` needs is there.

        Raises:
            InputRefusedError: not a folder, or parts are missing; the message names all of them.
        """
        if not path.is_dir():
            raise InputRefusedError(str(path), ["it is not a folder; give the folder that holds model_index.json"])
        missing = [name for name in ("model_index.json", *parts) if not (path / name).exists()]
        if missing:
            raise InputRefusedError(
                str(path), [f"it is no checkpoint folder in the published layout, missing {', '.join(missing)}"]
            )
        return cls(path)

    def json(self, relative: str) -> dict[str, Any]:
        """Object in a JSON file of the folder."""
        return read_json(self.path / relative)


def read_json(path: Path) -> dict[str, Any]:
    """Object in a JSON file.

    Raises:
        InputRefusedError: absent, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputRefusedError(str(path), [f"it is larger than {MAX_JSON_BYTES >> 20} MiB"])
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputRefusedError(str(path), ["the file is missing"]) from None
    except (ValueError, RecursionError) as error:
        raise InputRefusedError(str(path), [f"it is not JSON ({error})"]) from None
    if not isinstance(value, dict):
        raise InputRefusedError(str(path), ["it holds no JSON object"])
    return value


def parse_config(kind: type[T], path: Path) -> T:
    """`kind.from_dict` of a JSON file, with its complaints turned into a refusal of that file."""
    values = read_json(path)
    try:
        config: T = kind.from_dict(values)  # type: ignore[attr-defined]
    except KeyError as error:
        raise InputRefusedError(str(path), [f"the value {error} is missing"]) from None
    except (TypeError, ValueError) as error:
        raise InputRefusedError(str(path), [str(error)]) from None
    return config


class Tensors(ABC):
    """Tensors by published key, read when asked for."""

    where: Path
    """What a complaint about them names."""

    @abstractmethod
    def keys(self) -> Collection[str]:
        """Published keys."""

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor, told without reading it."""

    @abstractmethod
    def __getitem__(self, key: str) -> Tensor:
        """Tensor as stored; backed by the file, not copied, as long as nobody changes its dtype."""

    def below(self, prefix: str) -> Tensors:
        """The tensors whose keys begin with `prefix`, under what is left of their keys."""
        return self.renamed({key.removeprefix(prefix): key for key in self.keys() if key.startswith(prefix)})

    def only(self, prefixes: tuple[str, ...]) -> Tensors:
        """The tensors whose keys begin with one of `prefixes`."""
        return self.renamed({key: key for key in self.keys() if key.startswith(prefixes)})

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """The tensors that `names` maps new keys to, under these."""
        return _Renamed(self, names)

    def check(self, module: nn.Module, ignored: Iterable[str] = ()) -> None:
        """Compare keys and shapes with those of a module that loads them.

        Args:
            module: may be on the meta device.
            ignored: prefixes of keys that published files may hold beside what the module needs.

        Raises:
            InputRefusedError: lists all missing, unexpected and mis-shaped tensors at once.
        """
        expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        found = {key: self.shape(key) for key in self.keys() if not key.startswith(tuple(ignored))}
        faults = [f"missing tensor {key}" for key in expected.keys() - found.keys()]
        faults += [f"unexpected tensor {key}" for key in found.keys() - expected.keys()]
        faults += [
            f"tensor {key} has shape {list(found[key])}, expected {list(shape)}"
            for key, shape in expected.items()
            if key in found and found[key] != shape
        ]
        if faults:
            raise InputRefusedError(str(self.where), sorted(faults))

    def load_into(self, module: nn.Module, ignored: Iterable[str] = ()) -> None:
        """Fill a module in float32, for checks and for training on; export itself streams tensors instead."""
        self.check(module, ignored)
        names = module.state_dict().keys()
        module.load_state_dict({name: self[name].float() for name in names}, assign=True)


class _Renamed(Tensors):
    """Some tensors of a source, under other keys."""

    def __init__(self, source: Tensors, names: Mapping[str, str]) -> None:
        self.where = source.where
        self._source = source
        self._names = names

    def keys(self) -> Collection[str]:
        return self._names.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._source.shape(self._names[key])

    def __getitem__(self, key: str) -> Tensor:
        return self._source[self._names[key]]


class TensorFiles(Tensors):
    """Tensors of one or more files; where a key stands in several, the last file has it."""

    def __init__(self, where: Path, paths: Iterable[Path]) -> None:
        self.where = where
        self._files: dict[str, TensorReader] = {}
        for file in map(open_tensors, paths):
            self._files |= dict.fromkeys(file.keys(), file)

    def keys(self) -> Collection[str]:
        """Published keys of all files."""
        return self._files.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """As the file tells it."""
        return self._files[key].shape(key)

    def __getitem__(self, key: str) -> Tensor:
        """Tensor as stored."""
        return self._files[key].read(key)


class TensorFile(TensorFiles):
    """Tensors of one file: safetensors, or a pickled state dict."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, [path])


class TensorFolder(TensorFiles):
    """Tensors of a folder in the published layout."""

    def __init__(self, folder: Path, pickles: bool = False) -> None:
        """Open the weight files of `folder`.

        Args:
            folder: holds one file, shards with their index, or the fp16 copy when there is nothing else.
            pickles: take `pytorch_model.bin`, whole or in shards, where there are no safetensors.

        Raises:
            InputRefusedError: there are none, or they are damaged.
        """
        super().__init__(folder, _weight_files(folder, pickles))


def _weight_files(folder: Path, pickles: bool) -> list[Path]:
    """Weight files of a part: one file, shards by their index, or the fp16 copy when there is nothing else."""
    whole = [f"{stem}.safetensors" for stem in STEMS] + ([PICKLE_NAME] if pickles else [])
    for name in whole:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
        for found in (folder / name, folder / name.replace(".safetensors", ".fp16.safetensors")):
            if found.is_file():
                return [found]
    raise InputRefusedError(str(folder), [f"no {' or '.join(whole)} in it"])


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputRefusedError(str(index), ["it has no weight_map of file names"])
    names = sorted(set(weight_map.values()))
    kind = Path(index.name.removesuffix(".index.json")).suffix
    faults = [f"shard {name!r} is not a plain file name" for name in names if not _is_plain(name)]
    faults += [f"shard {name} is no {kind} file" for name in names if not faults and not name.endswith(kind)]
    faults += [f"shard {name} is missing" for name in names if not faults and not (index.parent / name).is_file()]
    if faults:
        raise InputRefusedError(str(index), faults)
    return [index.parent / name for name in names]


def _is_plain(name: str) -> bool:
    """Whether this names a file of the same folder, on every system."""
    return not set(name) & set("/\\:\0") and name not in ("", ".", "..")


def empty(kind: type[M], config: object, dtype: torch.dtype = torch.float32) -> M:
    """Module with unset weights: gigabytes of address space, no memory until something is written."""
    with torch.device("meta"):
        module = kind(config)
    return module.to(dtype).to_empty(device="cpu").eval()
