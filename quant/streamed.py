"""Tensors that are read, transformed and written a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import IO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pochade.errors import InputRefusedError

SLAB = 1 << 21
"""Numbers per chunk: 8 MB in float32, small beside any model and large enough for numpy to run at full speed."""

Array = NDArray[np.generic]


class StreamedTensor(ir.LazyTensor):
    """A tensor whose content is computed chunk by chunk whenever it is written.

    A modulation layer merged over all blocks is a single tensor of a gigabyte, so that computing one tensor at a
    time would not be enough to stay small.
    """

    def __init__(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], chunks: Callable[[], Iterator[Array]]
    ) -> None:
        """Describe the tensor.

        Args:
            name: name of the initializer.
            dtype: type of its elements.
            shape: its shape.
            chunks: makes an iterator over consecutive parts of the content, in row-major order.
        """
        self._chunks = chunks
        super().__init__(self._whole, dtype, ir.Shape(shape), name=name)

    def _whole(self) -> ir.TensorProtocol:
        parts = [np.ravel(chunk) for chunk in self._checked()]
        return ir.Tensor(np.concatenate(parts).reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)

    def tofile(self, file: IO[bytes]) -> None:
        """Write the content to a binary file."""
        for chunk in self._checked():
            little_endian = chunk.astype(chunk.dtype.newbyteorder("<"), copy=False)
            file.write(np.ascontiguousarray(little_endian).data)

    def _checked(self) -> Iterator[Array]:
        try:
            yield from self._chunks()
        except FloatingPointError as error:
            raise InputRefusedError(f"weight {self.name}", [str(error)]) from error


def read(tensor: ir.TensorProtocol) -> NDArray[np.floating]:
    """Content of a float tensor; of an external one a memory map that is closed with its last view."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    # An ExternalTensor holds on to its map, and with it to the pages read, so ask a short-lived twin.
    twin = ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=tensor.base_dir,
    )
    return twin.numpy()


def slabs(array: NDArray[np.floating]) -> Iterator[NDArray[np.floating]]:
    """Consecutive parts of an array along its first axis, of about `SLAB` numbers, contiguous and read-only."""
    width = max(1, array.size // max(1, len(array)))
    step = max(1, SLAB // width)
    for start in range(0, len(array), step):
        yield np.ascontiguousarray(array[start : start + step])
