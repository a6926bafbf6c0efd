"""OpenAI's official client at a server in a process of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from served import Server

from chat_models import save_model
from gradmem import Client
from gradmem.serving.api_keys import ApiKeys

RATE = 400
"""Requests in a minute, for each key and address."""
QUESTIONS = ("Who signed?", "What did Ann sign, and when?", "Where?", "Why was it signed?")


@dataclass
class Place:
    """A server of a language model with random weights, and its memory `notes`."""

    server: Server
    folder: Path
    model: str

    def client(self, kind: Any = openai.OpenAI, key: str = "none") -> Any:
        """A client that does not try again."""
        return kind(base_url=f"{self.server.url}/v1", api_key=key, max_retries=0, timeout=120)

    def asked(self, question: str = QUESTIONS[0], **more: Any) -> dict[str, Any]:
        """A request for an answer of 20 tokens."""
        messages = [{"role": "user", "content": question}]
        return {"model": self.model, "messages": messages, "max_completion_tokens": 20, **more}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server on loopback."""
    folder = tmp_path_factory.mktemp("openai")
    name = save_model(folder / "lm")
    server = Server(folder, name, "--rate", str(RATE))
    Client(server.url).write("Ann signed the report in May.", name, name="notes")
    yield Place(server, folder, f"{name}:notes")
    server.process.kill()
    server.process.wait()


def test_chat(place: Place) -> None:
    create = place.client().chat.completions.create
    reply = create(**place.asked(logprobs=True, top_logprobs=2, n=2))
    first, second = reply.choices
    assert first.message.content == second.message.content != ""
    assert (first.finish_reason, reply.usage.completion_tokens) == ("length", 40)
    assert (len(first.logprobs.content), len(first.logprobs.content[0].top_logprobs)) == (20, 2)
    assert first.gradmem["answer_tokens"] == 20
    stop = first.message.content[5:7]
    ended = create(**place.asked(stop=[stop])).choices[0]
    assert ended.finish_reason == "stop"
    assert ended.message.content == first.message.content.partition(stop)[0]
    drawn = [create(**place.asked(temperature=1, seed=seed)).choices[0].message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    again = [*place.asked()["messages"], first.message, {"role": "developer", "content": "Hum."}]
    parts = [{"type": "text", "text": "And "}, {"type": "text", "text": "when?"}]
    asked = place.asked(messages=[*again, {"role": "user", "content": parts}])
    assert create(**asked).usage.prompt_tokens > reply.usage.prompt_tokens


def test_chat_streams(place: Place) -> None:
    """By chunks, and by the client's own helper, which adds the chunks up."""
    client = place.client()
    whole = client.chat.completions.create(**place.asked(logprobs=True))
    asked = place.asked(stream_options={"include_usage": True})
    *chunks, last = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert (last.choices, last.usage) == ([], whole.usage)
    ended = place.asked(logprobs=True, stop=whole.choices[0].message.content[8:10])  # the helper wants whole answers
    whole = client.chat.completions.create(**ended)
    with client.chat.completions.stream(**ended) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert (final.choices[0].message.content, final.choices[0].message.role) == (
        whole.choices[0].message.content,
        "assistant",
    )
    assert final.choices[0].logprobs.content == whole.choices[0].logprobs.content
    assert final.choices[0].finish_reason == "stop"


def test_responses(place: Place) -> None:
    client = place.client()
    chat = client.chat.completions.create(**place.asked()).choices[0].message.content
    asked = {"model": place.model, "input": QUESTIONS[0], "max_output_tokens": 20}
    reply = client.responses.create(**asked, store=False)
    assert (reply.output_text, reply.status, reply.incomplete_details.reason) == (
        chat,
        "incomplete",
        "max_output_tokens",
    )
    assert (reply.usage.output_tokens, reply.usage.total_tokens) == (20, 20 + reply.usage.input_tokens)
    events = list(client.responses.create(**asked, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == chat
    assert events[-1].response.output_text == chat
    with client.responses.stream(**asked) as stream:
        found = list(stream)
    assert [event.snapshot for event in found if event.type == "response.output_text.delta"][-1] == chat
    more = [{"role": "user", "content": QUESTIONS[0]}, *reply.output, {"role": "user", "content": "When?"}]
    assert client.responses.create(**{**asked, "input": more}, instructions="Hum.").output_text


def test_errors_are_of_the_clients_classes(place: Place) -> None:
    client = place.client()
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError, match="tools") as bad:
        create(**place.asked(tools=[{"type": "function", "function": {"name": "f"}}]))
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "tools",
        "unsupported_parameter",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError, match="tempratur: no such field"):
        create(**place.asked(extra_body={"tempratur": 1}))
    with pytest.raises(openai.BadRequestError, match="the limit of"):
        create(**place.asked("word " * 2000))
    with pytest.raises(openai.BadRequestError, match="the limit of"):
        create(**place.asked("word " * 2000), stream=True)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model=place.model, input="x", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError, match="no such memory") as missing:
        create(**place.asked(model=f"{place.model}x"))
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError, match="no such memory"):
        client.models.retrieve(f"{place.model}x")
    assert client.models.retrieve(place.model).id == place.model
    with pytest.raises(openai.NotFoundError, match="not kept"):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.AuthenticationError):
        place.client(key="gm-wrong").models.list()
    flooding = place.client(key=ApiKeys(place.folder / "keys.json").add("flood"))
    refused = None
    for _ in range(RATE + 1):
        try:
            flooding.models.list()
        except openai.RateLimitError as error:
            refused = error
    assert "requests in a minute" in str(refused)


def test_clients_stream_at_the_same_time(place: Place) -> None:
    """Threads and coroutines; some leave in the middle, which changes nothing for the others."""
    client, wanted = place.client(), {}
    for question in QUESTIONS:
        wanted[question] = client.chat.completions.create(**place.asked(question)).choices[0].message.content

    def streamed(question: str) -> str:
        with client.chat.completions.create(**place.asked(question), stream=True) as stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    def leaves(question: str) -> str:
        long = place.asked(question) | {"max_completion_tokens": 800}
        with client.chat.completions.create(**long, stream=True) as stream:
            return str(next(iter(stream)).choices[0].delta.content)

    async def together() -> list[str]:
        async with place.client(openai.AsyncOpenAI) as own:

            async def chat(question: str) -> str:
                stream = await own.chat.completions.create(**place.asked(question), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            async def respond(question: str) -> str:
                asked = {"model": place.model, "input": question, "max_output_tokens": 20}
                async with own.responses.stream(**asked) as stream:
                    return "".join([one.delta async for one in stream if one.type == "response.output_text.delta"])

            return await asyncio.gather(*map(chat, QUESTIONS), *map(respond, QUESTIONS))

    with ThreadPoolExecutor(12) as pool:
        left = [pool.submit(leaves, question) for question in QUESTIONS]
        kept = [pool.submit(streamed, question) for question in QUESTIONS]
        assert asyncio.run(together()) == [*wanted.values()] * 2
        assert [one.result() for one in kept] == list(wanted.values())
        assert all(text.result() for text in left)
    until = time.monotonic() + 60
    while place.server.metric("gradmem_requests_active") > 1 and time.monotonic() < until:
        time.sleep(0.1)
    assert place.server.metric("gradmem_requests_active") == 1  # the one that asks
    assert client.chat.completions.create(**place.asked()).choices[0].message.content == wanted[QUESTIONS[0]]
    assert "Traceback" not in place.server.log.read_text()


def test_a_server_that_dies_is_an_error(place: Place) -> None:
    """The last test: a stream never just ends."""
    stream = place.client().chat.completions.create(**place.asked() | {"max_completion_tokens": 800}, stream=True)
    next(iter(stream))
    place.server.process.kill()
    with pytest.raises(openai.APIConnectionError):
        list(stream)
