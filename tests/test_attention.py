"""Decoding without copies of keys and values: the numbers of transformers' sdpa, and none of its repetition.

Guarded here: masks that all heads share, a mask for each head, none; prompts, to which nothing changes; what sdpa takes
besides and we do not, which must reach sdpa; a cache that a compiled step copies for every head of queries.
"""

import pytest
import torch
from quantized_models import transformers_model
from torch import nn

import fx_nvfp4
from fx_nvfp4.attention import GROUPED, group_queries, grouped_attention
from fx_nvfp4.benchmark.measure import Settings, attend
from fx_nvfp4.benchmark.table import render_how
from fx_nvfp4.benchmark.timing import static_cache

transformers = pytest.importorskip("transformers")
sdpa = pytest.importorskip("transformers.integrations.sdpa_attention").sdpa_attention_forward


def sharing(groups):
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    return module.eval()


def tensors(tokens, heads=6, kept=2, stored=11):
    torch.manual_seed(tokens)
    query = torch.randn(3, heads, tokens, 16)
    key, value = (torch.randn(3, kept, stored, 16) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("mask_of", [None, (3, 1), (3, 6), (1, 6)])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("kept", [2, 6])
def test_the_numbers_are_sdpa_s(tokens, mask_of, kept):
    query, key, value = tensors(tokens, kept=kept)
    mask = None
    if mask_of is not None:
        mask = torch.rand(*mask_of, tokens, 11) < 0.7
        mask[..., 0] = True
    module = sharing(6 // kept)
    given = {"scaling": 0.3, "sliding_window": None, "position_ids": torch.zeros(3, tokens)}
    expected, _ = sdpa(module, query, key, value, mask, **given)
    result, _ = grouped_attention(module, query, key, value, mask, **given)
    assert result.shape == expected.shape == (3, tokens, 6, 16)
    torch.testing.assert_close(result, expected)


def test_what_we_do_not_know_reaches_sdpa(monkeypatch):
    """Sinks, a softcap: ours to ignore they are not."""
    seen = []
    monkeypatch.setattr(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward", lambda *a, **k: seen.append(k)
    )
    grouped_attention(sharing(3), *tensors(1), None, softcap=30.0)
    assert seen == [{"softcap": 30.0}]
    grouped_attention(sharing(3), *tensors(1), None, softcap=None, is_causal=True)
    assert len(seen) == 1


def heads_of_keys(graph):
    """Of each attention of a graph of Dynamo's."""
    calls = [n for n in graph.graph.nodes if n.target is nn.functional.scaled_dot_product_attention]
    return [call.args[1].meta["example_value"].shape[1] for call in calls]


@torch.no_grad()
@pytest.mark.parametrize("grouped", [False, True])
def test_a_compiled_step_does_not_repeat_the_cache(grouped):
    """Guards against keys and values that a step copies for every head of queries, as compiled sdpa does."""
    model = transformers_model("Qwen3Moe", torch.float32)
    prompt = torch.arange(10).view(2, 5) + 3
    cache = static_cache(model, prompt, 12)
    steps = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "disable_compile": True,
        "pad_token_id": 0,
        "use_cache": True,
    }
    expected = model.generate(prompt, past_key_values=cache, **steps)
    if grouped:
        group_queries(model)
        assert model.config._attn_implementation == GROUPED
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=keep)
    cache.reset()
    assert torch.equal(model.generate(prompt, past_key_values=cache, **steps), expected)
    prefill, step = graphs
    assert heads_of_keys(prefill) == [4, 4]
    assert heads_of_keys(step) == ([2, 2] if grouped else [4, 4])


def test_models_of_other_attention_are_left_as_they_are():
    """gpt-oss has sinks, which sdpa does not know."""
    model = transformers_model("GptOss", torch.float32)
    with pytest.raises(ValueError, match="runs by 'eager'"):
        group_queries(model)
    assert fx_nvfp4.group_queries is group_queries


@pytest.mark.parametrize("family", ["Falcon", "DeepseekV32"])
def test_models_that_ask_for_sdpa_by_name_are_left_as_they_are(family):
    """Guards against logits that change: DeepSeek-V3.2 builds its indexer's mask for "sdpa" and "eager" alone."""
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"no {family} in this transformers")
    kind = getattr(transformers, f"{family}ForCausalLM")
    with torch.device("meta"):
        model = kind(getattr(transformers, f"{family}Config")(num_hidden_layers=1, vocab_size=8))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=r'"sdpa" by name \(modeling_\w+\.py:\d+\)|runs by'):
        group_queries(model)
    assert model.config._attn_implementation == before


def test_parts_that_attend_otherwise_are_left_as_they_are():
    """Guards against a vision tower that is moved from "eager", or flash attention, to ours."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**vision, "num_key_value_heads": 1, "vocab_size": 32}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**text),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": "eager"})
    group_queries(model)
    parts = model.config, model.config.text_config, model.config.vision_config
    assert [part._attn_implementation for part in parts] == [GROUPED, GROUPED, "eager"]


def test_the_benchmark_takes_ours_by_name_and_transformers_own():
    """Guards against a name of ours that is set past the checks of group_queries."""
    model = transformers_model("Qwen3Moe", torch.float32)
    for name in (GROUPED, "eager"):
        attend(model, name)
        assert model.config._attn_implementation == name
    with pytest.raises(ValueError, match="runs by 'eager'"):
        attend(model, GROUPED)
    assert render_how(Settings(attention=GROUPED)).endswith("attention by sdpa_grouped")
    assert "attention" not in render_how(Settings())
