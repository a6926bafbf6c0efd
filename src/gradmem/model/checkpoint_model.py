"""A memory method with its task: built, loaded, saved and configured."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from typing_extensions import Self

from ..errors import GradmemError, refused
from ..language_model import load_weights
from ..memory import Memory
from ..methods.base import Method
from ..prefix import Prefix
from ..receipts import Author
from ..tasks.base import Task
from ..untrusted import Stored, check_counts, within
from . import checkpoint, reading, writing
from .abstain import Abstain
from .build import Spec, build_backbone, build_method, build_task, method_class
from .encoding import TextEncoder
from .identity import fingerprints
from .reading import Answer

NAMED: set[str] = set()
"""Models that this process was told to load: memories may name these, as no file decides what is loaded."""
CHUNK_OPTIONS = ("chunk_size", "chunk_mode")
"""Options of every method that do not depend on the weights: how contexts are cut."""


class CheckpointModel(ModelHubMixin):
    """What a checkpoint holds: a memory method with the task that it was trained on.

    `MemoryModel` adds memories: it writes, opens and binds them.

    Parameters
    ----------
    method : Method
    task : Task
    spec : dict
        `task`, `backbone` and `method` as plain data, from which the same objects can be built.
    name : str
        Name or path by which `gradmem.load` finds it.
    """

    def __init__(self, method: Method, task: Task, spec: dict[str, Spec], name: str = "unnamed") -> None:
        self.method, self.task, self.spec, self.name = method, task, spec, name
        self.method_options: Spec = {}
        """Options of the method, which receipts state if the method is no checkpoint's own."""
        self.plain = False
        """Whether this is a plain language model."""
        self.overrides: Spec = {}
        """Options of the method that differ from training; see `configure`."""
        method.task = task
        self.abstain: Abstain | None = None
        """When to abstain; None if the checkpoint is not calibrated."""

    @classmethod
    def from_spec(
        cls, task: Spec, backbone: Spec, method: Spec, *, trusted: bool = True, stored: Stored | None = None
    ) -> Self:
        """Build a model with fresh weights, or pretrained ones.

        Parameters
        ----------
        task, backbone, method : dict
        trusted : bool
            Whether they may name a module that is not imported yet.
        stored : Stored, optional
            Weights that will be loaded into the model, which may not be larger.

        Raises
        ------
        GradmemError
            If a part is unknown, refuses an option, or is too large.
        """
        built_task = build_task(task, trusted=trusted)
        built = build_backbone(backbone, built_task, stored)
        config = built.model.config
        fields = {**config.to_diff_dict(), "model_type": config.model_type}
        fields.pop("_name_or_path", None)  # it may be a path on this machine
        spec = {"task": dict(task), "backbone": fields, "method": dict(method)}
        with within(None if stored is None else stored.limit):
            built_method = build_method(method, built, trusted=trusted)
        return cls(built_method, built_task, copy.deepcopy(spec))

    @classmethod
    def from_language_model(cls, name: str, method: Spec) -> Self:
        """Build a model from a pretrained language model and a method that needs no training, such as `cram`.

        Parameters
        ----------
        name : str
            Directory or hub name of the language model.
        method : dict
            `name` and options of the method. Its random numbers are the same every time.

        Raises
        ------
        GradmemError
            If the model or its tokenizer cannot be loaded, or the method does not know an option.
        """
        with torch.random.fork_rng(), refused(f"cannot load '{name}'"):
            torch.manual_seed(0)
            task = {"name": method_class(method, trusted=False).task_name, "tokenizer": name}
            model = cls.from_spec(task, {"pretrained": name}, method, trusted=False)
        NAMED.add(name)
        model.name, model.plain = name, True
        return model._untrained(method)

    @property
    def takes_methods(self) -> bool:
        """Whether other methods can be put on its backbone: it is plain, or its method has no weights of its own."""
        return self.plain or len(list(self.method.parameters())) == len(list(self.method.backbone.parameters()))

    def with_method(self, method: Spec) -> Self:
        """The same backbone, which is shared, under another method that needs no training.

        A checkpoint keeps its task; a plain language model is read through the task of the method.

        Parameters
        ----------
        method : dict
            `name` and options. Its random numbers are the same every time.

        Raises
        ------
        GradmemError
            If the checkpoint has a method that was trained, or the method does not know an option.
        """
        if not self.takes_methods:
            raise self._own_method()
        task, spec = self.task, self.spec["task"]
        name = method_class(method, trusted=False).task_name
        if self.plain and name != spec["name"]:
            spec = {"name": name, "tokenizer": self.name}
            task = build_task(spec)
        with torch.random.fork_rng(), refused(f"cannot put {method['name']} on '{self.name}'"):
            torch.manual_seed(0)
            built = build_method(method, self.method.backbone, trusted=False).to(self.device)
        model = type(self)(built, task, copy.deepcopy({**self.spec, "task": spec, "method": dict(method)}), self.name)
        model.plain = self.plain
        return model._untrained(method)

    def _untrained(self, method: Spec) -> Self:
        """This model, ready to write with a method that needs no training."""
        self.method_options = {key: value for key, value in method.items() if key != "name"}
        self.method.requires_grad_(False)
        self.method.eval()
        return self

    def _save_pretrained(self, save_directory: Path) -> None:
        checkpoint.save(save_directory, self.method, self.task, self.spec, self.abstain)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **download: Any) -> Self:
        """Load a checkpoint from a directory or, by its hub name, from the hub. No code in its files is executed.

        Parameters
        ----------
        pretrained_model_name_or_path : str or path
        download
            For the hub: arguments of `huggingface_hub.snapshot_download`, such as `revision`.

        Raises
        ------
        GradmemError
            If a file is missing or damaged, the weights do not fit the config, or the config asks for more than the
            weights hold, or names a model or code.
        """
        name = os.fspath(pretrained_model_name_or_path)
        NAMED.add(name)
        with refused(f"{name} is damaged or no checkpoint"):
            directory = checkpoint.locate(name, **download)
            found = checkpoint.read(directory)
            model = cls.from_spec(**found.specs, trusted=False, stored=found.stored)
            load_weights(model.method, found.weights)
        model.method.eval()
        model.name = name
        model.abstain = checkpoint.read_abstain(
            directory, model.fingerprints["checkpoint"], model.method.backbone.width
        )
        return model

    def configure(self, options: Spec) -> None:
        """Set options that do not depend on the weights: `chunk_size`, `chunk_mode` and the method's `runtime_options`.

        Raises
        ------
        GradmemError
            If there are other options, or the method cannot write in chunks.
        """
        cutting = {name: value for name, value in options.items() if name in CHUNK_OPTIONS}
        known = (*CHUNK_OPTIONS, *self.method.runtime_options)
        if set(options) - set(known):
            raise self._own_method()
        if cutting and not self.method.joins:
            raise GradmemError(
                f"'{self.name}' cannot write several chunks into one memory: cut its texts with `model.encoder.chunks`"
            )
        if cutting:
            self.method.chunk_by(**{"chunk_size": self.method.chunk_size, **cutting})
        for name in self.method.runtime_options:
            if name in options:
                setattr(self.method, name, options[name])
        chosen = {*self.overrides, *options, *(CHUNK_OPTIONS if cutting else ())}
        # Always in the same order, so that what is written with the same options has the same hash.
        self.overrides = {name: getattr(self.method, name) for name in known if name in chosen}

    def _own_method(self) -> GradmemError:
        known = ", ".join(f"`{name}`" for name in (*CHUNK_OPTIONS, *self.method.runtime_options))
        return GradmemError(
            f"'{self.name}' has a method of its own: only plain language models and checkpoints of "
            f"full_context and compact take another; this checkpoint takes {known}"
        )

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the `backbone`, the whole `checkpoint` and the `tokenizer`; see `gradmem.model.identity`."""
        return fingerprints(self.method, self.task, self.spec)

    @property
    def encoder(self) -> TextEncoder:
        """What turns texts into the token ids that this model reads."""
        return TextEncoder(self.task, self.method, self.name)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.method.device

    def to(self, device: str | torch.device) -> Self:
        """Move to a device."""
        self.method.to(device)
        return self

    @property
    def author(self) -> Author:
        """Who writes the memories of this model, for their receipts."""
        options = {**self.method_options, **self.overrides}
        return Author(self.spec["method"]["name"], self.name, options=options, **self.fingerprints)

    def most_steps(self, steps: int | None, until: float | None, max_steps: int | None) -> int:
        """Write steps that `write` takes with these arguments; with `until`, the most of them.

        Raises
        ------
        GradmemError
            If `steps` and `until` are both given, or `until` is not a positive loss.
        """
        return writing.most_steps(self.method, steps, until, max_steps)

    def finished(
        self,
        earlier: Memory,
        texts: Sequence[str],
        steps: int | None = None,
        *,
        until: float | None = None,
        max_steps: int | None = None,
        questions: Sequence[str] = (),
    ) -> list[Memory | None]:
        """Find what an earlier memory holds of texts that would be written now, such as chunks of a changed document.

        Parameters
        ----------
        earlier : Memory
        texts : sequence of str
        steps, until, max_steps, questions
            As for `write`.

        Returns
        -------
        list of Memory or None
            For each text the row that this model wrote from it, with the same options and questions and to the end;
            None if there is none. It need not be written again.
        """
        most = self.most_steps(steps, until, max_steps)
        return writing.finished_rows(self.author, texts, earlier, most, until, questions)

    def token_losses(self, memory: Memory, text: str) -> list[float]:
        """Loss of each token of a context text when it is read back from a memory of one row, nats.

        Raises
        ------
        GradmemError
            If the text could not be written by this model.
        """
        return writing.token_losses(self.method, memory, self.encoder.context_ids(text))

    def _sibling(self, memory: Memory) -> Self | None:
        """This backbone under the method that wrote a memory; None if that is this model's own, or it takes none."""
        receipt, mine = memory.receipts[0], self.fingerprints
        if receipt.checkpoint == mine["checkpoint"] or receipt.backbone != mine["backbone"] or not self.takes_methods:
            return None
        if receipt.checkpoint not in self._siblings:
            # The options come from a file: none may ask for more than the file holds.
            check_counts(receipt.options, max(size for tensor in memory.tensors.values() for size in tensor.shape))
            found = self.with_method({"name": receipt.method, **receipt.options})
            if found.fingerprints["checkpoint"] != receipt.checkpoint:
                return None
            self._siblings[receipt.checkpoint] = found
        return self._siblings[receipt.checkpoint]

    @cached_property
    def _siblings(self) -> dict[str, Any]:
        """By fingerprint: other methods on this backbone that wrote memories."""
        return {}

    def answer_ids(
        self, memory: Memory, prefix: Prefix, rows: list[int], queries: list[list[int]], **options: Any
    ) -> list[Answer]:
        """Answer tokenized queries from the prefix of a memory, with evidence; see `BoundMemory.answer`.

        Parameters
        ----------
        memory : Memory
            Written by this model.
        prefix : Prefix
            What `Method.prefix` returns for the memory.
        rows : list of int
            The row of the memory that each query asks.
        queries : list of list of int
            From `TextEncoder.query_ids`.
        options
            As for `BoundMemory.answer`.
        """
        answers, states = reading.answer(self.method, self.task, memory, prefix, rows, queries, options)
        if (abstain := self.abstain) is None:
            return answers
        # A memory of bare tokens has no receipts: whoever wrote it knows how long its contexts are.
        known = [not memory.receipts or abstain.holds(memory.receipts[row]) for row in rows]
        judged = abstain.judge(answers, states)
        return [sure if good else answer for sure, answer, good in zip(judged, answers, known, strict=True)]
