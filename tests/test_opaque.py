"""Quantisers of other projects, known by name: ops with their signatures, and Triton kernels as graphs hold them.

The packages need not be installed: ops of the same signature stand in for theirs. tests/test_arithmetic_options.py has
ModelOpt's own op, and ops that nobody knows.
"""

import importlib.util
import operator
import types

import pytest
import torch
from fx_nvfp4.passes import opaque
from fx_nvfp4.passes.found import Refused
from spellings import by_blocks, lookup
from test_activations import K, Quantised, run, x_of

from fx_nvfp4.format import quantize

pytestmark = pytest.mark.usefixtures("one_thread")


def shapes_of(x):
    """Empty codes and block scales of rows."""
    rows, k = x.shape
    return x.new_empty(rows, k // 2, dtype=torch.uint8), x.new_empty(rows, k // 16, dtype=torch.float8_e4m3fn)


# vLLM's as it defines them now and before, and torchao's
RETURNS = "(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout) -> (Tensor, Tensor)"
FILLS = "(Tensor! output, Tensor input, Tensor! output_scale, Tensor input_scale{}) -> ()"
PACKERS = {
    "_C::scaled_fp4_quant": [RETURNS, FILLS.format(", bool is_sf_swizzled_layout"), FILLS.format("")],
    "_C::scaled_fp4_experts_quant": [
        "(Tensor! output, Tensor! output_scale, Tensor input, Tensor input_global_scale, "
        "Tensor input_offset_by_experts, Tensor output_scale_offset_by_experts) -> ()"
    ],
    "ao::mslk_quantize_nvfp4": ["(Tensor x, Tensor? global_scale=None) -> (Tensor, Tensor)"],
    "ao::mslk_quantize_nvfp4_stacked": ["(Tensor m_sizes, Tensor x, Tensor global_scale) -> (Tensor, Tensor)"],
}


def _packer(name, schema):
    """A body for an op of that name and signature, and how a model calls it: (x, g) -> (codes, block scales)."""
    fills, scale_first = "!" in schema, name == "ao::mslk_quantize_nvfp4"
    stacked, experts = name.endswith("stacked"), name.endswith("experts_quant")

    def place(args):
        """(x, g) among the op's arguments."""
        i = 2 if experts else 1 if fills or stacked else 0
        return args[i], args[i + (2 if fills and not experts else 1)]

    def body(*args):
        x, g = place(args)
        codes, scale = quantize(x, 1 / g.reshape(-1)[0].double())
        if not fills:
            return (scale, codes) if scale_first else (codes, scale)
        args[0].copy_(codes)
        args[1 if experts else 2].copy_(scale)
        return None

    def shapes(*args):
        codes, scale = shapes_of(place(args)[0])
        return None if fills else (scale, codes) if scale_first else (codes, scale)

    def call(op, x, g):
        codes, scale = shapes_of(x)
        more = [False] if "is_sf_swizzled_layout" in schema else []
        if experts:
            op(codes, scale, x, g.reshape(1), torch.tensor([0, len(x)]), torch.tensor([0, len(x)]))
        elif fills:
            op(codes, x, scale, g, *more)
        elif stacked:
            codes, scale = op(torch.tensor([len(x)]), x, g.reshape(1))
        else:
            first, second = op(x, g, *more)
            codes, scale = (second, first) if scale_first else (first, second)
        return codes, scale

    return body, shapes, call


@pytest.mark.parametrize(("name", "schema"), [(n, s) for n, schemas in PACKERS.items() for s in schemas])
def test_every_projects_packer_is_known_by_its_name_and_signature(name, schema):
    library, op_name = name.split("::")
    real = importlib.util.find_spec("torchao") if library == "ao" else None
    if real:  # torchao defines its own: then ours go by another namespace, and the name is told
        from torchao.prototype.mx_formats import kernels  # noqa: F401

        defined = getattr(getattr(torch.ops, library), op_name).default._schema
        ours = torch._C.parse_schema(f"{name}{schema}")
        assert [str(a.type) for a in defined.arguments] == [str(a.type) for a in ours.arguments]
        assert [str(a.type) for a in defined.returns] == [str(a.type) for a in ours.returns]
    body, shapes, call = _packer(name, schema)
    with torch.library._scoped_library(f"stands_in_{library}", "FRAGMENT") as stands_in:
        stands_in.define(op_name + schema)
        stands_in.impl(op_name, body, "CompositeExplicitAutograd")
        stands_in.impl(op_name, shapes, "Meta")
        op = getattr(getattr(torch.ops, f"stands_in_{library}"), op_name).default

        def quantise(x, g):
            codes, scale = call(op, x, g)
            return by_blocks(lookup(codes), scale.float() / g).to(x.dtype)

        with pytest.MonkeyPatch.context() as patch:
            known = opaque._PACKERS
            assert name in known
            patch.setattr(opaque, "_PACKERS", {f"stands_in_{known_name}" for known_name in known})
            y, report, targets = run(Quantised(quantise, "static", scale=50.0), x_of())
        assert not report.refused
        assert report.matched[0].activations == "W4A16"
        assert f"activations are packed by stands_in_{name}, and dequantised" in report.matched[0].notes[0]
        assert "fake_quantize" not in targets.ours
        torch.testing.assert_close(y, Quantised(quantise, scale=50.0)(x_of()), rtol=1e-5, atol=1e-4)


class Unhashed(types.SimpleNamespace):
    __hash__ = object.__hash__


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("fp4_fake_quant_kernel", "kept"),  # ModelOpt's
        ("my_fp4_quantize_kernel", "refused"),
        ("rms_norm_kernel", None),
        ("fp4_dequantize_kernel", None),
    ],
)
def test_triton_kernels_that_quantise_are_known_by_their_names(name, found):
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional

    number = kernel_side_table.add_kernel(Unhashed(fn=Unhashed(fn=types.new_class(name))))
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_function(triton_kernel_wrapper_functional, (), {"kernel_idx": number, "kwargs": {"x_ptr": x}})
    rows = graph.call_function(operator.getitem, (call, "y_ptr"))
    x.meta["val"] = rows.meta["val"] = torch.empty(6, K, device="meta")
    if found == "refused":
        with pytest.raises(Refused, match=f"opaque op triton::{name}, which is not known"):
            opaque.opaque_quantiser(rows)
    else:
        expected = opaque.Kept(f"triton::{name}") if found else None
        assert opaque.opaque_quantiser(rows) == expected


def test_compressed_tensors_kernel_packs_by_its_name():
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional

    number = kernel_side_table.add_kernel(Unhashed(fn=types.new_class("_quantize_and_pack_fp4_kernel")))
    graph = torch.fx.Graph()
    call = graph.call_function(triton_kernel_wrapper_functional, (), {"kernel_idx": number, "kwargs": {}})
    codes = graph.call_function(operator.getitem, (call, "packed_ptr"))
    assert opaque.packer_of(codes) == "triton::_quantize_and_pack_fp4_kernel"
