"""`/v1/responses`."""

from __future__ import annotations

from typing import Any

import pytest
from tests.serving.requesting import events, refused
from tests.serving.routes.conftest import Plain

from documents import ROOT
from gradmem.serving.engine import Engine
from gradmem.serving.openai_responses import ResponseRequest

QUESTION = "Who signed?"
EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.incomplete",
]


def test_a_response_is_the_answer_of_chat(plain: Plain) -> None:
    """Text or messages, with instructions as the message of the system."""
    chat = {"max_tokens": 9, "logit_bias": None}
    for given, messages in (
        ({"input": QUESTION}, [{"role": "user", "content": QUESTION}]),
        (
            {
                "input": [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}],
                "instructions": "Hum.",
            },
            [{"role": "system", "content": "Hum."}, {"role": "user", "content": QUESTION}],
        ),
    ):
        wanted = plain.chat(**chat, messages=messages).json()
        found = plain.post("responses", **given, max_output_tokens=9, metadata={"a": "b"}).json()
        (message,) = found["output"]
        (text,) = message["content"]
        assert text["text"] == wanted["choices"][0]["message"]["content"] != ""
        assert message["gradmem"] == pytest.approx(
            wanted["choices"][0]["gradmem"] | {"written": None, "abstained": None}
        )
        usage = [found["usage"][name] for name in ("input_tokens", "output_tokens", "total_tokens")]
        assert usage == [wanted["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
        assert (found["object"], found["status"], found["metadata"]) == ("response", "incomplete", {"a": "b"})
        assert found["incomplete_details"] == {"reason": "max_output_tokens"}
        assert (found["store"], found["previous_response_id"], found["error"]) == (False, None, None)
    again = [{"role": "user", "content": QUESTION}, message, {"role": "user", "content": "When?"}]
    assert plain.post("responses", input=again, max_output_tokens=2).status_code == 200


def test_events_of_a_stream_add_up_to_the_response(plain: Plain) -> None:
    asked = {"input": QUESTION, "max_output_tokens": 9, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = plain.post("responses", **asked).json()
    (text,) = whole["output"][0]["content"]
    assert len(text["logprobs"]) == whole["usage"]["output_tokens"] == 9
    assert all(len(one["top_logprobs"]) == 2 for one in text["logprobs"])
    found = events(plain.post("responses", **asked, stream=True).text)
    assert list(dict.fromkeys(name for name, _ in found)) == EVENTS
    assert [data["sequence_number"] for _, data in found] == list(range(len(found)))
    assert all(name == data["type"] for name, data in found)
    deltas = [data for name, data in found if name == "response.output_text.delta"]
    assert "".join(data["delta"] for data in deltas) == text["text"]
    assert [one for data in deltas for one in data["logprobs"]] == text["logprobs"]
    last = found[-1][1]["response"]
    assert last["output"][0]["content"] == [text]
    assert last["usage"] == whole["usage"]
    assert {data["item_id"] for data in deltas} == {last["output"][0]["id"]}
    assert found[0][1]["response"] | {"status": 0} == last | {
        "status": 0, "output": [], "usage": None, "incomplete_details": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}}, "text.format.type"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"truncation": "auto"}, "truncation"),
        ({"seed": 1}, "seed"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_obeyed_is_refused_by_name(plain: Plain, fields: dict[str, Any], param: str) -> None:
    answer = plain.post("responses", **{"input": QUESTION, **fields})
    refused(answer, 400, "")
    assert answer.json()["error"]["param"] == param


def test_every_field_of_openais_client_is_known() -> None:
    params = pytest.importorskip("openai.types.responses.response_create_params")
    theirs = set(params.ResponseCreateParamsStreaming.__annotations__)
    theirs |= set(params.ResponseCreateParamsBase.__annotations__)
    assert theirs - set(ResponseRequest.model_fields) == set()
    page = (ROOT / "docs" / "howto" / "openai.md").read_text(encoding="utf-8").partition("## Responses")[2]
    assert not [name for name in ResponseRequest.model_fields if name != "memory_id" and f"`{name}" not in page]


def test_responses_are_not_kept(plain: Plain) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        refused(plain.client.request(method, f"/v1/responses/resp_1{path}"), 404, "responses are not kept here")


def test_a_stream_that_fails_says_so_and_ends(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with a request has its own status; what goes wrong later is the last event."""
    refused(plain.post("responses", input=" ", stream=True), 400, "the query is empty")
    ask = Engine.ask

    def broken(*given: Any, on_text: Any, **options: Any) -> Any:
        def tell(text: str) -> None:
            on_text(text)
            if len(text) > 2:
                raise TimeoutError

        return ask(*given, on_text=tell, **options)

    monkeypatch.setattr(Engine, "ask", broken)
    found = events(plain.post("responses", input=QUESTION, stream=True).text)
    assert [name for name, _ in found][-1] == "response.failed"
    response = found[-1][1]["response"]
    assert (response["status"], response["error"]["code"], response["output"]) == ("failed", "server_error", [])
    assert "longer than the server's timeout" in response["error"]["message"]
    name, data = events(plain.chat(stream=True).text)[-1]
    assert (name, data["error"]["type"], data["error"]["param"]) == ("error", "server_error", None)
