"""Transpose(weight) -> weight stored transposed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pochade.graph_edit import register


class FoldTransposePass(ir.passes.InPlacePass):
    """Replaces a Transpose of an initializer by an initializer that is transposed when it is written.

    PyTorch keeps linear weights as (out, in) and MatMul wants (in, out); without this each weight would be
    turned whenever a session opens, at twice its memory.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold every such node of the main graph."""
        modified = False
        for node in list(model.graph):
            weight = node.inputs[0] if node.op_type == "Transpose" else None
            if weight is None or weight.const_value is None or not weight.is_initializer():
                continue
            permutation = node.attributes["perm"].as_ints()
            turned = self._turned(model.graph, weight, tuple(permutation))
            ir.convenience.replace_all_uses_with(node.outputs[0], turned)
            model.graph.remove(node, safe=True)
            if not weight.uses():
                assert weight.name is not None
                model.graph.initializers.pop(weight.name)
            modified = True
        return ir.passes.PassResult(model, modified)

    @staticmethod
    def _turned(graph: ir.Graph, weight: ir.Value, permutation: tuple[int, ...]) -> ir.Value:
        source = weight.const_value
        assert source is not None and weight.name is not None
        name = weight.name + ".T"
        if name in graph.initializers:
            return graph.initializers[name]
        shape = ir.Shape([source.shape.numpy()[i] for i in permutation])
        tensor = ir.LazyTensor(
            lambda: ir.Tensor(np.ascontiguousarray(source.numpy().transpose(permutation))),
            dtype=source.dtype,
            shape=shape,
            name=name,
        )
        return register(graph, tensor)
