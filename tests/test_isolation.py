"""Fresh interpreters: what the runtime does without, and what it never does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BLOCKED = [
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "transformers",
    "diffusers",
    "yaml",
    "safetensors",
    "huggingface_hub",
]

BLOCK_IMPORTS = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
"""

WATCH = """
import os, socket, sys
events, telemetry = [], []
def watch(event, arguments):
    if event.startswith("socket."):
        events.append(event)
    if event == "import" and arguments[0] == "onnxruntime":
        telemetry.append(os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.addaudithook(watch)
def refuse(*_, **__):
    raise OSError("sockets are blocked")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
"""

# Native code raises no audit events: the kernel ends the process at the first socket() of any thread (seccomp(2)).
BLOCK_SOCKET_CALL = """
import ctypes, platform, struct
number, machine = {"x86_64": (41, 0xC000003E), "aarch64": (198, 0xC00000B7)}[platform.machine()]
rules = [
    (0x20, 0, 0, 4),           # load the architecture
    (0x15, 0, 3, machine),     # another one: allow
    (0x20, 0, 0, 0),           # load the number of the call
    (0x15, 0, 1, number),      # not socket(): allow
    (0x06, 0, 0, 0x80000000),  # kill the process
    (0x06, 0, 0, 0x7FFF0000),  # allow
]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
argument = Program(len(rules), ctypes.addressof(program))
assert libc.prctl(22, 2, ctypes.byref(argument), 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
"""

PAINT = """
import json, sys
import pochade
with pochade.load(sys.argv[1], device="cpu") as pipe:
    result = pipe("a red fox", width=64, height=64, num_inference_steps=2, seed=1)
print(json.dumps({"size": result.images[0].size, "modules": sorted(sys.modules)} | {
    name: globals()[name] for name in ("events", "telemetry") if name in globals()
}))
"""

has_seccomp = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in ("x86_64", "aarch64"), reason="filters system calls of Linux"
)


def fresh(script: str, place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in an interpreter without any of this one's environment, at home and working in `place`."""
    home, work = place / "home", place / "work"
    home.mkdir()
    work.mkdir()
    # CI=1 would switch the telemetry off, too, and nothing would be proven.
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "TMPDIR": str(work)}
    command = [sys.executable, "-I", "-c", script, *arguments]
    return subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, timeout=600)


def told(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def left_behind(place: Path) -> list[str]:
    return [str(path.relative_to(place)) for path in place.glob("*/**/*")]


def test_paints_without_any_package_for_export(bundles: dict[str, Path], tmp_path: Path) -> None:
    found = told(fresh(BLOCK_IMPORTS + PAINT, tmp_path, str(bundles["monetico-tiny"])))
    assert found["size"] == [64, 64]
    assert not set(BLOCKED) & set(found["modules"])


def test_the_block_works(tmp_path: Path) -> None:
    done = fresh(BLOCK_IMPORTS + "import onnx", tmp_path)
    assert "onnx is blocked" in done.stderr


def test_import_is_light(tmp_path: Path) -> None:
    script = "import json, sys, pochade; print(json.dumps(sorted(sys.modules)))"
    assert not {"numpy", "onnxruntime", "PIL", "tokenizers"} & set(told(fresh(script, tmp_path)))


def test_help_and_version_are_light(tmp_path: Path) -> None:
    script = "import json, sys, pochade.cli; pochade.cli.build_parser(); print(json.dumps(sorted(sys.modules)))"
    assert not {"numpy", "onnxruntime", "torch", "onnx", "PIL"} & set(told(fresh(script, tmp_path)))


@pytest.mark.parametrize(
    "first",
    [
        "",
        "import pochade.cli",
        "import pochade.export.write",
        "import pochade.quant.bundle",
        "import pochade.runtime.session",
        "import os, pochade; del os.environ['ORT_DISABLE_TELEMETRY']",
    ],
)
def test_nothing_is_written_or_sent(bundles: dict[str, Path], tmp_path: Path, first: str) -> None:
    found = told(fresh(f"{WATCH}\n{first}\n{PAINT}", tmp_path, str(bundles["monetico-tiny"])))
    assert found["telemetry"] and set(found["telemetry"]) == {"1"}, "set before the first import of onnxruntime"
    assert found["events"] == []
    assert left_behind(tmp_path) == []


@has_seccomp
def test_no_thread_opens_a_socket(bundles: dict[str, Path], tmp_path: Path) -> None:
    done = fresh(BLOCK_SOCKET_CALL + PAINT, tmp_path, str(bundles["monetico-tiny"]))
    assert told(done)["size"] == [64, 64]
    assert left_behind(tmp_path) == []


@has_seccomp
def test_the_filter_works(tmp_path: Path) -> None:
    done = fresh(BLOCK_SOCKET_CALL + "import socket; socket.socket()", tmp_path)
    assert done.returncode == -signal.SIGSYS
