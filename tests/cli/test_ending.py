"""How the program ends: exit codes, Ctrl-C, and readers and disks that go away."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import pochade.cli
from pochade.cli import main
from pochade.errors import (
    BundleInvalidError,
    CancelledError,
    DeviceUnavailableError,
    InputRefusedError,
    MissingExtraError,
    NetworkNeededError,
    OutOfBudgetError,
    OutputError,
    UsageError,
)

ODD_NAME = os.fsdecode(b"\xff.png")
"""A name that is no text in any encoding."""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of its own")
def test_ctrl_c_while_painting(bundle: Path, tmp_path: Path) -> None:
    """A real signal to a real process, sent once its progress bar shows that it paints."""
    # Whoever started the tests in the background may have left SIGINT ignored.
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pochade.cli import main; sys.exit(main())"
    )
    words = ["generate", "a fox", "-m", str(bundle), "--device", "cpu", "--steps", "1000", "-b", "1000"]
    terminal, stderr = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=tmp_path,
        start_new_session=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    try:
        os.close(stderr)
        seen = b""
        until = time.monotonic() + 300
        while b"painting" not in seen and time.monotonic() < until:
            seen += os.read(terminal, 65536)
        process.send_signal(signal.SIGINT)
        seen = drain(terminal)
        out, _ = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert process.returncode == 130
    assert out == b""
    assert b"Traceback" not in seen and b"Exception" not in seen
    assert seen.endswith(b"\r\x1b[Kpochade: cancelled\r\n")
    assert list(tmp_path.iterdir()) == []


def drain(terminal: int) -> bytes:
    """What is still written to a terminal until its last writer is gone."""
    seen = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # as Linux says it
            return seen
        if not data:
            return seen
        seen += data


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("no"), 2, "no"),
        (BundleInvalidError("x", ["a", "b"]), 3, "bundle x is refused: a; b"),
        (DeviceUnavailableError("no"), 4, "no"),
        (OutOfBudgetError("no"), 5, "no"),
        (InputRefusedError("x", ["a"]), 6, "x is refused: a"),
        (NetworkNeededError("no"), 7, "no"),
        (CancelledError("no"), 130, "no"),
        (KeyboardInterrupt(), 130, "cancelled"),
        (OutputError("no"), 1, "no"),
        (MissingExtraError("no"), 1, "no"),
        (OSError(errno.EIO, "Input/output error", "f"), 1, "[Errno 5] Input/output error: 'f'"),
        (UsageError("two\nlines\x1b[2J"), 2, "two\N{REPLACEMENT CHARACTER}lines\N{REPLACEMENT CHARACTER}[2J"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("pochade.cli.models.run", fail)
    # In a child, dropping stdout is meant; here it would take away pytest's own.
    monkeypatch.setattr(pochade.cli, "_drop_output", lambda: None)
    assert main(["models"]) == code
    assert capsys.readouterr() == ("", f"pochade: {line}\n")


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["generate", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "6 input file refused" in " ".join(out.split())
    assert f"pochade {pochade.__version__}\n" in out
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2


def child(*words: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "pochade", *words]
    return subprocess.run(command, stderr=subprocess.PIPE, timeout=600, **options)


def test_a_reader_that_goes_is_no_reason_to_complain() -> None:
    read, write = os.pipe()
    os.close(read)
    done = child("models", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_stdout_that_takes_nothing() -> None:
    with Path("/dev/full").open("wb") as full:
        done = child("models", stdout=full)
    assert (done.returncode, done.stderr) == (1, b"pochade: [Errno 28] No space left on device\n")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep names as text")
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_file_name_can_be_printed(bundle: Path, tmp_path: Path, encoding: str) -> None:
    names = [ODD_NAME, "狐.png"]
    for name in names:
        words = ["generate", "a fox", "-m", str(bundle), "--device", "cpu", "--size", "64x64", "--steps", "1"]
        words += ["-s", "1", "-q"]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = child(*words, "-o", name, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b"seed 1\n")
        escaped = name.encode("ascii", "backslashreplace")
        assert done.stdout == (os.fsencode(name) if encoding == "utf-8" else escaped) + b"\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
