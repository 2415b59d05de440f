# mypy: allow-untyped-defs
"""Tiled weights times rows of activations, as Triton device functions: rows of the weight on M, tokens on N.

The weight is decoded straight into the registers of the matrix units' left operand. As the right operand it would pass
through shared memory, and with few tokens on M most of a tile would be empty.
"""

import triton
import triton.language as tl

from .entry import permute_chunks, round_unscaled
from .fragments import decode_fragments

# What the left operand lacks: see prepack.DECODED_FACTOR.
FACTOR = tl.constexpr(128.0)
_WORDS = 8  # that pass through one piece of assembly
_MOVES = "\n".join(f"mov.b32 ${i}, ${i + _WORDS};" for i in range(_WORDS))
_WAIT = tl.constexpr("wgmma.wait_group.sync.aligned 0;\n" + _MOVES)
_WAIT_OPERANDS = tl.constexpr(",".join(["=&r"] * _WORDS + ["r"] * _WORDS))


@triton.jit
def after_products(words):
    """words, once the matrix units are done: what is decoded from them may take the registers of their left operand.

    Before decoding rather than after the product: until then the units work while the next steps are asked for.
    """
    return tl.inline_asm_elementwise(_WAIT, _WAIT_OPERANDS, [words], dtype=words.dtype, is_pure=False, pack=8)


@triton.jit
def product(
    words_ptr,
    scales_ptr,
    x_ptrs,
    x_mask,
    rest_ptrs,
    rest_mask,
    K,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    ORDER: tl.constexpr,
    WAIT: tl.constexpr,
    dtype: tl.constexpr,
    FORM: tl.constexpr,
):
    """float32 [ROWS, tokens] = (code * block scale / 128)[ROWS, K] @ x[tokens, K].T, of x and of the rest of x.

    Args:
        words_ptr, scales_ptr: of the first chunk of each tile of 16 rows, [ROWS / 16].
        x_ptrs: of each row's first element, [tokens].
        x_mask: [tokens].
        rest_ptrs, rest_mask: of more rows, or None.
        MASKED: K is not a multiple of BLOCK_K.
        ORDER: "permuted", x's columns are in the order of prepack.permute_k; or they are in their own and are read as
            the matrix units hold them, in "pairs" or "fours" (tile_config.takes_pairs).
        WAIT: see tile_config.needs_wait.
    """
    CHUNKS: tl.constexpr = BLOCK_K // 64
    word, lane = tl.arange(0, CHUNKS * 128), tl.arange(0, CHUNKS * 32)
    words_ptrs = words_ptr[:, None] + word[None, :]
    scales_ptrs = scales_ptr[:, None] + lane[None, :]
    k = tl.arange(0, BLOCK_K)
    column = k
    if ORDER == "pairs":  # where permuted() has put it
        column = k // 64 * 64 + k // 2 % 4 * 16 + k // 16 % 4 * 4 + k // 8 % 2 * 2 + k % 2
    if ORDER == "fours":
        column = k // 64 * 64 + k // 4 % 4 * 16 + k // 16 % 4 * 4 + k % 4
    x_ptrs = x_ptrs[:, None] + column[None, :]
    acc = tl.zeros((ROWS, x_mask.shape[0]), dtype=tl.float32)
    rest = acc
    if rest_ptrs is not None:
        rest_ptrs = rest_ptrs[:, None] + column[None, :]
        rest = tl.zeros((ROWS, rest_mask.shape[0]), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        left = K - start
        if MASKED:
            words = tl.load(words_ptrs + start * 2, mask=(word < left * 2)[None, :], other=0)
            scales = tl.load(scales_ptrs + start // 2, mask=(lane < left // 2)[None, :], other=0)
        else:
            words = tl.load(words_ptrs + start * 2)
            scales = tl.load(scales_ptrs + start // 2)
        x = columns_of(x_ptrs, x_mask, k, left, MASKED)
        if rest_ptrs is not None:
            x_of_rest = columns_of(rest_ptrs, rest_mask, k, left, MASKED)
        if WAIT:
            words = after_products(words)
        w = decode_fragments(words.to(tl.uint32, bitcast=True), scales, dtype, FORM, ORDER != "fours")
        acc = tl.dot(w, tl.trans(x), acc)
        x_ptrs += BLOCK_K
        if rest_ptrs is not None:
            rest = tl.dot(w, tl.trans(x_of_rest), rest)
            rest_ptrs += BLOCK_K
    return acc, rest


@triton.jit
def columns_of(ptrs, mask, k, left, MASKED: tl.constexpr):
    """A step's columns k of rows, to which ptrs [rows, columns] and mask [rows] belong; `left` are before the end."""
    if MASKED:
        return tl.load(ptrs, mask=mask[:, None] & (k < left)[None, :], other=0.0)
    else:
        return tl.load(ptrs, mask=mask[:, None], other=0.0)


@triton.jit
def prefetch(ptrs, COLUMNS: tl.constexpr):
    """Asks for the first COLUMNS of tiles of rows, whose words ptrs [tiles] point to, to come to the L2 cache."""
    lines = ptrs[:, None] + (tl.arange(0, COLUMNS // 16) * 32)[None, :]  # 16 columns of 16 rows are a line, 128 bytes
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def scaled(acc, scale, bias_ptr, stride_bn, n, N, dtype: tl.constexpr):
    """acc [rows n, tokens] times each row's scale [rows], rounded to dtype, and again with the bias."""
    y = (acc * scale[:, None]).to(dtype).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n * stride_bn, mask=n < N, other=0.0).to(tl.float32)
        y = (y + bias[:, None]).to(dtype).to(tl.float32)
    return y


@triton.jit
def leave(h, act_scale_ptr, PERMUTE: tl.constexpr, NATIVE: tl.constexpr, dtype: tl.constexpr):
    """h [outputs, TOKENS] float32 to rows [TOKENS, outputs] in dtype: rounded to NVFP4 and permuted where asked.

    Fewer outputs than a chunk of columns are not permuted here, but stored where they belong.
    """
    OUTPUTS: tl.constexpr = h.shape[0]
    TOKENS: tl.constexpr = h.shape[1]
    rows = tl.trans(h.to(dtype))
    if act_scale_ptr is not None:
        blocks = tl.reshape(rows.to(tl.float32), (TOKENS * OUTPUTS // 16, 16))
        rows = tl.reshape(round_unscaled(blocks, tl.load(act_scale_ptr), NATIVE), (TOKENS, OUTPUTS)).to(dtype)
    if PERMUTE and OUTPUTS % 64 == 0:
        rows = permute_chunks(rows, TOKENS, OUTPUTS)
    return rows
