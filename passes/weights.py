"""Recognises dequantised NVFP4 weights in an ATen graph by what they mean, not by how they are spelled.

The cone of ops between the leaves of the graph and an operand of a matmul is evaluated at sampled coordinates, with
leaves whose values are hashes. Which element of which leaf each sample read gives the layout; the values must equal,
bit for bit and in every sample, one of the formulas `round(code * block_scale * global_scale)`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from .cone import Cone, cone_key, cone_nodes, holds_codes
from .found import Axis, NotPacked, PackedWeight, Refusal, Refused, UnknownScale
from .layout import explained, find_global, find_qdata, find_scale
from .probe import Probe, Read, probe_cone
from .sample import SymbolicPosition, Unsupported, is_tensor, shape_of
from .values import match_values

__all__ = ["Axis", "PackedWeight", "Refusal", "cone_key", "cone_nodes", "recognise_weight"]


def recognise_weight(node: Node, constants: Mapping[Node, Tensor]) -> PackedWeight | Refusal | None:
    """What a floating-point matmul operand is, if packed integers are among the leaves it is computed from.

    Args:
        node: the operand; `meta["val"]` of every node below it must be set.
        constants: known values of small static placeholders and attributes. One is used only if it acts as a table,
            that is, if codes choose the place it is read at or all of it is read for one element.

    Returns:
        PackedWeight if it is a dequantised NVFP4 weight, Refusal if it is another function of packed integers, None
        if no packed integers are involved.
    """
    if not is_tensor(node) or not node.meta["val"].is_floating_point() or len(node.meta["val"].shape) < 2:
        return None
    with unset_fake_temporarily(), torch.no_grad():
        cone = Cone.above(node)
        if cone is None or 0 in shape_of(node) or not holds_codes(cone):
            return None
        try:
            return _recognise(cone, constants)
        except NotPacked:
            return None
        except Refused as refused:
            return Refusal(node, refused.reason, refused.advice)
        except SymbolicPosition as error:
            return Refusal(node, f"expert chosen by a symbolic index: {error}", "index with a tensor of ids")
        except Unsupported as error:
            return Refusal(node, f"cannot be evaluated: {error}", "spell the dequantisation without this op")


def _recognise(cone: Cone, constants: Mapping[Node, Tensor]) -> PackedWeight:
    probe = probe_cone(cone, constants)
    try:
        return _explained(cone, probe)
    except UnknownScale as refused:
        # Several scales, or one that is computed: what they come to is a node of the graph.
        for node in cone.computed_from({r.node for r in probe.reads if _may_scale(r)}, set(probe.leaves.tables)):
            with contextlib.suppress(Refused):
                return _explained(cone, probe_cone(cone, constants, frozenset((node,))))
        raise refused


def _may_scale(read: Read) -> bool:
    return read.dtype.is_floating_point and read.dtype.itemsize > 1


def _explained(cone: Cone, probe: Probe) -> PackedWeight:
    qdata, packed_dim, k_dim = find_qdata(probe)
    if probe.leaves.unknown_tables:
        names = ", ".join(n.name for n in probe.leaves.unknown_tables)
        if all(n.op == "placeholder" and _is_nested(n) for n in probe.leaves.unknown_tables):
            reason = f"inside a control-flow branch the values of the lookup table {names} are not known"
            raise Refused(reason, "dequantise outside of the branch, or choose by torch.where instead")
        raise Refused(f"codes are looked up in {names}, whose values are unknown", "make the table a constant buffer")
    qdata_axes = explained(probe, qdata, packed_dim)
    scale, scale_axes, scale_dim, layout = find_scale(probe, qdata, packed_dim, k_dim)
    global_scale = find_global(probe, qdata, scale)
    global_axes = explained(probe, global_scale) if global_scale else ()
    if any(axis.kind == "index" and axis not in qdata_axes for axis in (*scale_axes, *global_axes)):
        raise Refused("codes and scales are chosen by different indices", "index all of them by the same tensor")
    for read, axes in ((qdata, qdata_axes), (scale, scale_axes), (global_scale, global_axes)):
        if read and any(k_dim in axis.dims() for axis in axes):
            raise Refused(f"{read.node.name} is addressed by K in more than one dimension", "keep K one dimension")
    values = match_values(probe, qdata, scale, global_scale, k_dim, cone.factors())
    return PackedWeight(
        operand=cone.operand,
        qdata=qdata.node,
        block_scale=scale.node,
        global_scale=global_scale.node if global_scale else None,
        k_dim=k_dim,
        qdata_axes=qdata_axes,
        packed_dim=packed_dim,
        scale_axes=scale_axes,
        scale_dim=scale_dim,
        scale_layout=layout,
        global_axes=global_axes,
        nibbles=values.nibbles,
        global_op=values.global_op,
        formula=values.formula,
        dtype=cone.operand.meta["val"].dtype,
        tables=tuple(probe.leaves.tables),
        factor=values.factor,
    )


def _is_nested(placeholder: Node) -> bool:
    """Whether a graph input is that of a branch or loop body: AOTAutograd describes inputs of the whole graph alone."""
    module = placeholder.graph.owning_module
    described = any("desc" in n.meta for n in placeholder.graph.nodes)
    return not described and module is not None and "desc" not in placeholder.meta
