"""The op fx_nvfp4::moe in generated code: its kernels there as text, started by Inductor's launcher.

Before:  buf = torch.ops.fx_nvfp4.moe.default(x, ids, weights, ...), a call of Python that starts five kernels
After:   table, entry, up and down kernels, and the weighted sum as an expression of Inductor's own, which fuses it
         with what follows, such as the residual and the next norm

Where the number of tokens is a symbol, the choice of tile sizes is one of each call, and the op stays a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import gpu_tiled, tuning
from .kernels.tile_config import choose, target_of
from .lowering import compat
from .moe import make_block

_OP = torch.ops.fx_nvfp4.moe.default


def inlining() -> Any:
    """Context in which Inductor takes the op apart where it can."""
    return compat.lowered(_OP, _lower)


def _lower(*args: Any, **kwargs: Any) -> Any:
    from torch._inductor.lowering import fallback_handler
    from torch._inductor.virtualized import V

    from .lowering.launched import NotLaunchesError

    try:
        return _inlined(V, args, kwargs)
    except NotLaunchesError as reason:
        tuning.log.debug("fx_nvfp4::moe stays a call: %s", reason)
        return fallback_handler(_OP, add_to_fallback_set=False)(*args, **kwargs)


def _inlined(graph: Any, args: Any, kwargs: Any) -> Any:
    """The op's result as a node of Inductor's graph.

    Raises:
        NotLaunchesError: it cannot be taken apart, with the reason.
    """
    from .lowering.launch_node import insert_launches, weighted_sum
    from .lowering.launched import trace_launches

    node = graph.graph.current_node
    given, spec = pytree.tree_flatten((args, kwargs))
    examples = [_example(a) for a in pytree.tree_leaves((node.args, node.kwargs))]
    _require_plain(graph.graph, examples)
    with graph.graph.fake_mode:
        fakes = [_alone(e) if isinstance(e, Tensor) else e for e in examples]
        fake_args, fake_kwargs = pytree.tree_unflatten(fakes, spec)
        x, ids, weights, *operands = fake_args
        block = make_block(*operands, **fake_kwargs)
        configs = _configs(x, ids, block)
        traced = trace_launches(lambda: gpu_tiled.products(x, ids, weights, block, configs))
    boxes = [
        (fake, compat.as_it_lies(box, fake.stride()))
        for fake, box in zip(fakes, given, strict=True)
        if isinstance(fake, Tensor)
    ]
    by_fake = {id(fake): box for fake, box in boxes}
    y = insert_launches(traced, boxes)
    after = by_fake[id(weights)] if block.weighted == "output" else None
    dtype = block.out_dtype or x.dtype
    return weighted_sum(y, by_fake[id(ids)], after, block.experts, dtype)


def _example(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument


def _require_plain(graph: Any, examples: list[Any]) -> None:
    from .lowering.kernel_source import interprets
    from .lowering.launched import NotLaunchesError

    tensors = [e for e in examples if isinstance(e, Tensor)]
    if graph.cpp_wrapper:
        raise NotLaunchesError("Inductor writes C++ around kernels here")
    if any(not isinstance(n, int) for t in tensors for n in (*t.shape, *t.stride())):
        raise NotLaunchesError("a size is a symbol, and tile sizes are chosen by it at each call")
    if len({t.device for t in tensors}) > 1:
        raise NotLaunchesError("its operands are on several devices")
    if not (tensors[0].is_cuda or interprets()):
        raise NotLaunchesError("no Triton kernels run there")


def _alone(tensor: Tensor) -> Tensor:
    """A fake tensor like it with memory of its own."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _configs(x: Tensor, ids: Tensor, block: Any) -> Any:
    from .lowering.launched import NotLaunchesError

    if ids.numel() == 0 or not gpu_tiled.supports(x, block):
        raise NotLaunchesError("the kernels on tiled weights do not serve it")
    problem, tokens = gpu_tiled.problem_of(x, ids, block), x.shape[0]
    measured = tuning.measured(problem, tokens, x.device)
    if measured is None and tuning.enabled() and x.device.type == "cuda":
        raise NotLaunchesError("it is tuned at its first call; compiled after that it is inlined")
    return measured or choose(tokens, ids.shape[1], block.experts, target_of(x))
