"""A model that writes documents, several at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..device import clock, device_named
from ..errors import GradmemError, reason
from ..memory import Memory
from ..model.loading import load
from ..receipts import text_digest
from ..store import content_hash
from ..store.rows import check_name, version_of
from .destination import Written, document_key
from .documents import Document
from .options import Options


@dataclass
class Prepared:
    """A document that can be written.

    Attributes
    ----------
    number : int
        In the list of the run.
    name : str
    tags : list of str
    key, content : str
        As in `Written`.
    texts : list of str
        Its chunks.
    tokens : int
        Those of the longest chunk.
    """

    number: int
    name: str
    tags: list[str]
    key: str
    content: str
    texts: list[str]
    tokens: int


class TextWriter:
    """A model that writes documents, several at once.

    Parameters
    ----------
    options : Options

    Raises
    ------
    GradmemError
        If there is no such checkpoint or device.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.model = load(options.checkpoint, options.method).to(device_named(options.device))
        if options.chunk_size is not None and self.model.method.joins:
            self.model.configure({"chunk_size": options.chunk_size})
        how = content_hash(self.model, [], options.steps, precision=options.precision)
        self.settings = text_digest(f"{how} {options.chunk_size}")
        self.model_seconds = 0.0

    def prepare(self, number: int, document: Document) -> Prepared:
        """Cut the text of a document into chunks.

        Raises
        ------
        GradmemError
            If it could not be read, the model cannot read it, or a store does not take its name.
        """
        if document.reason:
            raise GradmemError(document.reason)
        check_name(document.name)
        text, encoder = document.text, self.model.encoder
        whole = self.model.method.chunk_size is not None
        texts = [text] if whole else encoder.chunks(text, self.options.chunk_size)
        tokens = max(len(encoder.context_ids(one)) for one in texts)
        content = content_hash(self.model, texts, self.options.steps, precision=self.options.precision)
        key = document_key(self.settings, text_digest(text))
        return Prepared(number, document.name, document.tags, key, content, texts, tokens)

    def write(self, documents: list[Prepared]) -> Iterator[tuple[Prepared, Written | str]]:
        """Write documents, those of similar length together, and yield each with its memory or the reason why not."""
        for group in self.groups(documents):
            try:
                memories = self._write(group)
            except Exception as error:  # out of memory too
                memories = [reason(error)] if len(group) == 1 else [self._alone(one) for one in group]
            for document, memory in zip(group, memories, strict=True):
                yield document, memory if isinstance(memory, str) else self._packed(document, memory)

    def groups(self, documents: list[Prepared]) -> Iterator[list[Prepared]]:
        """Documents that are written at once: of similar length, and as many as fit. One in chunks goes alone."""
        left = sorted((one for one in documents if len(one.texts) == 1), key=lambda one: -one.tokens)
        while left:
            size = self.model.method.texts_at_once(left[0].tokens)
            yield left[:size]
            left = left[size:]
        yield from ([one] for one in documents if len(one.texts) > 1)

    def _write(self, group: list[Prepared]) -> list[Memory | str]:
        texts = [text for document in group for text in document.texts]
        began = clock()
        try:
            memory: Memory = self.model.write(texts, self.options.steps)
        finally:
            self.model_seconds += clock() - began
        return [memory] if len(group) == 1 else [memory[row] for row in range(len(group))]

    def _alone(self, document: Prepared) -> Memory | str:
        try:
            return self._write([document])[0]
        except Exception as error:
            return reason(error)

    def _packed(self, document: Prepared, memory: Memory) -> Written | str:
        data = memory.to_bytes(self.options.precision)
        try:
            version_of(memory, data)  # refuses what no store holds
        except GradmemError as error:
            return str(error)
        return Written(document.key, document.content, document.name, document.tags, list(memory.receipts), data)
