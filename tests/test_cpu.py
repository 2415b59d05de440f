"""The C++ body of the ops on a CPU against the plain body, and what happens where it cannot be built.

Edges: odd N, K = 16 and K that fills no whole step, experts without rows, all rows in one expert, ids out of range, no
rows, strided and expanded operands, NaN in one row, every instruction set that the source has. The moe op's own cases
are in test_moe_op.py, which runs them with this body too.
"""

import ctypes
import mmap
import os
import subprocess
import sys

import pytest
import torch
from torch._inductor import config

from fx_nvfp4 import NVFP4Warning, cpu
from fx_nvfp4.cpu import library
from fx_nvfp4.lowering import compat
from fx_nvfp4.reference import Activations

E = 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(37, 16), (48, 80), (5, 1040)]
IDS = {"all": [0, 3, 1, 1, -1, 3, 4, 0], "one": [2] * 23, "few": [1, 1, 1, 2], "nobody": [7, -2], "none": []}
op = torch.ops.fx_nvfp4


@pytest.fixture(scope="module", autouse=True)
def _several_threads():
    """Also where tests run with one thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, os.cpu_count()))
    yield
    torch.set_num_threads(threads)


def make_weight(n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    qdata = torch.randint(0, 256, (E, n, k // 2), generator=g, dtype=torch.uint8)
    # Every finite scale of either sign, subnormal ones too.
    block_scale = torch.randint(0, 0x7F, (E, n, k // 16), generator=g, dtype=torch.uint8)
    block_scale += 128 * torch.randint(0, 2, block_scale.shape, generator=g, dtype=torch.uint8)
    return qdata, block_scale, torch.rand(E, n, generator=g) * 1e-3 + 1e-4


def make_x(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def from_body(monkeypatch, name, call):
    with monkeypatch.context() as m:
        m.setenv(library.VARIABLE, name)
        return call()


def check(monkeypatch, call):
    """call() from C++ equals call() from plain PyTorch, up to the order of an fp32 sum and one rounding."""
    got, want = (from_body(monkeypatch, name, call) for name in ("c++", "plain"))
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if want.numel():
        size = want.abs().max().double()
        limit = 3e-6 * size + (want.dtype != torch.float32) * torch.finfo(want.dtype).eps * want.abs().double()
        assert ((got.double() - want.double()).abs() <= limit).all()
    return got


@pytest.fixture(autouse=True)
def built():
    """Every test here is about the library, which has to be there."""
    assert library.load() is not None, library.description()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_indexed(monkeypatch, dtype, size, ids):
    x, weight, ids = make_x(len(ids), size[1], dtype=dtype), make_weight(*size), torch.tensor(ids, dtype=torch.int32)
    got = check(monkeypatch, lambda: op.indexed(x, *weight, ids))
    assert not got[(ids < 0) | (ids >= E)].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_batched_and_grouped(monkeypatch, dtype, size):
    weight, offs = make_weight(*size), torch.tensor([2, 2, 13, 14])
    for rows in (0, 1, 11):
        x = make_x(rows, size[1], dtype=dtype)
        check(monkeypatch, lambda x=x: op.linear(x, *(t[1] for t in weight)))
        check(monkeypatch, lambda x=x: op.batched(x.expand(E, -1, -1), *weight))
    x = make_x(17, size[1], dtype=dtype)
    got = check(monkeypatch, lambda: op.grouped(x, *weight, offs))
    assert not got[14:].any()


@pytest.mark.parametrize("mode", ["static", "per expert", "dynamic"])
@pytest.mark.parametrize("dialect", ["hardware", "torchao"])
def test_quantised_activations(monkeypatch, mode, dialect):
    weight, x, ids = make_weight(48, 80), make_x(8, 80, dtype=torch.bfloat16), torch.tensor(IDS["all"])
    scale = None if mode == "dynamic" else torch.rand(E, dtype=torch.float64) * 2e-3 + 1e-4
    scale, mode = (scale[0], mode) if mode == "static" else (scale, mode.replace("per expert", "static"))
    check(monkeypatch, lambda: op.indexed(x, *weight, ids, scale, mode, dialect))


def make_extremes(dtype):
    """Blocks of every magnitude, with ties, zeros of either sign, NaN and infinities among them."""
    x = make_x(400, 64, dtype=torch.float64) * 2.0 ** torch.arange(-40, 40).repeat(5).unsqueeze(1)
    x[::7] = torch.tensor([0.0, -0.0, 0.25, -0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -6.0, 6.0, -5.0, 0.5, 1, -1.5, 2]).repeat(
        4
    )
    x[3, 5], x[4, 20], x[5, :16], x[6, 2], x[9, 16:32] = torch.nan, torch.inf, torch.nan, -torch.inf, 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-30, 1e-42, 1e30])
def test_rounded_activations_are_the_oracles_bit_for_bit(dtype, size):
    x, scale = make_extremes(dtype), torch.tensor([1.0, 0.7, 3e-3], dtype=torch.float64) * size
    ids = torch.randint(0, 3, (400,), generator=torch.Generator().manual_seed(0))
    for act, group in (
        (Activations("static", scale, "hardware"), ids),
        (Activations("static", scale[1], "hardware"), None),
    ):
        for rows in (x, x.t().contiguous().t()):
            got, want = cpu._enter(rows, act, group, 3), act.enter_rows(rows, group, 3)
            assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8))
            assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_whatever_other_rows_there_are(dtype):
    weight, x = make_weight(37, 1040), make_x(29, 1040, dtype=dtype)
    many = op.indexed(x, *weight, torch.full((29,), 2))
    for rows in ([0], [5, 28], [3, 4, 9, 14, 22]):
        assert torch.equal(op.indexed(x[rows], *weight, torch.full((len(rows),), 2)), many[rows])


@pytest.mark.parametrize("rows", [2, 19])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(dtype, value, rows):
    weight, x = make_weight(37, 80), make_x(rows, 80, dtype=dtype)
    want = op.linear(x, *(t[0] for t in weight))
    x[1, 79] = value
    got = op.linear(x, *(t[0] for t in weight))
    others = torch.arange(rows) != 1
    assert not got[1].isfinite().any()
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_scale_of_nan_is_nan_in_its_row_of_the_weight_alone(monkeypatch, dtype):
    qdata, block_scale, global_scale = make_weight(37, 80)
    block_scale[1, 5, 2] = 0x7F
    got = op.linear(make_x(9, 80, dtype=dtype), qdata[1], block_scale[1], global_scale[1])
    assert got[:, 5].isnan().all()
    assert got.isnan().sum() == 9


def test_strided_operands(monkeypatch):
    qdata, block_scale, global_scale = make_weight(48, 160)
    ids = torch.tensor([3, 0, 9, 1, 9, 3, 9, 0]).view(4, 2)[:, 0]
    x = make_x(160, 4)
    check(monkeypatch, lambda: op.indexed(x.t(), qdata, block_scale, global_scale, ids))
    check(monkeypatch, lambda: op.linear(x.t()[:, ::2], qdata[0, :, :40], block_scale[0, :, :5], global_scale[0]))
    every_other = [t[:, 1::2] for t in (qdata, block_scale, global_scale)]
    check(monkeypatch, lambda: op.indexed(x.t(), *every_other, ids))
    shared = [t[1:2].expand(E, *t.shape[1:]) for t in (qdata, block_scale)]
    check(monkeypatch, lambda: op.indexed(x.t(), *shared, global_scale[:, :1].expand(-1, 48), ids))
    columns = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (qdata, block_scale)]
    check(monkeypatch, lambda: op.indexed(x.t(), *columns, global_scale.t().contiguous().t(), ids))
    check(monkeypatch, lambda: op.linear(make_x(1, 160).expand(3, -1), qdata[0], block_scale[0], global_scale[0]))


def make_block(dtype=torch.bfloat16, tokens=70, layout="interleaved"):
    up, down = make_weight(64, 48), make_weight(80, 32, seed=1)
    ids = torch.randint(-1, E + 1, (tokens, 3), generator=torch.Generator().manual_seed(2))
    weights = make_x(tokens, 3).softmax(dim=-1).to(dtype)
    biases = [make_x(E, 64, dtype=dtype)], make_x(E, 80)
    return (make_x(tokens, 48, dtype=dtype), ids, weights, *([t] for t in up), *down, "silu(g) * u", layout, *biases)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moe_in_several_chunks(monkeypatch, dtype):
    monkeypatch.setattr(cpu, "_CHUNK", 1000)
    got, want = (from_body(monkeypatch, name, lambda: op.moe(*make_block(dtype))) for name in ("c++", "plain"))
    # h is rounded between the products, so that a sum in another order may fall to its other side.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2 * torch.finfo(dtype).eps * float(want.abs().max()))


def test_slots_of_nobody_take_no_bias(monkeypatch):
    operands = list(make_block(tokens=5))
    operands[12] = torch.full((E, 80), float("nan"))
    operands[1] = torch.full((5, 3), -1)
    assert torch.equal(op.moe(*operands), torch.zeros(5, 80, dtype=torch.bfloat16))


def test_moe_without_slots():
    x, ids, weights, *rest = make_block()
    assert torch.equal(op.moe(x, ids[:, :0], weights[:, :0], *rest), torch.zeros(70, 80, dtype=x.dtype))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages were touched")
@pytest.mark.parametrize("rows", [1, 9])
def test_experts_that_no_row_chose_are_not_read(rows):
    n, k, page = 2, 2 * mmap.PAGESIZE, mmap.PAGESIZE  # an expert has two pages
    memory = mmap.mmap(-1, E * n * page)
    qdata = torch.frombuffer(memory, dtype=torch.uint8).view(E, n, page)
    qdata[2] = 0x5A
    op.indexed(make_x(rows, k), qdata, make_weight(n, k)[1], torch.ones(E, n), torch.full((rows,), 2))
    touched = (ctypes.c_ubyte * (E * n))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(qdata.data_ptr()), ctypes.c_size_t(E * n * page), touched) == 0
    assert [t & 1 for t in touched] == [0, 0, 0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(("bits", "isa"), [(256, "AVX2"), (1, "any CPU")])
@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="needs AVX2")
def test_other_instruction_sets(monkeypatch, bits, isa):
    with config.patch({"cpp.simdlen": bits}):
        other = library._build.__wrapped__()
    assert other.isa == isa
    monkeypatch.setattr(library, "_build", lambda: other)
    for dtype in DTYPES:
        for ids in (IDS["all"], IDS["one"]):
            test_indexed(monkeypatch, dtype, (37, 80), ids)
    test_moe_in_several_chunks(monkeypatch, torch.bfloat16)


@pytest.fixture
def unbuilt():
    """As in a process in which the library was not asked for yet."""
    library._build.cache_clear()
    yield
    library._build.cache_clear()


def test_without_a_compiler_the_plain_body_runs_and_one_warning_says_so(monkeypatch, unbuilt, recwarn):
    def no_compiler(source):
        raise RuntimeError("no working C++ compiler\nfound")

    monkeypatch.setattr(compat, "build_cpp", no_compiler)
    weight, x = [t[0] for t in make_weight(37, 80)], make_x(3, 80)
    got = op.linear(x, *weight)
    assert torch.equal(got, op.linear(x, *weight))
    (warning,) = [w for w in recwarn if issubclass(w.category, NVFP4Warning)]
    assert "not built (RuntimeError: no working C++ compiler found). Install a C++ compiler" in str(warning.message)
    assert library.description().startswith("plain PyTorch on cpu (no C++ body: RuntimeError: no working C++ compiler")
    assert torch.equal(got, from_body(monkeypatch, "plain", lambda: op.linear(x, *weight)))


def test_the_plain_body_on_request_builds_nothing(monkeypatch, unbuilt):
    monkeypatch.setattr(compat, "build_cpp", lambda source: pytest.fail("was built"))
    monkeypatch.setenv(library.VARIABLE, "plain")
    assert library.load() is None
    assert library.description() == "plain PyTorch on cpu (FX_NVFP4_CPU=plain)"


def test_an_unknown_body_is_refused(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "fast")
    with pytest.raises(ValueError, match=r'FX_NVFP4_CPU must be "c\+\+" or "plain", got \'fast\''):
        op.linear(make_x(3, 80), *(t[0] for t in make_weight(37, 80)))


def test_operands_elsewhere_are_refused():
    qdata, *scales = (t[0] for t in make_weight(37, 80))
    with pytest.raises(ValueError, match=r"another operand, torch.uint8 \[1, 37, 40\], on meta"):
        cpu.linear(make_x(3, 80), qdata.to("meta"), *scales, Activations("none", None, "hardware"))


def run_apart(cache, **environment):
    code = "from fx_nvfp4.cpu import library; print(library.description())"
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **environment}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_two_processes_build_at_once_and_one_has_no_compiler(tmp_path):
    two = [run_apart(tmp_path / "cache") for _ in range(2)]
    without = run_apart(tmp_path / "other", CXX="/nonexistent/c++", PATH="/nonexistent")
    for process in two:
        out, error = process.communicate(timeout=300)
        assert out.decode().startswith("C++ for "), error.decode()
    assert len(list((tmp_path / "cache").rglob("*.main.so"))) == 1
    out, error = without.communicate(timeout=300)
    assert out.decode().startswith("plain PyTorch on cpu (no C++ body: ")
    assert "NVFP4Warning: NVFP4 products on the CPU run as plain PyTorch" in error.decode()


SHORT_OF_MEMORY = """
import resource, torch
import fx_nvfp4
torch.set_num_threads(1)
K = 1 << 22
codes, scales = torch.zeros(4, K // 2, dtype=torch.uint8), torch.full((4, K // 16), 0x38, dtype=torch.uint8)
operands = codes, scales.view(torch.float8_e4m3fn), torch.ones(4)
x = torch.ones(4, K)
few = [t.contiguous() for t in (x[:1, :64], codes[:, :32], operands[1][:, :4], operands[2])]
torch.ops.fx_nvfp4.linear(*few)  # builds the body
size = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size + (300 << 20),) * 2)
try:
    torch.ops.fx_nvfp4.linear(x, *operands)
except MemoryError as error:
    print("MemoryError", error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_memory_that_runs_out_in_a_thread_is_an_error():
    """It ended the process: no exception may leave the threads' region."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SHORT_OF_MEMORY], capture_output=True, text=True)
    assert "MemoryError fx_nvfp4: no memory" in done.stdout, done.stderr[-2000:]
