"""Runs a command on a machine without a graphics card as if it had one that WebGPU can use.

    python -m pochade.benchmarks.software_webgpu pochade generate "a fox" --device webgpu

SwiftShader, the Vulkan driver in software that Chromium brings along (on Debian `apt-get install chromium`), computes
every kernel of the WebGPU provider on the CPU: what comes out is real, how long it takes says nothing. It has no
float16, and fused attention is wrong on it (see `pochade.runtime.webgpu`), so that transformers stay on the CPU. ONNX
Runtime looks for cards in the system's list of devices, so the command sees a list with a card in it, in a mount
namespace of its own: that takes Linux and root.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

DRIVERS = (
    "/usr/lib/chromium/vk_swiftshader_icd.json",
    "/usr/lib64/chromium-browser/vk_swiftshader_icd.json",
    "/opt/google/chrome/vk_swiftshader_icd.json",
)
"""Where distributions keep the driver's description; the variable SWIFTSHADER names another place."""

SCRIPT = """
set -e
card=/sys/bus/pci/devices/0000:00:02.0
mount -t tmpfs none /sys/bus/pci/devices
mount -t tmpfs none /sys/class
mkdir -p $card /sys/class/drm/card0
echo 0x030000 > $card/class
echo 0x1ae0 | tee $card/vendor > $card/subsystem_vendor
echo 0xc0de > $card/device
ln -s $card /sys/class/drm/card0/device
exec "$@"
"""
"""Puts a display controller (PCI class 03) of SwiftShader's numbers into the lists of devices and runs the command."""


def find_driver() -> Path | None:
    """Description of SwiftShader's driver, if there is one here."""
    candidates = [os.environ.get("SWIFTSHADER", ""), *DRIVERS]
    return next((Path(path) for path in candidates if path and Path(path).is_file()), None)


def run(command: list[str], driver: Path) -> int:
    """Exit code of a command that sees the card.

    Args:
        command: and its arguments.
        driver: of `find_driver`.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The first is read by today's loader of Vulkan drivers, the second by older ones.
        environment = os.environ | {"VK_DRIVER_FILES": str(driver), "VK_ICD_FILENAMES": str(driver)}
        environment.setdefault("XDG_RUNTIME_DIR", folder)
        script = ["unshare", "--mount", "sh", "-c", SCRIPT, "sh", *command]
        return subprocess.run(script, env=environment, check=False).returncode


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    command = sys.argv[1:] if argv is None else argv
    driver = find_driver()
    if not command or command[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if driver is None:
        print(f"SwiftShader is not here ({', '.join(DRIVERS)}); install chromium, or set SWIFTSHADER", file=sys.stderr)
        return 2
    return run(command, driver)


if __name__ == "__main__":
    sys.exit(main())
