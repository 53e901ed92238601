"""Functions of the domain `pochade` in a graph's file; ONNX Runtime takes them apart when it opens the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from pochade.gpu_graph import OWN_DOMAIN
from pochade.quant.streamed import Array
from pochade.quant.surgery import MICROSOFT


class FunctionTape(tape.Tape):
    """Records the nodes of a function, and its constants when they are first asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, ir.Value] = {}

    def constant(self, name: str, array: Array) -> ir.Value:
        """The constant of that name."""
        if name not in self._known:
            self._known[name] = self.op("Constant", [], {"value": ir.Tensor(array)})
        return self._known[name]

    def integers(self, *numbers: int) -> ir.Value:
        """A list of int64."""
        return self.constant("_".join(map(str, numbers)), np.array(numbers, np.int64))

    def number(self, value: float) -> ir.Value:
        """A float32."""
        return self.constant(f"{value:.9g}", np.array(value, np.float32))

    def function(
        self,
        name: str,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        opset: int,
        attributes: Mapping[str, ir.AttributeType],
    ) -> ir.Function:
        """The function.

        Args:
            name: unique in its file.
            inputs: of its own.
            outputs: among what was recorded.
            opset: version of ONNX's operators.
            attributes: that nodes of it may carry, without a default.
        """
        imports = {"": opset, MICROSOFT: 1}
        graph = ir.Graph(inputs, outputs, nodes=self.nodes, opset_imports=imports, name=name)
        declared = [ir.Attr(each, kind, None) for each, kind in attributes.items()]
        return ir.Function(OWN_DOMAIN, name, graph=graph, attributes=declared)
