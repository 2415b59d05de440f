"""lm-evaluation-harness on a checkpoint, with tasks of the kinds of piqa, wikitext and generation from local files.

Its figures are those of the uncompiled model, and the harness' options reach the loader. Skipped where lm_eval is not
installed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fx_nvfp4

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")

CHECKPOINT = Path(__file__).parent / "data" / "modelopt_mixtral_w4a4"
QUESTIONS = [
    {"goal": "open a jar", "sol1": "turn its lid", "sol2": "paint its lid", "label": 0},
    {"goal": "boil an egg", "sol1": "put it into a drawer", "sol2": "put it into hot water", "label": 1},
    {"goal": "read at night", "sol1": "light a lamp", "sol2": "close both eyes and run", "label": 0},
]
PAGES = [{"page": "The jar is open. Its lid lies beside it."}, {"page": "An egg boils in water for five minutes."}]
PIQA = """
task: local_piqa
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/questions.jsonl}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WIKITEXT = """
task: local_wikitext
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/pages.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""
GENERATION = """
task: local_generation
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{goal}}"
doc_to_target: "{{sol1}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint with a tokenizer of bytes, and the tasks."""
    folder = tmp_path_factory.mktemp("harness")
    shutil.copytree(CHECKPOINT, folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for name, rows in (("questions", QUESTIONS), ("pages", PAGES)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks").mkdir()
    for name, text in (("piqa", PIQA), ("wikitext", WIKITEXT), ("generation", GENERATION)):
        (folder / "tasks" / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def harness(folder, tasks, **model_args):
    """Results of the harness' own command line, by task."""
    settings = {"pretrained": folder / "model", "dtype": "float32", **model_args}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fx_nvfp4", "lm-eval", "--model", "fx_nvfp4", "--tasks", ",".join(tasks)),
            *("--model_args", ",".join(f"{name}={value}" for name, value in settings.items())),
            *(
                "--include_path",
                folder / "tasks",
                "--device",
                "cpu",
                "--batch_size",
                "2",
                "--output_path",
                folder / "results.json",
            ),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    newest = max(folder.rglob("results*.json"), key=lambda file: file.stat().st_mtime)
    return json.loads(newest.read_text())["results"]


def likelihood(model, context, continuation):
    """Log likelihood of letters after others."""
    letters = tokenizer()
    ids = torch.tensor([letters.encode(context + continuation, add_special_tokens=False)])
    if not context:
        ids = torch.cat((torch.tensor([[letters.bos_token_id]]), ids), dim=1)
    logits = model(ids).logits[0, :-1].log_softmax(dim=-1)
    return logits.gather(1, ids[0, 1:, None])[-len(continuation) :].sum().item()


def expected(model):
    """Byte perplexity of the pages, and the share of right answers."""
    pages = [page["page"] for page in PAGES]
    per_byte = sum(likelihood(model, "", page) for page in pages) / sum(map(len, pages))
    right = 0
    for q in QUESTIONS:
        first, second = (likelihood(model, f"Question: {q['goal']}\nAnswer:", f" {q[s]}") for s in ("sol1", "sol2"))
        right += int(second > first) == q["label"]
    return torch.tensor(-per_byte).exp().item(), right / len(QUESTIONS)


def figures(results):
    return results["local_wikitext"]["byte_perplexity,none"], results["local_piqa"]["acc,none"]


@pytest.mark.slow
def test_figures_are_those_of_the_uncompiled_model(folder):
    results = harness(folder, ("local_wikitext", "local_piqa", "local_generation"))
    model = fx_nvfp4.load(CHECKPOINT, dtype=torch.float32, progress=False)
    assert figures(results) == pytest.approx(expected(model), rel=1e-4)
    assert results["local_generation"]["exact_match,none"] == 0


def test_options_reach_the_loader(folder):
    tasks = ("local_wikitext", "local_piqa")
    weights_alone = harness(folder, tasks, activations="none", mode="eager", prepare=True)
    model = fx_nvfp4.load(CHECKPOINT, dtype=torch.float32, activations="none", progress=False)
    assert figures(weights_alone) == pytest.approx(expected(model), rel=1e-4)
    both = expected(fx_nvfp4.load(CHECKPOINT, dtype=torch.float32, progress=False))
    assert figures(weights_alone)[0] != pytest.approx(both[0], rel=1e-3)
