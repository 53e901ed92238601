"""A second graph of a component, on the same weights, in operators and types of graphics cards.

What computes on 8-bit activations, which no card's provider has kernels for, computes on expanded weights there. Blocks
of 4 bits are read as blocks of 32, whose products have a fused kernel: the bytes are the same, a scale is repeated for
each part of its block. With float16, matrix products and attention compute in it, and what lies between them moves it;
norms, sums and rotary embeddings stay in float32, so that the residual stream cannot leave float16's range
(Micikevicius et al. 2018, arXiv 1710.03740, section 3.3).

Everything that is made of weights alone is computed by ONNX Runtime when it opens the session, so the second graph adds
no data: a file of operators beside the first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from pochade.component import Component, GpuGraph, with_graphs
from pochade.gpu_half import Narrowing, is_half
from pochade.gpu_strips import take_rows_before_loops
from pochade.graph_edit import before, forget_shapes, home, register, subgraphs
from pochade.session_memory import weight_bytes

OWN_DOMAIN = "pochade"
"""Of functions that quantization writes into a graph's file."""

ROUNDED_ATTENTION = "RoundedAttention"
"""What names of those functions begin with that stand for an attention, see `pochade.quant.attention`."""

CPU_ONLY = frozenset({"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeLinear", "QLinearMatMul", "ConvInteger"})
"""Operators of 8-bit activations that are left once those below are replaced; a graph with one stays on the CPU."""

BLOCK = 32
"""Block size of the fused kernel of CUDA's MatMulNBits (weights of 4 bits, float16, no zero points)."""

INLINE_BYTES = 1024
"""Constants up to so many bytes stay in the graph's own file."""


def save_gpu_graph(path: Path, dtype: str) -> GpuGraph | None:
    """Write the second graph beside a component's first.

    Args:
        path: of the first graph, `<name>.onnx`; with what takes low-rank changes, `<name>.lora.onnx`.
        dtype: `float16` or `float32`, what matrix products are computed in.

    Returns:
        What the manifest says about it; None where the first graph is as good on a card, or cannot be brought there.
    """
    model = ir.load(path)
    if any(node.op_type in CPU_ONLY for node in model.graph.all_nodes()):
        return None
    changed = restore_attention(model) + _replace_operators(model) + take_rows_before_loops(model)
    if dtype == "float16" and not is_half(model.graph) and not any(subgraphs(node) for node in model.graph):
        changed += Narrowing(model.graph).apply()
    if not changed:
        return None
    RemoveUnusedNodesPass()(model)
    _read_from(path, model)
    target = path.with_name(f"{path.stem}.gpu.onnx")
    forget_shapes(model)
    ir.save(model, target)
    return GpuGraph(target.name, dtype, weight_bytes(model))


def with_gpu_graphs(component: Component, folder: Path, dtype: str) -> Component:
    """A component with its graphs for graphics cards written beside those that it has.

    Args:
        component: whose files lie in the folder.
        folder: of the bundle.
        dtype: see `save_gpu_graph`.
    """
    return with_graphs(component, "gpu", lambda file: save_gpu_graph(folder / file, dtype))


def restore_attention(model: ir.Model) -> int:
    """Let every attention of rounded numbers be the exact one that it stands for, and say how many there were."""
    rounded = [node for node in model.graph if node.domain == OWN_DOMAIN and node.op_type.startswith(ROUNDED_ATTENTION)]
    for node in rounded:
        node.domain, node.op_type = "com.microsoft", "MultiHeadAttention"
    if rounded:
        model.functions.clear()
        model.graph.opset_imports.pop(OWN_DOMAIN)
    return len(rounded)


def _replace_operators(model: ir.Model) -> int:
    """Replace what a card has no kernel for, or no fast one, and say how many there were."""
    changed = 0
    for node in list(model.graph.all_nodes()):
        if node.op_type == "DynamicQuantizeMatMul":
            _expand(node)
        elif node.op_type == "QLinearConv":
            _expand_convolution(node)
        elif node.op_type == "DepthToSpace" and node.outputs[0].dtype is ir.DataType.UINT8:
            _rearrange_floats(node)
        elif node.op_type == "MatMulNBits" and _can_split(node):
            _split_blocks(node)
        elif node.op_type == "ArgMax" and (ids := node.inputs[0]) is not None and ids.dtype is ir.DataType.INT64:
            # No card compares whole numbers for it; ids of a vocabulary are exact in float32.
            node.replace_input_with(0, before(node, "Cast", [ids], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT)))
        else:
            continue
        changed += 1
    return changed


def _expand(product: ir.Node) -> None:
    """A product of rounded activations -> one of whole ones with the expanded weight."""
    x, codes, scales, zero, bias = (*product.inputs, None, None)[:5]
    assert x is not None and codes is not None and scales is not None, f"{product.name} is incomplete"
    graph, result = home(product), product.outputs[0]
    name = codes.name
    given = [codes, scales] if zero is None else [codes, scales, zero]
    expanded = ir.node("DequantizeLinear", given, {"axis": 1}, name=f"{name}.expanded")
    multiplied = ir.node("MatMul", [x, expanded.outputs[0]], name=f"{name}.product")
    nodes = [expanded, multiplied]
    if bias is not None:
        nodes.append(ir.node("Add", [multiplied.outputs[0], bias], name=f"{name}.biased"))
    for node in nodes:
        node.outputs[0].name, node.outputs[0].dtype = f"{result.name}.{node.op_type}", ir.DataType.FLOAT
    expanded.outputs[0].shape = codes.shape
    last = nodes[-1].outputs[0]
    last.name, last.shape, last.type, result.name = result.name, result.shape, result.type, f"{result.name}.rounded"
    graph.insert_after(product, nodes)
    result.replace_all_uses_with(last, replace_graph_outputs=True)
    graph.remove(product, safe=True)


def _expand_convolution(product: ir.Node) -> None:
    """A convolution of 8-bit numbers -> one of whole numbers between widening and rounding, with the expanded weight.

    Weight and bias are expanded by Cast and Mul, once for all bodies that read them and before any of them.
    """
    x, x_scale, x_zero, codes, scales, _, *steps = product.inputs
    steps, bias = steps[:2], steps[2] if len(steps) > 2 else None
    assert codes is not None and scales is not None, f"{product.name} is incomplete"
    brought = codes.producer()
    codes = codes if brought is None else brought.inputs[0]
    assert codes is not None and isinstance(codes.graph, ir.Graph) and codes.shape is not None, "a weight is computed"
    widened = ir.node("DequantizeLinear", [x, x_scale, _fixed(x_zero)], name=f"{product.name}.widened")
    column = [-1, *[1] * (len(codes.shape) - 1)]
    inputs: list[ir.Value | None] = [widened.outputs[0], _scaled(codes.graph, codes, [scales], column)]
    if bias is not None:
        inputs.append(_scaled(codes.graph, bias, [scales, x_scale], [-1]))
    conv = ir.Node("", "Conv", inputs, product.attributes.values(), name=f"{product.name}.expanded")
    for node in (widened, conv):
        node.outputs[0].name, node.outputs[0].dtype = node.name, ir.DataType.FLOAT
    home(product).insert_before(product, [widened, conv])
    product.op_type, product.name = "QuantizeLinear", f"{product.name}.rounded"
    product.attributes.clear()
    product.resize_inputs(3)
    for i, value in enumerate((conv.outputs[0], *steps)):
        product.replace_input_with(i, value)


def _fixed(zero: ir.Value | None) -> ir.Value | None:
    """The constant that a free zero point is made of (`pochade.quant.int8_conv`); any other one as it is."""
    made = zero.producer() if zero is not None else None
    return zero if made is None else made.inputs[0]


def _rearrange_floats(node: ir.Node) -> None:
    """Cards rearrange no 8-bit numbers."""
    result, codes = node.outputs[0], node.inputs[0]
    assert codes is not None, f"{node.name} is incomplete"
    node.replace_input_with(0, before(node, "Cast", [codes], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT)))
    narrow = ir.node("Cast", [result], {"to": int(ir.DataType.UINT8)}, name=f"{result.name}.narrow")
    narrow.outputs[0].name, narrow.outputs[0].dtype = narrow.name, ir.DataType.UINT8
    result.replace_all_uses_with(narrow.outputs[0], replace_graph_outputs=True)
    narrow.replace_input_with(0, result)
    home(node).insert_after(node, narrow)


def _scaled(main: ir.Graph, codes: ir.Value, factors: list[ir.Value | None], shape: list[int]) -> ir.Value:
    """Integers as floats, times factors in that shape; the same value for the same integers."""
    name = f"{codes.name}.expanded"
    for use in codes.uses():
        if use.node.op_type == "Cast":
            value = use.node.outputs[0]
            while value.name != name:
                (value,) = (following.node.outputs[0] for following in value.uses())
            return value
    asked = register(main, ir.Tensor(np.array(shape), name=f"{name}.shape"))
    nodes = [ir.node("Cast", [codes], {"to": int(ir.DataType.FLOAT)}, name=f"{name}.cast")]
    for i, factor in enumerate(factors):
        lifted = ir.node("Reshape", [factor, asked], name=f"{name}.factor{i}")
        nodes += [lifted, ir.node("Mul", [nodes[-1].outputs[0], lifted.outputs[0]], name=f"{name}.mul{i}")]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].dtype = str(node.name), ir.DataType.FLOAT
    last = nodes[-1].outputs[0]
    last.name, last.shape = name, codes.shape
    main.insert_before(main[0], nodes)
    return last


def _can_split(product: ir.Node) -> bool:
    """Whether blocks of a product are several blocks of 32, and nothing stands in the way."""
    size, width = (product.attributes.get_int(name, 0) for name in ("block_size", "K"))
    has_zeros = len(product.inputs) > 3 and product.inputs[3] is not None
    return product.attributes.get_int("bits", 4) == 4 and size > BLOCK and width % size == 0 and not has_zeros


def _split_blocks(product: ir.Node) -> None:
    """Read each block as blocks of 32."""
    codes, scales = product.inputs[1:3]
    assert codes is not None and scales is not None and scales.dtype is not None, f"{product.name} is incomplete"
    width, rows = (product.attributes.get_int(name, 0) for name in ("K", "N"))
    parts = product.attributes.get_int("block_size", BLOCK) // BLOCK
    blocks = width // BLOCK
    _read_as(codes, (rows, blocks, BLOCK // 2))
    repeated = scales
    for op_type, shape in (
        ("Reshape", (rows, blocks // parts, 1)),
        ("Expand", (rows, blocks // parts, parts)),
        ("Reshape", (rows, blocks)),
    ):
        asked = ir.Tensor(np.array(shape), name=f"{repeated.name}.{op_type}.shape")
        repeated = before(product, op_type, [repeated, register(home(product), asked)], scales.dtype)
    product.replace_input_with(2, repeated)
    product.attributes.add(ir.AttrInt64("block_size", BLOCK))
    product.attributes.pop("accuracy_level", None)


def _read_as(value: ir.Value, shape: tuple[int, ...]) -> None:
    """Give an initializer another shape, its bytes where they are."""
    stored = value.const_value
    assert stored is not None, f"{value.name} is no initializer"
    if isinstance(stored, ir.ExternalTensor):
        value.const_value = ir.ExternalTensor(
            stored.location,
            stored.offset,
            stored.length,
            stored.dtype,
            name=value.name or "",
            shape=ir.Shape(shape),
            base_dir=stored.base_dir,
        )
    else:
        value.const_value = ir.Tensor(stored.numpy().reshape(shape), name=value.name)
    value.shape = ir.Shape(shape)


def _read_from(path: Path, model: ir.Model) -> None:
    """Let large constants in the bodies of loops be read from where they lie in the first graph's file.

    Quantization keeps them there and not in a data file, for reasons of the CPU (`store_in_subgraphs`).
    """
    file = path.read_bytes()
    for node in list(model.graph.all_nodes()):
        stored = node.attributes.get("value") if node.op_type == "Constant" else None
        if stored is None or home(node) is model.graph or (tensor := stored.as_tensor()).nbytes < INLINE_BYTES:
            continue
        content, name = tensor.tobytes(), node.outputs[0].name
        start = file.find(content)
        assert start >= 0, f"{name} does not lie in {path.name} as it is computed with"
        shape = ir.Shape(tensor.shape.numpy())
        where = ir.ExternalTensor(
            path.name, start, len(content), tensor.dtype, shape=shape, name=str(name), base_dir=path.parent
        )
        node.outputs[0].replace_all_uses_with(register(model.graph, where))
        home(node).remove(node, safe=True)
    _hoist(model.graph)


def _hoist(main: ir.Graph) -> None:
    """Expand weights before a loop, where its body expands them: once, and ONNX Runtime refuses the other way."""
    weights = set(main.initializers.values())
    for node in list(main.all_nodes()):
        if node.op_type == "DequantizeLinear" and home(node) is not main and weights.issuperset(node.inputs):
            home(node).remove(node)
            main.insert_before(main[0], node)
