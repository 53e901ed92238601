"""KB-sized bundles written by hand: no onnx, no onnxruntime, and not by the writer under test."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def wire(number: int, value: int | str | bytes) -> bytes:
    """One protobuf field: a varint, or something with a length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def external_tensor(**entries: str) -> bytes:
    """A TensorProto that lies outside of the model, at the place these entries name."""
    pairs = b"".join(wire(13, wire(1, key) + wire(2, value)) for key, value in entries.items())
    return wire(8, "weight") + pairs + wire(14, 1)


def model(*initializers: bytes, nodes: bytes = b"") -> bytes:
    """A ModelProto with these TensorProtos."""
    graph = wire(2, "graph") + nodes + b"".join(wire(5, tensor) for tensor in initializers)
    return wire(1, 10) + wire(7, graph)


FILES: dict[str, bytes] = {
    "decoder.onnx": model(external_tensor(location="decoder.onnx.data", offset="4", length="12")),
    "decoder.onnx.data": bytes(range(16)),
    "text_encoder.onnx": model(),
    "tokenizer.json": b"{}",
}

MANIFEST: dict[str, Any] = {
    "format_version": 1,
    "name": "toy",
    "family": "meissonic",
    "family_revision": 1,
    "task": "text-to-image",
    "components": {
        "text_encoder": {
            "file": "text_encoder.onnx",
            "external_data": [],
            "inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["batch", 77]}],
            "outputs": [{"name": "hidden_states", "dtype": "float32", "shape": ["batch", 77, 8]}],
            "precision": "fp32",
            "quantization": None,
            "num_parameters": 12,
        },
        "decoder": {
            "file": "decoder.onnx",
            "external_data": ["decoder.onnx.data"],
            "inputs": [{"name": "tokens", "dtype": "int64", "shape": ["batch", "height", "width"]}],
            "outputs": [{"name": "image", "dtype": "float32", "shape": ["batch", 3, "rows", "columns"]}],
            "precision": "int4",
            "quantization": {"method": "rtn", "bits": 4, "block_size": 32},
            "num_parameters": 3456789,
        },
    },
    "tokenizer": "tokenizer.json",
    "scheduler": {"masking_schedule": "cosine", "mask_token_id": 31},
    "defaults": {"num_inference_steps": 4, "guidance_scale": 2.0},
    "source": {"checkpoint": "tests/toy", "revision": "0000000", "licence": "Apache-2.0"},
    "scorecard": {
        "components": {"decoder": {"snr_db": 31.5, "cosine": 0.9996}, "text_encoder": {"snr_db": None}},
        "pipeline": {"token_agreement": 0.987, "psnr_db": 34.25},
        "settings": {"prompts": 16, "seed": 0},
    },
    "files": [],
}


def toy_manifest(files: Mapping[str, bytes] = FILES, **changes: Any) -> dict[str, Any]:
    """The manifest of a toy bundle with these files, with other values for some of its keys."""
    values = copy.deepcopy(MANIFEST)
    values["files"] = [
        {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for path, data in files.items()
    ]
    values.update(changes)
    return values


def write_files(folder: Path, files: Mapping[str, bytes] = FILES) -> Path:
    """The folder, filled with these files."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def write_bundle(folder: Path, files: Mapping[str, bytes] = FILES, **changes: Any) -> Path:
    """The folder, holding a bundle of these files whose manifest has these other values."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(toy_manifest(files, **changes), ensure_ascii=False)
    write_files(folder, files).joinpath("bundle.json").write_text(text, encoding="utf-8")
    return folder
