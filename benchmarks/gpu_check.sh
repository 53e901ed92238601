#!/usr/bin/env bash
# Checks and measures pochade on this machine's graphics card: parity, provider truth, limits of memory, speed; one JSON.
#
#     benchmarks/gpu_check.sh [OUT.json] [BUNDLE] [further options of pochade.benchmarks.gpu_check]
#
# Fetches nothing. PYTHON names an interpreter where pochade and onnxruntime-gpu can be imported (default: python3).
set -euo pipefail

out=${1:-gpu_check.json}
bundle=${2:-starter}
shift $(($# < 2 ? $# : 2))
"${PYTHON:-python3}" -m pochade doctor || true
exec "${PYTHON:-python3}" -m pochade.benchmarks.gpu_check "$bundle" --json "$out" "$@"
