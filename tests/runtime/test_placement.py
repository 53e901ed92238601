"""Provider truth: which provider computes the nodes of a session."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from pochade.errors import DeviceUnavailableError
from pochade.runtime.opening import _check
from pochade.runtime.placement import CPU, Placement, judge, placement
from pochade.runtime.providers import Device, fix

CUDA = "CUDAExecutionProvider"


@pytest.mark.parametrize(
    ("reason", "mend"),
    [
        ("the installed onnxruntime has no CUDA provider", 'pip install "pochade\\[gpu\\]"'),
        ("libcuda.so.1: cannot open shared object file: No such file or directory", "driver, 580 or newer"),
        ("CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version", "driver to 580"),
        ("libcublasLt.so.13: cannot open shared object file", "brings CUDA and cuDNN"),
        ("Error loading cudnn64_9.dll which is missing", "brings CUDA and cuDNN"),
    ],
)
def test_every_reason_has_its_fix(reason: str, mend: str) -> None:
    found = fix("cuda", reason)
    assert found is not None and re.search(mend, found)
    assert fix("cpu", reason) is None


def test_shape_arithmetic_on_the_cpu_is_no_stray() -> None:
    found = judge(CUDA, [(CUDA, "MatMul"), (CUDA, "Add"), (CPU, "Concat"), (CPU, "Gather")])
    assert found == Placement(CUDA, 2, {})
    assert str(found) == CUDA


def test_what_the_cpu_computes_is_named() -> None:
    found = judge(CUDA, [(CUDA, "MatMul"), (CPU, "MatMulInteger"), (CPU, "ArgMax"), (CPU, "MatMulInteger")])
    assert str(found) == f"{CUDA}, but ArgMax, 2 MatMulInteger on {CPU}"


class Session:
    """As much of a session as tells where its nodes are."""

    def __init__(self, providers: list[str], **nodes: list[str]) -> None:
        self._providers, self._nodes = providers, nodes

    def get_providers(self) -> list[str]:
        return self._providers

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=op) for op in ops])
            for name, ops in self._nodes.items()
        ]


def test_the_record_of_a_session_is_read() -> None:
    session = Session([CUDA, CPU], **{CUDA: ["MatMul", "Softmax"], CPU: ["QLinearConv", "Shape"]})
    assert placement(session) == Placement(CUDA, 2, {"QLinearConv": 1})


def test_a_session_on_the_cpu_is_not_asked() -> None:
    assert placement(Session([CPU], **{CPU: ["MatMul"]})) == Placement(CPU, 0, {})


def test_a_device_asked_for_by_name_computes_everything() -> None:
    device = Device("cuda", required=True)
    _check(Placement(CUDA, 9, {}), "transformer", device)
    with pytest.raises(
        DeviceUnavailableError, match=r"transformer cannot run on cuda alone: the CPU would compute 2 Gru"
    ):
        _check(Placement(CUDA, 9, {"Gru": 2}), "transformer", device)
    with pytest.raises(DeviceUnavailableError, match="transformer runs on CPUExecutionProvider instead of CUDA"):
        _check(Placement(CPU, 0, {}), "transformer", device)
