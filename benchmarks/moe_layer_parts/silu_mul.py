"""silu(gate) * up of columns in turn, as matmul_ogs fuses it; a file of its own, as Triton reads its source."""

import triton
import triton.language as tl


@triton.jit
def silu_mul(input):
    gate, up = tl.split(tl.reshape(input, (input.shape[0], input.shape[1] // 2, 2)))
    gate = gate.to(tl.float32)
    return gate / (1 + tl.exp(-gate)) * up.to(tl.float32)
