"""The wire reader against the onnx package: it finds what is there, and never chokes on what is not."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper

from pochade import onnx_external
from pochade.onnx_external import MAX_DEPTH, MalformedModelError, model_facts, read_model_facts
from tests.bundles import external_tensor, model, varint, wire


def tensor(location: str, offset: int | None = None, length: int | None = None) -> TensorProto:
    made = TensorProto(name=location, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    places = {"location": location, "offset": offset, "length": length}
    for key, value in places.items():
        if value is not None:
            made.external_data.add(key=key, value=str(value))
    return made


def graph(name: str, nodes: list[onnx.NodeProto], *initializers: TensorProto) -> onnx.GraphProto:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    return helper.make_graph(nodes, name, [], [value], list(initializers))


def everywhere() -> onnx.ModelProto:
    """A model with an external tensor in every place that onnx.proto has for one."""
    inner = graph("inner", [helper.make_node("Constant", [], ["y"], value=tensor("inner.value"))], tensor("inner"))
    body = graph("body", [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)], tensor("body"))
    sparse = helper.make_sparse_tensor(tensor("values"), tensor("indices"), [1])
    many = helper.make_node("Many", [], ["y"], domain="d", tensors=[tensor("list.0"), tensor("list.1")])
    nodes = [
        helper.make_node("Loop", ["n", "c"], ["y"], body=body),
        many,
        helper.make_node("Constant", [], ["z"], sparse_value=sparse),
        helper.make_node("Graphs", [], ["g"], domain="d", graphs=[graph("listed", [], tensor("graphs.0"))]),
        helper.make_node("Sparses", [], ["s"], domain="d", sparses=[sparse]),
    ]
    main = graph("main", nodes, tensor("big", 4096, 100), tensor("big", 0, 4096), TensorProto(name="inside"))
    main.sparse_initializer.append(helper.make_sparse_tensor(tensor("main.values"), tensor("main.indices"), [1]))
    constant = helper.make_node("Constant", [], ["y"], value=tensor("function"))
    function = helper.make_function("d", "F", [], ["y"], [constant], [helper.make_opsetid("", 20)])
    function.attribute_proto.append(helper.make_attribute("default", tensor("function.default")))
    made = helper.make_model(main, functions=[function])
    made.training_info.add(initialization=graph("start", [], tensor("start")), algorithm=graph("go", [], tensor("go")))
    return made


def test_finds_external_data_wherever_it_may_hide(tmp_path: Path) -> None:
    onnx.save(everywhere(), tmp_path / "model.onnx")
    facts = read_model_facts(tmp_path / "model.onnx")
    places = "inner inner.value body values indices list.0 list.1 graphs.0 main.values main.indices function start go"
    expected = dict.fromkeys([*places.split(), "function.default"], 0)
    assert facts.external == expected | {"big": 4196}
    assert facts.operators == {"Loop", "If", "Constant", "Many", "Graphs", "Sparses"}


def test_data_written_by_onnx_is_found(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.zeros(1000, np.float32), "weight")
    onnx.save(
        helper.make_model(graph("g", [], weight)), tmp_path / "m.onnx", save_as_external_data=True, location="m.data"
    )
    assert read_model_facts(tmp_path / "m.onnx").external == {"m.data": 4000}


def test_a_model_without_external_data_needs_no_file() -> None:
    assert model_facts(helper.make_model(graph("g", [], TensorProto(name="x"))).SerializeToString()).external == {}


NODE = wire(1, wire(4, "Identity"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (wire(1, 10), "holds no graph"),
        (model()[:-1], "ends before its last field does"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "ends before its last field does"),
        (b"\x3a" + b"\xff" * 11, "a number without an end"),
        (b"\x08\x80", "a number without an end"),
        (b"\x0d\x00", "ends before its last field does"),
        (b"\x00\x00", "a field without a valid number"),
        (varint(1 << 33) + b"\x00", "a field without a valid number"),
        (b"\x0b", "the unknown wire type 3"),
        (b"\x0f", "the unknown wire type 7"),
        (wire(7, 1), "a number where a message belongs"),
        (wire(7, b"") + wire(7, b""), "a message twice where one belongs"),
        (model(nodes=wire(1, wire(4, b"\xff"))), "a name that is no UTF-8"),
        (model(external_tensor()), "without a location"),
        (model(external_tensor(location="")), "without a location"),
        (model(external_tensor(offset="0")), "without a location"),
        (model(external_tensor(location="a", offset="-1")), "'-1' as its offset"),
        (model(external_tensor(location="a", length="0x10")), "'0x10' as its length"),
        (model(external_tensor(location="a", length="²")), "'²' as its length"),
        (model(external_tensor(location="a", length="9" * 5000)), "as its length"),
        (model(external_tensor(location="a") + external_tensor(location="b")), "two values for 'location'"),
        (model(wire(13, wire(1, "location") + wire(2, "a") + wire(2, "b"))), "one key and one value"),
    ],
)
def test_what_cannot_be_followed_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(MalformedModelError, match=reason):
        model_facts(data)


def nested(depth: int) -> bytes:
    inner = wire(5, external_tensor(location="deep"))
    for _ in range(depth):
        inner = wire(1, wire(5, wire(6, inner)))
    return wire(7, inner)


def test_subgraphs_are_followed_down_to_a_limit() -> None:
    assert model_facts(nested((MAX_DEPTH - 2) // 3)).external == {"deep": 0}
    for depth in (MAX_DEPTH // 3 + 1, 5000):
        with pytest.raises(MalformedModelError, match="nests more than 64 messages"):
            model_facts(nested(depth))


def test_a_file_of_endless_fields_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_external, "MAX_FIELDS", 1000)
    with pytest.raises(MalformedModelError, match="more than 1000 fields"):
        model_facts(model(nodes=NODE * 1000))


def test_whatever_onnx_can_read_is_read_alike_or_refused() -> None:
    sound = everywhere().SerializeToString()
    dice = random.Random(0)
    alike = 0
    for _ in range(2000):
        data = bytearray(sound)
        for _ in range(dice.randint(1, 3)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            ours = set(model_facts(bytes(data)).external)
        except MalformedModelError:
            continue
        try:
            theirs = onnx.ModelProto.FromString(bytes(data))
        except DecodeError:
            continue
        assert ours == locations(theirs)
        alike += 1
    assert alike > 300


def locations(message: object) -> set[str]:
    """Every external location in a message of the onnx package, found by its own descriptors."""
    found = set()
    for descriptor, value in message.ListFields():  # type: ignore[attr-defined]
        if isinstance(message, TensorProto) and descriptor.name == "external_data":
            found |= {pair.value for pair in value if pair.key == "location"}
        elif descriptor.message_type is not None:
            children = value if hasattr(value, "append") or hasattr(value, "add") else [value]
            for child in children:
                found |= locations(child)
    return found
