"""Launches of Triton kernels as nodes of Inductor's graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import empty_strided
from torch._inductor.virtualized import V, ops

from ..kernels.launch import Launch
from .kernel_source import parameters_of
from .launch_code import start
from .launched import Traced


def insert_launches(traced: Traced, inputs: Sequence[tuple[Tensor, ir.TensorBox]]) -> ir.TensorBox:
    """Nodes that start the kernels, each after the one before it; the buffer of the result.

    Args:
        inputs: the fake tensors that the traced call was given, each with memory of its own, and what they stand for.
    """
    boxes = {_memory(fake): box for fake, box in inputs}
    before: Sequence[ir.TensorBox] = ()
    for launch in traced.launches:
        before = KernelLaunch(launch, boxes, before).written
    return boxes[_memory(traced.result)]


def weighted_sum(y: Any, ids: Any, weights: Any | None, experts: int, dtype: torch.dtype) -> Any:
    """y [T * A, N], ids and weights [T, A] -> [T, N]: float32 sums, one slot after the other, rounded once.

    Rows of slots without an expert hold anything. An expression of Inductor's: it fuses with what reads it. Written
    out over A, since Inductor would end a kernel after a reduction.
    """
    tokens, top = map(int, ids.get_size())
    row, expert, weight = y.make_loader(), ids.make_loader(), weights.make_loader() if weights is not None else None

    def term(token: Any, place: int, column: Any) -> Any:
        value = ops.to_dtype(row([token * top + place, column]), torch.float32)
        if weight is not None:
            value = ops.mul(value, ops.to_dtype(weight([token, place]), torch.float32))
        found = expert([token, place])
        low, high = (ops.constant(n, ids.get_dtype()) for n in (0, experts))
        inside = ops.and_(ops.ge(found, low), ops.lt(found, high))
        return ops.where(inside, value, ops.constant(0.0, torch.float32))

    def element(index: Sequence[Any]) -> Any:
        token, column = index
        return ops.to_dtype(functools.reduce(ops.add, (term(token, place, column) for place in range(top))), dtype)

    return ir.Pointwise.create(
        device=y.get_device(), dtype=dtype, inner_fn=element, ranges=[tokens, int(y.get_size()[1])]
    )


class KernelLaunch(ir.ExternKernel):
    """One launch. Unlike Inductor's own node for kernels of users it is told what the kernel writes.

    Kernels that start while others end rely on the order of launches that they were written for, so each launch
    counts what the one before it wrote among its inputs.
    """

    def __init__(self, launch: Launch, boxes: dict[int, ir.TensorBox], before: Sequence[ir.TensorBox]) -> None:
        self.launch = launch
        self.arguments = dict(zip(parameters_of(launch.kernel), launch.arguments, strict=True))
        self.operands = {name: _operand(t, boxes) for name, t in self.arguments.items() if isinstance(t, Tensor)}
        device = next(iter(self.operands.values())).get_device()
        order = [_buffer(box) for box in before]
        super().__init__(None, ir.NoneLayout(device=device), [*self.operands.values(), *order])
        self.device = device
        self.written = [boxes[_memory(self.arguments[name])] for name in launch.writes]
        self.mutation_outputs = [ir.MutationOutput(ir.NoneLayout(device=device), box, self) for box in self.written]
        V.graph.register_operation(self)

    def get_outputs(self) -> list[ir.Buffer]:
        return list(self.mutation_outputs)

    def get_device(self) -> torch.device:
        return self.device

    def should_allocate(self) -> bool:
        return False

    def codegen(self, wrapper: Any) -> None:
        comment = functools.partial(self.codegen_comment, wrapper)
        start(wrapper, self.launch, self.arguments, self.operands, self.device, comment)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _buffer(box: ir.TensorBox) -> Any:
    return ir.ExternKernel.unwrap_storage_for_input(ir.ExternKernel.realize_input(box))


def _operand(tensor: Tensor, boxes: dict[int, ir.TensorBox]) -> Any:
    """Where the tensor starts in its buffer, which is allocated here if nothing has it yet."""
    key = _memory(tensor)
    if key not in boxes:
        boxes[key] = empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    buffer = _buffer(boxes[key])
    start_bytes = tensor.storage_offset() * tensor.element_size()
    if start_bytes == 0:
        return buffer
    # Kernels take an address: of the tensor's own dtype, sizes and strides nothing need be told.
    offset = buffer.get_layout().offset + start_bytes // buffer.get_dtype().itemsize
    layout = ir.FixedLayout(buffer.get_device(), buffer.get_dtype(), [1], [1], offset)
    storage = buffer.data if isinstance(buffer, ir.ReinterpretView) else ir.StorageBox(buffer)
    return ir.ReinterpretView(data=storage, layout=layout)
