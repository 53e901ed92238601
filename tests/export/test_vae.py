"""The autoencoder of continuous latents against the reference library's, as a module and as exported graphs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from diffusers import AutoencoderKL as Reference
from numpy.typing import NDArray

from pochade.benchmarks.random_hunyuandit import CONFIGS
from pochade.export.modules.vae import AutoencoderKL, VaeConfig
from pochade.export.trace import save
from pochade.export.vae_graphs import build_vae_decoder, build_vae_encoder
from pochade.quant.component import quantize_component
from pochade.quant.scheme import SCHEMES

TOLERANCE = 5e-5
LEVELS = {"3": (32, 32, 64), "4": (32, 64, 64, 96)}
PUBLISHED = CONFIGS["vae"]
Array = NDArray[np.float32]


def values(levels: str) -> dict[str, Any]:
    """The published config with other widths."""
    widths = LEVELS[levels]
    kinds = {f"{way.lower()}_block_types": (kind,) * len(widths) for way, kind in BLOCKS.items()}
    return {**PUBLISHED, **kinds, "block_out_channels": widths}


BLOCKS = {"Down": "DownEncoderBlock2D", "Up": "UpDecoderBlock2D"}


def reference(levels: str) -> Any:
    """Random weights, norms and biases included; attention that does not average over everything."""
    torch.manual_seed(0)
    model: Any = Reference(**values(levels))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.copy_(float("norm" in name and name.endswith("weight")) + 0.1 * torch.randn(value.shape))
            if name.endswith(("to_q.weight", "to_k.weight")):
                value.mul_(4)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=LEVELS)
def levels(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(levels: str) -> Any:
    return reference(levels)


@pytest.fixture(scope="module")
def graphs(levels: str, model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both graphs by what they do."""
    folder, config, weights = tmp_path_factory.mktemp("vae"), VaeConfig.from_dict(values(levels)), model.state_dict()
    paths = {name: folder / f"vae_{name}.onnx" for name in ("decoder", "encoder")}
    save(build_vae_decoder(config, weights.__getitem__), paths["decoder"])
    save(build_vae_encoder(config, weights.__getitem__), paths["encoder"])
    return paths


@cache
def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(path: Path, strips: int, **inputs: NDArray[Any]) -> list[Array]:
    outputs: list[Array] = session(path).run(None, {**inputs, "strips": np.array([strips])})
    return outputs


def latents(rows: int, columns: int) -> Array:
    return np.random.default_rng(0).standard_normal((1, 4, rows, columns), dtype=np.float32)


def decoded(model: Any, latent: Array) -> Array:
    """In [0, 1], not clipped, as the published pipeline decodes."""
    image: Array = (model.decode(torch.tensor(latent) / PUBLISHED["scaling_factor"]).sample / 2 + 0.5).numpy()
    return image


def divisors(number: int) -> list[int]:
    return [count for count in range(1, number + 1) if number % count == 0]


def test_module_equals_the_reference(levels: str, model: Any) -> None:
    module = AutoencoderKL(VaeConfig.from_dict(values(levels)))
    module.load_state_dict(model.state_dict())
    latent = torch.tensor(latents(6, 5))
    with torch.no_grad():
        image = module.decode(latent)
        expected = model.decode(latent / PUBLISHED["scaling_factor"]).sample
        torch.testing.assert_close(image, expected, rtol=0, atol=TOLERANCE)
        mean, log_variance = module.encode(expected)
        posterior = model.encode(expected).latent_dist
    torch.testing.assert_close(mean, PUBLISHED["scaling_factor"] * posterior.mean, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(log_variance, posterior.logvar, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (6, 10), (5, 3), (1, 4)])
def test_decoder_has_no_seams(graphs: dict[str, Path], model: Any, rows: int, columns: int) -> None:
    latent = latents(rows, columns)
    expected = decoded(model, latent)
    for strips in divisors(rows):
        for recompute in (False, True):
            (image,) = run(graphs["decoder"], strips, latent=latent, recompute=np.array(recompute))
            np.testing.assert_allclose(image, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (6, 10), (5, 3)])
def test_encoder_gives_the_posterior(graphs: dict[str, Path], model: Any, rows: int, columns: int) -> None:
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    image = np.random.default_rng(1).random((1, 3, rows * factor, columns * factor), dtype=np.float32)
    posterior = model.encode(2 * torch.tensor(image) - 1).latent_dist
    for strips in divisors(rows):
        latent, log_variance = run(graphs["encoder"], strips, image=image)
        scaled = PUBLISHED["scaling_factor"] * posterior.mean.numpy()
        np.testing.assert_allclose(latent, scaled, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(log_variance, posterior.logvar.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("rows", "columns", "chunks"), [(6, 4, 3), (5, 3, 5)])
def test_scores_are_never_whole(graphs: dict[str, Path], tmp_path: Path, rows: int, columns: int, chunks: int) -> None:
    """Even in one strip, queries meet the keys two rows of cells at a time, or one row."""
    model = ir.load(graphs["decoder"])
    (softmax,) = [node for node in model.graph.all_nodes() if node.op_type == "Softmax"]
    scans = [node for node in model.graph if node.op_type == "Scan"]
    (queries,) = [node.inputs[0] for node in scans if node.attributes["body"].as_graph() is softmax.graph]
    assert queries is not None
    queries.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(queries)
    ir.save(model, tmp_path / "queries.onnx", external_data="queries.onnx.data")
    found = run(tmp_path / "queries.onnx", 1, latent=latents(rows, columns), recompute=np.array(False))[1]
    assert found.shape[:2] == (chunks, rows * columns // chunks)


@pytest.mark.parametrize(("scheme", "limit"), [("int8", 0.004), ("int4", 0.03)])
def test_quantized_decoder_stays_close(
    graphs: dict[str, Path], model: Any, tmp_path: Path, scheme: str, limit: float
) -> None:
    """Weights of codecs have 16 or 8 bits in these schemes, layers are kept in float16."""
    latent = latents(6, 4)
    expected = decoded(model, latent)
    report = quantize_component(graphs["decoder"], tmp_path / "small.onnx", "vae_decoder", SCHEMES[scheme])
    assert report.half_layers > 20
    assert report.bytes_after < (0.6 if scheme == "int8" else 0.4) * report.bytes_before
    for strips in (1, 3):
        for recompute in (False, True):
            (image,) = run(tmp_path / "small.onnx", strips, latent=latent, recompute=np.array(recompute))
            error = np.linalg.norm(image - expected) / np.linalg.norm(expected)
            assert 0 < error < limit


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_encoder_stays_close(graphs: dict[str, Path], model: Any, tmp_path: Path, scheme: str) -> None:
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    image = np.random.default_rng(1).random((1, 3, 6 * factor, 4 * factor), dtype=np.float32)
    expected, _ = run(graphs["encoder"], 1, image=image)
    quantize_component(graphs["encoder"], tmp_path / "small.onnx", "vae_encoder", SCHEMES[scheme])
    found, _ = run(tmp_path / "small.onnx", 2, image=image)
    assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.05


@pytest.mark.parametrize(
    ("name", "value"), [("act_fn", "relu"), ("mid_block_add_attention", False), ("shift_factor", 0.1)]
)
def test_other_layouts_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        VaeConfig.from_dict({**values("3"), name: value})
