"""transformers' generate() with a static cache and the compiled model: eager's tokens, one graph each for two stages.

Guarded here: a recompilation at every step, and code that is generated for a decode graph of one token alone.
"""

import pytest
import torch
from checkpoint_files import CHECKPOINTS, SMALL

import fx_nvfp4
from fx_nvfp4.backend import collect_reports

pytest.importorskip("transformers")

PROMPT, STEPS = 9, 64


def graphs_of(config):
    """Prefill and decode; one more where a layer sees a window that fills meanwhile, whose cache rolls from then on."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    return 2 if window is None or window >= PROMPT + STEPS else 3


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "batch"),
    [
        pytest.param(n, batch, marks=[pytest.mark.slow] * ((n, batch) != (SMALL.name, 4)))
        for n in CHECKPOINTS
        for batch in (1, 4)
    ],
)
def test_tokens_are_those_of_the_uncompiled_model(name, batch, device):
    torch._dynamo.reset()
    model = fx_nvfp4.load(CHECKPOINTS[name], device=device, dtype=torch.float32, progress=False).eval()
    prompt = torch.randint(3, 100, (batch, PROMPT), generator=torch.Generator().manual_seed(batch)).to(device)
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    settings |= {"cache_implementation": "static", "disable_compile": True}
    eager = model.generate(prompt, **settings)
    model.forward = torch.compile(model.forward, backend="nvfp4_emu", options={"strict": True})
    with collect_reports() as report:
        compiled = model.generate(prompt, **settings)
        again = model.generate(prompt, **settings)
    assert eager.shape == (batch, PROMPT + STEPS)
    assert len(eager[:, PROMPT:].unique()) > 8  # not one token over and over
    assert torch.equal(compiled, eager)
    assert torch.equal(again, eager)
    assert report.graphs == graphs_of(model.config)
    assert [block.lifted for block in report.blocks] == [True] * (2 * report.graphs)  # two layers
