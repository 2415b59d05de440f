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
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import gpu_tiled, tuning
from .block import Block
from .kernels.tile_config import TileConfigs, choose, target_of
from .lowering import compat
from .moe import make_block
from .reference import Activations

log = logging.getLogger("fx_nvfp4.inlined")
# What an operand stands for in Inductor's graph, by the fake tensor that a function was traced with.
Boxes = Mapping[int, Any]


@contextlib.contextmanager
def inlining() -> Iterator[None]:
    """Inductor takes the ops apart inside the block, where it can."""
    ops = torch.ops.fx_nvfp4
    with contextlib.ExitStack() as stack:
        for op, build in ((ops.moe.default, _moe), (ops.linear.default, _linear), (ops.batched.default, _batched)):
            stack.enter_context(compat.lowered(op, functools.partial(_lower, op, build)))
        yield


def _lower(op: Any, build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from torch._inductor.lowering import fallback_handler

    from .lowering.launched import NotLaunchesError

    try:
        return _inlined(build, args, kwargs)
    except NotLaunchesError as reason:
        log.info("%s stays a call: %s", op, reason)
        return fallback_handler(op, add_to_fallback_set=False)(*args, **kwargs)


def _inlined(build: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The op's result as a node of Inductor's graph.

    Args:
        build: takes the op's operands as fake tensors; returns what to trace, and what makes the op's result of the
            buffer that this leaves, from its shape.

    Raises:
        NotLaunchesError: the op cannot be taken apart, with the reason.
    """
    from torch._inductor.virtualized import V

    from .lowering.launch_node import insert_launches
    from .lowering.launched import trace_launches

    given, spec = pytree.tree_flatten((args, kwargs))
    examples = [_example(a) for a in pytree.tree_leaves((V.graph.current_node.args, V.graph.current_node.kwargs))]
    _require_plain(V.graph, [e for e in examples if isinstance(e, Tensor)])
    with V.graph.fake_mode:
        fakes = [_alone(e) if isinstance(e, Tensor) else e for e in examples]
        fake_args, fake_kwargs = pytree.tree_unflatten(fakes, spec)
        call, finish = build(*fake_args, **fake_kwargs)
        traced = trace_launches(call)
    pairs = [(f, compat.as_it_lies(box, f.stride())) for f, box in zip(fakes, given, strict=True) if _is_tensor(f)]
    result = insert_launches(traced, pairs)
    return finish(result, traced.result.shape, {id(fake): box for fake, box in pairs})


def _moe(x: Tensor, ids: Tensor, weights: Tensor, *operands: Any, **options: Any) -> Any:
    block = make_block(*operands, **options)
    _require(gpu_tiled.supports(x, block))
    configs = _configs(x, ids, block)

    def finish(y: Any, shape: torch.Size, boxes: Boxes) -> Any:
        from .lowering.launch_node import weighted_sum

        after = boxes[id(weights)] if block.weighted == "output" else None
        return weighted_sum(y, boxes[id(ids)], after, block.experts, block.out_dtype or x.dtype)

    return lambda: gpu_tiled.products(x, ids, weights, block, configs), finish


def _linear(x: Tensor, qdata: Tensor, *rest: Any, **options: Any) -> Any:
    return _product(gpu_tiled.linear, x, qdata, *rest, **options)


def _batched(x: Tensor, qdata: Tensor, *rest: Any, **options: Any) -> Any:
    return _product(gpu_tiled.batched, x, qdata, *rest, **options)


def _product(
    body: Callable[..., Tensor],
    x: Tensor,
    qdata: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    act_scale: Tensor | None = None,
    activations: str = "none",
    dialect: str = "hardware",
) -> Any:
    _require(gpu_tiled.serves(x, qdata) and x.numel() > 0)
    act = Activations(activations, act_scale, dialect)
    return lambda: body(x, qdata, block_scale, global_scale, act), lambda y, shape, boxes: compat.viewed(y, shape)


def _require(serves: bool) -> None:
    from .lowering.launched import NotLaunchesError

    if not serves:
        raise NotLaunchesError("the kernels on tiled weights do not serve it")


def _require_plain(graph: Any, tensors: list[Tensor]) -> None:
    from .lowering.kernel_source import interprets
    from .lowering.launched import NotLaunchesError

    if graph.cpp_wrapper:
        raise NotLaunchesError("Inductor writes C++ around kernels here")
    if any(not isinstance(n, int) for t in tensors for n in (*t.shape, *t.stride())):
        raise NotLaunchesError("a size is a symbol, and tile sizes are chosen by it at each call")
    if len({t.device for t in tensors}) > 1:
        raise NotLaunchesError("its operands are on several devices")
    if not (tensors[0].is_cuda or interprets()):
        raise NotLaunchesError("no Triton kernels run there")


def _configs(x: Tensor, ids: Tensor, block: Block) -> TileConfigs:
    from .lowering.launched import NotLaunchesError

    _require(ids.numel() > 0)
    problem, tokens = gpu_tiled.problem_of(x, ids, block), x.shape[0]
    measured = tuning.measured(problem, tokens, x.device)
    if measured is None and tuning.enabled() and x.is_cuda:
        raise NotLaunchesError("it is tuned at its first call; what is compiled after that is inlined")
    return measured or choose(tokens, ids.shape[1], block.experts, target_of(x))


def _example(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _alone(tensor: Tensor) -> Tensor:
    """A fake tensor like it with memory of its own."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
