"""`pochade export`, `quantize` and `models`: from a checkpoint folder to a small bundle, and what stops the way."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pochade.bundle import Bundle
from pochade.cli import main
from tests.bundles import write_bundle
from tests.golden import GOLDEN

CHECKPOINT = GOLDEN / "monetico-tiny"
WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")


def run(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def refused(code: int, *words: object) -> str:
    """The one line on stderr that a refusal gives as its reason."""
    found, out, err = run(*words)
    assert (found, out) == (code, ""), err
    assert err.startswith("pochade: ") and len(err.splitlines()) == 1, err
    return err


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The only export here, straight to int8 with one weight kept in half precision."""
    target = tmp_path_factory.mktemp("工作") / "deeper" / "小画"
    words = ["--recipe", "monetico", "--scheme", "int8", "--keep", r"^text_encoder/.*embed=16"]
    assert run("export", CHECKPOINT, "-o", target, *words) == (0, f"{target}\n", "")
    return target


@pytest.fixture(scope="module")
def int4(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("int4") / "int4"
    words = ["-o", target, "--scheme", "int4", "--block-size", "32"]
    assert run("quantize", bundles["monetico-tiny"], *words) == (0, f"{target}\n", "")
    return target


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "检查点"))


# what they make


def test_export_to_int8_leaves_one_folder(int8: Path) -> None:
    assert [path.name for path in int8.parent.iterdir()] == ["小画"]
    assert run("verify", int8)[0] == 0
    bundle = Bundle.open(int8)
    assert bundle.manifest.name == "小画"
    assert bundle.manifest.components["transformer"].precision == "int8"
    assert bundle.manifest.source["recipe"] == "monetico"


def test_kept_weights_are_counted(int8: Path, int4: Path) -> None:
    for path, kept in ((int8, True), (int4, False)):
        quantization = Bundle.open(path).manifest.components["text_encoder"].quantization
        assert quantization is not None
        rules = quantization["scheme"]["keep"]
        assert bool(rules) is kept
    assert rules == [] and Bundle.open(int4).manifest.components["transformer"].precision == "int4"


def test_block_size_is_taken(int4: Path) -> None:
    quantization = Bundle.open(int4).manifest.components["transformer"].quantization
    assert quantization is not None
    assert quantization["scheme"]["linear"]["block_size"] == 32


def test_info_shows_the_scorecard(int8: Path, int4: Path) -> None:
    for path in (int8, int4):
        code, out, err = run("info", path)
        assert (code, err) == (0, "")
        assert "scorecard, against fp32" in out
        table = out[out.index("scorecard, against fp32") :]
        components = {words[0] for words in rows(table) if words}
        assert {"component", "transformer", "text_encoder"} <= components
        scorecard = json.loads(run("info", path, "--json")[1])["manifest"]["scorecard"]
        assert scorecard["components"]["transformer"]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantized_bundles_paint(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    words = ["-m", request.getfixturevalue(name), "--size", "64x64", "--steps", "2", "-o", tmp_path / "a.png", "-q"]
    assert run("generate", "a red fox", *words)[0] == 0
    assert (tmp_path / "a.png").stat().st_size > 0


def test_overwriting_replaces_the_bundle(int8: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    target = Path(shutil.copytree(int8, tmp_path / "bundle"))
    words = ["-o", target, "--scheme", "int8"]
    assert "exists: choose another name, or replace it with --overwrite" in refused(
        2, "quantize", bundles["monetico-tiny"], *words
    )
    assert Bundle.open(target).digest == Bundle.open(int8).digest
    assert run("quantize", bundles["monetico-tiny"], *words, "--overwrite")[0] == 0
    assert Bundle.open(target).manifest.name == "bundle"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


# what they refuse


@pytest.mark.parametrize("scheme", [[], ["--scheme", "int8"]])
def test_an_existing_target_is_kept(tmp_path: Path, scheme: list[str]) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary", encoding="utf-8")
    words = [CHECKPOINT, "-o", tmp_path / "notes", "--recipe", "monetico", *scheme]
    assert "exists: choose another name" in refused(2, "export", *words)
    assert "holds more than a bundle (diary.txt)" in refused(2, "export", *words, "--overwrite")
    assert [path.name for path in tmp_path.rglob("*")] == ["notes", "diary.txt"]


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    assert "it is not a folder" in refused(6, "export", tmp_path / "no", "-o", target, "--recipe", "monetico")
    (tmp_path / "empty").mkdir()
    assert "no recipe fits it" in refused(6, "export", tmp_path / "empty", "-o", target)
    assert "missing model_index.json" in refused(
        6, "export", tmp_path / "empty", "-o", target, "--recipe", "monetico", "--scheme", "int4"
    )
    assert "recipe 'dalle' is unknown" in refused(2, "export", CHECKPOINT, "-o", target, "--recipe", "dalle")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def truncate(checkpoint: Path) -> None:
    path = checkpoint / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def lie_about_offsets(checkpoint: Path) -> None:
    """The last tensor is said to end far behind the file."""
    path = checkpoint / WEIGHTS
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    header[last]["data_offsets"][1] += 1 << 40
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def claim_a_huge_header(checkpoint: Path) -> None:
    path = checkpoint / WEIGHTS
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])


def lose_a_shard(checkpoint: Path) -> None:
    index = {"weight_map": {"embed.embeddings.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (checkpoint / f"{WEIGHTS}.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "no intact safetensors file"),
        (lie_about_offsets, "no intact safetensors file"),
        (claim_a_huge_header, "no intact safetensors file"),
        (lose_a_shard, "shard diffusion_pytorch_model-00001-of-00002.safetensors is missing"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "no intact safetensors file"),
        (lambda folder: (folder / "vqvae" / "config.json").write_bytes(b"{"), "it is not JSON"),
        (lambda folder: (folder / "transformer" / "config.json").write_bytes(b"[]"), "it holds no JSON object"),
    ],
    ids=["truncated", "offsets", "header", "shard", "empty", "json", "list"],
)
def test_a_damaged_checkpoint(checkpoint: Path, tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    damage(checkpoint)
    message = refused(6, "export", checkpoint, "-o", tmp_path / "bundle", "--recipe", "monetico")
    assert reason in message and str(checkpoint) in message
    assert [path.name for path in tmp_path.iterdir()] == ["检查点"]


def test_quantizing_twice(int8: Path, tmp_path: Path) -> None:
    message = refused(6, "quantize", int8, "-o", tmp_path / "again", "--scheme", "int4")
    assert "are quantized already; quantize the float bundle they came from" in message
    assert list(tmp_path.iterdir()) == []


def test_quantizing_what_is_no_bundle(tmp_path: Path) -> None:
    words = ["-o", tmp_path / "small", "--scheme", "int4"]
    assert "there is no bundle 'nothing'" in refused(3, "quantize", "nothing", *words)
    assert "has no bundle.json" in refused(3, "quantize", CHECKPOINT, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--scheme", "int4", "--keep", "proj_out"], "is not REGEX=BITS"),
        (["--scheme", "int4", "--keep", "=8"], "is not REGEX=BITS"),
        (["--scheme", "int4", "--keep", "x=²"], "is not REGEX=BITS"),
        (["--scheme", "int4", "--keep", "x=5"], "cannot be kept in 5 bits: take 8, 16 or 32"),
        (["--scheme", "int4", "--keep", "[=8"], "is not a regular expression"),
        (["--scheme", "int4", "--block-size", "33"], "block size 33 is not supported"),
        (["--scheme", "int4", "--block-size", "0"], "block size 0 is not supported"),
        (["--scheme", "int4", "--block-size", "-32"], "block size -32 is not supported"),
        (["--scheme", "int8", "--block-size", "32"], "--block-size"),
        (["--keep", "x=8"], "--keep needs --scheme, --target-size, --min-snr or --bits"),
        (["--block-size", "32"], "--block-size needs --scheme"),
        (["--codec-layers", "16"], "--codec-layers needs --scheme"),
        (["--scheme", "int8", "--rounding", "gptq"], "--rounding has no effect with scheme int8"),
        (["--scheme", "int4", "--low-rank", "-1"], "a low-rank branch of -1 columns"),
        (["--target-size", "much"], "'much' is not a size such as 0.9G"),
        (["--target-size", "0"], "a bundle of 0 bytes is not possible"),
        (["--min-snr", "-3"], "-3.0 dB cannot be meant"),
    ],
    ids=" ".join,
)
def test_schemes_that_cannot_be_meant(tmp_path: Path, words: list[str], reason: str) -> None:
    assert reason in refused(2, "export", CHECKPOINT, "-o", tmp_path / "bundle", *words)
    assert list(tmp_path.iterdir()) == []


def test_quantize_asks_for_a_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "x", "-o", "y"]) == 2
    assert "say how: --scheme int8" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["quantize", "x", "-o", "y", "--scheme", "int3"])
    assert ended.value.code == 2
    assert "--scheme" in capsys.readouterr().err


def test_targets_below_a_file(bundles: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    target = tmp_path / "file" / "bundle"
    for words in (
        ["quantize", bundles["monetico-tiny"], "-o", target, "--scheme", "int8"],
        ["export", CHECKPOINT, "-o", target, "--recipe", "monetico"],
        ["export", CHECKPOINT, "-o", target, "--recipe", "monetico", "--scheme", "int8"],
    ):
        assert str(target.parent) in refused(1, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_cancelled_between_export_and_quantization(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(_: Path, target: Path, **__: Any) -> None:
        shutil.copytree(bundles["monetico-tiny"], target)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pochade.export.write.export_checkpoint", export)
    monkeypatch.setattr("pochade.quant.bundle.quantize_component", interrupt)
    words = ["export", CHECKPOINT, "-o", tmp_path / "bundle", "--scheme", "int8"]
    assert refused(130, *words) == "pochade: cancelled\n"
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, verb, extra in (
        ("pochade.export.write", "export", "pochade[cpu,export]"),
        ("pochade.quant.bundle", "quantize", "pochade[cpu,quant]"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            message = refused(1, verb, CHECKPOINT, "-o", tmp_path / "bundle", "--scheme", "int8")
        assert f'pip install "{extra}"' in message


# what there is


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed bundles, one sound and one not."""
    monkeypatch.setenv("POCHADE_HOME", str(tmp_path))
    write_bundle(tmp_path / "models" / "红狐")
    write_bundle(tmp_path / "models" / "broken").joinpath("tokenizer.json").unlink()
    return tmp_path / "models"


def test_models_lists_bundles_and_recipes(home: Path) -> None:
    code, out, err = run("models")
    assert (code, err) == (0, "")
    sound = next(row for row in rows(out) if row[:1] == ["红狐"])
    assert sound[1:3] == ["meissonic", "fp32+int4"] and sound[-1] == str(home / "红狐")
    broken = next(line for line in out.splitlines() if line.split()[:1] == ["broken"])
    assert "'tokenizer.json' is missing" in broken
    assert ["monetico", "meissonic", "Apache-2.0", "Collov-Labs/Monetico"] in rows(out)


def test_models_for_machines(home: Path) -> None:
    code, out, err = run("models", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert {row["name"] for row in found["installed"]} >= {"红狐", "broken"}
    assert found["recipes"]["meissonic"]["defaults"]["width"] == 1024


def test_models_without_pyyaml(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    code, out, err = run("models")
    assert code == 0
    assert "红狐" in out and "Collov-Labs" not in out
    assert err == 'Recipes: pip install "pochade[export]" to read models.yaml\n'
    assert json.loads(run("models", "--json")[1])["recipes"] is None
