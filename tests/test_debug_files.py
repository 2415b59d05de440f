"""What a compilation leaves for whoever looks: TORCH_LOGS, the structured trace of tlparse, TORCH_COMPILE_DEBUG."""

import json
import logging
from pathlib import Path

import pytest
import torch
from spelled_models import SpelledMoE, tokens
from test_backend import run_process

import fx_nvfp4
from fx_nvfp4 import backend, report_table
from fx_nvfp4.report import Report

COMPILE = """
    import json
    model = SpelledMoE("linear", torch.bfloat16)
    with torch.no_grad():
        torch.compile(model, backend="nvfp4_emu")(spelled_models.tokens(3, torch.bfloat16))
    print(json.dumps(0))
"""


def compile_in_process(tmp_path, **env):
    return run_process(COMPILE, tmp_path / "cache", **env)


def debug_folders(tmp_path):
    return [f.parent for f in (tmp_path / "torch_compile_debug").rglob("output_code.py")]


# "torch": a process in which nothing but the entry point of the backend imports the package. The structured trace is
# looked at in the same process, which compiles a near miss last.
@pytest.mark.in_part(2)
@pytest.mark.parametrize(("first", "setting"), [("torch", "+fx_nvfp4"), ("fx_nvfp4", "fx_nvfp4")])
def test_logs_and_structured_trace_hold_the_report(tmp_path, first, setting):
    code = f"""
        import {first}
        import json, torch
        from spelled_models import SpelledMoE, tokens
        with torch.no_grad():
            for entry in (None, (5, 3.03)):
                torch._dynamo.reset()
                model = SpelledMoE("linear", torch.bfloat16, table_entry=entry)
                torch.compile(model, backend="nvfp4_emu", options={{"codegen": False}})(tokens(3, torch.bfloat16))
        print(json.dumps(0))
    """
    out, folder = tmp_path / "log", tmp_path / "trace"
    logs = {"TORCH_LOGS": setting, "TORCH_LOGS_OUT": str(out), "TORCH_TRACE": str(folder)}
    run_process(code, tmp_path / "cache", imports="", **logs)
    text = out.read_text()
    assert "nvfp4_emu: 2 NVFP4 products in 1 graph, 0 refused" in text
    assert ("up_qdata" in text) == (setting[0] == "+")  # the names of weights are in the full table
    found = artifacts(folder)
    assert found["fx_nvfp4_report"][0] == "json"
    report = Report.from_json(found["fx_nvfp4_report"][1])
    assert len(report.refused) == 2
    assert found["fx_nvfp4_report_text"][0] == "string"
    assert str(report.refused[0]) in found["fx_nvfp4_report_text"][1]


def artifacts(folder):
    """name -> (encoding, payload) of the artifacts in torch's structured trace, as tlparse reads it."""
    found, pending = {}, None
    for line in next(folder.glob("*.log")).read_text().splitlines():
        if line.startswith("\t"):
            if pending:
                found[pending["name"]][1].append(line[1:])
            continue
        header = json.loads(line[line.index("{") :])
        pending = header.get("artifact")
        if pending:
            found[pending["name"]] = pending["encoding"], []
    return {name: (encoding, "\n".join(lines)) for name, (encoding, lines) in found.items()}


@pytest.mark.slow
def test_debugging_leaves_graphs_and_sites_beside_inductors_output_code(tmp_path):
    env = {"TORCH_COMPILE_DEBUG": "1", "TORCH_COMPILE_DEBUG_DIR": str(tmp_path)}
    compile_in_process(tmp_path, **env)
    (folder,) = debug_folders(tmp_path)
    report = Report.from_json((folder / "fx_nvfp4.json").read_text())
    assert [m.op for m in report.matched] == ["linear"] * 2
    assert all(m.config and m.milliseconds is None for m in report.matched)
    assert report.cost.stages.keys() >= {"recognise", "rewrite", "verify"}
    assert 0 < report.cost.total < report.cost.compilation
    text = (folder / "fx_nvfp4.txt").read_text()
    table, before, after = text.replace("Graph after the pass", "Graph before the pass").split("Graph before the pass")
    assert table.startswith("nvfp4_emu: 2 NVFP4 products")
    assert "aten.mm.default" in before
    assert "fx_nvfp4.linear.default" not in before
    assert after.count("torch.ops.fx_nvfp4.linear.default") == 2
    # With Inductor's cache warm the pass does not run: the report is there, and says why no graph is.
    compile_in_process(tmp_path, **env)
    (warm,) = [f for f in tmp_path.rglob("fx_nvfp4*.txt") if f.parent != folder]
    assert "up_qdata" in warm.read_text()
    assert "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1" in warm.read_text()


def test_what_strict_refuses_is_in_the_debug_folder_too(tmp_path):
    model = SpelledMoE("linear", torch.bfloat16, table_entry=(5, 3.03))
    options = {"strict": True, "codegen": False, "trace.enabled": True, "trace.debug_dir": str(tmp_path)}
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="not emulated as NVFP4"):
        torch.compile(model, backend="nvfp4_emu", options=options)(tokens(3, torch.bfloat16))
    (file,) = tmp_path.rglob("fx_nvfp4*.json")
    assert len(Report.from_json(Path(file).read_text()).refused) == 2


def test_without_debugging_no_text_is_made(monkeypatch):
    made = []
    # A handler that waits for the first record is there even where TORCH_TRACE is not set, and goes with that record.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
    monkeypatch.setattr(report_table, "render", lambda *a: made.append(a) or "")
    monkeypatch.setattr(fx_nvfp4.report, "render", lambda *a: made.append(a) or "")
    monkeypatch.setattr(backend, "DebugFiles", lambda *a: made.append(a))
    torch._dynamo.reset()
    with torch.no_grad():
        model = SpelledMoE("linear", torch.bfloat16)
        torch.compile(model, backend="nvfp4_emu", options={"codegen": False})(tokens(3, torch.bfloat16))
    assert not made
