"""Quantizing takes every tokenizer along."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

from pochade.bundle import Bundle
from pochade.quant.bundle import quantize_bundle
from pochade.quant.scheme import SCHEMES


def test_all_tokenizers_are_copied_to_where_they_were(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(small_bundles["monetico-tiny"], tmp_path / "source")
    data = (source / "tokenizer.json").read_bytes()
    (source / "second").mkdir()
    (source / "second" / "tokenizer.json").write_bytes(data + b"\n")
    manifest = json.loads((source / "bundle.json").read_text("utf-8"))
    digest = hashlib.sha256(data + b"\n").hexdigest()
    manifest["files"].append({"path": "second/tokenizer.json", "size": len(data) + 1, "sha256": digest})
    manifest["more_tokenizers"] = {"condition": "second/tokenizer.json"}
    (source / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    bundle = quantize_bundle(source, tmp_path / "int8", replace(SCHEMES["int8"], rounding="rtn"))
    assert Bundle.open_verified(bundle.path).more_tokenizer_paths == {
        "condition": bundle.path / "second" / "tokenizer.json"
    }
    assert (bundle.path / "second" / "tokenizer.json").read_bytes() == data + b"\n"
    assert (bundle.path / "tokenizer.json").read_bytes() == data
