"""What torch.compile, torch.export and AOTInductor offer, on a small routed model with packed weights.

Numbers of tokens: symbolic and marked, none, one; experts that no token reaches, all tokens on one. Modes, autocast,
no_grad, inference mode, training, compiled autograd, caches on and off, copies, pickles, threads, two models in one
process; exported programs and packages, in this process and in a fresh one. Canonical weights, and tiles.
"""

import copy
import io
import pickle
import signal
import subprocess
import sys
import threading

import pytest
import routed_model
import torch
from routed_model import DEVICE, EXPERTS, HIDDEN, TOP_K, Routed, tokens
from spelled_models import STYLES, SpelledMoE
from test_backend import run_process
from torch import nn

import fx_nvfp4
from fx_nvfp4.backend import collect_reports
from fx_nvfp4.layouts import is_tiled

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(params=["canonical", "tiles"])
def prepack(request):
    """The option that leaves weights in one layout or the other."""
    return "always" if request.param == "tiles" else False


def compiled(model, prepack=False, codegen=False, **kwargs):
    options = {"codegen": codegen, "prepack": prepack, "strict": True, **kwargs.pop("options", {})}
    return torch.compile(model, backend="nvfp4_emu", options=options, **{"fullgraph": True, **kwargs})


def check(run, model, *inputs):
    torch.testing.assert_close(run(*inputs), model.reference(*inputs), rtol=1e-5, atol=1e-5)


# Numbers of tokens


@pytest.mark.in_part(2)
@pytest.mark.parametrize("codegen", [False, True])
@torch.no_grad()
def test_symbolic_numbers_of_tokens_down_to_none(prepack, codegen):
    model = Routed()
    run = compiled(model, prepack, codegen, dynamic=True)
    with collect_reports() as report:
        for count in (7, 0, 1, 2, 33, 0):
            check(run, model, tokens(count))
    assert report.graphs == 3  # Dynamo takes 0 and 1 for sizes of their own
    assert is_tiled(model.experts.down_proj.qdata) == bool(prepack)


@torch.no_grad()
def test_a_marked_number_of_tokens(prepack):
    model, x = Routed(), tokens(7)
    torch._dynamo.mark_dynamic(x, 0)
    run = compiled(model, prepack)
    check(run, model, x)
    for count in (2, 12, 33):
        with torch._dynamo.config.patch(error_on_recompile=True):
            check(run, model, tokens(count))
    for count in (1, 0):
        check(run, model, tokens(count))


@torch.no_grad()
def test_numbers_that_become_symbols_by_themselves():
    model = Routed()
    run = compiled(model)
    for count in (0, 1, 5, 9):
        check(run, model, tokens(count))


@pytest.mark.in_part(3)
@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_no_tokens_for_spelled_weights(style):
    """Gathering the weights of no token once passed for a dequantisation, and raised under strict."""
    model = SpelledMoE(style, torch.bfloat16).to(DEVICE)
    run = compiled(model, dynamic=True)
    for count in (5, 0, 1):
        x = tokens(count).bfloat16()
        torch.testing.assert_close(run(x).float(), model.reference(x).float(), rtol=2**-6, atol=2**-5)


ROUTINGS = {
    "all on one": lambda n: torch.full((n, TOP_K), EXPERTS - 1, device=DEVICE),
    "two experts unreached": lambda n: torch.tensor([[0, 2]], device=DEVICE).expand(n, TOP_K),
    "nobody": lambda n: torch.full((n, TOP_K), -1, device=DEVICE),
    "each slot its own": lambda n: torch.arange(n * TOP_K, device=DEVICE).view(n, TOP_K) % EXPERTS,
}


@pytest.mark.in_part(6)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
@torch.no_grad()
def test_routings(prepack, routing):
    model = Routed()
    run = compiled(model, prepack)
    for count in (6, 1):
        check(run, model, tokens(count), routing(count))


# Modes and contexts


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
@torch.no_grad()
def test_modes(mode):
    model = Routed()
    run = torch.compile(model, backend="nvfp4_emu", mode=mode, fullgraph=True)
    for count in (5, 1):
        check(run, model, tokens(count))


def test_contexts_one_after_the_other(prepack):
    """Each has a graph of its own; weights that one of them put into tiles serve all."""
    model = Routed()
    run = compiled(model, prepack)
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            check(run, model, tokens(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast(prepack, dtype):
    """Products have the dtype that eager gives them, and the numbers up to its rounding."""
    model = Routed()
    with torch.autocast(DEVICE, dtype=dtype):
        want, got = model(tokens(5)), compiled(model, prepack)(tokens(5))
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)


def gradients(call, model):
    x = tokens(5).requires_grad_()
    model.zero_grad()
    call(x).square().sum().backward()
    return x.grad, model.router.grad, model.head.bias.grad


@pytest.mark.parametrize("compiled_autograd", [False, True])
def test_training_beside_packed_weights(prepack, compiled_autograd):
    model = Routed()
    want = gradients(model.reference, model)
    with torch._dynamo.config.patch(compiled_autograd=compiled_autograd):
        got = gradients(compiled(model, prepack), model)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activations", ["none", "dynamic"])
@torch.no_grad()
def test_two_models_in_one_process(activations):
    """Of equal graphs, one may serve both; each with its own weights."""
    models = [Routed(activations) for _ in range(2)]
    other = routed_model.packed(32, HIDDEN, seed=5, activations=activations).to(DEVICE)
    models[1].head.weight = nn.Parameter(other, requires_grad=False)
    runs = [compiled(m, codegen=True) for m in models]
    for _ in range(2):
        for run, model in zip(runs, models, strict=True):
            torch.testing.assert_close(run(tokens(5)), model(tokens(5)), rtol=1e-5, atol=1e-5)


@pytest.mark.in_part(3)
@pytest.mark.parametrize(
    "options", [{"fx_graph_cache": True}, {"fx_graph_cache": False}, {"force_disable_caches": True}]
)
@torch.no_grad()
def test_caches_on_and_off(options, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for _ in range(2):
        torch._dynamo.reset()
        model = Routed()
        with collect_reports() as report:
            check(compiled(model, codegen=True, options=options), model, tokens(5))
        assert len(report.matched) == 4


# Copies, pickles, threads


@torch.no_grad()
def test_copies_of_a_model_and_of_a_compiled_one(prepack):
    model = Routed()
    run = compiled(model, prepack)
    check(run, model, tokens(5))
    copied, other = copy.deepcopy(run), copy.deepcopy(model)
    copied._orig_mod.head.bias.add_(1)
    check(copied, copied._orig_mod, tokens(5))
    check(compiled(other, prepack), other, tokens(5))
    check(run, model, tokens(5))
    assert copied._orig_mod.head.weight.qdata.data_ptr() != model.head.weight.qdata.data_ptr()


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [by_torch, lambda m: pickle.loads(pickle.dumps(m))], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("how", ["eager", "compiled", "compile()"])
@torch.no_grad()
def test_pickles(prepack, through, how):
    """What was compiled is not in the pickle: the model compiles anew. pickle itself once failed on fp8 scales."""
    model = Routed()
    if how == "compile()":
        model.compile(backend="nvfp4_emu", options={"codegen": False, "prepack": prepack})
    run = compiled(model, prepack) if how == "compiled" else model
    check(run, model, tokens(5))
    again = through(run)
    torch._dynamo.reset()  # else the graph of the first may serve the second
    with collect_reports() as report:
        check(again, getattr(again, "_orig_mod", again), tokens(5))
    assert report.graphs == (how == "compiled")
    weight = getattr(again, "_orig_mod", again).head.weight
    assert torch.equal(weight.dequantize(), model.head.weight.dequantize())
    assert is_tiled(weight.qdata) == is_tiled(model.head.weight.qdata)


@torch.no_grad()
def test_a_compiled_method_is_refused_by_pickle_itself():
    """PyTorch puts a wrapper in its place, which pickle finds not to be the function of that name."""
    run = torch.compile(Routed().forward, backend="nvfp4_emu", options={"codegen": False})
    run(tokens(3))
    with pytest.raises(pickle.PicklingError, match="not the same object"):
        pickle.dumps(run)


def test_pickles_from_before_scales_travelled_as_bytes():
    weight = routed_model.packed(32, HIDDEN, seed=0)
    state = {n: v for n, v in vars(weight).items() if n not in ("act_scale", "view_dims")}
    other = routed_model.packed(32, HIDDEN, seed=1)
    other.__setstate__(state)
    assert other.block_scale.dtype == torch.float8_e4m3fn
    assert other.view_dims is None
    assert torch.equal(other.dequantize(), weight.dequantize())


def in_threads(count, work):
    """Calls work(number) in so many threads at once, and raises what any of them raised."""
    failed, barrier = [], threading.Barrier(count)

    def one(number):
        barrier.wait()
        try:
            with torch.no_grad():
                work(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def test_threads_compile_models_of_their_own():
    def work(number):
        model = Routed()
        run = compiled(model, "always" if number % 2 else False)
        for _ in range(2):
            check(run, model, tokens(3 + number))

    in_threads(4, work)


def test_threads_compile_one_model(prepack):
    model = Routed()
    run, want = compiled(model, prepack), model.reference(tokens(3)).detach()
    in_threads(4, lambda number: torch.testing.assert_close(run(tokens(3)), want, rtol=1e-5, atol=1e-5))


# Exported programs


class Products(nn.Module):
    """The products that an expert tensor takes part in without FusedExperts."""

    def __init__(self, style):
        super().__init__()
        self.style = style
        self.w = nn.Parameter(routed_model.packed(EXPERTS, 32, HIDDEN, seed=0).to(DEVICE), requires_grad=False)

    def forward(self, x, ids):
        if self.style == "indexed":
            return torch.bmm(self.w[ids], x.unsqueeze(-1)).squeeze(-1)
        if self.style == "batched":
            return torch.bmm(x.expand(EXPERTS, *x.shape), self.w.transpose(1, 2)).sum(0)
        ids, order = ids.sort()
        offs = nn.functional.one_hot(ids, EXPERTS).sum(0).cumsum(0, dtype=torch.int32)
        w = self.w.to(torch.bfloat16)
        return torch._grouped_mm(x[order].bfloat16(), w.transpose(1, 2), offs=offs)


def ops_of(program):
    return [str(n.target).split(".")[1] for n in program.graph.nodes if str(n.target).startswith("fx_nvfp4")]


def exported(model, *inputs, least=0):
    count = torch.export.Dim("count", min=least, max=1024)
    with torch.no_grad():
        return torch.export.export(model.eval(), inputs, dynamic_shapes=tuple({0: count} for _ in inputs))


@pytest.mark.parametrize("tile", [False, True])
@torch.no_grad()
def test_an_exported_program_runs_the_ops(tile):
    model = Routed()
    assert not tile or not fx_nvfp4.prepack(model).left
    program = exported(model, tokens(5))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    lowered = program.run_decompositions()
    assert ops_of(lowered) == ["moe", "linear"]
    for form in (program, torch.export.load(file), lowered):
        for count in (5, 9, 1, 0):
            check(form.module(), model, tokens(count))


@pytest.mark.parametrize("tile", [False, True])
@pytest.mark.parametrize("style", ["indexed", "batched", "grouped"])
@torch.no_grad()
def test_products_export_as_ops(style, tile):
    """A conversion is exported with an assertion on dtype and device, which a packed weight once did not answer."""
    model = Products(style)
    assert not tile or not fx_nvfp4.prepack(model).left
    program = exported(model, tokens(5), torch.arange(5, device=DEVICE) % EXPERTS, least=2).run_decompositions()
    assert ops_of(program) == [style]
    for count in (5, 9):
        ids = torch.arange(count, device=DEVICE) % EXPERTS
        torch.testing.assert_close(program.module()(tokens(count), ids), model(tokens(count), ids))


def test_assertions_on_a_packed_weight():
    weight = routed_model.packed(32, HIDDEN, seed=0)
    asserts = torch.ops.aten._assert_tensor_metadata.default
    asserts(weight, dtype=torch.float32, device=torch.device("cpu"), layout=torch.strided)
    asserts(weight, [32, HIDDEN])
    for odd in ({"dtype": torch.float16}, {"device": torch.device("meta")}):
        with pytest.raises(RuntimeError, match="mismatch"):
            asserts(weight, **odd)


PACKAGED = """
    import json
    {imports}
    try:
        run = torch._inductor.aoti_load_package({package!r})
        y = run(torch.load({inputs!r}))
        print(json.dumps(y.tolist()))
    except RuntimeError as error:
        print(json.dumps(str(error)))
"""


PLAIN_PACKAGE = """
import sys, torch
program = torch.export.export(torch.nn.Linear(16, 8), (torch.randn(4, 16),))
package = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
torch._inductor.aoti_load_package(package)
"""


@pytest.fixture(scope="module")  # it takes a minute
def packages_load(tmp_path_factory):
    """Skips where PyTorch ends the process on a package without anything of ours, as seen with 2.11 beside a GPU."""
    if DEVICE == "cuda":
        command = [sys.executable, "-c", PLAIN_PACKAGE, str(tmp_path_factory.mktemp("plain") / "m.pt2")]
        if subprocess.run(command, capture_output=True).returncode == -signal.SIGSEGV:
            pytest.skip("aoti_load_package crashes on a plain nn.Linear here")


@pytest.mark.slow
@pytest.mark.usefixtures("packages_load")
@pytest.mark.parametrize("tile", [False, True])
@torch.no_grad()
def test_a_package_runs_in_a_fresh_process_that_imports_the_library(tile, tmp_path):
    """Its ops are Python's: without the import, PyTorch says that it knows no fx_nvfp4::moe."""
    model = Routed()
    assert not tile or not fx_nvfp4.prepack(model).left
    package = torch._inductor.aoti_compile_and_package(exported(model, tokens(5)), package_path=str(tmp_path / "m.pt2"))
    run = torch._inductor.aoti_load_package(package)
    for count in (5, 9, 1, 0):
        check(run, model, tokens(count))
    torch.save(tokens(5), tmp_path / "x.pt")
    code = PACKAGED.format(imports="{imports}", package=package, inputs=str(tmp_path / "x.pt"))
    cache = tmp_path / "cache"
    got = run_process(code.format(imports="import fx_nvfp4"), cache, "import torch\n")
    torch.testing.assert_close(torch.tensor(got), model.reference(tokens(5)).cpu(), rtol=1e-5, atol=1e-5)
    if not tile:
        assert "fx_nvfp4::moe" in run_process(code.format(imports=""), cache, "import torch\n")
