"""What bundle.json must say: one test per refusal of docs/bundle-format.md that needs no folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pochade.errors import BundleInvalidError
from pochade.manifest import Manifest
from tests.bundles import MANIFEST, toy_manifest


def manifest_faults(change: Callable[[dict[str, Any]], object]) -> str:
    values = toy_manifest()
    change(values)
    with pytest.raises(BundleInvalidError) as caught:
        Manifest.from_json(json.dumps(values), "toy")
    return "; ".join(caught.value.faults)


def test_a_manifest_survives_the_round_trip() -> None:
    manifest = Manifest.from_json(json.dumps(toy_manifest()), "toy")
    assert Manifest.from_json(manifest.to_json(), "toy") == manifest
    assert json.loads(manifest.to_json()) == toy_manifest()


def test_an_input_that_may_be_left_out_comes_back() -> None:
    values = toy_manifest()
    values["components"]["decoder"]["inputs"].append(
        {"name": "controls", "dtype": "float32", "shape": ["control_batch"], "optional": True}
    )
    manifest = Manifest.from_json(json.dumps(values), "toy")
    assert [spec.optional for spec in manifest.components["decoder"].inputs] == [False, True]
    assert json.loads(manifest.to_json()) == values


def test_the_example_of_the_document_is_a_manifest() -> None:
    page = Path(__file__).parent.parent.joinpath("docs", "bundle-format.md").read_text(encoding="utf-8")
    example = page.split("```json\n", 1)[1].split("```", 1)[0]
    manifest = Manifest.from_json(example, "the example")
    assert set(json.loads(example)) == set(toy_manifest())
    assert hashlib.sha256(b"{}\n").hexdigest() == manifest.files[-1].sha256


# Paths


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/etc/passwd", "is absolute"),
        ("C:/Windows/x.onnx", "is absolute"),
        ("c:x.onnx", "is absolute"),
        ("../x.onnx", "may leave the bundle"),
        ("a/../../x.onnx", "may leave the bundle"),
        ("a\\x.onnx", "backslash"),
        ("\\\\server\\share\\x.onnx", "backslash"),
        ("./x.onnx", "shortest form"),
        ("a//x.onnx", "shortest form"),
        ("", "shortest form"),
        ("a/", "shortest form"),
        (".git/x.onnx", "readers ignore"),
        ("desktop.ini", "readers ignore"),
        ("nul", "some system cannot hold"),
        ("COM1.onnx", "some system cannot hold"),
        ("a./x.onnx", "some system cannot hold"),
        ("x.onnx:stream", "some system cannot hold"),
        ("x\n.onnx", "some system cannot hold"),
        ("e\u0301.onnx", "composed form"),
    ],
)
def test_a_path_that_may_not_stand_in_a_bundle(path: str, reason: str) -> None:
    entry = {"path": path, "size": 0, "sha256": "0" * 64}
    assert reason in manifest_faults(lambda values: values["files"].append(entry))
    assert reason in manifest_faults(lambda values: values["components"]["decoder"].update(file=path))
    assert reason in manifest_faults(lambda values: values["components"]["decoder"].update(external_data=[path]))
    assert reason in manifest_faults(lambda values: values.update(tokenizer=path))


def entry(path: str) -> dict[str, Any]:
    return {"path": path, "size": 0, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (["Tokenizer.json"], "'Tokenizer.json' and 'tokenizer.json' differ only in case"),
        (["a/one", "A/two"], "'A' and 'a' differ only in case"),
        (["tokenizer.json"], "'tokenizer.json' is listed twice"),
        (["tokenizer.json/more"], "'tokenizer.json' is listed as a file and is the folder of another"),
        (["bundle.json"], "'bundle.json' is listed, and cannot hold its own hash"),
        (["Bundle.JSON"], "'Bundle.JSON' is listed, and cannot hold its own hash"),
    ],
)
def test_paths_that_clash(paths: list[str], reason: str) -> None:
    assert reason in manifest_faults(lambda values: values["files"].extend(map(entry, paths)))


@pytest.mark.parametrize("key", [key for key in MANIFEST if key != "format_version"])
def test_every_key_is_needed(key: str) -> None:
    assert f"{key} is missing" in manifest_faults(lambda values: values.pop(key))


@pytest.mark.parametrize("key", list(MANIFEST["components"]["decoder"]))
def test_every_key_of_a_component_is_needed(key: str) -> None:
    expected = f"components.decoder.{key} is missing"
    assert expected in manifest_faults(lambda values: values["components"]["decoder"].pop(key))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("format_version", "1", "format_version must be a whole number, not text"),
        ("format_version", True, "format_version must be a whole number, not true or false"),
        ("format_version", 0, "format_version is 0, less than 1"),
        ("name", 3, "name must be text, not a whole number"),
        ("name", " ", "name is empty or has control characters"),
        ("name", "\x1b[2J", "name is empty or has control characters"),
        ("family_revision", 1.5, "family_revision must be a whole number, not a number"),
        ("components", [], "components must be an object, not a list"),
        ("components", {}, "it has no components"),
        ("components", {"decoder": None}, "components.decoder must be an object, not null"),
        ("scheduler", None, "scheduler must be an object, not null"),
        ("scorecard", "good", "scorecard must be an object, not text"),
        ("files", {}, "files must be a list, not an object"),
        ("files", ["x"], "files[0] must be an object, not text"),
        ("tokenizer", "vocab.json", "tokenizer 'vocab.json' is not listed in files"),
    ],
)
def test_a_value_of_the_wrong_kind(key: str, value: object, reason: str) -> None:
    assert reason in manifest_faults(lambda values: values.update({key: value}))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("inputs", [], "components.decoder.inputs is empty"),
        ("outputs", [], "components.decoder.outputs is empty"),
        ("inputs", [{"name": "x", "dtype": "float32", "shape": [1]}] * 2, "inputs has 'x' twice"),
        ("inputs", [{"name": "x", "dtype": "float128", "shape": [1]}], "inputs[0].dtype 'float128' is none of"),
        ("inputs", [{"name": "x", "dtype": "bool", "shape": [0]}], "inputs[0].shape[0] is neither"),
        ("inputs", [{"name": "x", "dtype": "bool", "shape": [1], "optional": 1}], "inputs[0].optional must be true or"),
        ("outputs", [{"name": "x", "dtype": "bool", "shape": [1], "optional": True}], "'x', which is optional: only"),
        ("inputs", [{"name": "x", "dtype": "bool", "shape": [True]}], "inputs[0].shape[0] is neither"),
        ("inputs", [{"name": "x", "dtype": "bool", "shape": [""]}], "inputs[0].shape[0] is neither"),
        ("external_data", [3], "external_data[0] must be text, not a whole number"),
        ("external_data", ["x.data"], "component decoder: 'x.data' is not listed in files"),
        ("external_data", ["decoder.onnx"], "component decoder: 'decoder.onnx' is named twice"),
        ("file", "x.onnx", "component decoder: 'x.onnx' is not listed in files"),
        ("file", "decoder.ort", "component decoder: 'decoder.ort' does not end in .onnx"),
        ("file", "a/x.onnx", "'decoder.onnx.data' is not below the folder of 'a/x.onnx'"),
        ("precision", None, "components.decoder.precision must be text, not null"),
        ("num_parameters", -1, "components.decoder.num_parameters is -1, less than 0"),
    ],
)
def test_a_component_that_is_not_declared_well(key: str, value: object, reason: str) -> None:
    assert reason in manifest_faults(lambda values: values["components"]["decoder"].update({key: value}))


@pytest.mark.parametrize("name", ["Decoder", "../x", "", "1st", "vq-decoder", "译"])
def test_a_component_name_that_is_none(name: str) -> None:
    def rename(values: dict[str, Any]) -> None:
        values["components"][name] = values["components"].pop("decoder")

    assert f"has the name {name!r}" in manifest_faults(rename)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("size", -1, "size is -1, less than 0"),
        ("size", 1.0, "size must be a whole number, not a number"),
        ("sha256", "A" * 64, "sha256 is not 64 lower-case hexadecimal digits"),
        ("sha256", "0" * 63, "sha256 is not 64 lower-case hexadecimal digits"),
    ],
)
def test_a_file_entry_that_is_none(key: str, value: object, reason: str) -> None:
    assert f"files[0].{reason}" in manifest_faults(lambda values: values["files"][0].update({key: value}))


def test_all_faults_of_a_manifest_come_together() -> None:
    def break_three(values: dict[str, Any]) -> None:
        values.update(name=1, tokenizer="../x", family_revision=0)

    assert manifest_faults(break_three).count(";") == 2


def add_tokenizer(values: dict[str, Any], paths: object) -> None:
    digest = "0" * 64
    values["files"].append({"path": "second.json", "size": 2, "sha256": digest})
    values["more_tokenizers"] = paths


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (None, "more_tokenizers must be an object, not null"),
        ({"decoder": 1}, "more_tokenizers.decoder must be text, not a whole number"),
        ({"decoder": "../second.json"}, "more_tokenizers.decoder '../second.json' has '..' and may leave the bundle"),
        ({"decoder": "third.json"}, "tokenizer 'third.json' is not listed in files"),
        ({"reader": "second.json"}, "more_tokenizers names 'reader', which is no component"),
    ],
)
def test_further_tokenizers_that_are_none(paths: object, reason: str) -> None:
    assert reason in manifest_faults(lambda values: add_tokenizer(values, paths))


def test_further_tokenizers_need_a_first() -> None:
    def change(values: dict[str, Any]) -> None:
        add_tokenizer(values, {"decoder": "second.json"})
        values["tokenizer"] = None

    assert "more_tokenizers stands without a tokenizer" in manifest_faults(change)


def test_further_tokenizers_come_back_and_belong_to_the_digest() -> None:
    values = toy_manifest()
    add_tokenizer(values, {})
    none = Manifest.from_json(json.dumps(values), "toy")
    values["more_tokenizers"] = {"decoder": "second.json"}
    one = Manifest.from_json(json.dumps(values), "toy")
    assert one.more_tokenizers == {"decoder": "second.json"}
    assert one.tokenizer_files == ("tokenizer.json", "second.json")
    assert Manifest.from_json(one.to_json(), "toy") == one
    assert one.digest != none.digest
    # Bundles made before there were any keep their identity.
    assert "more_tokenizers" not in none.to_dict()
    del values["more_tokenizers"]
    assert Manifest.from_json(json.dumps(values), "toy").digest == none.digest
