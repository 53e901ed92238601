"""Opening and verifying: one test per refusal of docs/bundle-format.md that needs a folder."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import pytest

from pochade.bundle import Bundle
from pochade.errors import BundleInvalidError, BundleNotFoundError
from pochade.manifest import MAX_MANIFEST_BYTES
from tests.bundles import FILES, MANIFEST, external_tensor, model, wire, write_bundle, write_files


def faults_of(folder: Path, verify: bool = False) -> tuple[str, ...]:
    with pytest.raises(BundleInvalidError) as caught:
        Bundle.open_verified(folder) if verify else Bundle.open(folder)
    assert caught.value.exit_code == 3
    return caught.value.faults


def fault_of(folder: Path, verify: bool = False) -> str:
    (fault,) = faults_of(folder, verify)
    return fault


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "toy")


# Opening what is sound


def test_opens_and_tells_what_it_holds(toy: Path) -> None:
    bundle = Bundle.open(toy)
    assert bundle.component_path("decoder") == toy.resolve() / "decoder.onnx"
    assert bundle.tokenizer_path == toy.resolve() / "tokenizer.json"
    assert bundle.size == sum(map(len, FILES.values()))
    assert bundle.component_size("decoder") == len(FILES["decoder.onnx"]) + 16
    decoder = bundle.manifest.components["decoder"]
    assert decoder.inputs[0].shape == ("batch", "height", "width")
    assert decoder.quantization == {"method": "rtn", "bits": 4, "block_size": 32}


def test_a_string_names_a_folder_as_well_as_a_path(toy: Path) -> None:
    assert Bundle.open(str(toy)) == Bundle.open(toy)


def test_verify_reports_its_progress_in_bytes(toy: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    Bundle.open(toy).verify(lambda *step: steps.append(step))
    total = sum(map(len, FILES.values()))
    assert [path for path, _, _ in steps] == list(FILES)
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    assert steps[-1][1:] == (total, total)


def test_what_progress_raises_ends_the_verification(toy: Path) -> None:
    def cancel(*_step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Bundle.open(toy).verify(cancel)


def test_a_component_that_is_not_there_is_named_with_those_that_are(toy: Path) -> None:
    with pytest.raises(BundleInvalidError, match="no component 'unet', only decoder, text_encoder"):
        Bundle.open(toy).component_path("unet")


def test_chinese_folder_and_file_names(tmp_path: Path) -> None:
    files = {**FILES, "说明/许可证.txt": "署名".encode()}
    folder = write_bundle(tmp_path / "红狐 模型", files, name="红狐")
    assert Bundle.open_verified(folder).manifest.name == "红狐"


def test_components_may_lie_in_folders_of_their_own(tmp_path: Path) -> None:
    files = {f"parts/{path}": data for path, data in FILES.items()}
    components = copy.deepcopy(MANIFEST["components"])
    for component in components.values():
        component["file"] = f"parts/{component['file']}"
        component["external_data"] = [f"parts/{path}" for path in component["external_data"]]
    folder = write_bundle(tmp_path / "toy", files, components=components, tokenizer="parts/tokenizer.json")
    assert Bundle.open_verified(folder).component_path("decoder").is_file()


def test_a_family_without_text_has_no_tokenizer(tmp_path: Path) -> None:
    assert Bundle.open(write_bundle(tmp_path / "toy", tokenizer=None)).tokenizer_path is None


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    assert Bundle.open(write_bundle(tmp_path / "toy", colour="red")) == Bundle.open(write_bundle(tmp_path / "toy"))


@pytest.mark.parametrize("name", [".DS_Store", "._decoder.onnx", "Thumbs.db", ".git/config", ".cache/x/y"])
def test_hidden_files_and_litter_are_ignored(toy: Path, name: str) -> None:
    write_files(toy, {name: b"x"})
    Bundle.open_verified(toy)


def test_the_folder_itself_may_be_reached_through_a_link(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(toy)
    assert Bundle.open(tmp_path / "link").path == toy.resolve()


def test_hard_links_are_accepted_because_installers_make_them(toy: Path, tmp_path: Path) -> None:
    os.link(toy / "decoder.onnx.data", tmp_path / "cache")
    Bundle.open_verified(toy)


def test_digest_knows_content_and_not_name(tmp_path: Path) -> None:
    toy = Bundle.open(write_bundle(tmp_path / "toy"))
    renamed = Bundle.open(write_bundle(tmp_path / "other", name="other", scorecard=None, defaults={}))
    assert toy.digest == renamed.digest
    changed = Bundle.open(write_bundle(tmp_path / "changed", {**FILES, "tokenizer.json": b"[]"}))
    rescheduled = Bundle.open(write_bundle(tmp_path / "rescheduled", scheduler={}))
    assert len({toy.digest, changed.digest, rescheduled.digest}) == 3
    assert len(toy.digest) == 64


# Nothing there


def test_a_missing_folder_is_not_found_and_neighbours_are_named(toy: Path) -> None:
    with pytest.raises(BundleNotFoundError, match=r"does not exist; bundles nearby: .*toy"):
        Bundle.open(toy.parent / "tyo")


def test_a_folder_without_manifest_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError, match=r"has no bundle\.json; `pochade models`"):
        Bundle.open(tmp_path)


def test_a_file_is_no_bundle(toy: Path) -> None:
    with pytest.raises(BundleNotFoundError, match=r"is a file: give the folder that holds bundle\.json"):
        Bundle.open(toy / "bundle.json")


def test_unfinished_folders_are_not_suggested(toy: Path) -> None:
    toy.rename(toy.parent / ".toy.0.partial")
    with pytest.raises(BundleNotFoundError, match="pochade models"):
        Bundle.open(toy)


# Files that are not as declared


def test_a_missing_file_is_refused(toy: Path) -> None:
    (toy / "tokenizer.json").unlink()
    assert fault_of(toy) == "'tokenizer.json' is missing"


def test_an_undeclared_file_is_refused(toy: Path) -> None:
    write_files(toy, {"more/weights.bin": b"x"})
    assert fault_of(toy) == "'more/weights.bin' is not declared in bundle.json"


def test_another_size_is_refused(toy: Path) -> None:
    (toy / "decoder.onnx.data").write_bytes(bytes(17))
    assert fault_of(toy) == "'decoder.onnx.data' has 17 bytes instead of 16"


def test_other_content_is_refused_by_verify_and_not_looked_at_by_open(toy: Path) -> None:
    (toy / "decoder.onnx.data").write_bytes(bytes(16))
    Bundle.open(toy)
    assert fault_of(toy, verify=True).startswith("'decoder.onnx.data' is damaged or was changed")


def test_all_faults_come_together(toy: Path) -> None:
    (toy / "decoder.onnx.data").write_bytes(bytes(16))
    (toy / "tokenizer.json").unlink()
    write_files(toy, {"extra.txt": b"x"})
    assert len(faults_of(toy)) == 2
    assert len(faults_of(toy, verify=True)) == 3


def test_a_link_to_a_file_is_refused(toy: Path, tmp_path: Path) -> None:
    shutil.move(toy / "tokenizer.json", tmp_path / "elsewhere.json")
    (toy / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    assert any("'tokenizer.json' is a link" in fault for fault in faults_of(toy))


def test_a_link_to_a_folder_is_refused_and_not_followed(toy: Path, tmp_path: Path) -> None:
    (toy / "loop").symlink_to(tmp_path)
    assert fault_of(toy).startswith("'loop' is a link")


def test_a_linked_manifest_is_refused(toy: Path, tmp_path: Path) -> None:
    shutil.move(toy / "bundle.json", tmp_path / "bundle.json")
    (toy / "bundle.json").symlink_to(tmp_path / "bundle.json")
    assert fault_of(toy).startswith("bundle.json is a link")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["tokenizer.json", "bundle.json"])
def test_a_pipe_is_refused_and_not_opened(toy: Path, name: str) -> None:
    (toy / name).unlink()
    os.mkfifo(toy / name)
    assert any("is not a regular file" in fault for fault in faults_of(toy))


# A manifest that cannot be read


def test_a_newer_format_is_refused_with_both_numbers_and_nothing_else(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "toy", format_version=7, components="who knows")
    assert fault_of(folder) == "its format version is 7 and this pochade reads up to 1: upgrade pochade"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[]", "must hold an object, not a list"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "1e999 is too large a number"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"a": "\\ud800"}', "no Unicode"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "is no JSON"),
        ("\ufeff{}", "is no JSON"),
    ],
)
def test_a_manifest_that_is_no_strict_json(toy: Path, text: str, reason: str) -> None:
    (toy / "bundle.json").write_text(text, encoding="utf-8")
    assert reason in fault_of(toy)


def test_a_manifest_that_is_not_utf8(toy: Path) -> None:
    (toy / "bundle.json").write_bytes('{"name": "é"}'.encode("latin-1"))
    assert fault_of(toy) == "bundle.json is not UTF-8"


def test_a_manifest_that_is_too_large(toy: Path) -> None:
    (toy / "bundle.json").write_bytes(b" " * (MAX_MANIFEST_BYTES + 1))
    assert fault_of(toy) == "bundle.json is larger than 4194304 bytes"


# External data of the graphs


def with_decoder(folder: Path, graph: bytes, data: bytes = bytes(16)) -> Path:
    return write_bundle(folder, {**FILES, "decoder.onnx": graph, "decoder.onnx.data": data})


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("/etc/shadow", "which is absolute"),
        ("../outside.data", "may leave the bundle"),
        ("..\\outside.data", "backslash"),
        ("*/_ORT_MEM_ADDR_/*", "cannot hold"),
        ("tokenizer.json", "which its component does not declare"),
        ("absent.data", "which its component does not declare"),
    ],
)
def test_external_data_outside_of_what_is_declared(tmp_path: Path, location: str, reason: str) -> None:
    declared = external_tensor(location="decoder.onnx.data")
    folder = with_decoder(tmp_path / "toy", model(declared, external_tensor(location=location)))
    assert reason in fault_of(folder)


def test_external_data_beyond_the_end_of_its_file(tmp_path: Path) -> None:
    graph = model(external_tensor(location="decoder.onnx.data", offset="8", length="9"))
    folder = with_decoder(tmp_path / "toy", graph)
    assert fault_of(folder) == "'decoder.onnx' reads tensors up to byte 17 of 'decoder.onnx.data', which has 16"


def test_declared_data_that_no_tensor_lies_in(tmp_path: Path) -> None:
    assert "reads nothing from 'decoder.onnx.data'" in fault_of(with_decoder(tmp_path / "toy", model()))


def test_a_graph_compiled_for_one_device(tmp_path: Path) -> None:
    node = wire(1, wire(4, "EPContext"))
    graph = model(external_tensor(location="decoder.onnx.data"), nodes=node)
    assert "has the operator EPContext" in fault_of(with_decoder(tmp_path / "toy", graph))


@pytest.mark.parametrize("graph", [b"", b"\x00", b"not a model at all", model()[:-1], b"\x3a\xff\xff\xff\xff\x0f"])
def test_a_graph_that_is_no_model(tmp_path: Path, graph: bytes) -> None:
    assert "is no readable ONNX model: it " in fault_of(with_decoder(tmp_path / "toy", graph))
