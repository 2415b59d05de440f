"""Attention of a decoding step by transformers' models without copies of keys and values for every head of queries.

Where several heads of queries share one of keys and values, and there is a mask, as with a static cache, transformers'
"sdpa" in a compiled model repeats the cache for every head of queries. Of one new token these heads can be rows of one
product instead.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GROUPED = "sdpa_grouped"
_LOOKS_FOR_SDPA = re.compile(r"""_attn_implementation\b.*["']sdpa["']""")
# What models pass besides and one new token's attention does not depend on, as it sees all that the mask lets it see.
_HARMLESS = {"is_causal", "sliding_window", "position_ids", "cache_position", "use_cache"}


def group_queries(model: Any) -> None:
    """Let a transformers model decode by the attention implementation "sdpa_grouped", which this registers.

    With one new token a prompt, the queries that share a head of keys and values are rows of one
    scaled_dot_product_attention; all else is transformers' "sdpa". Parts of a model that attend otherwise stay as they
    are. Call it before the model is compiled; model.set_attn_implementation("sdpa") undoes it.

    Raises:
        ImportError: there is no transformers, or none of the versions that name attention implementations.
        ValueError: the model does not run by "sdpa" as it is (attention of its own, "eager" for its sinks, ...), its
            code does other things for "sdpa" by name, or transformers cannot switch it. Nothing has changed then.
    """
    kind, config = type(model).__name__, model.config
    found = getattr(config, "_attn_implementation", None)
    if found == GROUPED:
        return
    if found != "sdpa":
        raise ValueError(f'group_queries: {kind} runs by {found!r}, expected "sdpa": leave it as it is')
    asking = _asks_for_sdpa(model)
    if asking is not None:
        raise ValueError(
            f'group_queries: {kind} does other things for "sdpa" by name ({asking}), which another name would turn '
            "off: leave it as it is"
        )
    _register()
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    own = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    model.set_attn_implementation({"": GROUPED, **{n: GROUPED if how == "sdpa" else how for n, how in own.items()}})
    if config._attn_implementation != GROUPED:
        raise ValueError(f"group_queries: transformers cannot switch the attention of {kind}: leave it as it is")


def _asks_for_sdpa(model: Any) -> str | None:
    """file:line of code of the model's that looks for the name, as DeepSeek-V3.2's indexer does."""
    for name in sorted({type(module).__module__ for module in model.modules()}):
        file = getattr(sys.modules.get(name), "__file__", None)
        if name.startswith("torch.") or file is None or not file.endswith(".py"):
            continue
        for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
            if _LOOKS_FOR_SDPA.search(line):
                return f"{Path(file).name}:{number}"
    return None


def _register() -> None:
    """Make the name known to transformers; again does nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: query [B, heads, T, D], key and value [B, heads of keys, S, D] -> [B, T, heads, D].

    attention_mask: [B, 1 or heads, T, S]; bool, or float and added.
    """
    batch, heads, tokens, size = query.shape
    groups = heads // key.shape[1]
    plain = all(given is None or given is False or name in _HARMLESS for name, given in others.items())
    whole = key.shape[0] == batch and (attention_mask is None or attention_mask.ndim == 4)
    if tokens != 1 or groups == 1 or not plain or not whole:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    rows = query.reshape(batch, key.shape[1], groups, size)
    if attention_mask is not None and attention_mask.shape[1] == heads:
        attention_mask = attention_mask.reshape(attention_mask.shape[0], key.shape[1], groups, -1)
    y = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attention_mask, dropout, scale=scaling)
    return y.reshape(batch, 1, heads, value.shape[-1]), None
