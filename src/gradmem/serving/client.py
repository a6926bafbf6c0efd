"""A client of `gradmem serve`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx2

from ..errors import GradmemError, Missing
from ..model import Answer
from ..store.entries import Entry
from .errors import Busy

OnLoss = Callable[[int, int, float | None], object]


class Client:
    """Access to the memories of a server, by id or name.

    Every method raises `GradmemError` with the message of the server: `Missing` if there is no such memory, and `Busy`
    if the server asks to try again later.

    Parameters
    ----------
    url : str
        Address of the server, as `gradmem serve` prints it.
    key : str, optional
        API key. Not needed for a server on this machine.
    timeout : float
        Seconds to wait for a response, or for the next part of one.

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
        """Close the connections to the server."""
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

        The options are `before`, `may_forget`, `steps`, `until` and `max_steps` of `MemoryModel.append`.
        """
        return self._write(f"{_path(ref)}/append", {"text": text, **options}, on_step)

    def ask(self, ref: str, query: str | Sequence[str]) -> Any:
        """Answer one query with an `Answer`, or several with a list of them."""
        if isinstance(query, str):
            return self.ask(ref, [query])[0]
        found = self._json("POST", f"{_path(ref)}/ask", json={"queries": list(query)})
        return [Answer(**answer) for answer in found["answers"]]

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints that the server offers."""
        found: list[str] = self._json("GET", "checkpoints")["checkpoints"]
        return found

    def checkpoint(self, name: str, seed: int = 0) -> dict[str, Any]:
        """Describe a checkpoint, with an `example` of its task that is drawn with the seed."""
        found: dict[str, Any] = self._json("GET", f"checkpoints/{quote(name, safe='')}", params={"seed": seed})
        return found

    def list(self, **filters: Any) -> list[Entry]:
        """List memories in the order of `Store.list`. `limit`, `after` and the filters are those of `Store.list`."""
        if not isinstance(tags := filters.get("tags", ""), str):
            filters["tags"] = ",".join(tags)
        return [Entry.read(row) for row in self._json("GET", "memories", params=filters)["memories"]]

    def get(self, ref: str) -> Entry:
        """Return the entry of a memory."""
        return Entry.read(self.inspect(ref)["memory"])

    def inspect(self, ref: str) -> dict[str, Any]:
        """Return a dictionary with the `memory`, its `versions`, and the write `receipts` of its rows."""
        found: dict[str, Any] = self._json("GET", _path(ref))
        return found

    def change(self, ref: str, **changes: Any) -> Entry:
        """Change the `name` of a memory (None removes it), its `tags`, or whether it is `pinned`."""
        return Entry.read(self._json("PATCH", _path(ref), json=changes))

    def delete(self, ref: str) -> None:
        """Delete a memory with all its versions."""
        self._request("DELETE", _path(ref))

    def download(self, ref: str, version: int | None = None) -> bytes:
        """Return the bytes of a memory file. `Memory.from_bytes` reads them."""
        params = {} if version is None else {"version": version}
        return self._request("GET", f"{_path(ref)}/file", params=params).content

    def upload(self, data: bytes, *, name: str | None = None, tags: Sequence[str] = ()) -> Entry:
        """Store the bytes of a memory file."""
        params = {"tags": ",".join(tags)} | ({} if name is None else {"name": name})
        return Entry.read(self._json("POST", "memories/files", content=data, params=params))

    def _write(self, path: str, body: dict[str, Any], on_step: OnLoss | None) -> Entry:
        with _translate_errors(), self._http.stream("POST", path, json={**body, "stream": True}) as response:
            _check(response)
            for event, data in _events(response):
                if event == "memory":
                    return Entry.read(data)
                if event == "error":
                    raise GradmemError(data["error"]["message"])
                if on_step and event == "step":
                    on_step(data["step"], data["of"], data["loss"])
        raise GradmemError("the server stopped before the memory was written")

    def _json(self, method: str, path: str, **request: Any) -> Any:
        return self._request(method, path, **request).json()

    def _request(self, method: str, path: str, **request: Any) -> httpx2.Response:
        with _translate_errors():
            return _check(self._http.request(method, path, **request))


def _path(ref: str) -> str:
    return f"memories/{quote(ref, safe='')}"


def _events(response: httpx2.Response) -> Iterator[tuple[str, Any]]:
    """Yield name and data of each server-sent event."""
    name = ""
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)
            name = ""


def _check(answer: httpx2.Response) -> httpx2.Response:
    """Raise the error of an unsuccessful response."""
    if answer.is_success:
        return answer
    try:
        message = json.loads(answer.read())["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = f"{answer.url} answered {answer.status_code}: is this a gradmem server?"
    if answer.status_code == 429:
        raise Busy(message, float(answer.headers.get("Retry-After", 1)))
    raise (Missing if answer.status_code == 404 else GradmemError)(message)


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Raise `GradmemError` if the server cannot be reached."""
    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise GradmemError(f"cannot reach the server: {error}") from error
