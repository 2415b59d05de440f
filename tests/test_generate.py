"""transformers' generate() with a static cache and the compiled model: eager's tokens, one graph each for two stages.

Guarded here: a recompilation at every step, and code that is generated for a decode graph of one token alone.
"""

from pathlib import Path

import pytest
import torch

import fx_nvfp4
from fx_nvfp4.backend import collect_reports

pytest.importorskip("transformers")

CHECKPOINT = Path(__file__).parent / "data" / "modelopt_mixtral_w4a4"
STEPS = 64


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("batch", [1, 4])
def test_tokens_are_those_of_the_uncompiled_model(batch, device):
    torch._dynamo.reset()
    model = fx_nvfp4.load(CHECKPOINT, device=device, dtype=torch.float32).eval()
    prompt = torch.randint(3, 100, (batch, 9), generator=torch.Generator().manual_seed(batch)).to(device)
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    settings |= {"cache_implementation": "static", "disable_compile": True}
    eager = model.generate(prompt, **settings)
    model.forward = torch.compile(model.forward, backend="nvfp4_emu", options={"strict": True})
    with collect_reports() as report:
        compiled = model.generate(prompt, **settings)
        again = model.generate(prompt, **settings)
    assert eager.shape == (batch, 9 + STEPS)
    assert len(eager[:, 9:].unique()) > 8  # not one token over and over
    assert torch.equal(compiled, eager)
    assert torch.equal(again, eager)
    assert report.graphs == 2  # prefill and decode
    assert [block.lifted for block in report.blocks] == [True] * 4
