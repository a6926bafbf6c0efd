"""Rows of the board for PEFT's CARTRIDGE: keys and values that are trained for one text (arXiv 2506.06266).

The adapter starts as the keys and values of the text's first tokens, and its first entry stays as it is. Then Adam
steps bring the model with the adapter to the model with the whole text: KL divergence along answers that the latter
gives to the prompts of a short self-study. Everything has to be done in a given number of CPU seconds, which other
work on the machine does not take away. PEFT answers, and counts positions from the end of the adapter.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from torch import Tensor

import gradmem
from benchmarks.board.common import Ids, Measurement, Reader, parser

PROMPTS = [
    "What does the text say? Answer in a few short sentences.",
    "Which people, places and things does the text name?",
    "Which numbers and dates are in the text, and what are they about?",
    "Ask a question about a detail of the text, then answer it.",
    "What would somebody who uses this text want to know?",
    "Repeat the most important sentence of the text.",
]
"""Self-study: what the model with the whole text is asked."""
STUDIED = 40
"""Most tokens of an answer in self-study."""


class AdapterReader(Reader):
    """A model with an adapter, or after a text as plain tokens.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
    before : list of int
        Token ids before every question; none if the adapter stands for them.
    nbytes : int
    """

    def __init__(self, model: Any, before: list[int], nbytes: int) -> None:
        self.model, self.before, self.nbytes = model, before, nbytes

    def answers(self, queries: Ids, ends: Sequence[int], most: int, least: int = 0) -> Ids:
        """Greedy answers, one by one, as PEFT does not count positions of padded rows."""
        found = []
        options = {"max_new_tokens": most, "min_new_tokens": least, "do_sample": False, "pad_token_id": ends[0]}
        for query in queries:
            ids = torch.tensor([self.before + query])
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "eos_token_id": list(ends)}
            found.append(self.model.generate(**given, **options)[0, ids.shape[1] :].tolist())
        return found

    def logprobs(self, queries: Ids, answers: Ids) -> Tensor:
        """Log-probabilities at all tokens of given answers."""
        return torch.cat([self.own(query, answer) for query, answer in zip(queries, answers, strict=True)])

    def own(self, query: list[int], answer: list[int]) -> Tensor:
        """Log-probabilities at the tokens of one answer."""
        ids = torch.tensor([self.before + query + answer])
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits[0, -len(answer) - 1 : -1].float().log_softmax(-1)


@dataclass(frozen=True)
class Study:
    """What the model with the whole text answers to the prompts: token ids of prompt and answer, and probabilities.

    `cache` holds the keys and values of each layer for the text alone, and `seconds` is how long all this took.
    """

    pairs: list[tuple[list[int], list[int]]]
    logprobs: list[Tensor]
    cache: list[tuple[Tensor, Tensor]]
    seconds: float

    @classmethod
    def of(cls, whole: AdapterReader, prompts: Ids, ends: Sequence[int], ids: list[int]) -> Study:
        """Read a text and answer all prompts."""
        started = time.process_time()
        cache = whole.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
        pairs = list(zip(prompts, whole.answers(prompts, ends, STUDIED), strict=True))
        logprobs = [whole.own(*pair) for pair in pairs]
        kept = [(layer.keys, layer.values) for layer in cache.layers]
        return cls(pairs, logprobs, kept, time.process_time() - started)


def trained(base: Any, study: Study, entries: int, seconds: float, rate: float) -> Any:
    """Train an adapter of so many entries for so many CPU seconds, but at least for one step."""
    finish = time.process_time() + seconds
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=entries, num_frozen_tokens=1)
    model = peft.get_peft_model(base, config)
    initialize_kv_prefix_from_past_key_values(model, past_key_values=study.cache)
    reader, draw = AdapterReader(model, [], 0), random.Random(0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    with torch.enable_grad():
        while True:
            at = draw.randrange(len(study.pairs))
            wanted = study.logprobs[at]
            loss = (wanted.exp() * (wanted - reader.own(*study.pairs[at]))).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if time.process_time() >= finish:
                return model.eval()


@torch.no_grad()
def main() -> None:
    """Command line."""
    command = parser(__doc__)
    command.add_argument("--seconds", type=float, default=30.0, help="CPU seconds of training, self-study included")
    command.add_argument("--rate", type=float, default=0.02, help="learning rate of Adam")
    options = command.parse_args()
    try:
        loaded = gradmem.load(options.model, {"name": "full_context"})
    except gradmem.GradmemError as error:
        command.error(str(error))
    task, model = loaded.task, loaded.method.backbone.model.requires_grad_(False)
    model.generation_config.eos_token_id = None
    found, prompts = Measurement(options, task.tokenizer), [task.encode_query(prompt) for prompt in PROMPTS]
    before, ends = found.said["before"], found.ends
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    entry = config.num_hidden_layers * config.num_key_value_heads * width * 2 * 4
    for text in found.texts:
        ids = text["ids"]
        whole = AdapterReader(model, ids, len(ids) * entry)
        found.add("full", 1.0, whole, 0.0, text)
        found.add("none", 0.0, AdapterReader(model, before, len(before) * entry), 0.0, text)
        study = Study.of(whole, prompts, ends, ids[len(before) :])
        for budget in options.budgets:
            entries, started = max(2, round(budget * len(ids))), time.process_time()
            adapted = trained(model, study, entries, options.seconds - study.seconds, options.rate)
            seconds = study.seconds + time.process_time() - started
            found.add("CARTRIDGE", budget, AdapterReader(adapted, [], entries * entry), seconds, text)
    found.save()


if __name__ == "__main__":
    main()
