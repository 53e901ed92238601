"""The verbs that only look: what they print, where they print it, and how they end."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from pochade import machine
from pochade.bundle import Bundle
from pochade.cli import doctor, info, verify
from pochade.cli.text import brief, human_count, human_size, printable, table
from pochade.errors import MissingExtraError
from pochade.runtime.probe import FLOAT16, one_node_model, why_not
from tests.bundles import FILES, toy_manifest, write_bundle


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(required=True)
    for verb in (info, verify, doctor):
        verb.register(subparsers)
    arguments = parser.parse_args(words)
    return int(arguments.func(arguments))


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "红狐")


# info


def test_info_tells_what_there_is(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", str(toy)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split() for line in out.splitlines()]
    for expected in (
        ["folder", str(toy)],
        ["family", "meissonic,", "revision", "1"],
        ["decoder", "97", "B", "3.46", "M", "int4", "method", "rtn,", "bits", "4,", "block_size", "32"],
        ["text_encoder", "11", "B", "12", "fp32", "-"],
        ["guidance_scale", "2"],
        ["mask_token_id", "31"],
        ["licence", "Apache-2.0"],
        ["component", "snr_db", "cosine"],
        ["decoder", "31.5", "0.9996"],
        ["text_encoder", "-", "-"],
        ["psnr_db", "34.25"],
        ["prompts", "16"],
    ):
        assert expected in lines
    assert f"size    {human_size(sum(map(len, FILES.values())))} in 4 files" in out


def test_info_aligns_its_columns(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("info", str(toy))
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("component "))
    row = next(line for line in lines if line.startswith("decoder "))
    assert head.index("precision") == row.index("int4")


def test_info_without_scorecard_has_no_section_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", str(write_bundle(tmp_path / "toy", scorecard=None, defaults={}))) == 0
    out = capsys.readouterr().out
    assert "\nscorecard" not in out
    assert "\ndefaults" not in out


def test_info_prints_any_scorecard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scorecard = {"components": {"decoder": 3}, "pipeline": {"per_prompt": [1.0] * 9}, "remark": "by hand"}
    assert run("info", str(write_bundle(tmp_path / "toy", scorecard=scorecard))) == 0
    assert "per_prompt  9 values" in capsys.readouterr().out


def test_info_for_machines(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", str(toy), "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["manifest"] == toy_manifest()
    assert values["component_sizes"] == {"text_encoder": 11, "decoder": 97}
    assert values["digest"] == Bundle.open(toy).digest


def test_nothing_from_a_bundle_moves_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"licence": "\x1b[2Jfree", "\x1b]0;title\x07": ["\u202etxt"]}
    run("info", str(write_bundle(tmp_path / "toy", source=source)))
    assert not set(capsys.readouterr().out) & set("\x1b\x07\u202e")


# verify


def test_verify_says_ok_in_one_line(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", str(toy)) == 0
    assert capsys.readouterr() == (f"ok: 4 files, {sum(map(len, FILES.values()))} B\n", "")


def test_verify_lists_the_files_when_asked(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", str(toy), "-v") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == list(FILES)


def test_verify_lists_all_faults_and_ends_with_three(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy / "decoder.onnx.data").write_bytes(bytes(16))
    (toy / "tokenizer.json").unlink()
    assert run("verify", str(toy)) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"{toy} is refused, 2 faults:"
    assert "  'tokenizer.json' is missing" in err.splitlines()
    assert any(line.startswith("  'decoder.onnx.data' is damaged") for line in err.splitlines())


def test_verify_for_machines(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", str(toy), "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["ok"], values["files"]) == (True, 4)
    (toy / "tokenizer.json").unlink()
    assert run("verify", str(toy), "--json") == 3
    assert json.loads(capsys.readouterr().out) == {"ok": False, "faults": ["'tokenizer.json' is missing"]}


# doctor


class FakeSession:
    """A session that gets what the fake onnxruntime gives it."""

    def __init__(self, providers: list[str]) -> None:
        self.providers = providers

    def run(self, _names: None, feeds: dict[str, Any]) -> list[Any]:
        return list(feeds.values())

    def get_providers(self) -> list[str]:
        return self.providers


@pytest.fixture
def no_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pochade.runtime.locate.installed", list)


def fake_ort(monkeypatch: pytest.MonkeyPatch, works: Iterable[str], listed: list[str]) -> None:
    def session(_model: bytes, providers: list[str], enable_fallback: int) -> FakeSession:
        assert enable_fallback == 0
        if providers[0] in works:
            return FakeSession(providers)
        os.write(2, b"\x1b[1;31m2026 [E:onnxruntime:Default, x.cc:1 f] FAIL : no x.so with error: libx.so: not there\n")
        return FakeSession(["CPUExecutionProvider"])

    fake = SimpleNamespace(
        __version__="9.9",
        get_available_providers=lambda: listed,
        InferenceSession=session,
        preload_dlls=lambda: None,
    )
    for module in ("ort", "providers", "webgpu"):
        monkeypatch.setattr(f"pochade.runtime.{module}.ort", fake)


def distributions(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"onnxruntime": list(names)})
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "9.9")


@pytest.mark.usefixtures("no_bundles")
def test_doctor_finds_the_cpu_ready_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    out = capsys.readouterr().out
    assert "CPUExecutionProvider (--device cpu): loads" in out
    assert "telemetry off" in out
    assert "AzureExecutionProvider" not in out
    assert out.splitlines()[-1].startswith("ready to paint on ")


@pytest.mark.usefixtures("no_bundles")
def test_doctor_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["onnxruntime"]["version"] == onnxruntime.__version__
    assert report["packages"]["numpy"] == np.__version__
    assert report["cores"] >= report["usable_cores"] >= 1
    assert report["bundles"] == []


@pytest.mark.usefixtures("no_bundles")
def test_a_silent_fall_to_the_cpu_does_not_count_as_loading(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_ort(monkeypatch, ["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert run("doctor") == 0
    out, err = capfd.readouterr()
    assert "CUDAExecutionProvider (--device cuda): does not load\n    libx.so: not there\n    fix: install" in out
    assert out.endswith("ready to paint on cpu\n")
    assert err == "", "what the libraries write belongs into the findings"


@pytest.mark.usefixtures("no_bundles")
def test_no_working_provider_ends_with_four(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    fake_ort(monkeypatch, ["OtherExecutionProvider"], ["OtherExecutionProvider", "CUDAExecutionProvider"])
    assert run("doctor") == 4
    out = capfd.readouterr().out
    assert "OtherExecutionProvider (not used by pochade): loads" in out
    assert out.endswith("not ready: no device works\n")


def test_an_exception_of_a_provider_is_its_reason() -> None:
    def refuse(_model: bytes) -> None:
        raise RuntimeError("no such\nlibrary")

    assert why_not(refuse, "X") == "no such library"


@pytest.mark.usefixtures("no_bundles")
def test_two_flavours_at_once_are_named_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    distributions(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    run("doctor")
    out = capsys.readouterr().out
    assert "onnxruntime and onnxruntime-gpu are installed at once" in out
    assert "fix: pip uninstall -y onnxruntime onnxruntime-gpu\n" in out
    assert 'fix: pip install "pochade[gpu]"' in out


@pytest.mark.parametrize(
    ("names", "error", "fix"),
    [
        ((), MissingExtraError("not here"), 'pip install "pochade[cpu]"'),
        (("onnxruntime",), ImportError("not here"), "pip install --force-reinstall --no-deps onnxruntime"),
        # What is left of the module when one of two flavours was uninstalled.
        (("onnxruntime-gpu",), RuntimeError("not here"), "pip install --force-reinstall --no-deps onnxruntime-gpu"),
    ],
)
def test_without_onnxruntime_the_fix_is_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    names: tuple[str, ...],
    error: Exception,
    fix: str,
) -> None:
    class Absent:
        @property
        def ort(self) -> None:
            raise error

    monkeypatch.setitem(sys.modules, "pochade.runtime.ort", Absent())
    distributions(monkeypatch, *names)
    assert run("doctor") == 4
    out = capsys.readouterr().out
    assert "cannot be imported" in out
    assert "    not here\n" in out
    assert f"fix: {fix}" in out


def test_doctor_opens_the_installed_bundles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sound, damaged = write_bundle(tmp_path / "sound"), write_bundle(tmp_path / "damaged")
    (damaged / "tokenizer.json").unlink()
    monkeypatch.setattr("pochade.runtime.locate.installed", lambda: [sound, damaged])
    assert run("doctor") == 0
    out = capsys.readouterr().out
    assert f"  sound: {sound}, {human_size(Bundle.open(sound).size)}\n" in out
    assert f"  damaged: {damaged}, damaged\n" in out
    assert "'tokenizer.json' is missing" in out


@pytest.mark.parametrize(("arguments", "operator", "element"), [((), "Identity", 1), (("Neg", FLOAT16), "Neg", 10)])
def test_the_probe_is_a_model_that_onnx_accepts(arguments: tuple[Any, ...], operator: str, element: int) -> None:
    model = onnx.load_from_string(one_node_model(*arguments))
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version, model.graph.node[0].op_type) == (10, 20, operator)
    assert model.graph.input[0].type.tensor_type.elem_type == element


# machine


def test_memory_is_cut_to_the_limit_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal:       16000 kB\nMemAvailable:   12000 kB\n",
        "/sys/fs/cgroup/memory.max": "max\n",
        "/sys/fs/cgroup/memory.current": "3000000\n",
    }
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    assert machine._linux_memory() == machine.Memory(16_384_000, 12_288_000)
    files["/sys/fs/cgroup/memory.max"] = "8000000\n"
    assert machine._linux_memory() == machine.Memory(8_000_000, 5_000_000)
    files.clear()
    assert machine._linux_memory() == machine.Memory(None, None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_features_are_those_that_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor : 0\nmodel name : Fast\nflags : fpu avx2 avx512_vnni\n\nprocessor : 1\nmodel name : Slow\n"
    monkeypatch.setattr(machine, "_read", lambda _path: text)
    assert machine.cpu_features() == ["avx2", "avx512_vnni"]
    assert machine.cpu_model() == "Fast"


# text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (12_345_678, "12.3 MB"),
        (999_960_000, "1.0 GB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_human_size(size: int, text: str) -> None:
    assert human_size(size) == text


def test_numbers_and_values_in_a_few_words() -> None:
    assert [human_count(n) for n in (999_999, 3_456_789, 1_180_000_000)] == ["999,999", "3.46 M", "1.18 B"]
    assert (
        brief({"bits": 4, "nodes": list(range(100)), "on": True, "off": None})
        == "{bits 4, nodes 100 values, on yes, off -}"
    )
    assert brief({str(n): n for n in range(9)}) == "9 values"
    assert brief([1, 2.50]) == "[1, 2.5]"
    assert printable("狐\n\x1b") == "狐\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    assert table([["a", "bb"], ["ccc", "d"]], indent=" ") == " a    bb\n ccc  d"
