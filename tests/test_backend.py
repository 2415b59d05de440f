"""The backend on models that spell their dequantisation: one graph, nothing dense left, right numbers, caches.

Styles: plain linear, gather then einsum, transformers' batched_mm and grouped_mm, dense products of all experts.
"""

import functools
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import spelled_models
import torch
from spelled_models import STYLES, SpelledMoE
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table

import fx_nvfp4
from fx_nvfp4 import NotEmulatedError, NVFP4Warning, NVFP4Weight, backend, kernel_choice, tuning
from fx_nvfp4.backend import collect_reports, nvfp4_emu
from fx_nvfp4.lowering import compat

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten._grouped_mm}


class Record(CustomGraphPass):
    """Keeps what the graph holds after our pass."""

    def __init__(self):
        self.targets, self.elements = [], []

    def __call__(self, graph):
        for node in graph.nodes:
            if node.op == "call_function":
                self.targets.append(node.target)
                val = node.meta.get("val")
                if isinstance(val, torch.Tensor) and val.is_floating_point():
                    self.elements.append(val.numel())

    def uuid(self):
        return None


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def compiled(model, record=None, codegen=False, **kwargs):
    options = {"codegen": codegen, **kwargs.pop("options", {}), "force_disable_caches": True}
    if record is not None:
        options["post_grad_custom_pre_pass"] = record
    return torch.compile(model, backend="nvfp4_emu", fullgraph=True, options=options, **kwargs)


# torch compiles grouped products in bf16 alone.
@pytest.mark.in_part(9)
@pytest.mark.parametrize(
    ("style", "dtype"),
    [(s, d) for s in STYLES for d in (torch.bfloat16, torch.float32) if (s, d) != ("grouped", torch.float32)],
)
@pytest.mark.parametrize("lift", [True, False])
def test_style_becomes_ops_and_nothing_dense_is_left(device, style, dtype, lift):
    model = SpelledMoE(style, dtype).to(device)
    x = spelled_models.tokens(9, dtype, device)
    record = Record()
    with torch.no_grad(), collect_reports() as report:
        got = compiled(model, record, codegen=True, options={"lift": lift})(x)
        want = model.reference(x)
    ops = ["moe"] if lift and style != "linear" else [STYLES[style]] * 2
    assert [str(t).split(".")[1] for t in record.targets if str(t).startswith("fx_nvfp4")] == ops
    assert {m.op for m in report.matched} == set(ops)
    assert [b.lifted for b in report.blocks] == [True] * (ops == ["moe"])
    assert not report.refused
    assert report.graphs == 1
    # The largest float tensor left is smaller than one dequantised expert tensor.
    assert max(record.elements) < model.up_qdata.numel()
    bound = 1e-5 if dtype == torch.float32 else 2**-6
    assert (got.float() - want).abs().max() <= bound * want.abs().max()


@pytest.mark.in_part(10)
@pytest.mark.parametrize("lift", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_dynamic_token_counts_are_right_without_recompiling(device, style, lift):
    model = SpelledMoE(style, torch.bfloat16).to(device)
    run = compiled(model, codegen=True, dynamic=True, options={"lift": lift})
    with torch.no_grad():
        run(spelled_models.tokens(7, torch.bfloat16, device))
        for tokens in (12, 2, 33):
            x = spelled_models.tokens(tokens, torch.bfloat16, device)
            with torch._dynamo.config.patch(error_on_recompile=True):
                got = run(x).float()
            want = model.reference(x)
            assert (got - want).abs().max() <= 2**-6 * want.abs().max()


@pytest.mark.in_part(2)
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_keep_one_row_products_whole(device, mode):
    # These modes decompose products of one row into multiply and sum, unless the backend prevents it.
    model = SpelledMoE("linear", torch.bfloat16).to(device)
    with torch.no_grad(), collect_reports() as report:
        got = torch.compile(model, backend="nvfp4_emu", mode=mode)(spelled_models.tokens(1, torch.bfloat16, device))
        want = model.reference(spelled_models.tokens(1, torch.bfloat16, device))
    assert len(report.matched) == 2
    assert (got.float() - want).abs().max() <= 2**-6 * want.abs().max()


def test_gradients_reach_the_input_of_a_rewritten_product(device):
    model = SpelledMoE("dense", torch.float32).to(device)
    x = spelled_models.tokens(6, torch.float32, device).requires_grad_()
    (got,) = torch.autograd.grad(compiled(model)(x).sum(), x)
    (want,) = torch.autograd.grad(model.reference(x).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_strict_models_can_be_trained_through(device):
    model = SpelledMoE("dense", torch.float32).to(device)
    x = spelled_models.tokens(6, torch.float32, device).requires_grad_()
    with collect_reports() as report:
        compiled(model, options={"strict": True})(x).sum().backward()
    assert x.grad is not None
    assert not report.refused
    assert not report.notes


def test_everything_else_goes_to_inductor(device):
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 8)).to(device)
    x = torch.randn(3, 16, device=device)
    with torch.no_grad(), collect_reports() as report:
        torch.testing.assert_close(compiled(model, codegen=True)(x), model(x))
    assert (report.matched, report.refused) == ([], [])


def test_a_near_miss_is_a_warning_and_under_strict_an_error():
    model = SpelledMoE("linear", torch.bfloat16, table_entry=(5, 3.03))
    x = spelled_models.tokens(3, torch.bfloat16)
    with torch.no_grad():
        with pytest.warns(NVFP4Warning, match=r"2 uses of packed weights are not emulated"):
            got = compiled(model)(x)
        assert (got.float() - model(x).float()).abs().max() <= 2**-6 * got.float().abs().max()
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"not emulated as NVFP4") as error:
            compiled(model, options={"strict": True})(x)
    assert isinstance(error.value.__cause__ or getattr(error.value, "inner_exception", None), NotEmulatedError)


def test_an_explicit_dequantize_is_reported():
    weight = fx_nvfp4.NVFP4Weight.from_dense(torch.randn(32, 48))
    with torch.no_grad(), collect_reports() as report:
        compiled(lambda x: x @ weight.dequantize().T)(torch.randn(2, 48))
    (refusal,) = report.refused
    assert "is dequantised for" in refusal.reason
    assert "dequantize()" in refusal.advice


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"options": {"strikt": True}}, r"unknown option 'strikt'"),
        ({"options": {"strict": "yes"}}, r"'strict' must be True or False"),
        ({"mode": "fastest"}, r"fastest"),
    ],
)
def test_unknown_options_and_modes_are_named(kwargs, message):
    with pytest.raises(Exception, match=message):
        torch.compile(torch.nn.Linear(2, 2), backend="nvfp4_emu", **kwargs)(torch.randn(1, 2))


def test_a_users_own_joint_pass_still_runs():
    record = Record()
    model = SpelledMoE("linear", torch.bfloat16)
    with torch.no_grad(), collect_reports() as report:
        options = {"joint_custom_pre_pass": record, "codegen": False}
        torch.compile(model, backend="nvfp4_emu", options=options)(spelled_models.tokens(3, torch.bfloat16))
    assert record.targets
    assert len(report.matched) == 2


def run_process(code, cache, imports="import torch, spelled_models\nfrom spelled_models import SpelledMoE\n", **env):
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    # The C++ body would be built anew in each cache.
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": path, "FX_NVFP4_CPU": "plain", **env}
    code = imports + textwrap.dedent(code)
    # Away from the repository, whose folder would stand in for the installed package.
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=env, cwd=cache.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


WARM = """
    import json, fx_nvfp4.backend as backend
    runs = []
    call = backend.EmulationPass.__call__
    backend.EmulationPass.__call__ = lambda self, graph: (runs.append(1), call(self, graph))[1]
    model = SpelledMoE("linear", torch.bfloat16, table_entry={entry})
    product = lambda x: x @ model.weight("up")[0].T  # alone: emulated, it leaves Inductor no C++ to compile
    with torch.no_grad(), backend.collect_reports() as report:
        y = torch.compile(product, backend="nvfp4_emu")(spelled_models.tokens(9, torch.bfloat16))
    print(json.dumps([len(runs), len(report.matched), len(report.refused), y.float().sum().item()]))
"""


def test_a_warm_cache_skips_the_pass_and_keeps_result_and_report(tmp_path):
    passes, matched, refused, total = run_process(WARM.format(entry=None), tmp_path)
    assert (passes, matched, refused) == (1, 1, 0)
    assert run_process(WARM.format(entry=None), tmp_path) == [0, 1, 0, total]


@pytest.mark.slow
def test_models_that_differ_only_in_their_table_share_no_artifact(tmp_path):
    _, _, _, total = run_process(WARM.format(entry=None), tmp_path)
    passes, matched, refused, other = run_process(WARM.format(entry=(5, 3.5)), tmp_path)
    assert (passes, matched, refused) == (1, 0, 1)
    assert other != total


def test_the_backend_is_found_by_name_without_importing_the_package(tmp_path):
    code = """
        import json, sys, torch
        before = "fx_nvfp4" in sys.modules
        run = torch.compile(torch.nn.Linear(4, 4), backend="nvfp4_emu", options={"codegen": False})
        run(torch.ones(1, 4))
        print(json.dumps([before, "fx_nvfp4.backend" in sys.modules]))
    """
    assert run_process(code, tmp_path, imports="") == [False, True]


def test_collectors_nest():
    with collect_reports() as outer:
        with collect_reports():
            pass
        with torch.no_grad():
            compiled(SpelledMoE("linear", torch.bfloat16))(spelled_models.tokens(3, torch.bfloat16))
    assert len(outer.matched) == 2


def test_what_another_thread_compiles_is_not_collected_and_warns():
    packed = NVFP4Weight.from_dense(torch.randn(32, 64))

    def compile_it():
        with pytest.warns(NVFP4Warning, match="1 use of a packed weight is not emulated"):
            compiled(lambda x: x @ packed.dequantize().T)(torch.randn(3, 64))
        done.append(True)

    done = []
    with collect_reports() as report:
        thread = threading.Thread(target=compile_it)
        thread.start()
        thread.join()
    assert done
    assert report.graphs == 0


def test_norms_and_scales_are_no_tables():
    # They would keep fine-tuned models from sharing artifacts, and cost a copy from the device.
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.RMSNorm(256)
            self.register_buffer("scale", torch.rand(16) + 0.1)
            self.register_buffer("codes", torch.randint(0, 255, (16, 16), dtype=torch.uint8))

        def forward(self, x):
            return self.norm(x) * self.scale.sum() + self.codes.sum()

    found = []
    plain = backend.find_tables
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "find_tables", lambda *a: found.append(plain(*a)) or found[-1])
        compiled(Normed())(torch.randn(2, 256))
    assert found == [{}]


def test_overlapping_compilations_give_each_table_its_products_back():
    """One counter was kept for both tables, of which one never got its own again."""
    patches = ({"fallback_random": True}, {})
    tables = []
    for patch in patches:
        with torch._inductor.config.patch(patch):
            tables.append(select_decomp_table())
    assert tables[0] is not tables[1]
    before = [set(table) for table in tables]
    first, second = (compat._products_kept(patch) for patch in patches)
    first.__enter__()
    second.__enter__()
    assert all(len(table) < len(ops) for table, ops in zip(tables, before, strict=True))
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert [set(table) for table in tables] == before


@pytest.mark.parametrize(
    ("mode", "tune", "wanted"),
    [("max-autotune-no-cudagraphs", None, True), ("max-autotune-no-cudagraphs", False, False), (None, True, True)],
)
def test_what_the_option_says_of_tuning_goes_before_the_mode(mode, tune, wanted, monkeypatch):
    monkeypatch.setattr(tuning, "_enabled", False)
    options = {"codegen": False, **({} if tune is None else {"tune": tune})}
    with torch.no_grad():  # torch.compile takes a mode or options, a backend both
        run = torch.compile(torch.nn.Linear(4, 4), backend=functools.partial(nvfp4_emu, mode=mode, options=options))
        run(torch.ones(1, 4))
    assert tuning.enabled() == wanted


@pytest.mark.slow
def test_explaining_many_times_leaves_compilation_working():
    model, x = SpelledMoE("linear", torch.bfloat16), spelled_models.tokens(3, torch.bfloat16)
    with torch.no_grad():
        for _ in range(10):
            assert len(fx_nvfp4.explain(model, x).matched) == 2
        with collect_reports() as report:
            compiled(model)(x)
    assert len(report.matched) == 2


def test_a_restored_report_is_that_of_the_same_activations_and_names_the_body_that_runs(monkeypatch):
    found, x, counters = [], torch.randn(3, 48), torch._dynamo.utils.counters
    counters.clear()
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        for i, activations in enumerate(("none", "dynamic", "none")):
            torch._dynamo.reset()
            monkeypatch.setattr(kernel_choice.cpu, "description", lambda i=i: f"body {i}")
            weight = NVFP4Weight.from_dense(torch.randn(32, 48), activations=activations)
            with collect_reports() as report:
                torch.compile(lambda x, w: x @ w.T, backend="nvfp4_emu")(x, weight)
            found.append((report.matched[0].activations, report.matched[0].config))
    assert found == [("W4A16", "body 0"), ("W4A4 dynamic, hardware rule", "body 1"), ("W4A16", "body 2")]
    assert counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def test_the_backend_function_takes_what_dynamo_passes():
    assert torch._dynamo.lookup_backend("nvfp4_emu") is nvfp4_emu
