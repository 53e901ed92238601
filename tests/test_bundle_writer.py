"""What writing promises: all or nothing under the final name, and never more deleted than a bundle."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pochade.bundle import Bundle, BundleWriter
from pochade.errors import BundleInvalidError, OutputError, UsageError
from pochade.manifest import Manifest
from tests.bundles import FILES, toy_manifest, write_bundle, write_files


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "toy")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def arguments(**changes: Any) -> dict[str, Any]:
    """What `finish` takes, for the files of the toy bundle."""
    manifest = Manifest.from_json(json.dumps(toy_manifest()), "toy")
    taken = (key for key in toy_manifest() if key not in ("format_version", "files"))
    return {key: getattr(manifest, key) for key in taken} | changes


def write(target: Path, overwrite: bool = False, **changes: Any) -> Bundle:
    with BundleWriter(target, overwrite) as writer:
        write_files(writer.path)
        return writer.finish(**arguments(**changes))


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    bundle = write(tmp_path / "新的" / "toy")
    assert Bundle.open_verified(tmp_path / "新的" / "toy") == bundle
    assert json.loads(bundle.manifest.to_json()) == toy_manifest(dict(sorted(FILES.items())))
    assert names(tmp_path / "新的") == ["toy"]


def test_a_finished_bundle_is_as_readable_as_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    bundle = write(tmp_path / "toy")
    assert stat.S_IMODE(bundle.path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_nothing_stands_under_the_final_name_before_the_end(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "toy") as writer:
        write_files(writer.path)
        assert names(tmp_path) == [writer.path.name]
        assert writer.path.name.startswith(".toy.")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), BundleWriter(tmp_path / "toy") as writer:
        write_files(writer.path)
        raise error
    assert names(tmp_path) == []


def test_a_block_that_does_not_finish_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "toy") as writer:
        write_files(writer.path)
    assert names(tmp_path) == []


def test_a_killed_process_leaves_no_bundle_and_no_obstacle(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pochade.bundle import BundleWriter\n"
        "with BundleWriter(sys.argv[1]) as writer:\n"
        "    (writer.path / 'half').write_bytes(b'x')\n"
        "    os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "toy")], check=False).returncode == 9
    (left_over,) = names(tmp_path)
    assert left_over.endswith(".partial")
    write(tmp_path / "toy")
    assert names(tmp_path) == sorted([left_over, "toy"])


def test_an_existing_bundle_is_not_overwritten_unasked(toy: Path) -> None:
    with pytest.raises(UsageError, match="--overwrite"):
        BundleWriter(toy)


def test_a_name_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--overwrite"), BundleWriter(tmp_path / "toy") as writer:
        write_files(writer.path)
        write_bundle(tmp_path / "toy", name="faster")
        writer.finish(**arguments())
    assert Bundle.open(tmp_path / "toy").manifest.name == "faster"
    assert names(tmp_path) == ["toy"]


def test_overwriting_replaces_the_bundle(toy: Path) -> None:
    (toy / ".DS_Store").touch()
    assert write(toy, overwrite=True, name="second").manifest.name == "second"
    assert Bundle.open_verified(toy).manifest.name == "second"
    assert names(toy.parent) == ["toy"]


def test_overwriting_through_a_link_replaces_what_it_points_to(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(toy)
    write(tmp_path / "link", overwrite=True, name="second")
    assert (tmp_path / "link").is_symlink()
    assert Bundle.open(toy).manifest.name == "second"


def test_a_damaged_bundle_may_be_overwritten(toy: Path) -> None:
    (toy / "decoder.onnx").unlink()
    (toy / "tokenizer.json").write_bytes(b"damaged")
    write(toy, overwrite=True)
    Bundle.open_verified(toy)


def test_overwriting_never_deletes_what_is_no_part_of_a_bundle(toy: Path, tmp_path: Path) -> None:
    for name in ("notes.txt", ".git/config"):
        write_files(toy, {name: b"precious"})
        with pytest.raises(UsageError, match="holds more than a bundle"):
            BundleWriter(toy, overwrite=True)
        (toy / name).unlink()
    other = write_files(tmp_path / "other", {"thesis.txt": b"precious"})
    with pytest.raises(UsageError, match=r"holds more than a bundle \(thesis\.txt\)"):
        BundleWriter(other, overwrite=True)
    write_files(other, {"bundle.json": b'["another program\'s"]'})
    with pytest.raises(UsageError, match="holds more than a bundle"):
        BundleWriter(other, overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        BundleWriter(other / "thesis.txt", overwrite=True)


def test_the_old_bundle_survives_a_failed_write(toy: Path) -> None:
    with pytest.raises(RuntimeError), BundleWriter(toy, overwrite=True) as writer:
        write_files(writer.path)
        raise RuntimeError
    assert Bundle.open_verified(toy).manifest.name == "toy"


def test_the_old_bundle_comes_back_when_the_last_rename_fails(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def refuse_the_new_one(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(OutputError, match=r"cannot write .*toy: Permission denied; choose another folder"):
        write(toy, overwrite=True, name="second")
    assert Bundle.open_verified(toy).manifest.name == "toy"
    assert names(toy.parent) == ["toy"]


def test_a_full_disk_while_filling_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left on device; free some space"), BundleWriter(tmp_path / "toy"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_a_full_disk_while_finishing_is_one_sentence(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        write(toy, overwrite=True, name="second")
    assert Bundle.open_verified(toy).manifest.name == "toy"
    assert names(toy.parent) == ["toy"]


def test_a_checkpoint_that_cannot_be_read_is_not_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(PermissionError) as caught, BundleWriter(tmp_path / "toy"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "checkpoint.bin"))
    assert not isinstance(caught.value, OutputError)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*toy: "), BundleWriter(tmp_path / "file" / "toy"):
        pass


def test_the_writer_refuses_what_the_reader_would(tmp_path: Path) -> None:
    with pytest.raises(BundleInvalidError, match=r"toy is refused: tokenizer 'missing\.json' is not listed in files"):
        write(tmp_path / "toy", tokenizer="missing.json")
    with pytest.raises(BundleInvalidError, match="NaN or infinite"):
        write(tmp_path / "toy", scorecard={"psnr_db": float("inf")})
    with pytest.raises(BundleInvalidError, match="'link' is a link"), BundleWriter(tmp_path / "toy") as writer:
        write_files(writer.path)
        (writer.path / "link").symlink_to(tmp_path)
        writer.finish(**arguments())
    assert names(tmp_path) == []
