"""A memory method with its tokenizer and task: what a checkpoint holds."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from . import methods, tasks
from .backbone import Backbone
from .batch import TOKENS_AT_ONCE, Tokens
from .data.pretrained import digest_tokenizer
from .errors import GradmemError
from .memory import Memory, Record, digest, text_digest
from .methods.base import Method, Written, final
from .plugins import check_options, find
from .tasks.base import Task

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
HERE = "."
"""In a checkpoint's config: the directory of the checkpoint itself."""
Spec = dict[str, Any]
Progress = Callable[..., Iterable[Any]]


def _silent(steps: Iterable[Any], title: str = "", total: int | None = None) -> Iterable[Any]:
    return steps


def build_task(spec: Spec, *, trusted: bool = True) -> Task:
    """Build a task from its `name` and options."""
    cls = find(Task, tasks.__name__, "task", spec["name"], trusted=trusted)
    options = {key: value for key, value in spec.items() if key != "name"}
    return _construct(cls, f"{spec['name']} task", (), options)


def build_method(spec: Spec, backbone: Backbone, *, trusted: bool = True) -> Method:
    """Build a method from its `name` and options."""
    cls = find(Method, methods.__name__, "method", spec["name"], trusted=trusted)
    options = {key: value for key, value in spec.items() if key != "name"}
    return _construct(cls, f"{spec['name']} method", (backbone,), options)


def build_backbone(spec: Spec, task: Task) -> Backbone:
    """Build a backbone from `pretrained: NAME` (and `dtype`) or the fields of a config, for the task's tokenizer."""
    if "pretrained" in spec:
        options = {key: value for key, value in spec.items() if key != "pretrained"}
        if extra := sorted(options.keys() - {"dtype"}):
            raise GradmemError(f"a pretrained backbone is what it is: leave out {', '.join(extra)}")
        return Backbone.from_pretrained(spec["pretrained"], len(task.tokenizer), **options)
    fields = {"vocab_size": len(task.tokenizer), "pad_token_id": task.pad_id, "eos_token_id": task.end_id}
    return Backbone.from_config({**fields, **spec})


def _construct(cls: type, kind: str, given: tuple[Any, ...], options: dict[str, Any]) -> Any:
    check_options(cls, kind, options, ("backbone",))
    try:
        return cls(*given, **options)
    except TypeError as error:
        raise GradmemError(f"{kind}: {error}") from error


class MemoryModel(ModelHubMixin, library_name="gradmem", tags=["memory", "test-time-training"]):
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
        self.options: Spec = {}
        """Options of the method that a plain language model's memories need to say."""

    @classmethod
    def from_spec(cls, task: Spec, backbone: Spec, method: Spec, *, trusted: bool = True) -> MemoryModel:
        """Build a model with fresh (or pretrained) weights."""
        built_task = build_task(task, trusted=trusted)
        built = build_backbone(backbone, built_task)
        config = built.model.config
        fields = {**config.to_diff_dict(), "model_type": config.model_type}
        fields.pop("_name_or_path", None)  # a place on this machine, perhaps
        spec = {
            "task": dict(task),
            "backbone": fields,
            "method": dict(method),
        }
        return cls(build_method(method, built, trusted=trusted), built_task, copy.deepcopy(spec))

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
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = cls.from_spec({"name": "plain", "tokenizer": name}, {"pretrained": name}, method, trusted=False)
        model.method.requires_grad_(False)
        model.name, model.options = name, {key: value for key, value in method.items() if key != "name"}
        model.method.eval()
        return model

    # Checkpoints

    def take_weights(self, other: MemoryModel) -> list[str]:
        """Warm start: take over every weight of another model that has the same name and shape.

        Returns
        -------
        list of str
            Names of the weights that stay as they were.
        """
        theirs = other.method.state_dict()
        kept = []
        with torch.no_grad():
            for name, weight in self.method.state_dict().items():
                if name in theirs and theirs[name].shape == weight.shape:
                    weight.copy_(theirs[name])
                else:
                    kept.append(name)
        return kept

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write config, weights and tokenizer; each file appears whole or not at all."""
        with tempfile.TemporaryDirectory(dir=save_directory) as temporary:
            save_model(self.method, str(Path(temporary) / WEIGHTS))
            spec = {**self.spec, "task": _portable(self.spec["task"])}
            (Path(temporary) / CONFIG).write_text(json.dumps({"format": FORMAT, **spec}, indent=1))
            self.task.tokenizer.save_pretrained(temporary)
            for file in Path(temporary).iterdir():
                os.replace(file, save_directory / file.name)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **download: Any) -> MemoryModel:
        """Load from a directory or, by its hub name, from the hub. Executes nothing that the files contain."""
        directory = Path(model_id)
        if not directory.is_dir():
            directory = Path(snapshot_download(model_id, **_known(snapshot_download, download)))
        try:
            config = json.loads((directory / CONFIG).read_text())
            if config["format"] != FORMAT:
                raise GradmemError(f"{model_id} has format {config['format']}, this gradmem reads {FORMAT}")
            task = _beside(config["task"], str(directory))
            model = cls.from_spec(task, config["backbone"], config["method"], trusted=False)
            load_model(model.method, str(directory / WEIGHTS))
        except FileNotFoundError as error:
            raise GradmemError(f"{model_id} is no checkpoint: it has no {Path(error.filename).name}") from error
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
            SafetensorError,
        ) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise GradmemError(f"{model_id} is damaged or no checkpoint: {reason}") from error
        model.name = model_id
        model.method.eval()
        return model

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the `backbone` weights, the whole `checkpoint` (weights and settings) and the `tokenizer`."""
        tokenizer = digest_tokenizer(self.task.tokenizer)
        settings = json.dumps(self.spec["method"], sort_keys=True) + tokenizer
        weights = digest(self.method.state_dict())
        return {
            "backbone": digest(self.method.backbone.state_dict()),
            "checkpoint": hashlib.sha256((settings + weights).encode()).hexdigest(),
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
        """Tokenize a text.

        Raises
        ------
        GradmemError
            When it is empty, longer than `limit` tokens, or has characters or words that the tokenizer lacks.
        """
        ids = self.task.encode(text)
        if not ids:
            raise GradmemError(f"the {what} is empty")
        if len(ids) > limit:
            raise GradmemError(f"the {what} has {len(ids)} tokens; the limit of '{self.name}' is {limit}")
        unknown_id = self.task.tokenizer.unk_token_id
        if unknown_id is not None and unknown_id in ids:
            pieces = zip(self.task.pieces(text), ids, strict=True)
            alien = sorted({piece.strip() or piece for piece, i in pieces if i == unknown_id})
            kind = "characters" if max(map(len, alien)) == 1 else "words"
            raise GradmemError(f"the {what} has {kind} that '{self.name}' does not know: {alien[:20]}")
        return ids

    def chunks(self, text: str, size: int | None = None) -> list[str]:
        """Cut a long text into parts to write, each at most `size` tokens when it stands alone.

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
        size = self.task.chunk if size is None else size
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
            One row for each text, with a `Record` each: provenance and write receipt.

        Raises
        ------
        GradmemError
            When a text is empty, too long or has unknown characters, or steps are negative.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise GradmemError("nothing to write")
        steps = self.most_steps(steps, until, max_steps)
        ids = [self.encode(self.task.context_text(t), "context", self.method.max_context) for t in texts]
        size = max(1, TOKENS_AT_ONCE // max(map(len, ids)))
        parts = []
        for first in range(0, len(texts), size):
            title = f"writing {min(first + size, len(texts))} of {len(texts)}"
            shown = partial(progress, title=title, total=steps + 1)
            parts.append(self._write(texts[first : first + size], ids[first : first + size], steps, until, shown))
        memory = Memory.join(parts)
        memory.model = self
        return memory

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

    def _write(
        self, texts: list[str], ids: list[list[int]], steps: int, until: float | None, progress: Callable[..., Any]
    ) -> Memory:
        """Write texts in one batch."""
        context = Tokens.from_lists(ids, self.task.pad_id).to(self.device)
        with torch.no_grad():
            written = final(progress(self.method.trajectory(context, steps, until=until)))
            token_losses = self.method.token_losses(written.memory, context)
        records = [
            self._record(text, written, token_losses[row, : len(ids[row])].tolist(), row)
            for row, text in enumerate(texts)
        ]
        return Memory(written.memory.tensors, records)

    def _record(self, text: str, written: Written, token_losses: list[float], row: int) -> Record:
        taken = int(written.taken[row])
        losses = [*written.losses[:taken, row].tolist(), sum(token_losses) / len(token_losses)]
        return Record(
            method=self.spec["method"]["name"],
            model=self.name,
            **self.fingerprints,
            context_sha256=text_digest(text),
            context_tokens=len(token_losses),
            steps=taken,
            inner_lr=[round(rate, 6) for rate in self.method.inner_lrs()],
            losses=[round(loss, 6) for loss in losses],
            token_losses=[round(loss, 3) for loss in token_losses],
            options=self.options,
        )

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
        if not memory.records:
            raise GradmemError(f"{what} does not say which model wrote it")
        for record in memory.records:
            if record.checkpoint != mine:
                raise GradmemError(
                    f"{what} was written by the checkpoint {record.checkpoint[:16]} ('{record.model}'), "
                    f"not by {mine[:16]} ('{self.name}'): a memory answers only through the model that wrote it"
                )
        self.method.check(memory, what)
        tensors = {name: tensor.to(self.device) for name, tensor in memory.tensors.items()}
        return Memory(tensors, memory.records, self)

    def reconstruct(self, memory: Memory, progress: Progress = _silent) -> list[list[int]]:
        """Token ids that each row of a memory gives back, as many as were written; see `Method.reconstruct`.

        Raises
        ------
        GradmemError
            When the memory has no records, or one with more tokens than the model can write.
        """
        lengths = [record.context_tokens for record in memory.records]
        if not lengths:
            raise GradmemError("the memory does not say how many tokens were written")
        if not all(isinstance(length, int) and 1 <= length <= self.method.max_context for length in lengths):
            raise GradmemError(f"the memory is damaged: it cannot hold contexts of {max(lengths, key=abs)} tokens")
        size = max(1, TOKENS_AT_ONCE // max(lengths))
        starts = range(0, len(lengths), size)
        found: list[list[int]] = []
        for first in progress(starts, title="reading back", total=len(starts)):
            rows = range(first, min(first + size, len(lengths)))
            found += self.method.reconstruct(memory.select(rows), [lengths[row] for row in rows])
        return found

    def restore(self, memory: Memory) -> list[str]:
        """Text that each row of a memory gives back, from the memory alone; see `reconstruct`."""
        return [self.task.text(ids) for ids in self.reconstruct(memory)]

    def ask(self, memory: Memory, query: Any, **options: Any) -> Any:
        """Answer queries from a memory alone.

        Parameters
        ----------
        memory : Memory
        query : str, list of str, or list of lists of str
            One query; several for a memory of one row; or for each row a list of its own.
        options
            Arguments of Hugging Face's `generate`, as `max_new_tokens` or `do_sample`.

        Returns
        -------
        str, list of str, or list of lists of str
            Answers in the shape of the queries; each a list where `num_return_sequences` asks for more than one.

        Raises
        ------
        GradmemError
            When a query is empty, too long or has no answer format, or rows and queries do not fit.
        """
        if isinstance(query, str):
            return self.ask(memory, [query], **options)[0]
        if query and isinstance(query[0], str):
            if len(memory) != 1:
                raise GradmemError(f"this memory has {len(memory)} rows: give a list of queries for each, or pick one")
            return self.ask(memory, [query], **options)[0]
        if len(query) != len(memory):
            raise GradmemError(f"{len(query)} lists of queries for {len(memory)} memories")
        flat = [(row, text) for row, texts in enumerate(query) for text in texts]
        if not flat:
            return [[] for _ in query]
        settings = {
            "max_new_tokens": self.task.answer_length,
            "do_sample": False,
            "eos_token_id": self.task.end_id,
        }
        settings |= options
        limit = self.method.max_query - int(settings["max_new_tokens"])
        ids = [self.encode(self.task.query_text(text), "query", limit) for _, text in flat]
        rows = torch.tensor([row for row, _ in flat], device=self.device)
        if memory.prefix is None:
            with torch.no_grad():
                memory.prefix = self.method.prefix(memory)
        generated = self.method.generate(memory.prefix, ids, rows, pad_id=self.task.pad_id, **settings)
        texts = [self.task.decode(row) for row in generated]
        each = len(texts) // len(flat)
        answers = iter(texts if each == 1 else [texts[i : i + each] for i in range(0, len(texts), each)])
        return [[next(answers) for _ in queries] for queries in query]


def _portable(task: Spec) -> Spec:
    """A task without places on this machine: its tokenizer goes along, and who wants its data says where it is."""
    local = task.get("data") is not None and Path(task["data"]).exists()
    return _beside({name: value for name, value in task.items() if not (local and name == "data")}, HERE)


def _beside(task: Spec, directory: str) -> Spec:
    """A task whose tokenizer, where that is an option, is the one in the checkpoint's directory."""
    return {**task, "tokenizer": directory} if task.get("tokenizer") else task


def _known(function: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options that a function takes."""
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}
