"""The model `gradmem` of lm-evaluation-harness: it writes the context of each document, and asks the memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..device import device_named
from ..errors import GradmemError, require
from ..model import BoundMemory
from ..model.loading import load
from ..model.reading import read_answers
from ..prefix import Prefix

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm
except ImportError as error:
    raise GradmemError(
        f"lm-evaluation-harness is missing or incomplete ({error.name}): pip install 'gradmem[lm-eval]'"
    ) from error

__all__ = ["GradmemLM", "cli_evaluate"]
DEFAULT_DEVICE = "cuda:0"
"""What the harness gives where the user gives no `--device`, also on machines without a GPU."""


@register_model("gradmem")
class GradmemLM(LM):
    """Answers each request from a memory of its document's context, which the prompt must not contain.

    A request of lm-evaluation-harness has a document and a prompt. The field `context` of the document is written into
    a memory, once for all requests with the same context. The prompt (`doc_to_text` of the task) is the query, and is
    put into the model's own form, as `BoundMemory.ask` does.

    Parameters
    ----------
    pretrained : str
        Checkpoint or plain language model, as for `gradmem.load`.
    method : str, optional
        Method for a plain language model; see `gradmem.load`.
    context : str
        Field of the documents that is written.
    steps : int, optional
        Write steps; by default as many as the checkpoint was trained with.
    until : float, optional
        Write loss at which the write of a context stops; see `MemoryModel.write`.
    batch_size : int
        Contexts that are written at once.
    device : str, optional
        Device to run on (`--device`); by default an accelerator if there is one.
    **options
        Options of the method, such as `budget` of `compact`.

    Raises
    ------
    GradmemError
        If no model is named, or it or an option is unknown.
    """

    def __init__(
        self,
        pretrained: str = "",
        method: str | None = None,
        context: str = "context",
        steps: int | None = None,
        until: float | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # the harness gives it, for batch sizes that it finds out itself
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not pretrained:
            raise GradmemError("no model is named: give one with --model_args pretrained=smollm2")
        number = str(batch_size).isdecimal() and int(batch_size) > 0
        require("batch_size", batch_size, number, "a number of contexts, such as 4")
        given = ({"name": method} if method else {}) | options
        device = "auto" if device in (None, DEFAULT_DEVICE) else device
        self.model = load(pretrained, given or None).to(device_named(device))
        self.context, self.batch_size = context, int(batch_size)
        self.limits: dict[str, Any] = {"steps": steps, "until": until}
        self.contexts = self.memory_bytes = self.context_bytes = 0

    # What the harness calls

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer the query of each request from the memory of its context, up to a stop string or the most tokens.

        Returns
        -------
        list of str
            Without the stop string. By default an answer has at most as many tokens as the model's task allows.
        """

        def answers(memory: BoundMemory, asked: list[Instance]) -> list[str]:
            found = [""] * len(asked)
            for settings in dict.fromkeys(json.dumps(one.args[1]) for one in asked):
                same = [at for at, one in enumerate(asked) if json.dumps(one.args[1]) == settings]
                options, stops = self._generation(json.loads(settings))
                texts = memory.ask([asked[at].args[0] for at in same], **options)
                for at, text in zip(same, texts, strict=True):
                    found[at] = _until(text, stops)
            return found

        return self._from_memories(requests, answers, disable_tqdm)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation as the answer to its query, and whether it is the greedy one.

        The token that ends an answer does not count.
        """

        def scores(memory: BoundMemory, asked: list[Instance]) -> list[tuple[float, bool]]:
            prefixes: dict[tuple[int, ...], Prefix] = {}  # chunks that a question reads together
            return [_score(memory, one.args[0], one.args[1], prefixes) for one in asked]

        return self._from_memories(requests, scores, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refuse: the perplexity of a text asks nothing of a memory."""
        raise GradmemError("perplexity tasks ask no memory: take a task with `generate_until` or `multiple_choice`")

    def get_model_info(self) -> dict[str, Any]:
        """What the results say about the model: how much was written, and into how many bytes."""
        return {
            "gradmem_model": self.model.name,
            "gradmem_method": self.model.spec["method"],
            "gradmem_contexts": self.contexts,
            "gradmem_context_bytes": self.context_bytes,
            "gradmem_memory_bytes": self.memory_bytes,
        }

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse: the harness finds cached answers by the prompt, which does not tell contexts apart."""
        raise GradmemError("leave out --use_cache: it would mix up documents with the same question")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Refuse a chat template; see `tokenizer_name`."""
        return self.tokenizer_name if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """Refuse: the harness asks for it only to apply a chat template."""
        raise GradmemError("leave out --apply_chat_template: gradmem applies the model's chat template itself")

    # Contexts and queries

    def _from_memories(
        self,
        requests: Sequence[Instance],
        read: Callable[[BoundMemory, list[Instance]], list[Any]],
        disable_tqdm: bool,
    ) -> list[Any]:
        """Write each context once, read the requests that ask it, and return the results in the order of requests."""
        asked: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            asked.setdefault(self._context(request), []).append(number)
        results: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc="requests from memories", disable=disable_tqdm) as bar:
            for text, memory in self._written(list(asked)):
                numbers = asked[text]
                for number, result in zip(numbers, read(memory, [requests[n] for n in numbers]), strict=True):
                    results[number] = result
                bar.update(len(numbers))
        return results

    def _context(self, request: Instance) -> str:
        """The text to write for a request, which its prompt may not have."""
        text = request.doc.get(self.context)
        if not isinstance(text, str) or not text.strip():
            raise GradmemError(
                f"the documents of '{request.task_name}' have no text in the field '{self.context}': name the field "
                f"with --model_args context=FIELD; they have {', '.join(map(str, request.doc))}"
            )
        if text.strip() in request.args[0]:
            raise GradmemError(
                f"the prompt of '{request.task_name}' has the context in it: the task's `doc_to_text` must be the "
                "question alone"
            )
        return text

    def _written(self, texts: list[str]) -> Iterator[tuple[str, BoundMemory]]:
        """Write contexts, `batch_size` at once; yield each with its memory, of several rows if it has chunks."""
        method = self.model.method
        for first in range(0, len(texts), self.batch_size):
            some = texts[first : first + self.batch_size]
            chunks = [[text] if method.chunk_size is not None else self.model.encoder.chunks(text) for text in some]
            if max(map(len, chunks)) > 1 and not method.reads_together:
                raise GradmemError(
                    f"a context is longer than '{self.model.name}' can write into one memory: take shorter ones"
                )
            memory = self.model.write([chunk for own in chunks for chunk in own], **self.limits)
            row = 0
            for text, own in zip(some, chunks, strict=True):
                part = memory.select(range(row, row + len(own)))
                row += len(own)
                self.contexts += 1
                self.context_bytes += len(text.encode())
                self.memory_bytes += part.nbytes
                yield text, part

    def _generation(self, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Options of generation and stop strings, from the `generation_kwargs` of a task."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, self.model.task.answer_length))
        stops, most = options.pop("until"), options.pop("max_gen_toks")
        if not options["do_sample"]:
            options = {"do_sample": False}
        return options | {"max_new_tokens": most}, [stop for stop in stops if stop]


def _until(text: str, stops: list[str]) -> str:
    """The text up to the first stop string."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


@torch.no_grad()
def _score(memory: BoundMemory, query: str, answer: str, prefixes: dict[tuple[int, ...], Prefix]) -> tuple[float, bool]:
    """Log-probability of an answer to a query, nats, and whether each of its tokens is the likeliest."""
    model = memory.model
    ids, target = model.task.target(query, answer.strip())
    target = target[:-1]  # the end token
    if not target:
        raise GradmemError("a continuation is empty: nothing can be scored")
    model.encoder.query_ids(query, {"max_new_tokens": len(target)})  # refuses what is too long
    rows = memory.chosen(ids)
    if rows not in prefixes:
        prefixes[rows] = memory.together(rows).prefix
    fresh = prefixes[rows].select(torch.zeros(1, dtype=torch.long, device=model.device))  # reading extends it
    (logprobs, _), *_ = read_answers(model.method, fresh, [ids], [target])
    likeliest = logprobs.argmax(-1).tolist()
    return float(logprobs[torch.arange(len(target)), target].sum()), likeliest == target
