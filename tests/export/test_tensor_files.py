"""Weight files beside safetensors: what is read of a pickle, and one test per refusal."""

from __future__ import annotations

import json
import logging
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pochade.errors import InputRefusedError
from pochade.export.checkpoint import TensorFile, TensorFolder

STATE = OrderedDict(
    {
        "bert.weight": torch.arange(6.0).reshape(2, 3),
        "bert.bias": torch.arange(2.0).half(),
        "visual.proj": torch.arange(4, dtype=torch.int64),
    }
)


def same(tensors: TensorFile | TensorFolder, expected: dict[str, Tensor]) -> bool:
    return set(tensors.keys()) == set(expected) and all(torch.equal(tensors[k], v) for k, v in expected.items())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_flat_pickle_gives_its_tensors_and_says_what_it_is(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(STATE, tmp_path / name)
    with caplog.at_level(logging.WARNING):
        tensors = TensorFile(tmp_path / name)
    assert same(tensors, STATE)
    assert f"{name} is a pickle" in caplog.text


@pytest.mark.parametrize("zipped", [True, False])
def test_deepspeed_state_is_unwrapped_once_and_its_average_comes_first(tmp_path: Path, zipped: bool) -> None:
    state = {"step": 7, "module": {"w": torch.zeros(1)}, "ema": {"w": torch.ones(1), "module": torch.ones(2)}}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert same(TensorFile(tmp_path / "a.pt"), {"w": torch.ones(1), "module": torch.ones(2)})
    del state["ema"]
    torch.save(state, tmp_path / "b.pt", _use_new_zipfile_serialization=zipped)
    assert same(TensorFile(tmp_path / "b.pt"), {"w": torch.zeros(1)})


def test_what_is_no_ordinary_tensor_is_passed_over(tmp_path: Path) -> None:
    state = {"w": torch.ones(1), "epoch": 3, 5: torch.ones(1), "s": torch.ones(2).to_sparse(), "none": None}
    torch.save(state, tmp_path / "a.pt")
    assert same(TensorFile(tmp_path / "a.pt"), {"w": torch.ones(1)})


def test_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    torch.save({"w": torch.full((64,), 3.5)}, tmp_path / "a.pt")
    tensors = TensorFile(tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    at = data.index(torch.full((64,), 3.5).numpy().tobytes())
    with (tmp_path / "a.pt").open("r+b") as file:
        file.seek(at)
        file.write(torch.ones(64).numpy().tobytes())
    # Pages of a private map that nobody touched show what is in the file now.
    assert torch.equal(tensors["w"], torch.ones(64))


class Payload:
    """Would make a file if it were run."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.target), "w")


def attack(path: Path) -> None:
    torch.save({"w": torch.ones(1), "x": Payload(path.with_name("touched"))}, path)


def attack_plain(path: Path) -> None:
    path.write_bytes(pickle.dumps({"w": Payload(path.with_name("touched"))}))


def cut(path: Path) -> None:
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-200])


def junk(path: Path) -> None:
    path.write_bytes(b"\x80\x02junk" * 9)


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def a_list(path: Path) -> None:
    torch.save([torch.ones(1)], path)


@pytest.mark.parametrize("damage", [attack, attack_plain, cut, junk, nothing, a_list])
def test_other_files_are_refused_and_nothing_is_run(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damage(tmp_path / "a.pt")
    reason = "no tensors by name" if damage is a_list else "no intact file of tensors alone"
    with pytest.raises(InputRefusedError, match=reason):
        TensorFile(tmp_path / "a.pt")
    assert not (tmp_path / "touched").exists()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputRefusedError, match=r"model\.pt is refused: the file is missing"):
        TensorFile(tmp_path / "model.pt")


def test_folder_takes_a_pickle_only_when_told_and_only_without_safetensors(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputRefusedError, match=r"no diffusion_pytorch_model\.safetensors or model\.safetensors in it"):
        TensorFolder(tmp_path)
    assert same(TensorFolder(tmp_path, pickles=True), STATE)
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert same(TensorFolder(tmp_path, pickles=True), {"w": torch.ones(1)})


def test_pickled_shards(tmp_path: Path) -> None:
    names = {key: f"pytorch_model-{i:05}-of-00003.bin" for i, key in enumerate(STATE)}
    for key, name in names.items():
        torch.save({key: STATE[key].clone()}, tmp_path / name)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert same(TensorFolder(tmp_path, pickles=True), STATE)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../a.safetensors", "not a plain file name"),
        ("/etc/a.safetensors", "not a plain file name"),
        ("..\\a.safetensors", "not a plain file name"),
        ("C:a.safetensors", "not a plain file name"),
        ("a\0.safetensors", "not a plain file name"),
        ("..", "not a plain file name"),
        ("", "not a plain file name"),
        ("sub/a.safetensors", "not a plain file name"),
        ("a.bin", "no .safetensors file"),
        ("b.safetensors", "is missing"),
    ],
)
def test_index_reaches_no_other_file(tmp_path: Path, name: str, reason: str) -> None:
    """A safetensors index may not lead to a pickle either."""
    torch.save(STATE, tmp_path / "a.bin")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(InputRefusedError, match=reason):
        TensorFolder(tmp_path)


def test_tensors_below_a_prefix_are_compared_by_what_is_left(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    part = TensorFile(tmp_path / "a.pt").below("bert.")
    module = nn.Linear(3, 2)
    part.load_into(module)
    assert torch.equal(module.weight, STATE["bert.weight"]) and module.bias.dtype == torch.float32
    with pytest.raises(InputRefusedError, match=r"weight has shape \[2, 3\], expected \[2, 4\]"):
        part.check(nn.Linear(4, 2))
