"""Embeddings on block-quantized tables: Gather becomes `com.microsoft.GatherBlockQuantized`.

Inputs of the operator are data (rows, width * bits / 8) uint8, the ids, and scales (rows, blocks) whose type is that
of the output. Without zero points it takes the middle of the code range, for uint8 data. It only expands the rows
asked for, and the table stays a memory map. Unlike Gather it answers an id that is out of range with zeros.
"""

from __future__ import annotations

from pochade.quant.blocks import add_blocks
from pochade.quant.scheme import Storage
from pochade.quant.select import Weight
from pochade.quant.surgery import become, drop


def rewrite(weight: Weight, storage: Storage) -> None:
    """Replace the readers of an embedding table."""
    assert storage.block_size is not None, "not a block storage"
    codes, scales = add_blocks(weight, storage, padded=False)
    attributes = {"bits": storage.bits, "block_size": storage.block_size, "gather_axis": 0, "quantize_axis": 1}
    for node in weight.readers:
        become(node, "GatherBlockQuantized", [codes, node.inputs[1], scales], attributes)
    drop(weight)
