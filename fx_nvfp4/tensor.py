"""The packed weight: a tensor subclass that looks like a dense weight and holds NVFP4."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchao.utils import TorchAOBaseTensor

from . import format as nvfp4
from .dialects import get_dialect
from .layouts import check_packed, is_tiled, weight_sizes
from .ops import ACTIVATION_MODES, UNCALIBRATED
from .pickled import state_to_pickle, take_pickled

Dims = tuple[tuple[int, ...], ...]

# On parameters of which other ranks hold the rest of K, so that their largest activation is not known here.
PART_OF_K = "_nvfp4_part_of_k"
LAYOUT = "layout"  # what __tensor_flatten__ adds to the arguments of the constructor
_MODES = (*ACTIVATION_MODES, UNCALIBRATED)


class NVFP4Weight(TorchAOBaseTensor):
    """A linear weight [N, K] or the experts' weights [E, N, K] in NVFP4, never held in another form.

    Value = code * block_scale * global_scale[row]. Matrix products with it run the ops of
    :mod:`fx_nvfp4.ops`; every other arithmetic raises and asks for an explicit :meth:`dequantize`.

    A model may index, permute, merge and split it before the product, as einsum and matmul do. Such a view keeps
    the stored parts and remembers what it shows: ``expert_ids`` which experts, ``view_dims`` in which dims.

    Args:
        qdata: uint8 [.., N, K/2], two E2M1 codes a byte along K, the even element in the low nibble; or the words
            of tiles, int32 [.., N/16, K/64, 32, 4], see :mod:`fx_nvfp4.layouts`.
        block_scale: float8_e4m3fn [.., N, K/16], linear; or, of tiles, uint8 [.., N/16, K/64, 32, 2].
        global_scale: float32 [.., N], the multiplier of each output row, so that gate, up and every expert
            keep their own exactly.
        orig_dtype: the dtype this weight shows: float32, bfloat16 or float16.
        activations: "none" (W4A16), "static" (the left operand is rounded to NVFP4 with act_scale), "dynamic", or
            "uncalibrated": static, but :func:`fx_nvfp4.calibrate` is still to find the scale, and products raise.
        dialect: whose rule rounds activations, see :mod:`fx_nvfp4.dialects`.
        transposed: show [.., K, N], as models that multiply x @ weight store it.
        act_scale: float64 [] or [E], activation global scale as a multiplier; float64 so that the fp32
            reciprocal which some producers store is recovered bit for bit.
        expert_ids: int64, any shape: this is ``experts[expert_ids]``, not yet gathered.
        view_dims: where it is neither [.., N, K] nor [.., K, N], the dims of [.., N, K] that each shown dim merges:
            ((1,), (0, 2)) shows [N, E * K], and () is a dim of size 1. Views have it, parameters do not.

    Raises:
        ValueError: shapes, dtypes or names do not fit together; the message names the part.
    """

    tensor_data_names = ["qdata", "block_scale", "global_scale"]  # noqa: RUF012
    tensor_attribute_names = ["orig_dtype", "activations", "dialect", "transposed"]  # noqa: RUF012
    optional_tensor_data_names = ["act_scale", "expert_ids"]  # noqa: RUF012
    optional_tensor_attribute_names = ["view_dims"]  # noqa: RUF012

    qdata: Tensor
    block_scale: Tensor
    global_scale: Tensor
    orig_dtype: torch.dtype
    activations: str
    dialect: str
    transposed: bool
    act_scale: Tensor | None
    expert_ids: Tensor | None
    view_dims: Dims | None

    def __new__(
        cls,
        qdata: Tensor,
        block_scale: Tensor,
        global_scale: Tensor,
        orig_dtype: torch.dtype = torch.bfloat16,
        activations: str = "none",
        dialect: str = "hardware",
        transposed: bool = False,
        act_scale: Tensor | None = None,
        expert_ids: Tensor | None = None,
        view_dims: Dims | None = None,
    ) -> NVFP4Weight:
        _check(qdata, block_scale, global_scale, orig_dtype, activations, dialect, act_scale, expert_ids)
        stored, n, k = weight_sizes(qdata)
        lead = stored if expert_ids is None else expert_ids.shape
        sizes = (*lead, n, k)
        dims = _plain_dims(len(lead), transposed) if view_dims is None else view_dims
        shape = [math.prod(sizes[d] for d in merged) for merged in dims]
        # Views of an ordinary tensor must be ordinary too, also where they are taken in inference mode.
        with torch.inference_mode(False):
            return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=orig_dtype, device=qdata.device)  # type: ignore[attr-defined]

    def __init__(
        self,
        qdata: Tensor,
        block_scale: Tensor,
        global_scale: Tensor,
        orig_dtype: torch.dtype = torch.bfloat16,
        activations: str = "none",
        dialect: str = "hardware",
        transposed: bool = False,
        act_scale: Tensor | None = None,
        expert_ids: Tensor | None = None,
        view_dims: Dims | None = None,
    ) -> None:
        super().__init__()
        self.qdata, self.block_scale, self.global_scale = qdata, block_scale, global_scale
        self.orig_dtype, self.activations, self.dialect = orig_dtype, activations, dialect
        self.transposed, self.act_scale, self.expert_ids, self.view_dims = transposed, act_scale, expert_ids, view_dims

    # Dispatch alone decides, and behind Dynamo's back: where a graph breaks, it would trace these frames by themselves.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        table = cls._ATEN_OP_TABLE[cls]
        handler = table.get(func) or table.get(func.name())
        if handler is not None:
            return handler(func, types, args, kwargs or {})
        if func._can_decompose():
            return func.decompose(*args, **(kwargs or {}))
        packed = next((a for a in tree_leaves(args) if isinstance(a, NVFP4Weight)), None)
        raise unsupported(func, packed, "not a view or a matrix product")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"NVFP4Weight(shape={list(self.shape)}, dtype={self.dtype}, device={self.device}, {self.describe()})"

    def requires_grad_(self, requires_grad: bool = True) -> NVFP4Weight:
        """Packed weights are frozen, as integer tensors are.

        Raises:
            RuntimeError: requires_grad is true.
        """
        if requires_grad:
            raise RuntimeError(
                f"packed NVFP4 weights are frozen, {list(self.shape)} cannot require gradients: hold it as "
                "nn.Parameter(weight, requires_grad=False), and train adapters beside it"
            )
        return super().requires_grad_(False)

    def share_memory_(self) -> NVFP4Weight:
        """Move the parts to memory that processes share; torch's own looks for a storage that is not there."""
        for name in self.__tensor_flatten__()[0]:
            getattr(self, name).share_memory_()
        return self

    def _stable_hash_for_caching(self) -> str:
        """What AOTAutograd's cache keys this weight on."""
        return layout_key(self)

    def describe(self) -> str:
        """Short text of format and activations, e.g. "W4A4 static per-expert", or "W4A16, tiles"."""
        layout = ", tiles" if is_tiled(self.qdata) else ""
        if self.activations == "none":
            return f"W4A16{layout}"
        per_expert = " per-expert" if self.act_scale is not None and self.act_scale.dim() else ""
        return f"W4A4 {self.activations}{per_expert}{layout}"

    def replace(self, **changes: Any) -> NVFP4Weight:
        """A weight that shares what is not changed."""
        names, attributes = (*self.tensor_data_names, *self.optional_tensor_data_names), self.tensor_attribute_names
        names = (*names, *attributes, *self.optional_tensor_attribute_names)
        return NVFP4Weight(**{name: changes.get(name, getattr(self, name)) for name in names})

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the dims before N and K: of the chosen experts, or of all that are stored."""
        return self.stored if self.expert_ids is None else tuple(self.expert_ids.shape)

    @property
    def stored(self) -> tuple[int, ...]:
        """Sizes of the dims before N and K of what is stored; its length is the dim of the rows in every part."""
        return weight_sizes(self.qdata)[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of [.., N, K], which :attr:`dims` counts."""
        return (*self.lead, *weight_sizes(self.qdata)[1:])

    @property
    def dims(self) -> Dims:
        """The dims of [.., N, K] that each shown dim merges; one that no dim shows has size 1."""
        return _plain_dims(len(self.lead), self.transposed) if self.view_dims is None else self.view_dims

    def show(self, dims: Sequence[tuple[int, ...]], **changes: Any) -> NVFP4Weight:
        """The same weight, or one with changed parts, shown in other dims of [.., N, K]."""
        ids = changes.get("expert_ids", self.expert_ids)
        lead = len(weight_sizes(changes.get("qdata", self.qdata))[0]) if ids is None else ids.dim()
        dims = tuple(dims)
        plain = [transposed for transposed in (False, True) if dims == _plain_dims(lead, transposed)]
        shown = {"transposed": plain[0], "view_dims": None} if plain else {"transposed": False, "view_dims": dims}
        return self.replace(**changes, **shown)

    def ids(self) -> Tensor:
        """Which stored expert each of :attr:`lead` is, counted over all leading dims that are stored."""
        if self.expert_ids is not None:
            return self.expert_ids
        return torch.arange(math.prod(self.lead), device=self.qdata.device).view(self.lead)

    def _apply_fn_to_data(self, fn: Callable[[Tensor], Tensor]) -> NVFP4Weight:
        names = (*self.tensor_data_names, *self.optional_tensor_data_names)
        parts = {name: getattr(self, name) for name in names}
        return self.replace(**{name: fn(part) for name, part in parts.items() if part is not None})

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight in dtype (default: the shown one), a new tensor; a compiled graph reports it."""
        w = torch.ops.fx_nvfp4.dequantize(
            self.qdata, self.block_scale.view(torch.uint8), self.global_scale, dtype or self.orig_dtype
        )
        w = w if self.expert_ids is None else w[self.expert_ids]
        order = [d for merged in self.dims for d in merged]
        hidden = [d for d in range(w.dim()) if d not in order]
        return w.permute(*order, *hidden).reshape(self.shape)

    def canonical(self) -> NVFP4Weight:
        """The weight in the canonical layout: itself, or unpacked from tiles into new memory."""
        if not is_tiled(self.qdata):
            return self
        qdata, block_scale = torch.ops.fx_nvfp4.unpack_tiles(self.qdata, self.block_scale)
        return self.replace(qdata=qdata, block_scale=block_scale.view(torch.float8_e4m3fn))

    def tiled(self, name: str = "weight") -> NVFP4Weight:
        """The weight in tiles, see :mod:`fx_nvfp4.prepack`: itself, or permuted into new memory.

        Raises:
            ValueError: sizes that do not fill tiles, or a negative block scale; names the weight.
        """
        from .tiling import tiled

        return tiled(self, name)

    def tile_(self, name: str = "weight") -> NVFP4Weight:
        """Permute the weight into tiles where it lies, in some memory more, whatever its size.

        Nobody may compute with it meanwhile, in another thread or on another stream.

        Raises:
            ValueError: as :meth:`tiled`, or its memory is not its own; the weight is as before.
        """
        from .tiling import tile_

        return tile_(self, name)

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """With the layout among the attributes: they are what Dynamo guards."""
        names, attributes = super().__tensor_flatten__()
        return names, {**attributes, LAYOUT: "tiles" if is_tiled(self.qdata) else "canonical"}

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        activations: str = "none",
        act_scale: Tensor | None = None,
        dialect: str = "hardware",
        global_scale: Tensor | None = None,
    ) -> NVFP4Weight:
        """Quantise a dense weight [N, K] or [E, N, K].

        Args:
            weight: float32, bfloat16 or float16; K a multiple of 16.
            activations, act_scale, dialect: as for the class; the weight is rounded by the same dialect.
            global_scale: multiplier, broadcasts to [.., N]; by default amax / 2688 of each 2-D weight.

        Raises:
            ValueError: an activation scale that is not finite and above zero.
        """
        if type(act_scale) is Tensor and not ((act_scale > 0) & act_scale.isfinite()).all():
            raise ValueError(
                f"from_dense: act_scale must be finite and above zero, got {act_scale.flatten()[:4].tolist()}: it is "
                "the multiplier amax / 2688 of the activations that enter the weight"
            )
        if global_scale is None:
            amax = weight.detach().abs().amax(dim=(-2, -1), keepdim=True).squeeze(-1).float()
            global_scale = torch.where(amax > 0, amax / nvfp4.TWO_LEVEL_MAX, 1.0)
        global_scale = global_scale.float().expand(weight.shape[:-1]).contiguous()
        qdata, block_scale = nvfp4.quantize(weight.detach(), global_scale.unsqueeze(-1), dialect)
        return cls(qdata, block_scale.detach(), global_scale, weight.dtype, activations, dialect, act_scale=act_scale)

    @classmethod
    def from_torchao(cls, weight: Tensor) -> NVFP4Weight:
        """Convert torchao's NVFP4Tensor [N, K] or [E, N, K] (linear or swizzled scales); codes are shared.

        Raises:
            TypeError: not a torchao NVFP4Tensor.
        """
        from .torchao_interop import from_torchao

        return from_torchao(weight)

    def to_torchao(self) -> Tensor:
        """Convert to torchao's NVFP4Tensor with linear scales.

        Raises:
            ValueError: rows of one expert have different global scales, which torchao cannot hold.
        """
        from .torchao_interop import to_torchao

        return to_torchao(self)


def _plain_dims(lead: int, transposed: bool) -> Dims:
    """Dims of [.., N, K] or [.., K, N], each by itself."""
    last = (lead + 1, lead) if transposed else (lead, lead + 1)
    return tuple((d,) for d in (*range(lead), *last))


def layout_key(weight: Any) -> str:
    """Everything of a packed tensor (ours or torchao's) that decides the compiled graph: all but the numbers."""
    names, attributes = weight.__tensor_flatten__()
    parts = [getattr(weight, name) for name in names]
    layout = [(str(t.dtype), tuple(t.shape), t.stride(), str(t.device)) for t in parts]
    shown = f"{tuple(weight.shape)} {weight.requires_grad}"
    return f"{type(weight).__name__} {shown} {names} {layout} {sorted(map(str, attributes.items()))}"


def unsupported(func: Any, weight: NVFP4Weight | None, why: str) -> NotImplementedError:
    """The error for an operation that would need the dense weight."""
    what = "" if weight is None else f" {list(weight.shape)}"
    return NotImplementedError(
        f"{func} on an NVFP4Weight{what}: {why}. Packed weights serve views and matrix products in which K is "
        "contracted; call .dequantize() where the dense weight is wanted."
    )


def _check(
    qdata: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    orig_dtype: torch.dtype,
    activations: str,
    dialect: str,
    act_scale: Tensor | None,
    expert_ids: Tensor | None,
) -> None:
    check_packed(qdata, block_scale)
    get_dialect(dialect)
    if qdata.dim() < 2:
        raise ValueError(f"NVFP4Weight: codes must be [N, K/2] or [E, N, K/2], got {list(qdata.shape)}")
    lead, n, _ = weight_sizes(qdata)
    if global_scale.dtype != torch.float32 or global_scale.shape != (*lead, n):
        raise ValueError(
            f"NVFP4Weight: global_scale must be float32 {[*lead, n]}, one per output row, "
            f"got {global_scale.dtype} {list(global_scale.shape)}; expand a per-tensor scale"
        )
    if orig_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"NVFP4Weight: orig_dtype must be float32, bfloat16 or float16, got {orig_dtype}")
    if activations not in _MODES:
        raise ValueError(f"NVFP4Weight: activations must be one of {_MODES}, got {activations!r}")
    if activations != UNCALIBRATED and (activations == "static") != (act_scale is not None):
        raise ValueError("NVFP4Weight: act_scale must be given for static activations, and only for them")
    per_expert = [list(lead)] if lead else []
    if act_scale is not None and (act_scale.dtype != torch.float64 or list(act_scale.shape) not in [[], *per_expert]):
        raise ValueError(
            f"NVFP4Weight: act_scale must be float64 of shape {[[], *per_expert]}, "
            f"got {act_scale.dtype} {list(act_scale.shape)}"
        )
    if expert_ids is not None and (len(lead) != 1 or expert_ids.dtype not in (torch.int32, torch.int64)):
        raise ValueError("NVFP4Weight: expert_ids must be integers and select among the experts of [E, N, K]")


# Here and not in the class, whose base puts a __setstate__ of its own into every subclass.
NVFP4Weight.__getstate__, NVFP4Weight.__setstate__ = state_to_pickle, take_pickled  # type: ignore[assignment, method-assign]
# torch.load(weights_only=True) may rebuild the class.
torch.serialization.add_safe_globals([NVFP4Weight])
