"""lm-evaluation-harness answers from memories: its command on the example's tasks, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import gradmem
from chat_models import save_model
from gradmem import GradmemError
from gradmem.errors import reason
from helpers import ROOT

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'gradmem[lm-eval]'")
EXAMPLE = ROOT / "examples" / "lm_eval"
LIMIT = 5
"""Questions: those of the first report, and one of the second."""
DOCUMENTS = [json.loads(line) for line in (EXAMPLE / "reports.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), positions=2048)


def run(folder: str, place: Path, *arguments: str, cwd: Path = EXAMPLE) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    common = ["--model", "gradmem", "--include_path", ".", "--limit", str(LIMIT)]
    common += ["--model_args", f"pretrained={folder},method=full_context"]
    environment = os.environ | {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "gradmem.lm_eval", *common, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def samples(output: Path, task: str) -> list[dict[str, Any]]:
    """What the harness kept of each question, in their order."""
    (file,) = output.rglob(f"samples_{task}_2*.jsonl")
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def test_the_command_answers_and_scores_from_memories(folder: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    arguments = ["--tasks", "reports,reports_choice", "--output_path", str(output), "--log_samples"]
    done = run(folder, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "|reports" in done.stdout
    model = gradmem.load(folder, {"name": "full_context"})
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    answered, scored = samples(output, "reports"), samples(output, "reports_choice")
    assert len(answered) == len(scored) == LIMIT
    for document, answer, score in zip(DOCUMENTS, answered, scored, strict=False):
        text = model.write(document["context"]).ask(document["question"], max_new_tokens=24)
        assert answer["resps"] == [[text.partition("\n")[0]]]
        before = model.task.before_context + model.task.encode(document["context"])
        before += model.task.encode_query(document["question"])
        for choice, ((found, greedy),) in zip(document["choices"], score["resps"], strict=True):
            target = model.task.encode(choice)
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([before + target])).logits[0, len(before) - 1 : -1]
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum()
            assert float(found) == pytest.approx(float(wanted), rel=1e-4)
            assert (greedy in (True, "True")) == (logits.argmax(-1).tolist() == target)
    (results,) = output.rglob("results_*.json")
    about = json.loads(results.read_text())["config"]
    assert about["gradmem_contexts"] == 4, "two reports, written once for each kind of request"
    assert about["gradmem_memory_bytes"] > 0


def test_one_line_says_what_is_wrong(folder: str, tmp_path: Path) -> None:
    leaking = (EXAMPLE / "reports.yaml").read_text().replace('"{{question}}"', '"{{context}} {{question}}"')
    (tmp_path / "reports.yaml").write_text(leaking)
    for name in ("reports.jsonl", "scores.py"):
        (tmp_path / name).write_bytes((EXAMPLE / name).read_bytes())
    done = run(folder, tmp_path, "--tasks", "reports", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("gradmem: error: the prompt of 'reports' has the context in it")
    assert "Traceback" not in done.stderr


def refusal(call: Any) -> str:
    with pytest.raises(GradmemError) as told:
        call()
    return reason(told.value)


def test_what_would_give_wrong_numbers_is_refused(folder: str) -> None:
    from lm_eval.api.instance import Instance

    from gradmem.lm_eval import GradmemLM

    def asked(context: Any, prompt: str = "Who?", **more: Any) -> list[Instance]:
        return [Instance("generate_until", {"context": context}, (prompt, {"until": ["x"]} | more), 0, ("t", 0, 1))]

    model = GradmemLM(folder, "full_context", batch_size="2")
    assert "no text in the field 'context'" in refusal(lambda: model.generate_until(asked(None)))
    assert "do not support `best_of`" in refusal(
        lambda: model.generate_until(asked("A text.", do_sample=True, best_of=2))
    )
    assert "leave out --use_cache" in refusal(lambda: model.set_cache_hook(None))
    assert "leave out --apply_chat_template" in refusal(lambda: model.chat_template(True))
    assert "perplexity tasks ask no memory" in refusal(lambda: model.loglikelihood_rolling([]))
    assert "no model is named" in refusal(GradmemLM)
    assert "batch_size must be" in refusal(lambda: GradmemLM(folder, batch_size="auto"))
    alone, together = asked("First.")[0], asked("Second.")[0]
    both = model.generate_until([together, alone, together], disable_tqdm=True)
    assert both == [model.generate_until([one], disable_tqdm=True)[0] for one in (together, alone, together)]
    assert both[0] != both[1]
