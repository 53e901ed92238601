"""A component laid open: what every linear layer is given, and what comes out with other weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pochade.quant.scheme import Use
from pochade.quant.select import Weight, find_weights
from pochade.runtime.graph import GraphSession

Array = NDArray[Any]


class Instrument:
    """A component's graph in which weights can be replaced for one run, and layer inputs read.

    Weights become graph inputs with the initializer as their default (ONNX IR, "Graphs"), and the inputs of linear
    layers become graph outputs, which all stay in memory during a run. One session serves thousands of trials.
    """

    def __init__(self, path: Path, *, replacing: bool = True) -> None:
        """Open the graph.

        Args:
            path: graph file; its data files lie beside it.
            replacing: whether weights will be replaced; products run slower when they may be, and read the weights
                where the file is mapped, of which the system may drop what it needs.
        """
        model = ir.load(path)
        self.outputs = [str(value.name) for value in model.graph.outputs]
        self.weights = {weight.name: weight for weight in find_weights(model)}
        self._sources: dict[str, str] = {}
        for weight in self.weights.values():
            if replacing and weight.graph is model.graph:
                model.graph.inputs.append(weight.value)
            source = _layer_input(weight, model.graph)
            if source is None:
                continue
            self._sources[weight.name] = str(source.name)
            if source not in model.graph.outputs and source not in model.graph.inputs:
                model.graph.outputs.append(source)
        self._inputs = {str(value.name) for value in model.graph.inputs} - {w.value.name for w in self.weights.values()}
        self._session = GraphSession(ir.to_proto(model).SerializeToString(), path.parent)

    @property
    def readable(self) -> dict[str, str]:
        """Linear weights whose input can be read, and the name of that input; several may share one."""
        return dict(self._sources)

    def width(self, name: str) -> int:
        """Numbers in a row of a weight's input."""
        return self.weights[name].width

    def run(
        self, inputs: Mapping[str, Array], weights: Mapping[str, Array] | None = None, read: Sequence[str] = ()
    ) -> dict[str, Array]:
        """Run once.

        Args:
            inputs: of the component.
            weights: replacements for this run, by name of the initializer.
            read: names of layer inputs wanted beside the component's outputs.
        """
        given = [name for name in read if name in self._inputs]
        wanted = [name for name in dict.fromkeys([*self.outputs, *read]) if name not in given]
        out = self._session.run(wanted, {**inputs, **(weights or {})})
        return out | {name: np.asarray(inputs[name]) for name in given}


def _layer_input(weight: Weight, graph: ir.Graph) -> ir.Value | None:
    """What the one layer that reads a linear weight multiplies it with, None where that cannot be read."""
    inputs = {reader.inputs[0] for reader in weight.readers}
    if weight.use is not Use.LINEAR or len(inputs) != 1:
        return None
    (source,) = inputs
    producer = source.producer() if source is not None else None
    owner = producer.graph if producer is not None else graph
    is_constant = source is None or source.is_initializer() or source.type is None
    return None if is_constant or owner is not graph else source
