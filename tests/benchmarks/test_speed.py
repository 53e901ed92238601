"""Speed measurements: what children report, what is kept when a run is interrupted, and what a comparison says."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from pochade.benchmarks import speed
from pochade.benchmarks.child import forget, read_figures
from pochade.benchmarks.compare_runs import compare_files
from pochade.benchmarks.html import page
from pochade.benchmarks.speed import Case, Report, Settings, default_settings, measure, spread
from pochade.bundle import Bundle
from pochade.cli import main
from pochade.cli.bench import with_kind
from pochade.errors import PochadeError
from pochade.runtime.locate import BUILT_IN

STARTER = BUILT_IN / "starter"
SETTINGS = Settings("a red star", 128, 128, 2, 2.0, 7, "cpu", None)


def figures(seconds: float = 1.0, cold: bool = False, peak: int = 100_000_000) -> dict[str, Any]:
    """What a child reports of a guided picture of two steps."""
    components = {
        "text_encoder": [1],
        "condition": [1, 1],
        "transformer": [5, 5, 6, 6],
        "sampler": [1, 2],
        "vq_decoder": [8],
    }
    return {
        "cold": cold,
        "picture": 40 * seconds,
        "peak_rss": peak,
        "components": {
            name: {"opened": [0.5 * seconds], "ran": [n * seconds for n in ran]} for name, ran in components.items()
        },
    }


def case(*runs: dict[str, Any], name: str = "small") -> Case:
    return Case(name, STARTER, "digest", 1000, {"components": {"transformer": {"snr_db": 30.0}}}, list(runs))


def write(path: Path, *cases: Case, settings: Settings = SETTINGS) -> Path:
    Report(settings, 2, list(cases)).save(path)
    return path


def test_figures_follow_from_runs() -> None:
    one = case(figures(9.0, cold=True), figures(1.0), figures(2.0))
    assert one.samples("cold_open") == [22.5]
    assert one.samples("open") == [2.5, 5.0]
    assert one.samples("text") == [3.0, 6.0]
    # Two passes and a draw each.
    assert one.samples("step") == [11.0, 14.0, 22.0, 28.0]
    assert one.samples("sampler") == [1.0, 2.0, 2.0, 4.0]
    assert one.median("decode") == 12.0
    assert one.median("picture") == 60.0
    assert case(figures(cold=False)).samples("cold_open") == []
    assert spread([4.0, 1.0, 3.0]) == (1.0, 4.0)
    assert spread([0.0, 1.0, 2.0, 3.0, 4.0]) == (1.0, 3.0)


def continuous_figures(steps: int = 2, seconds: float = 1.0) -> dict[str, Any]:
    """Of a family that samples outside of its graphs, with two text encoders and another decoder."""
    run = figures(seconds)
    times = run["components"]
    del times["sampler"]
    times["text_encoder_2"] = {"opened": [0.5 * seconds], "ran": [3 * seconds]}
    times["vae_decoder"] = times.pop("vq_decoder")
    return run | {"settings": {"num_inference_steps": steps}}


def test_figures_of_a_family_without_a_sampler() -> None:
    one = case(continuous_figures(), continuous_figures(), continuous_figures(seconds=2.0))
    assert one.samples("text") == [6.0, 12.0]
    assert one.samples("step") == [10.0, 12.0, 20.0, 24.0]
    assert one.samples("decode") == [8.0, 16.0]
    assert one.samples("sampler") == []
    assert "sampler" not in one.to_json()["median_seconds"]
    # Without guidance a step is a pass.
    assert case(continuous_figures(4), continuous_figures(4)).samples("step") == [5.0, 5.0, 6.0, 6.0]
    text = page(Report(SETTINGS, 2, [one]))
    assert text.count("<svg") == 3
    assert "<td>-</td>" in text


def test_a_family_without_a_sampler_is_compared(tmp_path: Path) -> None:
    slower = [continuous_figures(seconds=3.0) for _ in range(3)]
    paths = [
        write(tmp_path / "a.json", case(*(continuous_figures() for _ in range(3)))),
        write(tmp_path / "b.json", case(*slower)),
    ]
    assert {ratio.metric for ratio in compare_files(*paths).ratios} >= {"text", "step", "decode", "picture"}


def test_bundles_take_turns_and_runs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, bool]] = []

    def run(measured: Case, settings: Settings, cold: bool) -> dict[str, Any]:
        asked.append((measured.name, cold))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return figures(cold=cold)

    monkeypatch.setattr(speed, "run_once", run)
    path = tmp_path / "kept.json"
    report = Report(SETTINGS, 2, [case(name="a"), case(name="b")])
    report.cases[1].digest = "other"
    with pytest.raises(KeyboardInterrupt):
        measure(report, lambda *_: None, lambda: report.save(path))
    assert asked == [("a", True), ("b", True), ("b", False), ("a", False)]
    again = Report(SETTINGS, 2, [case(name="a"), case(name="b")])
    again.cases[1].digest = "other"
    again.resume(path)
    assert [len(each.runs) for each in again.cases] == [1, 2]
    measure(again, lambda *_: None, lambda: None)
    assert asked[4:] == [("a", False), ("a", False), ("b", False)]


def test_another_measurement_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.json", case(figures()))
    assert main(["bench", str(STARTER), "--steps", "3", "--json", str(path), "--resume"]) == 6
    assert "its settings are not those asked for now" in capsys.readouterr().err
    # Nothing that was measured is lost.
    assert json.loads(path.read_text("utf-8"))["bundles"][0]["runs"]


def test_the_verb_measures_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"--json": tmp_path / "speed.json", "--html": tmp_path / "speed.html"}
    options = [part for name, path in files.items() for part in (name, str(path))]
    assert main(["bench", str(STARTER), "--steps", "2", "--rounds", "1", "--threads", "1", *options]) == 0
    table = capsys.readouterr().out
    assert "starter" in table
    assert "peak memory" in table
    report = json.loads(files["--json"].read_text("utf-8"))
    assert (report["format_version"], report["kind"], report["rounds"]) == (1, "pochade bench", 1)
    assert report["machine"]["versions"]["onnxruntime"]
    (bundle,) = report["bundles"]
    medians = bundle["median_seconds"]
    assert medians["picture"] > medians["decode"] > 0
    assert medians["step"] > medians["sampler"] > 0
    assert len(bundle["runs"]) == 2
    assert all(run["providers"]["transformer"] == "CPUExecutionProvider" for run in bundle["runs"])
    assert all(run["threads"] == 1 for run in bundle["runs"])
    assert bundle["peak_rss"] > 20_000_000
    text = files["--html"].read_text("utf-8")
    assert text.count("<svg") == 3
    # Only names of XML's own vocabularies.
    assert "http" not in text.replace("http://www.w3.org/", "")


def test_a_page_takes_any_prompt_and_a_run_that_has_just_begun() -> None:
    hostile = Settings("<script>alert(1)</script> & more", 128, 128, 2, 2.0, 7, "cpu", 1)
    for runs in ([], [figures()], [figures(), figures()]):
        text = page(Report(hostile, 2, [case(*runs, name="<b>bold</b>")]))
        assert "<script>" not in text
        assert "<b>" not in text
    for part in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part[: part.index("</svg>")] + "</svg>")


def test_what_the_bundle_refuses_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(STARTER), "--size", "100x100", "--rounds", "1"]) == 2
    assert "not a multiple of" in capsys.readouterr().err


def test_a_child_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(PochadeError, match=r"measuring small failed \(exit code 1\)"):
        measure(Report(SETTINGS, 1, [case()]), lambda *_: None, lambda: None)


def test_read_figures_skips_what_libraries_print() -> None:
    assert read_figures('hello\n{"a": 1}\n') == {"a": 1}
    for text in ("", "hello", "[1]"):
        with pytest.raises(ValueError, match=r"."):
            read_figures(text)


def test_the_cache_is_forgotten_without_harm(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(10_000))
    forget(tmp_path)
    assert (tmp_path / "weights").read_bytes() == bytes(10_000)


def test_large_pictures_get_few_steps() -> None:
    bundle = Bundle.open(STARTER)
    assert default_settings(bundle).num_inference_steps == bundle.manifest.defaults["num_inference_steps"]
    assert default_settings(bundle, num_inference_steps=3, width=None).num_inference_steps == 3


def test_equal_runs_are_noise_and_slow_ones_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a.json", case(*[figures(1.0)] * 5), case(*[figures(1.0)] * 5, name="steady"))
    after = write(
        tmp_path / "b.json",
        case(*[figures(1.2, peak=50_000_000)] * 5),
        case(*[figures(1.01)] * 5, name="steady"),
    )
    verdicts = {(r.bundle, r.metric): r.verdict(0.05) for r in compare_files(before, after).ratios}
    assert verdicts["small", "picture"] == "slower"
    assert verdicts["small", "peak memory"] == "less"
    assert verdicts["steady", "picture"] == "noise"
    assert main(["bench", "compare", str(before), str(after)]) == 1
    assert "slower" in capsys.readouterr().out
    assert main(["bench", "compare", str(before), str(after), "--threshold", "30", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["ratios"]
    assert {row["verdict"] for row in rows} == {"noise", "less"}
    assert main(["bench", "compare", str(after), str(before), "--threshold", "200"]) == 0


def test_spread_hides_a_small_change(tmp_path: Path) -> None:
    wide = [figures(x) for x in (1.0, 0.5, 1.0, 1.5, 2.0)]
    wider = [figures(x * 1.1) for x in (1.0, 0.5, 1.0, 1.5, 2.0)]
    paired = compare_files(write(tmp_path / "a.json", case(*wide)), write(tmp_path / "b.json", case(*wider)))
    assert not paired.worse(0.05)


def test_unlike_measurements_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "a.json", case(figures(), figures()))
    other = Settings("a red star", 128, 128, 4, 2.0, 7, "cpu", None)
    assert main(["bench", "compare", str(one), str(write(tmp_path / "b.json", settings=other))]) == 2
    assert "they differ in num_inference_steps 2 and 4" in capsys.readouterr().err
    assert main(["bench", "compare", str(one), str(write(tmp_path / "c.json", case(name="other")))]) == 2
    assert "no bundle in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no json", "cannot be read"),
        ("{}", "pochade bench did not write it"),
        ('{"kind": "pochade bench", "format_version": 99}', "has format version 99, this version reads 1"),
        ('{"kind": "pochade bench", "format_version": 1, "settings": {}}', "figures are missing"),
    ],
)
def test_other_files_are_refused(text: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, "utf-8")
    assert main(["bench", "compare", str(path), str(path)]) == 6
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (["--rounds", "0"], 2, "--rounds is 0"),
        (["--size", "wide"], 2, "is not WIDTHxHEIGHT"),
        (["--resume"], 2, "--resume needs --json"),
        (["--html", "no/such/page.html"], 1, "there is no folder no/such"),
        ([str(STARTER)], 2, "two bundles are called starter"),
    ],
)
def test_bad_options(options: list[str], code: int, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(STARTER), *options]) == code
    assert reason in capsys.readouterr().err


def test_a_kind_is_implied() -> None:
    assert with_kind(["bench", "starter"]) == ["bench", "speed", "starter"]
    assert with_kind(["bench", "--quick", "starter"]) == ["bench", "speed", "--quick", "starter"]
    assert with_kind(["bench", "quality", "a", "b"]) == ["bench", "quality", "a", "b"]
    assert with_kind(["generate", "bench"]) == ["generate", "bench"]
    assert with_kind([]) == []
    for argv in (["bench"], ["bench", "--help"]):
        assert with_kind(argv) == argv
