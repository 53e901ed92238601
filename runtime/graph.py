"""A graph that is in memory, opened beside its data files: for looking into a component, not for painting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pochade.machine import usable_cores
from pochade.runtime.ort import ort


class GraphSession:
    """A session on the CPU whose outputs are asked for by name."""

    def __init__(self, model: bytes, folder: Path) -> None:
        """Open the graph.

        Args:
            model: a serialized ONNX model.
            folder: where its external data files lie.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = usable_cores()
        # Every weight that may be replaced earns a warning otherwise.
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(self, outputs: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs asked for; initializers that are graph inputs may be among the inputs."""
        return dict(zip(outputs, self._session.run(list(outputs), dict(inputs)), strict=True))
