"""What `recognise_weight` says of a traced function, for tests to assert, and a weight to try it on."""

import torch
from fx_nvfp4.passes.weights import Axis, PackedWeight, Refusal, recognise_weight
from spellings import BLOCK, lookup, packed, per_matrix, trace

E, N, K = 8, 48, 128
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def recognise(fn, *args, **kwargs):
    traced = trace(fn, *args, **kwargs)
    return recognise_weight(traced.operand, traced.constants), traced.inputs


def accepted(fn, *args, **kwargs):
    result, inputs = recognise(fn, *args, **kwargs)
    assert isinstance(result, PackedWeight), result
    return result, inputs


def refused(fn, *args, **kwargs):
    result, _ = recognise(fn, *args, **kwargs)
    assert isinstance(result, Refusal), result
    assert result.advice
    return result.reason


def weight(*lead, seed=0):
    lead = lead or (E,)
    return (*packed(*lead, N, K, seed=seed), torch.rand(lead[0]) + 0.1)


def dim(d):
    return Axis("dim", dim=d)


def chosen(node, *axes):
    return Axis("index", node=node, index_axes=axes)


def scaled(rounding):
    """Dequantisation with the scaling given as a function of values, scales and global scale in fp32."""

    def fn(q, s, g):
        g = per_matrix(g)
        v, s = lookup(q), s.float().repeat_interleave(BLOCK, -1)
        return rounding(v, s, g)

    return fn
