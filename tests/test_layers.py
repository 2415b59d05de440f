"""Models compiled layer by layer: one compilation for layers that are alike, with a cache and without.

Guarded here: a cache's layer number that enters the graph (one compilation a layer); a copy of the model that runs the
original's layers; layers of two kinds; more kinds than Dynamo compiles by default; models without a list of layers.
"""

import copy

import pytest
import torch
from quantized_models import transformers_model
from torch import nn

import fx_nvfp4
from fx_nvfp4 import NVFP4Config, quantize_
from fx_nvfp4.backend import collect_reports
from fx_nvfp4.benchmark.recorded import Recorded
from fx_nvfp4.benchmark.timing import static_cache
from fx_nvfp4.layers import LayerCache, compile_layers, uncompile_layers

transformers = pytest.importorskip("transformers")
FAST = {"options": {"codegen": False}}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def packed(family="Mixtral", **changes):
    model = transformers_model(family, torch.float32, **changes)
    quantize_(model, NVFP4Config(activations="none"))
    return model


def prompt(batch=2, tokens=5):
    return torch.arange(batch * tokens).view(batch, tokens) % 48 + 3


def steps(new):
    return {
        **{"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True},
        **{"disable_compile": True, "pad_token_id": 0},
    }


@torch.no_grad()
def generated(model, cache, new=3):
    """Tokens, twice: for the first time, and after a reset of the cache."""
    both = []
    for _ in range(2):
        cache.reset()
        both.append(model.generate(prompt(), past_key_values=cache, **steps(new)))
    assert torch.equal(*both)
    return both[0]


@torch.no_grad()
def test_layers_share_one_compilation_for_each_stage_with_a_static_cache():
    model = packed()
    want = generated(model, static_cache(model, prompt(), 16))
    assert compile_layers(model, **FAST) == 2
    with collect_reports() as report:
        assert torch.equal(generated(model, static_cache(model, prompt(), 16)), want)
    assert report.graphs == 2  # prefill and decoding, and not that many for each layer
    assert [block.lifted for block in report.blocks] == [True] * 2
    assert not report.refused


@torch.no_grad()
def test_without_a_cache_and_with_one_that_grows():
    model = packed()
    want = model(prompt(), use_cache=False).logits
    compile_layers(model, **FAST)
    with collect_reports() as report:
        torch.testing.assert_close(model(prompt(), use_cache=False).logits, want, rtol=0, atol=1e-5)
    assert report.graphs == 1
    cache = transformers.DynamicCache(config=model.config)
    model(prompt()[:, :4], past_key_values=cache)
    last = model(prompt()[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(last, want[:, 4:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_copy_runs_layers_of_its_own_and_both_are_undone():
    model = packed()
    want = model(prompt(), use_cache=False).logits
    compile_layers(model, **FAST)
    other = copy.deepcopy(model)
    for parameter in other.model.norm.parameters():
        parameter.zero_()
    for layer in other.model.layers:
        layer.input_layernorm.weight.zero_()
        layer.post_attention_layernorm.weight.zero_()
    assert torch.equal(other(prompt(), use_cache=False).logits, torch.zeros_like(want))
    torch.testing.assert_close(model(prompt(), use_cache=False).logits, want, rtol=0, atol=1e-5)
    for compiled in (model, other):
        uncompile_layers(compiled)
        assert not any("forward" in layer.__dict__ for layer in compiled.model.layers)
    assert torch.equal(model(prompt(), use_cache=False).logits, want)


@torch.no_grad()
def test_layers_of_two_kinds_are_two_compilations():
    model = packed(num_hidden_layers=4)
    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts.act_fn = (nn.SiLU(), nn.GELU())[number % 2]
    want = model(prompt(), use_cache=False).logits
    compile_layers(model, **FAST)
    with collect_reports() as report:
        torch.testing.assert_close(model(prompt(), use_cache=False).logits, want, rtol=0, atol=1e-5)
    assert report.graphs == 2


@torch.no_grad()
def test_more_kinds_of_layers_than_torch_compiles_by_default():
    """Beyond the limit torch would run them uncompiled, and say so in a log alone."""
    model = packed(num_hidden_layers=4)
    for layer, kind in zip(model.model.layers, (nn.SiLU, nn.GELU, nn.ReLU, nn.Tanh), strict=True):
        layer.mlp.experts.act_fn = kind()
    want = model(prompt(), use_cache=False).logits
    with torch._dynamo.config.patch(recompile_limit=2), collect_reports() as report:
        compile_layers(model, **FAST)
        torch.testing.assert_close(model(prompt(), use_cache=False).logits, want, rtol=0, atol=1e-5)
    assert report.graphs == 4


def test_a_model_without_a_list_of_layers_is_told():
    with pytest.raises(TypeError, match=r"Sequential has no list of layers.* use torch.compile on the model"):
        compile_layers(nn.Sequential(nn.Linear(3, 3)))


def test_layers_with_a_forward_of_their_own_are_refused_and_kept():
    """The class's forward took its place in silence, and undoing it deleted both."""
    model = packed()
    layers = model.model.layers
    plain, called = layers[1].forward, []
    layers[1].forward = lambda *args, **kwargs: called.append(1) or plain(*args, **kwargs)
    with pytest.raises(ValueError, match=r"layer 1 \(MixtralDecoderLayer\) has a forward of its own"):
        compile_layers(model, **FAST)
    uncompile_layers(model)
    with torch.no_grad():
        model(prompt())
    assert called == [1]


def test_a_layer_s_part_of_a_cache_is_the_whole_for_all_but_new_keys():
    cache = transformers.StaticCache(config=packed().config, max_cache_len=8)
    part = LayerCache(cache, 1)
    keys = torch.randn(1, 2, 2, 16)
    part.update(keys, keys, 0)  # whatever the number says
    assert torch.equal(cache.layers[1].keys[:, :, :2], keys)
    assert not cache.layers[0].is_initialized
    assert part.get_seq_length(1) == cache.get_seq_length(1)
    assert part.is_compileable == cache.is_compileable


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@pytest.mark.parametrize("prompts", [False, True])
@torch.no_grad()
def test_recorded_passes_give_the_tokens_of_plain_ones(prompts):
    model = packed().cuda()
    given = prompt().cuda()
    want = model.generate(given, past_key_values=static_cache(model, given, 16), **steps(8))
    compile_layers(model)
    model.forward = Recorded(model.forward, prompts)
    cache = static_cache(model, given, 16)
    for _ in range(3):
        cache.reset()
        assert torch.equal(model.generate(given, past_key_values=cache, **steps(8)), want)
    assert len(model.forward._graphs) == 1 + prompts


def test_the_first_pass_of_a_kind_takes_the_way_that_a_recorded_one_takes(monkeypatch):
    """transformers makes a mask of a prompt only while a graph is recorded, and that pass then compiled.

    So it did where a mask was a view, of which the recording has a copy.
    """
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    heard = []

    def forward(input_ids):
        heard.append((torch.cuda.is_current_stream_capturing(), input_ids._base is None))

    recorded = Recorded(forward, prompts=True)
    recorded(input_ids=prompt()[:, :4])
    recorded(prompt()[:, :4])  # never recorded
    assert heard == [(True, True), (False, False)]


def test_prompts_are_not_recorded():
    calls = []

    def forward(input_ids, **others):
        calls.append((input_ids.shape, others))
        return input_ids

    recorded = Recorded(forward)
    for tokens in (prompt(), prompt(tokens=1)):  # the first step of a kind is run as well: it compiles
        assert torch.equal(recorded(input_ids=tokens, use_cache=True), tokens)
    assert recorded(prompt()) is not None  # by position, as whoever shapes a cache calls
    assert [len(others) for _, others in calls] == [1, 1, 0]
    assert not recorded._graphs


@pytest.mark.parametrize(
    ("command", "message"),
    [("--record --device cpu", "--record needs a CUDA device"), ("--record --mode reduce-overhead", "by itself")],
)
def test_what_cannot_be_recorded_is_told(command, message, capsys):
    from fx_nvfp4 import cli

    folder = "tests/data/modelopt_mixtral_w4a4"
    assert cli.main(["bench", "--model", folder, *command.split()]) == 2
    assert message in capsys.readouterr().err


def test_it_is_in_the_package():
    assert fx_nvfp4.compile_layers is compile_layers
