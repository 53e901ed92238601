"""The smallest model there is, to see whether a provider really opens a session."""

from __future__ import annotations


def identity_model() -> bytes:
    """ONNX model with one Identity node from `x` to `y`, float32 of shape (1); IR 10, opset 20.

    Written as protobuf fields by hand: the runtime has no onnx package to build it with.
    """

    def field(number: int, payload: bytes | str | int) -> bytes:
        if isinstance(payload, int):
            return bytes([number << 3, payload])
        data = payload.encode() if isinstance(payload, str) else payload
        return bytes([number << 3 | 2, len(data)]) + data

    shape = field(1, field(1, 1))  # TensorShapeProto.dim.dim_value
    tensor_type = field(1, field(1, 1) + field(2, shape))  # TypeProto.tensor_type: elem_type FLOAT, shape
    node = field(1, "x") + field(2, "y") + field(4, "Identity")
    ports = [field(number, field(1, name) + field(2, tensor_type)) for number, name in ((11, "x"), (12, "y"))]
    graph = field(1, node) + field(2, "identity") + b"".join(ports)
    return field(1, 10) + field(7, graph) + field(8, field(2, 20))  # ir_version, graph, opset_import
