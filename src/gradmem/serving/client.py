"""A client of `gradmem serve`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx2

from ..errors import GradmemError, Missing
from ..model.abstain import Answer
from ..store.entries import Entry
from .engine import Busy

OnLoss = Callable[[int, int, float | None], object]


class Client:
    """Memories on a server, by id or name.

    Every method raises `GradmemError` with the server's one line: `Missing` where there is no such memory, `Busy` where
    it says when to come back.

    Parameters
    ----------
    url : str
        As `gradmem serve` prints it.
    key : str, optional
        API key; none is needed on the server's own machine.
    timeout : float
        Seconds to wait for an answer, or for the next part of one.

    Examples
    --------
    >>> with gradmem.Client("http://127.0.0.1:8000") as client:
    ...     client.write("a7:Qz", "kv-32", name="notes")
    ...     client.ask("notes", "a7").text
    'Qz'
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 300.0) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.Client(base_url=url.rstrip("/") + "/v1/", headers=headers, timeout=timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def write(self, text: str, checkpoint: str, *, on_step: OnLoss | None = None, **options: Any) -> Entry:
        """Write a text into a memory.

        Parameters
        ----------
        text, checkpoint : str
        on_step : callable
            `on_step(step, of, loss)` is called before the first step and after every step.
        options
            `name`, `tags`, `steps`, `until`, `max_steps` and `precision` of `Store.write`.
        """
        return self._write("memories", {"text": text, "checkpoint": checkpoint, **options}, on_step)

    def append(self, ref: str, text: str, *, on_step: OnLoss | None = None, **options: Any) -> Entry:
        """Write more text into a memory, as its next version.

        Options are `before`, `may_forget`, `steps`, `until` and `max_steps` of `MemoryModel.append`.
        """
        return self._write(f"{_path(ref)}/append", {"text": text, **options}, on_step)

    def ask(self, ref: str, query: str | Sequence[str]) -> Any:
        """Answer one query, or several, from a memory alone: an `Answer`, or a list of them."""
        if isinstance(query, str):
            return self.ask(ref, [query])[0]
        found = self._json("POST", f"{_path(ref)}/ask", json={"queries": list(query)})
        return [Answer(**answer) for answer in found["answers"]]

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints that are served."""
        found: list[str] = self._json("GET", "checkpoints")["checkpoints"]
        return found

    def checkpoint(self, name: str, seed: int = 0) -> dict[str, Any]:
        """What a checkpoint is for and how it writes, as plain data, with an `example` drawn by the seed."""
        found: dict[str, Any] = self._json("GET", f"checkpoints/{quote(name, safe='')}", params={"seed": seed})
        return found

    def list(self, **filters: Any) -> list[Entry]:
        """One page of memories, the newest first; `limit`, `after` and filters are those of `Store.list`."""
        if not isinstance(tags := filters.get("tags", ""), str):
            filters["tags"] = ",".join(tags)
        return [Entry.read(row) for row in self._json("GET", "memories", params=filters)["memories"]]

    def get(self, ref: str) -> Entry:
        """What the server says of a memory."""
        return Entry.read(self.inspect(ref)["memory"])

    def inspect(self, ref: str) -> dict[str, Any]:
        """All that is known of a memory, as plain data: `memory`, `versions`, and `receipts` with write receipts."""
        found: dict[str, Any] = self._json("GET", _path(ref))
        return found

    def change(self, ref: str, **changes: Any) -> Entry:
        """Give a memory another `name` (None for none) or other `tags`, or set whether it is `pinned`."""
        return Entry.read(self._json("PATCH", _path(ref), json=changes))

    def delete(self, ref: str) -> None:
        """Delete a memory with all its versions."""
        self._request("DELETE", _path(ref))

    def download(self, ref: str, version: int | None = None) -> bytes:
        """The bytes of a memory file; `Memory.from_bytes` reads them."""
        params = {} if version is None else {"version": version}
        return self._request("GET", f"{_path(ref)}/file", params=params).content

    def upload(self, data: bytes, *, name: str | None = None, tags: Sequence[str] = ()) -> Entry:
        """Keep the bytes of a memory file."""
        params = {"tags": ",".join(tags)} | ({} if name is None else {"name": name})
        return Entry.read(self._json("POST", "memories/files", content=data, params=params))

    def _write(self, path: str, wanted: dict[str, Any], on_step: OnLoss | None) -> Entry:
        with _told(), self._http.stream("POST", path, json={**wanted, "stream": True}) as answer:
            _check(answer)
            lines = [""]
            for line in answer.iter_lines():
                lines = [*lines[-1:], line]
                if not line.startswith("data: "):
                    continue
                data = json.loads(line.removeprefix("data: "))
                if lines[0] == "event: memory":
                    return Entry.read(data)
                if lines[0] == "event: error":
                    raise GradmemError(data["error"]["message"])
                if on_step and lines[0] == "event: step":
                    on_step(data["step"], data["of"], data["loss"])
        raise GradmemError("the server ended before the memory was written")

    def _json(self, method: str, path: str, **request: Any) -> Any:
        return self._request(method, path, **request).json()

    def _request(self, method: str, path: str, **request: Any) -> httpx2.Response:
        with _told():
            return _check(self._http.request(method, path, **request))


def _path(ref: str) -> str:
    return f"memories/{quote(ref, safe='')}"


def _check(answer: httpx2.Response) -> httpx2.Response:
    """Raise what the server refused with."""
    if answer.is_success:
        return answer
    try:
        message = json.loads(answer.read())["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = f"{answer.url} answered {answer.status_code}: is it a server of gradmem?"
    if answer.status_code == 429:
        raise Busy(message, float(answer.headers.get("Retry-After", 1)))
    raise (Missing if answer.status_code == 404 else GradmemError)(message)


@contextmanager
def _told() -> Iterator[None]:
    """Say in one line when the server cannot be reached."""
    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise GradmemError(f"cannot reach the server: {error}") from error
