"""Peers: that they compute the same model, that their loop samples right, and that ratios are of the same round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pochade.benchmarks.peers.loop import Clock, Networks, Step, paint, sample  # noqa: E402
from pochade.benchmarks.peers.torch_child import TorchNetworks  # noqa: E402
from pochade.benchmarks.peers.versus import PEERS, RATIOS, advantages, peer_cases  # noqa: E402
from pochade.benchmarks.speed import Case, Report, Settings  # noqa: E402
from pochade.cli import main  # noqa: E402
from pochade.cli.bench_peers import ALL  # noqa: E402
from pochade.export.families.meissonic import Meissonic  # noqa: E402
from tests.golden import GOLDEN, TOLERANCE, arrays  # noqa: E402

TINY = GOLDEN / "meissonic-tiny"
MASK = 9


def test_the_torch_peer_computes_the_recorded_logits() -> None:
    recorded = arrays("meissonic-tiny")
    networks = TorchNetworks(Meissonic.open(TINY), torch.float32, Clock())
    names = ("encoder_hidden_states", "pooled")
    states, pooled = (torch.from_numpy(recorded[f"fwd.in.{name}"][:1]) for name in names)
    tokens, micro = (recorded[f"fwd.in.{name}"][:1] for name in ("tokens", "micro_conds"))
    rows = networks.logits(tokens, states, pooled, micro, recorded["fwd.in.timestep"].astype(np.float32))
    expected = recorded["fwd.logits"][0].reshape(rows.shape[1], -1).T
    np.testing.assert_allclose(rows, expected, atol=TOLERANCE)


def test_a_draw_follows_the_logits() -> None:
    rng = np.random.default_rng(0)
    cells = 20_000
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    logits = np.tile(np.log(shares).astype(np.float32), (cells, 1))
    tokens = np.full((1, 100, 200), 9)
    drawn = sample(Step(tokens, 1.0, rng.random(cells), rng.random(cells), 0.0, 0, MASK), [logits])
    found = np.bincount(drawn.ravel(), minlength=4) / cells
    assert np.abs(found - shares).max() < 0.015


def test_guidance_mixes_before_the_draw_and_known_cells_stay() -> None:
    tokens = np.array([[[9, 2, 9, 1]]])
    wanted, unwanted = np.zeros((4, 3), np.float32), np.zeros((4, 3), np.float32)
    # Only three times the difference makes code 0 certain.
    wanted[:, 0], unwanted[:, 0] = 40.0, 20.0
    half = np.full(4, 0.5)
    drawn = sample(Step(tokens, 3.0, half, half, 0.0, 0, MASK), [wanted, unwanted])
    assert drawn.tolist() == [[[0, 2, 0, 1]]]


def test_the_least_confident_cells_are_masked_again() -> None:
    tokens = np.full((1, 1, 4), 9)
    logits = np.zeros((4, 2), np.float32)
    logits[:, 0] = (4.0, 1.0, 3.0, 2.0)
    low = np.zeros(4)
    again = sample(Step(tokens, 1.0, low, np.full(4, 0.5), 0.0, 2, MASK), [logits])
    assert again.tolist() == [[[0, 9, 0, 9]]]


def test_a_card_samples_like_the_host() -> None:
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((1, 16, 16)) < 0.7, MASK, 3)
    logits = [rng.standard_normal((256, 8)).astype(np.float32) * 3 for _ in range(2)]
    draw, keep = (rng.random(256).astype(np.float32) for _ in range(2))
    networks = TorchNetworks(Meissonic.open(TINY), torch.float32, Clock())
    for num_masked in (90, 0):
        step = Step(tokens, 4.0, draw, keep, 1.5, num_masked, MASK)
        found = networks.sample_there(step, [torch.from_numpy(each) for each in logits])
        # A draw on the edge between two codes may fall to either side of it.
        assert (found == sample(step, logits)).mean() > 0.99
        assert (found == MASK).sum() == num_masked


def test_a_compiled_peer_computes_the_same() -> None:
    checkpoint = Meissonic.open(TINY)
    ids = np.array([encoding.ids for encoding in checkpoint.tokenizer().encode_batch(["a cat", ""])])
    tokens = np.full((1, 4, 4), checkpoint.scheduler["mask_token_id"])
    given = np.array([[64, 64, 0, 0, 6.0]], np.float32), np.array([3.0], np.float32)
    found = []
    for compiled in (False, True):
        networks = TorchNetworks(checkpoint, torch.float32, Clock())
        if compiled:
            networks.compile(ids[:1], (4, 4), backend="aot_eager")  # inductor needs a C++ compiler
        found.append((networks.logits(tokens, *networks.encode(ids[:1]), *given), networks.decode(tokens % 8)))
    for plain, traced in zip(*found, strict=True):
        np.testing.assert_allclose(traced, plain, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_peer_paints(dtype: Any) -> None:
    checkpoint, clock = Meissonic.open(TINY), Clock()
    ids = np.array([encoding.ids for encoding in checkpoint.tokenizer().encode_batch(["a cat", ""])])
    settings = {"width": 64, "height": 128, "num_inference_steps": 3, "guidance_scale": 9.0, "seed": 1}
    networks = TorchNetworks(checkpoint, dtype, clock)
    picture = paint(networks, ids, checkpoint.scheduler_manifest(), settings, clock)
    assert picture.shape == (1, 3, 128, 64)
    assert np.isfinite(picture).all()
    counts = {name: len(times["ran"]) for name, times in clock.components.items()}
    assert counts == {"text_encoder": 1, "condition": 1, "transformer": 6, "sampler": 3, "vq_decoder": 1}


@pytest.mark.filterwarnings("ignore")
def test_openvino_computes_the_same_model(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    from pochade.benchmarks.peers.openvino_child import OpenVinoNetworks
    from pochade.benchmarks.peers.openvino_models import make

    make(TINY, tmp_path, ["int8"], 128, 64)
    facts = json.loads((tmp_path / "int8" / "facts.json").read_text("utf-8"))
    checkpoint = Meissonic.open(TINY)
    ids, tokens = np.array(facts["ids"]), np.full((1, 2, 4), checkpoint.scheduler["mask_token_id"])
    given = (np.array([[128, 64, 0, 0, 6.0]], np.float32), np.array([3.0], np.float32))
    found = []
    pair: list[Networks] = [
        TorchNetworks(checkpoint, torch.float32, Clock()),
        OpenVinoNetworks(tmp_path / "int8", facts, 1, Clock()),
    ]
    for networks in pair:
        states, pooled = networks.encode(ids[:1])
        found.append(networks.logits(tokens, states, pooled, *given))
    error = np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0])
    assert 0 < error < 0.2


def figures(step: float) -> dict[str, Any]:
    ran = {"text_encoder": [1.0], "condition": [0.0], "transformer": [step] * 4, "sampler": [0.0] * 2}
    components = {name: {"opened": [], "ran": values} for name, values in (ran | {"vq_decoder": [2.0]}).items()}
    return {"cold": False, "picture": 10 * step, "peak_rss": 1, "components": components}


def test_ratios_pair_rounds() -> None:
    settings = Settings("a cat", 64, 64, 2, 9.0, 7, "cpu", None)
    # The machine is half as fast in the second round, for both.
    ours = Case("int8", TINY, "a", 1, None, [figures(9.0), figures(1.0), figures(2.0)])
    theirs = Case("PyTorch fp32", TINY, "b", 1, None, [figures(9.0), figures(3.0), figures(6.0)])
    late = Case("PyTorch bf16", TINY, "c", 1, None, [figures(9.0)])
    found = list(advantages(Report(settings, 2, [ours, theirs, late], machine={})))
    ratios = {each.metric: each.rounds for each in found}
    assert {each.peer for each in found} == {"PyTorch fp32"}
    pictures = {"picture_loaded": (3.0, 3.0), "picture_from_files": (3.0, 3.0)}
    assert ratios == {"step": (3.0, 3.0), "text": (1.0, 1.0), "decode": (1.0, 1.0)} | pictures


def test_pictures_are_compared_with_loading_and_without() -> None:
    settings = Settings("a cat", 64, 64, 2, 9.0, 7, "cpu", None)
    # Half a second to open each of two models: within a bundle's picture, before a peer's.
    run = figures(1.0)
    for name in ("transformer", "vq_decoder"):
        run["components"][name]["opened"].append(0.5)
    ours = Case("int8", TINY, "a", 1, None, [run, run])
    theirs = Case("PyTorch fp32", TINY, "b", 1, None, [run, run], module="pochade.benchmarks.peers.torch_child")
    assert [ours.median(each) for each in ("picture", "picture_loaded", "picture_from_files")] == [10, 9, 10]
    assert [theirs.median(each) for each in ("picture", "picture_loaded", "picture_from_files")] == [10, 10, 11]
    ratios = {each.metric: each.median for each in advantages(Report(settings, 1, [ours, theirs], machine={}))}
    assert ratios["picture_loaded"] == 10 / 9 and ratios["picture_from_files"] == 11 / 10


def test_the_command_line_knows_all_peers() -> None:
    assert set(PEERS) == set(ALL)


def test_sizes_of_peers_are_those_of_their_weights(tmp_path: Path) -> None:
    cases = {case.name: case for case in peer_cases(TINY, tmp_path, ["PyTorch fp32", "PyTorch bf16"])}
    assert cases["PyTorch fp32"].bytes == 2 * cases["PyTorch bf16"].bytes > 100_000


def test_the_verb_measures_beside_pytorch(
    small_bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "peers.json"
    arguments = ["bench", "peers", str(TINY), str(small_bundles["meissonic-tiny"]), "--models", str(tmp_path / "ov")]
    options = ["--peer", "PyTorch bf16", "--size", "64x64", "--steps", "2", "--rounds", "1", "--json", str(path)]
    assert main([*arguments, *options]) == 0
    out = capsys.readouterr().out
    assert "times as long as" in out
    assert "PyTorch bf16" in out
    report = json.loads(path.read_text("utf-8"))
    assert {row["metric"] for row in report["advantages"]} == set(RATIOS)
    assert all(row["ratio"] > 0 for row in report["advantages"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--device", "webgpu"], "bench peers measures on cpu or cuda, not on webgpu"),
        (["--device", "cuda", "--peer", "OpenVINO int8"], "OpenVINO computes on the CPU; leave its peers away"),
        (["--peer", "OpenVINO int8"], "OpenVINO's peers need --models FOLDER"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    small_bundles: dict[str, Path], options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "peers", str(TINY), str(small_bundles["meissonic-tiny"]), *options]) == 2
    assert reason in capsys.readouterr().err


def test_what_is_missing_is_named(
    small_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pochade.cli.bench_peers.find_spec", lambda name: None if name == "nncf" else object())
    assert main(["bench", "peers", str(TINY), str(small_bundles["meissonic-tiny"]), "--models", "x"]) == 1
    assert "bench peers needs more packages (nncf)" in capsys.readouterr().err
