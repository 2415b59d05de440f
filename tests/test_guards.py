"""Compiled graphs are valid for the lookup tables they were compiled for, and for nothing else that may change.

Guarded here: tables edited in place, through .data or NumPy, replaced, loaded, copied with the model, created in
inference mode; buffers, globals, literals, frozen and trained parameters; one of two tables; training; warm caches of
another process. And what is an input, which may change freely: codes, scales, and the model's own numbers.
"""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from test_backend import run_process
from torch import nn
from torch.nn import functional as F

from fx_nvfp4 import NVFP4Warning, backend, tables
from fx_nvfp4 import format as nvfp4
from fx_nvfp4.backend import collect_reports

N, K = 48, 64
E2M1 = torch.tensor(nvfp4.E2M1_VALUES)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def packed(seed=0):
    dense = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    scale = dense.abs().max() / nvfp4.TWO_LEVEL_MAX
    return (*nvfp4.quantize(dense, scale), scale)


def decode(q, s, table):
    values = table[torch.stack((q & 15, q >> 4), -1).flatten(-2).int()].unflatten(-1, (-1, 16))
    return values * s.float().unsqueeze(-1)


class Model(nn.Module):
    """Two linears after each other in one graph; `tables` lets each have a table of its own."""

    def __init__(self, table=E2M1, second=None):
        super().__init__()
        self.q, self.s, self.g = (nn.Buffer(t) for t in packed(0))
        self.q2, self.s2, _ = (nn.Buffer(t) for t in packed(1))
        self.table = nn.Buffer(table.clone()) if not isinstance(table, nn.Parameter) else table
        self.second = self.table if second is None else nn.Buffer(second.clone())

    def forward(self, x):
        y = F.linear(x, (decode(self.q, self.s, self.table) * self.g).flatten(-2))
        return y + F.linear(x.flip(0), (decode(self.q2, self.s2, self.second) * self.g).flatten(-2))


def inputs(rows=5):
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(rows))


def compiled(model):
    return torch.compile(model, backend="nvfp4_emu", fullgraph=True, options={"codegen": False})


def check_falls_back(run, model, x=None):
    """Eager's numbers with one warning, however often it is called."""
    x = inputs() if x is None else x
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-4)
    (said,) = (str(w.message) for w in caught if issubclass(w.category, NVFP4Warning))
    assert "lookup table changed" in said


def check_emulates(run, model, x=None):
    x = inputs() if x is None else x
    with warnings.catch_warnings():
        warnings.simplefilter("error", NVFP4Warning)
        torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-4)


def started(model):
    """The model compiled, found right, and both products recognised."""
    run = compiled(model)
    with collect_reports() as report:
        check_emulates(run, model)
    assert [m.op for m in report.matched if m.op != "input_grad"] == ["linear"] * 2
    return run


def by_numpy(model):
    model.table.numpy()[3] = 9


def by_data(model):
    model.table.data[3] = 9


def by_other_data(model):
    model.table.data = E2M1 * 2


def by_another(model):
    model.table = model.second = E2M1 * 2


def by_state(model):
    model.load_state_dict({**model.state_dict(), "table": E2M1 * 2, "second": E2M1 * 2})


EDITS = {
    "add_": lambda m: m.table.add_(1),
    "set one entry": lambda m: m.table.__setitem__(3, 9.0),
    "copy_": lambda m: m.table.copy_(E2M1.flip(0)),
    "through data": by_data,
    "other data": by_other_data,
    "through NumPy": by_numpy,
    "through a view": lambda m: m.table[2:5].zero_(),
    "load_state_dict": by_state,
    "replaced": by_another,
}


@pytest.mark.parametrize("name", EDITS)
def test_a_changed_table_is_noticed(name):
    model = Model()
    with torch.no_grad():
        run = started(model)
        EDITS[name](model)
        check_falls_back(run, model)


def test_a_table_changed_back_is_emulated_again():
    model = Model()
    with torch.no_grad():
        run = started(model)
        model.table.mul_(2)
        check_falls_back(run, model)
        model.table.div_(2)
        check_emulates(run, model)


@pytest.mark.parametrize("name", ["table", "second"])
def test_one_of_two_tables(name):
    model = Model(second=E2M1)
    with torch.no_grad():
        run = started(model)
        getattr(model, name)[5] = 0.25
        check_falls_back(run, model)


def test_a_table_that_no_product_uses_is_free():
    class Two(Model):
        def forward(self, x):
            return super().forward(x) * self.ramp.mean()

    model = Two()
    model.ramp = nn.Buffer(torch.arange(16.0))
    with torch.no_grad():
        run = started(model)
        model.ramp[3] = 7
        check_emulates(run, model)


def test_copies_of_a_model_are_guarded_each():
    model = Model()
    with torch.no_grad():
        run = started(model)
        other = copy.deepcopy(model)
        other_run = compiled(other)
        check_emulates(other_run, other)
        other.table.mul_(2)
        check_falls_back(other_run, other)
        check_emulates(run, model)
        copied = copy.deepcopy(run)
        check_emulates(copied, model)
        copied._orig_mod.table.mul_(2)
        torch.testing.assert_close(copied(inputs()), copied._orig_mod(inputs()), rtol=1e-5, atol=1e-4)


def test_a_model_of_the_same_code_with_another_table():
    """Dynamo may run it with the graph of the first."""
    model, other = Model(), Model(E2M1 * 2)
    with torch.no_grad():
        run, other_run = started(model), compiled(other)
        for _ in range(2):
            torch.testing.assert_close(other_run(inputs()), other(inputs()), rtol=1e-5, atol=1e-4)
            check_emulates(run, model)


TABLE = E2M1.clone()


def global_table(x, q, s):
    return F.linear(x, decode(q, s, TABLE).flatten(-2))


def test_global_tables():
    q, s, _ = packed()
    call = lambda x: global_table(x, q, s)  # noqa: E731
    run = compiled(call)
    with torch.no_grad(), collect_reports() as report:
        check_emulates(run, call)
    assert len(report.matched) == 1
    try:
        TABLE[1] = 5.0
        with torch.no_grad():
            check_falls_back(run, call)
    finally:
        TABLE.copy_(E2M1)


def test_tables_written_in_the_forward():
    """A literal is part of the graph: another one is another graph."""

    class Literal(Model):
        values = nvfp4.E2M1_VALUES

        def forward(self, x):
            return F.linear(x, decode(self.q, self.s, torch.tensor(self.values)).flatten(-2))

    model = Literal()
    run = compiled(model)
    with torch.no_grad(), collect_reports() as report:
        check_emulates(run, model)
        assert len(report.matched) == 1
        model.values = (*model.values[:5], 9.0, *model.values[6:])
        torch.testing.assert_close(run(inputs()), model(inputs()), rtol=1e-5, atol=1e-4)
    assert len(report.matched) == 1
    assert len(report.refused) == 1


@pytest.mark.parametrize("trained", [False, True])
def test_tables_that_are_parameters(trained):
    """A frozen one is a table like any other; of a trained one the values are nobody's to rely on."""
    model = Model(nn.Parameter(E2M1.clone(), requires_grad=trained))
    run = compiled(model)
    with collect_reports() as report:
        check_emulates(run, model)
    assert len(report.matched) == (0 if trained else 2)
    with torch.no_grad():
        model.table[3] = 9.0
    if trained:
        check_emulates(run, model)
        (got,) = torch.autograd.grad(run(inputs()).sum(), model.table)
        (want,) = torch.autograd.grad(model(inputs()).sum(), model.table)
        torch.testing.assert_close(got, want)
    else:
        check_falls_back(run, model)


def test_small_parameters_do_not_decide_which_artifact_fits():
    model = Model()
    model.bias, model.zeros = nn.Parameter(torch.randn(256)), nn.Parameter(torch.zeros(256), requires_grad=False)
    model.bias.data[0] = 0
    model.forward = lambda x: Model.forward(model, x).sum() + model.bias.sum() + model.zeros.sum()
    found, plain = [], backend.find_tables
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "find_tables", lambda *a: found.append(plain(*a)) or found[-1])
        compiled(model)(inputs())
    assert [len(f) for f in found] == [1]


def test_tables_in_inference_mode():
    """Inference tensors do not count their changes."""
    with torch.inference_mode():
        model = Model(E2M1 * 1)
        run = started(model)
        model.table[3] = 9.0
        check_falls_back(run, model)
        model.table.copy_(E2M1)
        check_emulates(run, model)


def test_an_ordinary_table_edited_in_inference_mode():
    model = Model()
    run = started(model)
    with torch.inference_mode():
        check_emulates(run, model)
        model.table[3] = 9.0
        check_falls_back(run, model)


def test_a_model_converted_after_compilation_is_compiled_anew():
    model = Model()
    with torch.no_grad():
        run = started(model)
        model.table = model.second = model.table.half()
        with collect_reports() as report:
            check_emulates(run, model)
        assert len(report.matched) == 2
        model.table[3] = 9.0
        check_falls_back(run, model)


@pytest.mark.gpu
def test_a_model_moved_after_compilation_is_compiled_anew():
    model = Model()
    with torch.no_grad():
        run = started(model)
        model.cuda()
        with collect_reports() as report:
            check_emulates(run, model, inputs().cuda())
        assert len(report.matched) == 2
        model.table[3] = 9.0
        check_falls_back(run, model, inputs().cuda())


@pytest.mark.gpu
def test_tables_under_cuda_graphs():
    """Replayed graphs read static addresses: the guard must look before each replay."""
    model = Model().cuda()
    run = torch.compile(model, backend="nvfp4_emu", mode="reduce-overhead")
    x = inputs().cuda()
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-4)
        model.table.mul_(2)
        check_falls_back(run, model, x)
        model.table.div_(2)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            check_emulates(run, model, x)


class TestCounted:
    """The guard of tables whose entries cost a device synchronisation to read, tried on a CPU."""

    @pytest.fixture(autouse=True)
    def compared(self, monkeypatch):
        compared, plain = [], torch.equal
        monkeypatch.setattr(tables, "_is_host_memory", lambda table: False)
        monkeypatch.setattr(torch, "equal", lambda *a: compared.append(1) or plain(*a))
        return compared

    @torch.no_grad()
    def test_several_models_are_compared_once_each(self, compared):
        models = [Model() for _ in range(3)]
        runs = [compiled(m) for m in models]
        for run in runs:
            run(inputs())
        compared.clear()
        for run in runs * 3:
            run(inputs())
        assert not compared

    @pytest.mark.parametrize("name", [n for n in EDITS if n not in ("through data", "through NumPy")])
    @torch.no_grad()
    def test_counted_changes_are_noticed(self, name):
        model = Model()
        run = started(model)
        EDITS[name](model)
        check_falls_back(run, model)

    def test_inference_tensors_are_compared_at_each_call(self, compared):
        with torch.inference_mode():
            model = Model(E2M1 * 1)
            run = started(model)
            compared.clear()
            run(inputs())
            assert compared
            model.table[3] = 9.0
            check_falls_back(run, model)

    @torch.no_grad()
    def test_tables_replaced_at_each_call_are_not_kept(self, compared):
        model = Model()
        run = started(model)
        gone = weakref.ref(model.table)
        for _ in range(3):
            model.table = model.second = E2M1.clone()
            check_emulates(run, model)
        gc.collect()
        assert gone() is None


def test_gradients_under_a_changed_table():
    """The graph as written is differentiable, for activations and for whatever else asked for it."""
    model = Model()
    model.adapter = nn.Parameter(torch.randn(N, K) * 0.1)
    model.forward = lambda x: Model.forward(model, x) + F.linear(x, model.adapter)
    run = compiled(model)

    def gradients(call):
        x = inputs().requires_grad_()
        return torch.autograd.grad((call(x) ** 2).sum(), [x, model.adapter])

    for got, want in zip(gradients(run), gradients(model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    model.table[3] = 9.0
    with pytest.warns(NVFP4Warning, match="lookup table changed"):
        got = gradients(run)
    for g, w in zip(got, gradients(model), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-4)


def test_a_table_changed_between_forward_and_backward():
    """The backward pass belongs to the forward pass it was run with."""
    model, x = Model(), inputs().requires_grad_()
    run = compiled(model)
    (want,) = torch.autograd.grad(model(x).sum(), x)
    y = run(x)
    model.table[3] = 9.0
    (got,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


# What may change


CHANGES = {
    "codes": lambda m: m.q.bitwise_xor_(0x31),
    "block scales": lambda m: m.s.view(torch.uint8).sub_(3),
    "global scale": lambda m: m.g.mul_(1.5),
    "codes through data": lambda m: setattr(m.q, "data", m.q.flip(0)),
    "codes replaced": lambda m: setattr(m, "q", m.q2.clone()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_codes_and_scales_are_inputs(name):
    model = Model()
    with torch.no_grad():
        run = started(model)
        before = run(inputs())
        CHANGES[name](model)
        check_emulates(run, model)
        assert not torch.allclose(run(inputs()), before)


class Scaled(Model):
    """The global scale as a Python number, or as a tensor made of one."""

    def __init__(self, as_tensor):
        super().__init__()
        self.scale, self.as_tensor = 0.75, as_tensor

    def forward(self, x):
        scale = torch.tensor(self.scale) if self.as_tensor else self.scale
        return F.linear(x, (decode(self.q, self.s, self.table) * scale).flatten(-2))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_global_scales_that_are_numbers_of_the_model(as_tensor):
    """Dynamo compiles anew, or has made the number an input: either way the new value counts."""
    model = Scaled(as_tensor)
    run = compiled(model)
    with torch.no_grad(), collect_reports():
        for scale in (0.75, 0.3, 1.0, 0.0123):
            model.scale = scale
            want = model(inputs())
            # Sums of large terms in another order.
            torch.testing.assert_close(run(inputs()), want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


# Other processes with a warm cache


class One(Model):
    """A single product, as these compile generated code."""

    def forward(self, x):
        return F.linear(x, (decode(self.q, self.s, self.table) * self.g).flatten(-2))


OTHER_PROCESS = """
    import json, warnings
    from torch.nn import functional as F
    import fx_nvfp4.backend as backend
    from fx_nvfp4 import format as nvfp4
    import test_guards
    table = torch.tensor(nvfp4.E2M1_VALUES)
    {change}
    model, x = {model}, test_guards.inputs()
    with torch.no_grad(), backend.collect_reports() as report:
        run = torch.compile(model, backend="nvfp4_emu")
        error = (run(x) - model(x)).abs().max().item()
        warned = []
        if {edit}:
            model.table[3] = 9.0
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                error = max(error, (run(x) - model(x)).abs().max().item())
    hits = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
    hits += torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
    print(json.dumps([len(report.matched), len(report.refused), error, hits, len(warned)]))
"""


def other_process(cache, change="", model="test_guards.One(table)", edit=False):
    return run_process(OTHER_PROCESS.format(change=change, model=model, edit=edit), cache)


@pytest.mark.slow
def test_a_warm_cache_is_guarded_in_another_process(tmp_path):
    matched, refused, error, hits, _ = other_process(tmp_path)
    assert (matched, refused, hits) == (1, 0, 0)
    assert error < 1e-3
    # From the cache, and then the table changes.
    matched, refused, error, hits, warned = other_process(tmp_path, edit=True)
    assert (matched, refused, warned) == (1, 0, 1)
    assert hits
    assert error < 1e-3
    # Another table is another artifact.
    matched, refused, error, hits, _ = other_process(tmp_path, change="table[3] = 9.0")
    assert (matched, refused, hits) == (0, 1, 0)
    assert error < 1e-3


@pytest.mark.slow
def test_literal_tables_are_part_of_the_cached_graph(tmp_path):
    change = """
    class Literal(test_guards.Model):
        def forward(self, x):
            return F.linear(x, test_guards.decode(self.q, self.s, torch.tensor({values})).flatten(-2))
    """
    values = list(nvfp4.E2M1_VALUES)
    matched, refused, error, hits, _ = other_process(tmp_path, change.format(values=values), "Literal()")
    assert (matched, refused, hits) == (1, 0, 0)
    values[3] = 9.0
    matched, refused, error, hits, _ = other_process(tmp_path, change.format(values=values), "Literal()")
    assert (matched, refused, hits) == (0, 1, 0)
    assert error < 1e-3
