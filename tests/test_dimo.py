"""DiMO from the folder to the picture: the whole against PyTorch, its random start, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy import stats

import pochade
from pochade.bundle import Bundle
from pochade.cli import main
from pochade.errors import InputRefusedError, OutOfBudgetError, UsageError
from pochade.export.families.dimo import Dimo
from pochade.export.modules.clip_text import ClipTextEncoder
from pochade.export.modules.masked_transformer import MaskedTransformer
from pochade.export.modules.vq import VQModel
from pochade.export.recipes import choose, read_recipes
from pochade.export.sampler import CHUNK, build_one_step_sampler
from pochade.export.trace import save
from pochade.export.write import export_checkpoint
from pochade.quant.fidelity import Recorder
from pochade.runtime.families.dimo import DimoPipeline
from pochade.runtime.families.meissonic_memory import MemoryModel
from pochade.runtime.ort import ort
from pochade.runtime.plan import Workload
from pochade.runtime.rng import PhiloxNoise
from tests.golden import GOLDEN, TOLERANCE, softmax

MEISSONIC = GOLDEN / "meissonic-tiny"
MASK, CODES = 39, 32
SIZE: dict[str, Any] = {"width": 512, "height": 256}
GRID = (8, 16)


def run(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def transformer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as DiMO's is published: config and weights, which are not those of Meissonic's folder."""
    folder = Path(shutil.copytree(MEISSONIC / "transformer", tmp_path_factory.mktemp("dimo") / "meissonic"))
    path = folder / "diffusion_pytorch_model.safetensors"
    torch.manual_seed(0)
    changed = {key: value + 0.05 * torch.randn(value.shape) for key, value in load_file(path).items()}
    save_file(changed, path)
    return folder


@pytest.fixture(scope="module")
def bundle(transformer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bundle") / "dimo"
    export_checkpoint(MEISSONIC, target, recipe="dimo", transformer=transformer_folder)
    return target


@pytest.fixture(scope="module")
def int8(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized with a scorecard, of a bundle that paints small pictures unless told otherwise."""
    folder = tmp_path_factory.mktemp("int8")
    small = Path(shutil.copytree(bundle, folder / "small"))
    manifest = json.loads((small / "bundle.json").read_text("utf-8"))
    manifest["defaults"] |= {"width": 64, "height": 64}
    (small / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    assert run("quantize", small, "-o", folder / "int8", "--scheme", "int8")[0] == 0
    return folder / "int8"


@pytest.fixture
def pipe(bundle: Path) -> Iterator[DimoPipeline]:
    with pochade.load(bundle, device="cpu", threads=1) as pipeline:
        assert isinstance(pipeline, DimoPipeline)
        yield pipeline


# the whole


def start(noise: PhiloxNoise, image: int) -> NDArray[np.int64]:
    """Random codes, and the mask in the 60 % of cells whose number is least."""
    cells = GRID[0] * GRID[1]
    tokens = np.floor(noise.codes(image, cells).astype(np.float64) * CODES).astype(np.int64)
    order = noise.order(image, cells)
    tokens[order < np.sort(order)[round(0.6 * cells)]] = MASK
    return tokens.reshape(1, *GRID)


@torch.no_grad()
def eager(
    folder: Path, prompt: str, tokens: NDArray[np.int64], normal: NDArray[np.float32]
) -> tuple[NDArray[np.float32], VQModel]:
    """Logits (cells, codes) of DiMO as its sampling script computes them, nothing folded, and the codec."""
    checkpoint = Dimo.open(MEISSONIC, transformer=folder)
    text = ClipTextEncoder(checkpoint.text)
    checkpoint.text_weights.load_into(text, ("text_model.embeddings.position_ids",))
    model = MaskedTransformer(checkpoint.transformer)
    checkpoint.transformer_weights.load_into(model)
    codec = VQModel(checkpoint.codec)
    checkpoint.codec_weights.load_into(codec)
    ids = torch.tensor([checkpoint.tokenizer().encode(prompt).ids])
    states, pooled = text(ids)
    cells = model.embed(torch.from_numpy(tokens))
    cells = 0.1 * torch.from_numpy(normal).reshape(cells.shape) + (1 - 0.1**2) ** 0.5 * cells
    micro = torch.tensor([[512.0, 256.0, 0.0, 0.0, 6.0]])
    modulation = model.modulation(model.condition(pooled, micro, torch.zeros(1)))
    height, width = GRID[0] // 2, GRID[1] // 2
    rope = model.rope(states.shape[1], height, width)
    x = model.blocks(model.stem(cells), model.context(states), modulation, rope)
    logits = model.features(x, height, width) @ model.mlm_layer.conv2.weight.flatten(1).T
    return logits[0].numpy(), codec


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_picture_is_that_of_pytorch(pipe: DimoPipeline, transformer_folder: Path, temperature: float) -> None:
    noise, image, cells = PhiloxNoise(5), 1, GRID[0] * GRID[1]
    dim = Dimo.open(MEISSONIC, transformer=transformer_folder).transformer.dim
    tokens, normal = start(noise, image), noise.normal(image, cells, dim)
    logits, codec = eager(transformer_folder, "a red fox", tokens, normal)
    upto = softmax(logits / temperature).cumsum(-1)
    draw = noise.draw(image, 0, cells)
    expected = (upto <= draw[:, None]).sum(-1)
    result = pipe("a red fox", seed=5, num_images_per_prompt=2, temperature=temperature, **SIZE)
    # A draw that falls on a boundary of the distribution may go either way.
    unclear = np.abs(upto - draw[:, None]).min(-1) < TOLERANCE
    assert unclear.mean() < 0.05
    assert ((result.tokens[image].ravel() == expected) | unclear).all()
    with torch.no_grad():
        decoded = codec.decode(torch.from_numpy(result.tokens[image]))[0].permute(1, 2, 0).numpy()
    wanted = np.rint(255 * decoded.clip(0, 1)).astype(int)
    assert np.abs(np.asarray(result.images[image]).astype(int) - wanted).max() <= 1


def test_features_are_those_of_pytorch(pipe: DimoPipeline, transformer_folder: Path) -> None:
    noise, cells = PhiloxNoise(11), GRID[0] * GRID[1]
    checkpoint = Dimo.open(MEISSONIC, transformer=transformer_folder)
    tokens, normal = start(noise, 0), noise.normal(0, cells, checkpoint.transformer.dim)
    logits, _ = eager(transformer_folder, "two cats", tokens, normal)
    recorder = Recorder()
    pipe.observer = recorder
    pipe("two cats", seed=11, **SIZE)
    (call,) = (call for call in recorder.calls if call.component == "transformer")
    assert (call.inputs["tokens"] == tokens).all()
    assert (call.inputs["noise"].ravel() == normal.ravel()).all()
    head = checkpoint.transformer_weights["mlm_layer.conv2.weight"].flatten(1).numpy()
    np.testing.assert_allclose(call.outputs["features"][0] @ head.T, logits, rtol=0, atol=TOLERANCE)


def test_one_forward_and_one_decode(pipe: DimoPipeline) -> None:
    result = pipe("a red fox", seed=1, **SIZE)
    assert {name: len(times.ran) for name, times in result.components.items()} == dict.fromkeys(pipe.components, 1)
    assert result.settings["num_inference_steps"] == 1 and result.settings["temperature"] == 1.0
    assert result.settings["negative_prompt"] is None
    assert result.settings["sampler"] == "one step, 0.6 masked"


# its start


def test_start_masks_exactly_60_percent(pipe: DimoPipeline) -> None:
    # The published size: 2458 of 4096 cells, whatever the seed.
    for seed in range(3):
        tokens = pipe._start(PhiloxNoise(seed), (64, 64), 0)
        assert tokens.shape == (1, 64, 64) and (tokens == MASK).sum() == 2458
        kept = tokens[tokens != MASK]
        assert set(kept) == set(range(CODES))


def test_start_is_uniform_and_its_noise_normal() -> None:
    noise = PhiloxNoise(3)
    values = noise.normal(0, 512, 48).ravel()
    assert values.dtype == np.float32 and stats.kstest(values, "norm").pvalue > 1e-3
    for numbers in (noise.codes(0, 1 << 14), noise.order(0, 1 << 14), noise.draw(0, 0, 1 << 14)):
        assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    # Drawn for different purposes they have nothing to do with each other.
    assert abs(np.corrcoef(noise.codes(0, 1 << 14), noise.order(0, 1 << 14))[0, 1]) < 0.05


def test_a_seed_repeats_a_picture_alone_or_in_a_batch(pipe: DimoPipeline) -> None:
    batch = pipe("a red fox", num_images_per_prompt=2, seed=5, **SIZE)
    alone = pipe("a red fox", seed=6, **SIZE)
    assert (batch.tokens[1] == alone.tokens[0]).all()
    assert (np.asarray(batch.images[1]) == np.asarray(alone.images[0])).all()
    assert (batch.tokens[0] != alone.tokens[0]).any()


def test_noise_of_ones_own_must_have_a_start(pipe: DimoPipeline) -> None:
    class Uniform:
        def draw(self, image: int, step: int, cells: int) -> NDArray[np.float32]:
            return np.zeros(cells, np.float32)

        keep = draw

    with pytest.raises(UsageError, match="noise has no codes, order and normal"):
        pipe("a red fox", noise=Uniform(), **SIZE)


# its sampler


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampler_follows_the_law_of_its_temperature(tmp_path: Path, temperature: float) -> None:
    """Chi-square over 48 codes; more cells than a chunk has, and not a whole number of chunks."""
    path, codes, cells = tmp_path / "sampler.onnx", 48, 40 * CHUNK + 7
    save(build_one_step_sampler(codes, codes, lambda: torch.eye(codes)), path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(8)
    logits = rng.normal(size=codes).astype(np.float32)
    feeds = {
        "features": np.broadcast_to(logits, (1, cells, codes)).copy(),
        "draw_noise": rng.random((1, cells), dtype=np.float32),
        "temperature": np.array([temperature], np.float32),
    }
    (drawn,) = session.run(["codes"], feeds)
    assert drawn.shape == (1, cells)
    counts = np.bincount(drawn.ravel(), minlength=codes)
    assert stats.chisquare(counts, softmax(logits / temperature) * cells).pvalue > 1e-3


# what it refuses


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"num_inference_steps": 4}, "num_inference_steps is 4; DiMO paints in 1 step"),
        ({"num_inference_steps": True}, "num_inference_steps is True"),
        ({"guidance_scale": 9.0}, "guidance_scale is 9.0; DiMO has learned its guidance, leave it out"),
        ({"guidance_scale": 0.0}, "guidance_scale is 0.0"),
        ({"negative_prompt": "blurry"}, "a negative prompt has no effect on DiMO"),
        ({"negative_prompt": ["blurry"]}, "a negative prompt has no effect on DiMO"),
        ({"temperature": (2.0, 0.0)}, "DiMO has one step, give one number"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be a number from 0.01 to 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"height": 100}, "height 100 is not a multiple of"),
    ],
)
def test_values_without_a_meaning_are_refused(pipe: DimoPipeline, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint.replace("(", r"\(")):
        pipe.stream("a red fox", **arguments)


def test_values_that_mean_nothing_else_are_taken(pipe: DimoPipeline) -> None:
    plain = pipe("a red fox", seed=2, **SIZE)
    said = pipe("a red fox", seed=2, num_inference_steps=1, guidance_scale=1, negative_prompt="", temperature=1, **SIZE)
    assert (plain.tokens[0] == said.tokens[0]).all() and dict(plain.settings) == dict(said.settings)


def test_transformer_must_be_named_and_fit(transformer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name its folder with --transformer"):
        Dimo.open(MEISSONIC)
    folder = Path(shutil.copytree(transformer_folder, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"codebook_size": 31}))
    with pytest.raises(InputRefusedError, match="the codec has 32 codes, the transformer takes 31"):
        Dimo.open(MEISSONIC, transformer=folder)
    with pytest.raises(InputRefusedError, match=r"config\.json"):
        Dimo.open(MEISSONIC, transformer=tmp_path / "nowhere")


def test_recipe_is_taken_by_name_only(tmp_path: Path) -> None:
    config = {"_class_name": "Transformer2DModel", "downsample": True, "codebook_size": 8192}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    recipes = read_recipes()
    assert choose(recipes, tmp_path, None).name == "meissonic"
    assert choose(recipes, tmp_path, "dimo").family == "dimo"
    assert recipes["dimo"].licence == "not stated"


# bundles


def test_noise_counts_in_the_plan(bundle: Path, bundles: dict[str, Path]) -> None:
    work = Workload(64, 64, 1, 1, 1)
    with_noise, without = (MemoryModel.of(Bundle.open(path), 16) for path in (bundle, bundles["meissonic-tiny"]))
    assert with_noise is not None and without is not None
    # Both transformers have the same weights, and 48 floats of noise a cell are what is left.
    assert with_noise._loop(work, False) - with_noise._weights("transformer") - 2 * with_noise._weights("sampler") == (
        pytest.approx(
            without._loop(work, False)
            - without._weights("transformer")
            - 2 * without._weights("sampler")
            + 64 * 64 * 48 * 4,
            abs=4,
        )
    )


def test_int8_paints_and_its_picture_is_verified(int8: Path, tmp_path: Path) -> None:
    made = Bundle.open(int8).manifest
    assert made.components["transformer"].precision == "int8"
    assert made.scorecard is not None and made.scorecard["settings"]["num_inference_steps"] == 1
    assert made.scorecard["components"]["transformer"]["snr_db"] > 25
    assert made.scorecard["pipeline"]["forced_agreement"] > 0.8
    picture = tmp_path / "a.png"
    words = ["-m", int8, "-s", "7", "--temperature", "1.2", "-o", picture, "-q"]
    assert run("generate", "a red fox", *words)[0] == 0
    assert run("verify", picture, "-m", int8) == (0, "identical\n", "")


def test_limits_of_memory_are_kept_or_refused(bundle: Path) -> None:
    with pochade.load(bundle, device="cpu") as pipeline:
        free = pipeline("a red fox", seed=1, **SIZE)
    with pochade.load(bundle, device="cpu", ram="4G", tiling="on") as pipeline:
        strips = pipeline("a red fox", seed=1, **SIZE)
        assert pipeline.plan is not None and pipeline.plan.phases["decode"].recompute
    differences = np.asarray(free.images[0]).astype(int) - np.asarray(strips.images[0])
    assert np.abs(differences).max() <= 1
    with (
        pochade.load(bundle, device="cpu", ram="20M") as pipeline,
        pytest.raises(OutOfBudgetError, match="alone takes"),
    ):
        pipeline.stream("a red fox", **SIZE)


def test_info_tells_where_it_comes_from(int8: Path) -> None:
    code, out, _ = run("info", int8)
    assert code == 0 and "Yuanzhi/DiMO" in out and "not stated" in out
    source = json.loads(run("info", int8, "--json")[1])["manifest"]["source"]
    assert source["folder"] == "meissonic-tiny" and source["transformer"] == "meissonic"


def test_quick_bench_takes_the_one_step_there_is(int8: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    code, _, err = run("bench", int8, "--quick", "--rounds", "1", "--threads", "1", "--json", file, "-q")
    assert code == 0, err
    report = json.loads(file.read_text("utf-8"))
    assert report["settings"]["num_inference_steps"] == 1 and report["bundles"][0]["median_seconds"]["step"] > 0


def test_command_line_refuses_in_one_line(int8: Path, tmp_path: Path) -> None:
    code, out, err = run("generate", "a red fox", "-m", int8, "--steps", "8", "-o", tmp_path / "a.png")
    assert (code, out, len(err.splitlines())) == (2, "", 1) and "DiMO paints in 1 step" in err
    code, out, err = run("export", MEISSONIC, "-o", tmp_path / "bundle", "--recipe", "dimo")
    assert (code, out, len(err.splitlines())) == (2, "", 1) and "--transformer" in err
    assert not (tmp_path / "bundle").exists()


def test_int4_by_calibration_paints(bundle: Path, tmp_path: Path) -> None:
    small = Path(shutil.copytree(bundle, tmp_path / "small"))
    manifest = json.loads((small / "bundle.json").read_text("utf-8"))
    manifest["defaults"] |= {"width": 64, "height": 64}
    (small / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    words = ["-o", tmp_path / "int4", "--scheme", "int4", "--block-size", "32"]
    assert run("quantize", small, *words)[0] == 0
    with pochade.load(tmp_path / "int4", device="cpu") as pipeline:
        assert (pipeline("a red fox", seed=1).tokens[0] < CODES).all()
