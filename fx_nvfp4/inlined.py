"""Our ops in generated code: their kernels there as text, started by Inductor's launcher.

Before:  buf = torch.ops.fx_nvfp4.moe.default(x, ids, weights, ...), a call of Python that starts five kernels
After:   table, entry, up and down kernels, and the weighted sum as an expression of Inductor's own, which fuses it
         with what follows, such as the residual and the next norm

So are linear and batched. Where the number of tokens is a symbol, the choice of tile sizes is one of each call, and
the op stays a call.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._inductor.virtualized import V
from torch.utils import _pytree as pytree

from . import gpu_tiled, routing_checks, tuning
from .block import Block
from .kernels.tile_config import TileConfigs, choose, target_of
from .lowering import compat
from .lowering.kernel_source import interprets
from .lowering.launch_node import insert_launches, weighted_sum
from .lowering.launched import NotLaunchesError, trace_launches
from .moe import check_block, make_block
from .ops import check_operands
from .reference import Activations

log = logging.getLogger("fx_nvfp4.inlined")
# What an operand stands for in Inductor's graph, by the fake tensor that a function was traced with.
Boxes = Mapping[int, Any]
_active: ContextVar[bool] = ContextVar("fx_nvfp4_inlining", default=False)


@contextlib.contextmanager
def inlining() -> Iterator[None]:
    """What Inductor compiles in this thread inside the block has our ops taken apart, where it can be."""
    _install()
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


def key() -> str:
    """What decides on the generated code, besides sources and options: for the key of Inductor's caches."""
    return f"{interprets()} {routing_checks.wanted()} {tuning.state()}"


@functools.cache
def _install() -> None:
    for name, build in (
        ("moe", _moe),
        ("linear", functools.partial(_product, "linear", gpu_tiled.linear, 0)),
        ("batched", functools.partial(_product, "batched", gpu_tiled.batched, 1)),
    ):
        op = getattr(torch.ops.fx_nvfp4, name).default
        compat.lower_by(op, functools.partial(_lower, op, build))


def _lower(op: Any, build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not _active.get():
        return compat.as_call(op, args, kwargs)
    try:
        return _inlined(op, build, args, kwargs)
    except NotLaunchesError as reason:
        log.info("%s stays a call: %s", op, reason)
        return compat.as_call(op, args, kwargs)


def _inlined(op: Any, build: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The op's result as a node of Inductor's graph.

    Args:
        build: takes the op's operands as fake tensors; returns what to trace, and what makes the op's result of the
            buffer that this leaves, from its shape.

    Raises:
        NotLaunchesError: the op cannot be taken apart, with the reason.
    """
    node = V.graph.current_node
    given, spec = pytree.tree_flatten(_by_name(op, args, kwargs))
    examples = [_example(a) for a in pytree.tree_leaves(_by_name(op, node.args, node.kwargs))]
    _require_plain([e for e in examples if isinstance(e, Tensor)])
    with V.graph.fake_mode:
        # One for each tensor, as the ops tell by identity what gate and up share.
        alone = {id(e): _alone(e) for e in examples if isinstance(e, Tensor)}
        fakes = [alone.get(id(e), e) for e in examples]
        call, finish = build(**pytree.tree_unflatten(fakes, spec))
        traced = trace_launches(call)
    pairs = [(f, box) for f, box in zip(fakes, given, strict=True) if isinstance(f, Tensor)]
    boxes = {id(fake): compat.as_it_lies(box, fake.stride()) for fake, box in pairs}
    result = insert_launches(traced, [(fake, boxes[id(fake)]) for fake in alone.values()])
    return finish(result, traced.result.shape, boxes)


def _by_name(op: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """All operands in the order of the op's schema; Inductor gives a node's in one way, and us in another."""
    schema = op._schema.arguments
    given = {**dict(zip((a.name for a in schema), args, strict=False)), **kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def _moe(x: Tensor, ids: Tensor, weights: Tensor, **operands: Any) -> Any:
    block = make_block(**operands)
    _require_right(lambda: check_block(x, ids, weights, block))
    _require(gpu_tiled.supports(x, block))
    configs = _configs(x, ids, block)

    def finish(y: Any, shape: torch.Size, boxes: Boxes) -> Any:
        after = boxes[id(weights)] if block.weighted == "output" else None
        return weighted_sum(y, boxes[id(ids)], after, block.experts, block.out_dtype or x.dtype)

    return lambda: gpu_tiled.products(x, ids, weights, block, configs), finish


def _product(op: str, body: Callable[..., Tensor], expert_dims: int, **operands: Any) -> Any:
    """Of an op whose operands are x, a weight and how x is rounded, as fx_nvfp4/ops.py orders them."""
    x, qdata, block_scale, global_scale, act_scale, activations, dialect = operands.values()
    _require_right(lambda: check_operands(op, x, qdata, block_scale, global_scale, act_scale, activations, expert_dims))
    _require(gpu_tiled.serves(x, qdata) and x.numel() > 0)
    act = Activations(activations, act_scale, dialect)
    return lambda: body(x, qdata, block_scale, global_scale, act), lambda y, shape, boxes: compat.viewed(y, shape)


def _require_right(check: Callable[[], None]) -> None:
    """What does not fit raises where the op is called, as it does uncompiled."""
    try:
        check()
    except ValueError as error:
        raise NotLaunchesError(str(error)) from None
    if routing_checks.wanted():
        raise NotLaunchesError(f"{routing_checks.VARIABLE} asks to look at ids at each call")


def _require(serves: bool) -> None:
    if not serves:
        raise NotLaunchesError("the kernels on tiled weights do not serve it")


def _require_plain(tensors: list[Tensor]) -> None:
    if why := compat.why_no_launches():
        raise NotLaunchesError(why)
    if any(not isinstance(n, int) for t in tensors for n in (*t.shape, *t.stride())):
        raise NotLaunchesError("a size is a symbol, and tile sizes are chosen by it at each call")
    if len({t.device for t in tensors}) > 1:
        raise NotLaunchesError("its operands are on several devices")
    if not (tensors[0].is_cuda or interprets()):
        raise NotLaunchesError("no Triton kernels run there")


def _configs(x: Tensor, ids: Tensor, block: Block) -> TileConfigs:
    _require(ids.numel() > 0)
    problem, tokens = gpu_tiled.problem_of(x, ids, block), x.shape[0]
    measured = tuning.measured(problem, tokens, x.device)
    if measured is None and tuning.enabled() and x.is_cuda:
        raise NotLaunchesError("it is tuned at its first call; what is compiled after that is inlined")
    return measured or choose(tokens, problem.sizes, target_of(x))


def _example(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument


def _alone(tensor: Tensor) -> Tensor:
    """A fake tensor like it with memory of its own."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
