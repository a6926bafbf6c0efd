"""A memory method with its tokenizer and task: what a checkpoint holds."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors.torch import save_model
from torch import Tensor

from ..batch import Tokens
from ..errors import GradmemError, refused
from ..language_model import CONFIG, load_weights
from ..memory import Memory
from ..methods.base import Method
from ..prefix import Prefix, copies
from ..pretrained import digest_tokenizer
from ..tasks.base import OTHER_TEXTS, Task
from ..untrusted import WEIGHTS, Stored, check_counts, read_json, within
from .abstain import FILE as ABSTAIN
from .abstain import Abstain, Answer, assess, claim_losses, read_answers
from .build import Spec, build_backbone, build_method, build_task
from .identity import digest_of, model_config, options_of
from .writing import Progress, as_texts, measure_again, write_texts

FORMAT = 2
FILES = [CONFIG, WEIGHTS, ABSTAIN, "tokenizer*.json", "special_tokens_map.json"]
"""Files of a checkpoint."""
MODEL_CARD = """---
{{ card_data }}
---

A model that writes texts into a memory and answers from the memory alone, as a checkpoint of gradmem:
`gradmem.load(DIRECTORY).write(text).ask(query)`. Say here what it was trained on, and how well it answers beside its
controls (`gradmem eval DIRECTORY`).
"""
"""The `README.md` of a checkpoint that has none; Jinja puts the data of the hub in."""
HERE = "."
"""In a checkpoint's config: the directory of the checkpoint itself."""
NAMED: set[str] = set()
"""Models that this process was told to load: memories may name these, as no file decides what is loaded."""


CUTTING = ("chunk_size", "chunk_mode")
"""Options of every method that trained weights leave open: how contexts are cut."""


def _silent(steps: Iterable[Any], title: str = "", total: int | None = None) -> Iterable[Any]:
    return steps


class MemoryModel(
    ModelHubMixin, library_name="gradmem", tags=["memory", "test-time-training"], model_card_template=MODEL_CARD
):
    """A method with the task it was trained on; saves, loads and travels as a checkpoint.

    Parameters
    ----------
    method : Method
    task : Task
    spec : dict
        `task`, `backbone` and `method` as plain data, from which the same objects are built again.
    name : str
        Name or path by which `gradmem.load` finds it again.
    """

    def __init__(self, method: Method, task: Task, spec: dict[str, Spec], name: str = "unnamed") -> None:
        self.method, self.task, self.spec, self.name = method, task, spec, name
        self.method_options: Spec = {}
        """Options of the method that a plain language model's memories need to say."""
        self.overrides: Spec = {}
        """Options of the method that were chosen anew; see `configure`."""
        method.may_end = task.may_end
        self.abstain: Abstain | None = None
        """When to abstain, where the checkpoint was calibrated."""

    @classmethod
    def from_spec(
        cls, task: Spec, backbone: Spec, method: Spec, *, trusted: bool = True, stored: Stored | None = None
    ) -> MemoryModel:
        """Build a model with fresh (or pretrained) weights.

        Parameters
        ----------
        task, backbone, method : dict
        trusted : bool
            Whether they may name a module that is not imported yet.
        stored : Stored, optional
            Weights that are to be loaded into it: it may not be larger than they are.

        Raises
        ------
        GradmemError
            When a part is not known, refuses an option, or is too large.
        """
        built_task = build_task(task, trusted=trusted)
        built = build_backbone(backbone, built_task, stored)
        config = built.model.config
        fields = {**config.to_diff_dict(), "model_type": config.model_type}
        fields.pop("_name_or_path", None)  # a place on this machine, perhaps
        spec = {
            "task": dict(task),
            "backbone": fields,
            "method": dict(method),
        }
        with within(None if stored is None else stored.limit):
            built_method = build_method(method, built, trusted=trusted)
        return cls(built_method, built_task, copy.deepcopy(spec))

    @classmethod
    def from_language_model(cls, name: str, method: Spec) -> MemoryModel:
        """Build a model of a pretrained language model as it is and a method that needs no training, as `cram`.

        Parameters
        ----------
        name : str
            Directory or hub name of the language model.
        method : dict
            `name` and options of the method. What it draws is always the same.

        Raises
        ------
        GradmemError
            When model or tokenizer cannot be loaded, or the method does not know an option.
        """
        with torch.random.fork_rng(), refused(f"cannot load '{name}'"):
            torch.manual_seed(0)
            model = cls.from_spec({"name": "raw_text", "tokenizer": name}, {"pretrained": name}, method, trusted=False)
        model.method.requires_grad_(False)
        NAMED.add(name)
        model.name, model.method_options = name, {key: value for key, value in method.items() if key != "name"}
        model.method.eval()
        return model

    def configure(self, options: Spec) -> None:
        """Set options that do not depend on the weights: `chunk_size`, `chunk_mode` and the method's `runtime_options`.

        Raises
        ------
        GradmemError
            When there are other options, or the method cannot write so.
        """
        cutting = {name: value for name, value in options.items() if name in CUTTING}
        known = (*CUTTING, *self.method.runtime_options)
        if set(options) - set(known):
            raise GradmemError(
                f"'{self.name}' has a method of its own: only plain language models take another; a checkpoint takes "
                + ", ".join(f"`{name}`" for name in known)
            )
        if cutting and not self.method.joins:
            raise GradmemError(f"'{self.name}' writes no chunks into one memory: cut its texts with `model.chunks`")
        if cutting:
            self.method.chunk_by(**{"chunk_size": self.method.chunk_size, **cutting})
        for name in self.method.runtime_options:
            if name in options:
                setattr(self.method, name, options[name])
        chosen = {*self.overrides, *options, *(CUTTING if cutting else ())}
        # Always in one order: what is written with the same options has the same hash.
        self.overrides = {name: getattr(self.method, name) for name in known if name in chosen}

    # Checkpoints

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write config, weights and tokenizer; each file appears whole or not at all."""
        with tempfile.TemporaryDirectory(dir=save_directory) as temporary:
            save_model(self.method, str(Path(temporary) / WEIGHTS))
            spec = {**self.spec, "task": _portable(self.spec["task"])}
            (Path(temporary) / CONFIG).write_text(json.dumps({"format": FORMAT, **spec}, indent=1))
            self.task.tokenizer.save_pretrained(temporary)
            if self.abstain:
                self.abstain.save(Path(temporary))
            else:
                (save_directory / ABSTAIN).unlink(missing_ok=True)  # it was for other weights
            for file in Path(temporary).iterdir():
                os.replace(file, save_directory / file.name)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **download: Any) -> MemoryModel:
        """Load from a directory or, by its hub name, from the hub. Executes nothing that the files contain.

        Parameters
        ----------
        pretrained_model_name_or_path : str or path
        download
            For the hub: arguments of `huggingface_hub.snapshot_download`, as `revision`.

        Raises
        ------
        GradmemError
            When a file is missing or damaged, the weights do not fit the config, or the config asks for more than the
            weights hold, or names a model or code.
        """
        name = os.fspath(pretrained_model_name_or_path)
        NAMED.add(name)
        directory = Path(name)
        with refused(f"{name} is damaged or no checkpoint"):
            if not directory.is_dir():
                directory = Path(snapshot_download(name, allow_patterns=FILES, **download))
            model = cls._from_directory(directory)
        model.name = name
        model.abstain = Abstain.load(directory)
        abstain, own = model.abstain, (model.fingerprints["checkpoint"], 2 * model.method.backbone.width)
        if abstain and (abstain.checkpoint, abstain.width) != own:
            raise GradmemError(f"{ABSTAIN} of {name} is for another model: remove it, or calibrate again")
        return model

    @classmethod
    def _from_directory(cls, directory: Path) -> MemoryModel:
        if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
            raise GradmemError(f"{directory} is no checkpoint: it needs {CONFIG} and {WEIGHTS}")
        config = read_json(directory / CONFIG)
        if config.get("format") != FORMAT:
            raise GradmemError(f"{directory} has format {config.get('format')!r}, this gradmem reads {FORMAT}")
        stored = Stored([directory / WEIGHTS])
        for part in ("task", "method"):
            check_counts(config[part], stored.largest)
        task = {name: value for name, value in _beside(config["task"], str(directory)).items() if name != "data"}
        model = cls.from_spec(task, config["backbone"], config["method"], trusted=False, stored=stored)
        load_weights(model.method, directory / WEIGHTS)
        model.method.eval()
        return model

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the `backbone`, the whole `checkpoint` and the `tokenizer`: weights, and all settings that count.

        The config of the backbone is among these, and the options of method and task; see `gradmem.model.identity`.
        """
        tokenizer = digest_tokenizer(self.task.tokenizer)
        backbone = {"config": model_config(self.method.backbone.model.config)}
        method, task = options_of(self.method, self.spec["method"]), options_of(self.task, self.spec["task"])
        whole = {**backbone, "method": method, "task": task, "tokenizer": tokenizer}
        return {
            "backbone": digest_of(backbone, self.method.backbone.state_dict()),
            "checkpoint": digest_of(whole, self.method.state_dict()),
            "tokenizer": tokenizer,
        }

    # Text

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.method.parameters()).device

    def to(self, device: str | torch.device) -> MemoryModel:
        """Move to a device."""
        self.method.to(device)
        return self

    def encode(self, text: str, what: str, limit: int) -> list[int]:
        """Tokenize a text, a `context` or a query.

        Raises
        ------
        GradmemError
            When it is empty, longer than `limit` tokens, or has characters or words that the tokenizer lacks.
        """
        return self._checked(self.task.encode(text), text, what, limit)

    def _checked(self, ids: list[int], text: str, what: str, limit: int) -> list[int]:
        if not ids:
            raise GradmemError(f"the {what} is empty")
        if len(ids) > limit:
            advice = self.method.too_long_advice if what == "context" else ""
            raise GradmemError(f"the {what} has {len(ids)} tokens; the limit of '{self.name}' is {limit}{advice}")
        unknown_id = self.task.tokenizer.unk_token_id
        if unknown_id is not None and unknown_id in ids:
            pieces = zip(self.task.pieces(text), ids, strict=True)
            alien = sorted({piece.strip() or piece for piece, i in pieces if i == unknown_id})
            other = f"; {OTHER_TEXTS}" if what == "context" else ""
            kind = "characters" if max(map(len, alien)) == 1 else "words"
            raise GradmemError(f"the {what} has {kind} that '{self.name}' does not know: {alien[:20]}{other}")
        return ids

    def most_characters(self, tokens: int) -> int:
        """Characters beyond which no text of so many tokens goes; also of a text with marks and blanks to leave out."""
        return max(0, tokens) * max(16, self._longest_token)

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.task.tokenizer.get_vocab()))

    def _check_length(self, text: str, what: str, limit: int) -> None:
        """Refuse a text that is far too long before it is taken apart, which takes time."""
        if len(text) > self.most_characters(limit):
            raise GradmemError(f"the {what} has {len(text):,} characters; the limit of '{self.name}' is {limit} tokens")

    def chunks(self, text: str, size: int | None = None) -> list[str]:
        """Cut a long text into parts for a memory each, of at most `size` tokens when they stand alone.

        Parameters
        ----------
        text : str
        size : int, optional
            By default the task's own, or the whole text where it has none; never more than the model can write.

        Raises
        ------
        GradmemError
            When `size` is less than a character takes.
        """
        size = self.task.chunk_size if size is None else size
        if size is None or not text:
            return [text]
        if size < 1:
            raise GradmemError(f"a chunk has at least 1 token, not {size}")
        size = min(size, self.method.max_context)
        ends = [*accumulate(map(len, self.task.pieces(text))), len(text)]
        chunks, begin = [], 0
        while begin < len(text):
            last = min(bisect_right(ends, begin) + size, len(ends)) - 1
            # A part alone may take a token more than within the text, and an end may stand within a character.
            while ends[last] > begin and len(self.task.encode(text[begin : ends[last]])) > size:
                last -= 1
            if ends[last] <= begin:
                raise GradmemError(f"a chunk of {size} tokens is less than one character takes: give a longer one")
            chunks.append(text[begin : ends[last]])
            begin = ends[last]
        return chunks

    def write(
        self,
        text: str | Sequence[str],
        steps: int | None = None,
        *,
        until: float | None = None,
        max_steps: int | None = None,
        progress: Progress = _silent,
    ) -> Memory:
        """Write one text, or several at once, into a memory each.

        Parameters
        ----------
        text : str or sequence of str
        steps : int, optional
            Write steps; by default as many as the checkpoint was trained for.
        until : float, optional
            Instead of a number of steps: each text stops at this write loss (mean nats per token).
        max_steps : int, optional
            Most steps that `until` may take; by default 30, or as many as the method takes where that is more.
        progress : callable
            `progress(steps, title, total)` passes the write steps on and may show them, as `rich.progress.track` does.

        Returns
        -------
        Memory
            One row for each text, with a `Receipt` each: provenance and write receipt.

        Raises
        ------
        GradmemError
            When a text is empty, too long or has unknown characters, or steps are negative.
        """
        return write_texts(self, as_texts(text), None, self.most_steps(steps, until, max_steps), until, progress)

    def append(
        self,
        memory: Memory,
        text: str | Sequence[str],
        steps: int | None = None,
        *,
        before: str | Sequence[str] | None = None,
        may_forget: bool = False,
        until: float | None = None,
        max_steps: int | None = None,
        progress: Progress = _silent,
    ) -> Memory:
        """Write more text into a memory, as the next chunk of what was written.

        With `chunk_mode: independent` the text gets vectors of its own, which READ sees beside those that are there;
        otherwise WRITE goes on from the memory as it is. Both have to be learned: a checkpoint that was not trained on
        chunks in this way (`appends`) loses nearly all that was written before.

        Parameters
        ----------
        memory : Memory
            Written by this model; it stays as it is.
        text : str or sequence of str
            One for each row.
        steps, until, max_steps, progress
            As for `write`.
        before : str or sequence of str, optional
            For each row the text that was written before (of several all, one after the other, or one of them), to
            measure what the memory still keeps of it. Otherwise its receipt says that this was not measured.
        may_forget : bool
            Append also where the checkpoint was never trained to.

        Returns
        -------
        Memory
            Records are of the new texts, with those before in `earlier`.

        Raises
        ------
        GradmemError
            As `write`; when another model wrote the memory, the method allows no more, the checkpoint was never trained
            to append, or `before` is not what was written.
        """
        memory = self.bind(memory)
        if not self.method.joins:
            raise GradmemError(f"'{self.name}' writes a memory once: write all text together")
        if not self.appends and not may_forget:
            raise GradmemError(
                f"'{self.name}' was never trained to append, and would forget most of what was written: write all text "
                "together, or say that it may (`may_forget`) and measure what is left (`before`)"
            )
        texts = as_texts(text, memory)
        told = None if before is None else as_texts(before, memory, "`before` has")
        for row, given in enumerate(told or ()):
            kept = sum(min(len(part.token_losses), self.method.max_context) for part in memory.receipts[row].history)
            if len(given) > self.most_characters(kept):
                raise GradmemError("`before` is not the text that was written")
        appended = write_texts(self, texts, memory, self.most_steps(steps, until, max_steps), until, progress)
        if told is not None:
            appended.receipts = [measure_again(self, appended[row], text) for row, text in enumerate(told)]
        return appended

    @property
    def appends(self) -> bool:
        """Whether it was trained to write what comes next into a memory: contexts in chunks, in the way it does now."""
        trained, mode = self.spec["method"], self.method.chunk_mode
        return (
            mode != "joint"
            and trained.get("chunk_size") is not None
            and trained.get("chunk_mode", "sequential") == mode
        )

    def most_steps(self, steps: int | None, until: float | None, max_steps: int | None) -> int:
        """Write steps that `write` takes with these arguments; with `until`, at most.

        Raises
        ------
        GradmemError
            When `steps` and `until` are both given, or `until` is no loss.
        """
        if until is None:
            return self.method.write_steps if steps is None else steps
        if steps is not None:
            raise GradmemError("give `steps` or `until`, not both")
        if not until > 0:
            raise GradmemError(f"`until` is a loss above 0, not {until}")
        return max(30, self.method.write_steps) if max_steps is None else max_steps

    def token_losses(self, memory: Memory, text: str) -> list[float]:
        """Loss of each token of a context text when it is read back from a memory of one row, nats.

        Raises
        ------
        GradmemError
            When the text is none that this model could write.
        """
        context = Tokens.from_lists([self.context_ids(text)]).to(self.device)
        with torch.no_grad():
            return self.method.token_losses(memory, context)[0].tolist()

    def open(self, path: str | os.PathLike[str]) -> Memory:
        """Load a memory file that this model wrote.

        Raises
        ------
        GradmemError
            When the file is damaged or another model wrote it.
        """
        return self.bind(Memory.load(path), str(path))

    def bind(self, memory: Memory, what: str = "the memory") -> Memory:
        """Bind a loaded memory to this model; refuse one that another model wrote."""
        mine = self.fingerprints["checkpoint"]
        if not memory.receipts:
            raise GradmemError(f"{what} does not say which model wrote it")
        for receipt in memory.history:
            if receipt.checkpoint != mine:
                raise GradmemError(
                    f"{what} was written by the checkpoint {receipt.checkpoint[:16]} ('{receipt.model}'), "
                    f"not by {mine[:16]} ('{self.name}'): a memory answers only through the model that wrote it"
                )
        self.method.check(memory, what)
        # Counts stay on the CPU: shapes depend on them.
        found = memory.tensors.items()
        tensors = {name: tensor.to(self.device) if tensor.is_floating_point() else tensor for name, tensor in found}
        return Memory(tensors, memory.receipts, self)

    def reconstruct(self, memory: Memory, progress: Progress = _silent) -> list[list[int]]:
        """Token ids that a memory gives back, as many as were written; see `Method.reconstruct`.

        Returns
        -------
        list of list of int
            For each row; where a row was written several times, for each of these.

        Raises
        ------
        GradmemError
            When the memory has no receipts, or one with more tokens than the model can write, or several chunks were
            written into the same vectors.
        """
        cuts = [part.chunks or [part.context_tokens] for part in memory.history]
        lengths = [length for own in cuts for length in own]
        if not lengths:
            raise GradmemError("the memory does not say how many tokens were written")
        if not all(isinstance(length, int) and 1 <= length <= self.method.max_chunk for length in lengths):
            raise GradmemError(f"the memory is damaged: it cannot hold contexts of {max(lengths, key=abs)} tokens")
        memory = self.method.split_chunks(memory)
        if len(memory) != len(lengths):
            raise GradmemError(
                f"the memory has {len(lengths)} chunks in the vectors of {len(memory)}, which cannot be told apart: "
                "ask it, or write with `chunk_mode: independent` to read texts back"
            )
        size = max(1, self.method.backbone.tokens_at_once // max(lengths))
        starts = range(0, len(lengths), size)
        found: list[list[int]] = []
        for first in progress(starts, title="reading back", total=len(starts)):
            rows = range(first, min(first + size, len(lengths)))
            found += self.method.reconstruct(memory.select(rows), [lengths[row] for row in rows])
        pieces = iter(found)
        return [[token for _ in own for token in next(pieces)] for own in cuts]

    def restore(self, memory: Memory) -> list[str]:
        """Texts that a memory gives back, from the memory alone; see `reconstruct`."""
        return [self.task.text(ids) for ids in self.reconstruct(memory)]

    def ask(self, memory: Memory, query: Any, **options: Any) -> Any:
        """Answer queries from a memory alone.

        Parameters
        ----------
        memory : Memory
        query : str, list of str, or list of lists of str
            One query; several for a memory of one row; or for each row a list of its own.
        options
            Arguments of Hugging Face's `generate`, as `max_new_tokens` or `do_sample`: those of
            `gradmem.prefix.OPTIONS`. What the model's directory says of generation counts for nothing.

        Returns
        -------
        str, list of str, or list of lists of str
            Answers in the shape of the queries; each a list where `num_return_sequences` asks for more than one.

        Raises
        ------
        GradmemError
            When a query is empty, too long or has no answer format, rows and queries do not fit, or an option is
            another one.
        """

        def texts(rows: list[int], queries: list[str]) -> list[Any]:
            _, generated = self._generate(memory, rows, self._query_ids(memory, queries, options), options)
            found = [self.task.decode(ids) for ids in generated]
            each = len(found) // len(queries)
            return found if each == 1 else [found[i : i + each] for i in range(0, len(found), each)]

        return _in_shape(memory, query, texts)

    def answer(self, memory: Memory, query: Any, **options: Any) -> Any:
        """Answer queries from a memory alone, each with what speaks for the answer.

        Parameters
        ----------
        memory : Memory
        query, options
            As `ask` takes them, but for options that give several answers to a query.

        Returns
        -------
        Answer, list of Answer, or list of lists of Answer
            In the shape of the queries, the texts those of `ask`.

        Raises
        ------
        GradmemError
            As `ask`.
        """

        def answers(rows: list[int], queries: list[str]) -> list[Answer]:
            return self.answer_ids(memory, rows, self._query_ids(memory, queries, options), **options)

        return _in_shape(memory, query, answers)

    def answer_ids(self, memory: Memory, rows: list[int], queries: list[list[int]], **options: Any) -> list[Answer]:
        """Answer queries that are token ids (`query_ids`), each of its row of the memory; see `answer`."""
        answers, states = self.evidence(memory, rows, queries, **options)
        if (abstain := self.abstain) is None:
            return answers
        # Memories of bare tokens have no receipts: whoever makes them knows what they are.
        known = [not memory.receipts or abstain.holds(memory.receipts[row]) for row in rows]
        judged = abstain.judge(answers, states)
        return [sure if good else answer for sure, answer, good in zip(judged, answers, known, strict=True)]

    def evidence(
        self, memory: Memory, rows: list[int], queries: list[list[int]], **options: Any
    ) -> tuple[list[Answer], Tensor]:
        """Answers that are not judged yet, and the states by which `Abstain` judges them, shape (answers, 2 d)."""
        if copies(options) > 1:
            raise GradmemError("an `answer` is one for each query: leave out beams and several sequences, or `ask`")
        prefix, generated = self._generate(memory, rows, queries, options)
        end, task = self.task.end_id, self.task
        ids = [row[: row.index(end) + 1] if end in row else row for row in generated]
        texts = [task.decode(row) for row in ids]
        said = [task.statement(task.text(query), text) for query, text in zip(queries, texts, strict=True)]
        claims = [task.encode(one) or [end] for one in said]  # an empty text is no more than its end
        with torch.no_grad():
            index = torch.tensor(rows, device=self.device)
            logprobs, states = zip(*read_answers(self.method, prefix.select(index), queries, ids), strict=True)
            losses = claim_losses(self.method, memory.select(rows), claims)
        answers = [
            replace(
                answer,
                finish_reason="stop" if end in row else "length",
                query_tokens=len(query),
                answer_tokens=len(row),
            )
            for answer, query, row in zip(map(assess, texts, ids, logprobs, losses), queries, ids, strict=True)
        ]
        return answers, torch.stack(states)

    def context_ids(self, text: str) -> list[int]:
        """Tokenize a text that is to be written.

        Raises
        ------
        GradmemError
            When it is empty, too long, or has characters or words that the model does not know.
        """
        limit = self.method.max_context
        self._check_length(text, "context", limit)
        return self.encode(self.task.context_text(text), "context", limit)

    def query_ids(self, text: str, options: dict[str, Any] | None = None, taken: int = 0) -> list[int]:
        """Tokenize a query that is to be answered with these options of `generate`.

        Parameters
        ----------
        text : str
        options : dict, optional
        taken : int
            Positions that the memory's prefix takes, where that may be more than usual.

        Raises
        ------
        GradmemError
            When it is empty, too long, has unknown characters or no answer format.
        """
        room = min(self.method.max_query, self.method.backbone.max_positions - taken)
        limit = room - int((options or {}).get("max_new_tokens", self.task.answer_length))
        self._check_length(text, "query", limit)
        return self._checked(self.task.encode_query(text), self.task.query_text(text), "query", limit)

    def _query_ids(self, memory: Memory, queries: list[str], options: dict[str, Any]) -> list[list[int]]:
        """Queries of a memory, which may leave less room than usual: more was appended, or its chunks were others."""
        taken = self._prefix(memory).length
        return [self.query_ids(text, options, taken) for text in queries]

    def _generate(
        self, memory: Memory, rows: list[int], queries: list[list[int]], options: dict[str, Any]
    ) -> tuple[Prefix, list[list[int]]]:
        """The memory's prefix, which is kept with it, and the new tokens of each query."""
        settings = {
            "max_new_tokens": self.task.answer_length,
            "do_sample": False,
            "eos_token_id": self.task.end_id,
        }
        prefix, index = self._prefix(memory), torch.tensor(rows, device=self.device)
        given = settings | options
        return prefix, self.method.generate(prefix, queries, index, pad_id=self.task.pad_id, **given)

    def _prefix(self, memory: Memory) -> Prefix:
        """The memory's prefix, which is run once and kept with it."""
        if memory.prefix is None:
            with torch.no_grad():
                memory.prefix = self.method.prefix(memory)
        return memory.prefix


def _in_shape(memory: Memory, query: Any, answer: Callable[[list[int], list[str]], list[Any]]) -> Any:
    """Answers in the shape of the queries, from what answers a flat list: memory rows, and their queries."""
    if isinstance(query, str):
        return _in_shape(memory, [query], answer)[0]
    if query and isinstance(query[0], str):
        if len(memory) != 1:
            raise GradmemError(f"this memory has {len(memory)} rows: give a list of queries for each, or pick one")
        return _in_shape(memory, [query], answer)[0]
    if len(query) != len(memory):
        raise GradmemError(f"{len(query)} lists of queries for {len(memory)} memories")
    flat = [(row, text) for row, texts in enumerate(query) for text in texts]
    found = iter(answer([row for row, _ in flat], [text for _, text in flat]) if flat else [])
    return [[next(found) for _ in queries] for queries in query]


def _portable(task: Spec) -> Spec:
    """A task without places: its tokenizer goes along, and who wants its data says where it is."""
    return _beside({name: value for name, value in task.items() if name != "data"}, HERE)


def _beside(task: Spec, directory: str) -> Spec:
    """A task whose tokenizer, where that is an option, is the one in the checkpoint's directory."""
    return {**task, "tokenizer": directory} if task.get("tokenizer") is not None else task
