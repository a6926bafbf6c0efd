"""Exported memories in llama.cpp itself: through its C interface, and through its server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from llama_library import Llama, library
from ports import free_port
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

import gradmem
from chat_models import save_model, save_tokenizer
from gguf_models import write_model
from gradmem import BoundMemory, Tokens
from gradmem.cli.main import main
from gradmem.exports.asking import prompt, prompt_ids, stand_ins
from gradmem.exports.keys_values import keys_values
from gradmem.exports.llama_cpp import save_state
from gradmem.exports.prompt_embeds import prompt_embeds

TEXT = "Clara signed the minutes in Velmouth.\nThe code of the door is 4711.\n"
QUESTIONS = ["Who signed it?", "What is the code?"]
COMPACT = {"name": "compact", "budget": 0.4, "shared": False, "writers": "select,match"}
VECTORS = {"name": "gradmem", "n_mem": 3, "write_steps": 1, "n_ctrl": 1}
LENGTH, FIRST = 1024, 8
"""Positions of a context, and tokens of an answer that must be the same: later ones may be as likely as others."""
ERROR = 1e-2
"""Of a logit, as a share of the largest: llama.cpp keeps keys and values in float16, and attends in it."""
SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 256,
}
CONFIGS = {"mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def save_family(kind: str, folder: Path) -> Path:
    """A small model of a family with the tokenizer of bytes."""
    folder.mkdir()
    if kind == "llama":
        save_model(folder, positions=LENGTH)
        return folder
    extra = {"head_dim": 8, "sliding_window": None} if kind != "qwen2" else {"use_sliding_window": False}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind](**SMALL, **extra))
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.data.normal_(std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Directory and GGUF file of a family, made once."""
    library()
    made: dict[str, tuple[Path, Path]] = {}

    def get(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            place = tmp_path_factory.mktemp(kind)
            folder = save_family(kind, place / "model")
            made[kind] = folder, write_model(folder, place / "model.gguf")
        return made[kind]

    return get


@pytest.fixture
def llama(families: Callable[[str], tuple[Path, Path]]) -> Iterator[Callable[[str], Llama]]:
    """Open a family in llama.cpp."""
    opened: list[Llama] = []

    def get(kind: str) -> Llama:
        opened.append(Llama(families(kind)[1], LENGTH))
        return opened[-1]

    yield get
    for one in opened:
        one.close()


def own_tokens(memory: BoundMemory, question: str) -> list[int]:
    """What READ generates."""
    method, task = memory.model.method, memory.model.task
    ids = memory.model.encoder.query_ids(question)
    found: list[int] = method.generate(memory.prefix, [ids], pad_id=task.pad_id, **task.greedy_options())[0]
    return found


def own_logits(memory: BoundMemory, question: str) -> torch.Tensor:
    """What READ predicts right behind a question."""
    method, query = memory.model.method, Tokens.from_lists([memory.model.encoder.query_ids(question)])
    with torch.no_grad():
        hidden = method.read_hidden(memory.prefix.select(torch.tensor([0])), query)
        logits: torch.Tensor = method.backbone.head(hidden[0, -1])
    return logits


def check_answer(model: Llama, logits: torch.Tensor, answer: list[int]) -> None:
    """llama.cpp generates the first tokens, and finds none that is clearly likelier than any of the others."""
    for place, token in enumerate(answer):
        assert token == int(logits.argmax()) or place >= FIRST
        assert float(logits.max() - logits[token]) <= 2 * ERROR * float(logits.abs().max())
        logits = model.read([token])


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("method", [COMPACT, VECTORS, {"name": "full_context"}], ids=lambda one: one["name"])
def test_a_restored_state_answers_the_same(
    kind: str,
    method: dict[str, Any],
    families: Callable[[str], tuple[Path, Path]],
    llama: Callable[[str], Llama],
    tmp_path: Path,
) -> None:
    """The same logits and greedy tokens, but for the rounding of float16."""
    memory = gradmem.load(families(kind)[0], method).write(TEXT)
    entries = save_state(memory, tmp_path / "memory.bin")
    found = keys_values(memory)
    for question in QUESTIONS:
        model = llama(kind)
        tokens = model.restore(tmp_path / "memory.bin")
        assert tokens == stand_ins(found, memory)
        assert len(tokens) == entries == found.entries
        ids = prompt_ids(memory, tokens, question)
        logits, wanted = model.read(ids[entries:]), own_logits(memory, question)
        assert torch.allclose(logits, wanted, atol=ERROR * float(wanted.abs().max()))
        check_answer(model, logits, own_tokens(memory, question))
    blank = llama(kind)
    assert not torch.allclose(blank.read(ids[entries:]), wanted, atol=0.05), "the memory matters"


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_embeddings_of_a_prompt_answer_the_same(
    kind: str, families: Callable[[str], tuple[Path, Path]], llama: Callable[[str], Llama]
) -> None:
    """The tensor that vLLM and SGLang take, as a batch of llama.cpp."""
    memory = gradmem.load(families(kind)[0], VECTORS).write(TEXT)
    model, wanted = llama(kind), own_logits(memory, QUESTIONS[0])
    logits = model.read(embeds=prompt_embeds(memory, QUESTIONS[0]))
    assert torch.allclose(logits, wanted, atol=ERROR * float(wanted.abs().max()))
    check_answer(model, logits, own_tokens(memory, QUESTIONS[0]))


def post(address: str, path: str, body: dict[str, Any]) -> Any:
    request = Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=120) as response:
        return json.loads(response.read())


@pytest.fixture
def server(families: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> Iterator[str]:
    """Address of llama.cpp's server with two slots, whose states are in `slots`."""
    import xllamacpp

    (tmp_path / "slots").mkdir()
    given = xllamacpp.CommonParams()
    given.model.path, given.slot_save_path = str(families("llama")[1]), f"{tmp_path}/slots/"
    given.hostnames, given.port = ["127.0.0.1"], free_port()
    given.n_ctx, given.n_parallel, given.kv_unified = LENGTH, 2, True
    given.cache_idle_slots = False  # otherwise a slot forgets its memory while another one answers
    given.warmup, given.cpuparams.n_threads = False, 1
    running = xllamacpp.Server(given)
    yield running.listening_address
    del running


def test_the_server_restores_memories_into_slots(
    server: str, families: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """By the command: two slots with a memory each answer as READ does, and never for the other one."""
    folder = families("llama")[0]
    memories = []
    for slot, text in enumerate([TEXT, TEXT.replace("Clara", "Yusuf").replace("4711", "9023")]):
        memory = gradmem.load(folder, COMPACT).write(text)
        memory.save(tmp_path / f"{slot}.safetensors")
        command = ["export", str(tmp_path / f"{slot}.safetensors"), "--to", "llama.cpp", "--checkpoint", str(folder)]
        assert main([*command, "-o", str(tmp_path / "slots" / f"{slot}.bin")]) == 0
        assert post(server, f"/slots/{slot}?action=restore", {"filename": f"{slot}.bin"})["n_restored"] > 0
        memories.append(memory)
    for slot, memory in enumerate(memories):
        for question in QUESTIONS:
            asked = prompt(tmp_path / "slots" / f"{slot}.bin.json", question)
            answer = own_tokens(memory, question)[:FIRST]
            body = {"prompt": asked, "id_slot": slot, "temperature": 0, "return_tokens": True}
            made = post(server, "/completion", {**body, "n_predict": len(answer)})
            assert made["tokens"] == answer
            assert made["timings"]["cache_n"] >= keys_values(memory).entries, "the memory was read from the slot"
    crossed = prompt(tmp_path / "slots" / "1.bin.json", QUESTIONS[0])
    made = post(server, "/completion", {"prompt": crossed, "id_slot": 0, "n_predict": 1, "temperature": 0})
    assert made["timings"]["cache_n"] < 3, "no other memory stands in"
    (tmp_path / "slots" / "no.bin").write_bytes(b"ggsq")
    with pytest.raises(HTTPError):
        post(server, "/slots/0?action=restore", {"filename": "no.bin"})
