"""Which weights are packed: those of linear layers, and 3-D ones of experts; and why a weight is left alone."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..checkpoints.skeleton import experts_layout, tells_layout
from ..format import BLOCK
from ..ops import X_DTYPES
from ..tensor import NVFP4Weight

_HEADS = ("lm_head", "embed_out", "output_embeddings", "score", "classifier")
_ROUTERS = ("gate", "router", "shared_expert_gate", "wg")


def quantizable(module: nn.Module, fqn: str) -> bool:
    """The default filter_fn: linear layers and modules of 3-D experts, but for output heads, routers and odd sizes."""
    return reason_to_leave(module, fqn) is None


def reason_to_leave(module: nn.Module, fqn: str) -> str | None:
    """Why the default filter leaves a module's weights as they are; None: it takes them."""
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "inside nn.MultiheadAttention, which multiplies by itself"
    leaf = fqn.rpartition(".")[2]
    if leaf in _HEADS:
        return "an output head"
    if leaf in _ROUTERS or "router" in fqn:
        return "a router"
    weights = [weight for _, weight in packable(module)]
    if not weights or not (isinstance(module, nn.Linear) or _are_experts(module, weights)):
        return "no weight of a linear layer or of experts"
    odd = [list(w.shape) for w in weights if all(size % BLOCK for size in _input_sizes(module, w))]
    return f"the input dim of {odd[0]} is not whole blocks of {BLOCK}" if odd else None


def packable(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Name and value of the dense weights of a linear layer, or 3-D ones, that a module holds itself."""
    if isinstance(module, nn.Linear):
        found = [("weight", module.weight)]
    else:
        found = [(name, p) for name, p in module.named_parameters(recurse=False) if p.dim() == 3]
    return [(name, p) for name, p in found if p.dtype in X_DTYPES and not isinstance(p.data, NVFP4Weight)]


def _are_experts(module: nn.Module, weights: list[Tensor]) -> bool:
    """Whether 3-D weights are up and down weights of as many experts, and no kernels or tables."""
    experts = {w.shape[0] for w in weights}
    if tells_layout(module) or len(experts) != 1 or experts == {1}:
        return tells_layout(module)
    shapes = [tuple(w.shape[1:]) for w in weights]
    return _told(module) is not None or any(up == down[::-1] for up, down in itertools.combinations(shapes, 2))


def _input_sizes(module: nn.Module, weight: Tensor) -> list[int]:
    """Size of the input dim of a weight; where it cannot be told which that is, both."""
    transposed = False if isinstance(module, nn.Linear) else _told(module)
    sizes = list(weight.shape[-2:])
    return sizes if transposed is None else [sizes[0 if transposed else 1]]


def stored_transposed(module: nn.Module, fqn: str) -> bool:
    """Whether a module stores its experts [E, in, out], as it says or as the sizes of a fused gate and up show.

    Raises:
        ValueError: neither tells.
    """
    told = _told(module)
    if told is None:
        shapes = [list(w.shape) for _, w in packable(module)]
        raise ValueError(
            f"{fqn or type(module).__name__}: experts {shapes} could be stored [E, out, in] or [E, in, out], and "
            "nothing tells: set is_transposed on the module, or pass NVFP4Config(transposed=...)"
        )
    return told


def _told(module: nn.Module) -> bool | None:
    if tells_layout(module):
        return experts_layout(module).transposed
    shapes = [tuple(w.shape[1:]) for _, w in packable(module)]
    pairs = list(itertools.permutations(shapes, 2))
    fitting = {t for t in (False, True) if any(_fits(up, down, t) for up, down in pairs)}
    return fitting.pop() if len(fitting) == 1 else None


def _fits(up: tuple[int, ...], down: tuple[int, ...], transposed: bool) -> bool:
    """Whether up [2 I, H] and down [H, I], or their transposes, are of one expert."""
    (rows, hidden), (out, inner) = (up[::-1], down[::-1]) if transposed else (up, down)
    return rows == 2 * inner and hidden == out
