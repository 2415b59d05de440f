"""The benchmark of a layer: its arithmetic by hand, its checks on wrong results, and one small run of it.

Edges: more routings than the experts last for, a result that is wrong in one token, not written, or not repeated,
variants that fail when built and when run, numbers of tokens that nobody measured.
"""

import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_floor_is_the_larger_of_bytes_and_operations():
    from moe_layer_parts.shapes import Rates, Shape

    shape = Shape("by hand", experts=4, top=2, hidden=64, intermediate=32)
    # Gate, up and down are 3 * 64 * 32 = 6144 numbers: 3072 bytes of codes, and 384 scales.
    assert shape.expert_bytes == 3456
    # 5 tokens, 2 slots each, 6144 products each, a multiplication and an addition.
    assert shape.flops(5) == 122880
    assert shape.floor(5, 3, Rates(read=1000.0, matmul=1e9)) == pytest.approx(10.368)
    assert shape.floor(5, 3, Rates(read=1e9, matmul=1000.0)) == pytest.approx(122.88)


def test_the_floors_of_published_shapes():
    from moe_layer_parts.shapes import SHAPES, Rates

    rates = Rates(read=4.7e12, matmul=800e12)
    assert SHAPES["deepseek-v3"].floor(256, 256, rates) == pytest.approx(1.349e-3, rel=1e-3)
    assert SHAPES["qwen3-30b"].floor(16384, 128, rates) == pytest.approx(1.546e-3, rel=1e-3)


def test_routings_use_experts_in_turn():
    from moe_layer_parts.data import experts_hit, random_calls
    from moe_layer_parts.shapes import Shape

    shape = Shape("", experts=12, top=3, hidden=16, intermediate=16)
    calls = random_calls(shape, tokens=1, count=6, device=CPU)
    for i in (0, 2):
        assert torch.cat([ids for _, ids, _ in calls[i : i + 4]]).unique().numel() == 12
    many = random_calls(shape, tokens=50, count=2, device=CPU)
    for x, ids, weights in many:
        assert x.shape == (50, 16)
        assert ids.sort(dim=1).values.diff(dim=1).gt(0).all(), "experts of a token differ"
        assert weights.float().sum(dim=1).allclose(torch.ones(50), atol=0.02)
    assert experts_hit(many) == 12
    assert torch.equal(many[1][1], random_calls(shape, tokens=50, count=2, device=CPU)[1][1])


def test_tokens_that_are_compared():
    from moe_layer_parts.exact import SAMPLED, sample

    assert sample(5, CPU).tolist() == [0, 1, 2, 3, 4]
    chosen = sample(SAMPLED + 2, CPU).tolist()
    assert (len(chosen), chosen[0], chosen[-1]) == (SAMPLED, 0, SAMPLED + 1)
    assert len(set(chosen)) == SAMPLED


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([1.0, 1.0, 1.0], None),
        ([1.0, 1.1, 1.1], "relative error 0.1"),
        ([1.0, 1.0, 1.0 + 2**-20], "other bits"),
        ([1.0, float("nan"), float("nan")], "relative error nan"),
    ],
)
def test_wrong_results_are_refused(results, message):
    from moe_layer_parts.exact import checked

    want, values = torch.ones(3, 4, dtype=torch.float64), iter(results)

    def check():
        return checked(lambda: torch.full((3, 4), next(values)), want, torch.arange(3), 6e-3, repeats=True)

    if message is None:
        got, error = check()
        assert (got == 1).all()
        assert error == 0
    else:
        with pytest.raises(AssertionError, match=message):
            check()


def test_rows_that_are_not_compared_have_to_be_written():
    from moe_layer_parts.exact import checked

    result = torch.ones(3, 4)
    result[1] = float("nan")
    with pytest.raises(AssertionError, match="not written"):
        checked(lambda: result, torch.ones(2, 4).double(), torch.tensor([0, 2]), 6e-3, repeats=True)


def test_the_exact_result_is_that_of_the_plain_block():
    from moe_layer_parts.data import random_calls, random_layer
    from moe_layer_parts.exact import exact, relative_error
    from moe_layer_parts.shapes import Shape

    from fx_nvfp4 import block
    from fx_nvfp4.moe import make_block

    shape = Shape("", experts=4, top=2, hidden=64, intermediate=32)
    layer = random_layer(shape, CPU)
    call = random_calls(shape, 6, 1, CPU)[0]
    static = ("static", "static")
    for mode, modes in (("w4a16", ("none", "none")), ("w4a4", static), ("w4a4-shared", static)):
        gate_up, down = layer.weights(mode)
        up = [[part] for part in (gate_up.qdata, gate_up.block_scale, gate_up.global_scale)]
        scales = None if gate_up.act_scale is None else [gate_up.act_scale]
        operands = *up, down.qdata, down.block_scale, down.global_scale, "silu(g) * u", "concatenated"
        plain = block.moe(*call, make_block(*operands, None, None, scales, down.act_scale, *modes))
        error = relative_error(plain, exact(call, gate_up, down, torch.arange(6)))
        assert error < 3e-3, mode


def test_a_table_shows_what_failed_and_why():
    from moe_layer_parts.results import Cell
    from moe_layer_parts.table import render
    from moe_layer_parts.variants import Variant

    def never(layer):
        raise AssertionError

    ours = [Variant(f"ours {f}", never, f, ours=True) for f in ("w4a16", "w4a4")]
    peers = [Variant("fast", never, whole=False), Variant("slow", never), Variant("absent", never)]
    cells = [
        Cell("s", "ours w4a16", "w4a16", 16, microseconds=200.0, floor=50.0),
        Cell("s", "ours w4a16", "w4a16", 64, reason="ValueError: broken"),
        Cell("s", "ours w4a4", "w4a4", 16, microseconds=210.0, floor=50.0),
        Cell("s", "fast", "w4a16", 16, microseconds=100.0, floor=50.0),
        Cell("s", "slow", "w4a16", 16, microseconds=300.0, floor=50.0),
        *(Cell("s", "absent", "w4a16", tokens, reason="ImportError: no vllm") for tokens in (16, 64)),
    ]
    lines = render(cells, [*ours, *peers]).splitlines()
    rows = [[text.strip() for text in line.strip("|").split("|")] for line in lines[:4]]
    head = ["tokens", "floor", "ours w4a16", "% of floor", "ours w4a4", "overhead %", "fast", "slow", "absent"]
    assert rows[0] == [*head, "best peer / ours"]
    assert rows[2] == ["16", "50", "200", "25", "210", "5", "100", "300", "-", "1.50 (slow)"]
    assert rows[3] == ["64", *["-"] * 9]
    assert lines[-2:] == [
        "- ours w4a16 (64 tokens): ValueError: broken",
        "- absent (16, 64 tokens): ImportError: no vllm",
    ]


def test_what_fails_does_not_end_the_run():
    from moe_layer_parts.ceilings import Ceilings
    from moe_layer_parts.data import random_layer
    from moe_layer_parts.measure import Bench
    from moe_layer_parts.shapes import SHAPES
    from moe_layer_parts.variants import Runner, Variant

    def absent(layer):
        raise ImportError("not there")

    def fails_at_eight(x, ids, weights):
        if len(x) == 8:
            raise RuntimeError("eight")
        return x + 1

    cells = []
    bench = Bench(random_layer(SHAPES["tiny"], CPU), Ceilings(CPU), seconds=0.01)
    bench.cells(Variant("absent", absent), [4, 8], cells.append)
    bench.cells(Variant("fails", lambda layer: Runner(fails_at_eight), bound=1e6), [8, 4], cells.append)
    assert [(cell.variant, cell.tokens, cell.reason.partition(" (")[0]) for cell in cells] == [
        ("absent", 4, "ImportError: not there"),
        ("absent", 8, "ImportError: not there"),
        ("fails", 8, "RuntimeError: eight"),
        ("fails", 4, ""),
    ]
    assert cells[-1].microseconds > 0


def test_a_layer_that_is_not_lifted_is_an_error():
    from moe_layer_parts.data import random_calls, random_layer
    from moe_layer_parts.shapes import SHAPES
    from moe_layer_parts.variants import Emulated

    layer = random_layer(SHAPES["tiny"], CPU)
    emulated = Emulated(layer, "w4a16")
    emulated.compiled = torch.compile(emulated.compiled._orig_mod, backend="nvfp4_emu", options={"lift": False})
    call = random_calls(SHAPES["tiny"], 4, 1, CPU)[0]
    with torch.no_grad():
        for _ in range(2):  # also at the second call, which compiles nothing
            with pytest.raises(RuntimeError, match="not lifted to one"):
                emulated(*call)


def test_a_small_run(tmp_path, capsys):
    """All of it but the GPU: ours in both formats and a peer that cannot run, table, file and picture."""
    import moe_layer

    file, picture = tmp_path / "r.json", tmp_path / "r.png"
    arguments = ["--shapes", "tiny", "--device", "cpu", "--tokens", "4", "--peers", "vllm-marlin"]
    run = moe_layer.main([*arguments, "--seconds", "0.02", "--json", str(file), "--plot", str(picture)])
    raw, out = json.loads(file.read_text()), capsys.readouterr().out
    assert [(cell["variant"], cell["tokens"]) for cell in raw["cells"]] == [
        ("ours w4a16", 4),
        ("ours w4a4", 4),
        ("vLLM Marlin w4a16", 4),
    ]
    for cell in run.cells[:2]:
        assert cell.reason == ""
        assert cell.error < 6e-3
        assert cell.floor > 0
        assert cell.microseconds > 0
    assert "- vLLM Marlin w4a16 (4 tokens): RuntimeError: runs on GPUs only" in out
    assert "best peer / ours" in out
    assert raw["environment"]["torch"] == torch.__version__
    assert picture.stat().st_size > 0
    shown = moe_layer.main(["--saved", str(file), "--plot", str(picture.with_suffix(".svg"))])
    assert (shown.cells, shown.at_start) == (run.cells, run.at_start)
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert table == [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    file.write_text(json.dumps(raw | {"schema": 0}))
    with pytest.raises(ValueError, match="expected schema 1"):
        moe_layer.main(["--saved", str(file)])


@pytest.mark.gpu
def test_a_small_run_on_a_gpu():
    """One token, replays, events; memory that is poisoned; results of replays the same bit for bit."""
    import moe_layer

    arguments = ["--shapes", "tiny", "--tokens", "1", "16", "1024", "--peers", "bf16", "in-graph"]
    run = moe_layer.main([*arguments, "--seconds", "0.02"])
    assert len(run.cells) == 12
    assert [cell.reason for cell in run.cells] == [""] * 12
