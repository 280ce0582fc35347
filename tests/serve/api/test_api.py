"""OpenAI's own client is answered as the library answers; what is wrong is one line; nobody is left without a word."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import openai
import pytest
from tests.support.api_server import PATIENCE, Served, serving, wait_until
from tests.support.plans import random_plan
from tests.support.tiny import tiny_subject

from obliteratus.core.chat import Turn
from obliteratus.core.errors import UserError
from obliteratus.core.types import Plan, Subject
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.generate import generate
from obliteratus.inference.stream import AnswerLimits
from obliteratus.serve.api.app import MAX_BODY
from obliteratus.serve.api.requests import Defaults
from obliteratus.serve.api.server import Settings, check_key, check_names
from obliteratus.serve.dial import Dial
from obliteratus.serve.worker import ServerLimits

BASE = "tiny:llama"
ASKED: list[Any] = [{"role": "user", "content": "What is a comet?"}]
TURNS = (Turn("user", "What is a comet?"),)
TOKENS = 8
LONG = 150
KEY = "a-key-of-enough-characters"


def endless() -> Subject:
    """A model whose answers have no end."""
    subject = tiny_subject("llama")
    subject.model.generation_config.eos_token_id = None
    subject.tokenizer.eos_token = None
    return subject


@pytest.fixture(scope="module")
def subject() -> Subject:
    return endless()


@pytest.fixture(scope="module")
def plans(subject: Subject) -> dict[str, Plan]:
    return {"lean": random_plan(subject, strength=1.5), "other": random_plan(subject, norm="columns", seed=5)}


@pytest.fixture(scope="module")
def served(subject: Subject, plans: dict[str, Plan]) -> Iterator[Served]:
    with serving(subject, plans) as one:
        yield one


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return served.client()


def ask(client: openai.OpenAI, model: str = "lean", strength: float | None = None, **options: Any) -> Any:
    extra = {} if strength is None else {"strength": strength}
    options = {"messages": ASKED, "max_tokens": TOKENS, **options}
    return client.chat.completions.create(model=model, extra_body=extra, **options)


def expected(subject: Subject, plan: Plan, strength: float, tokens: int = TOKENS) -> str:
    return "".join(Dial(subject, plan).stream(TURNS, strength, AnswerLimits(tokens)))


# ------------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize(
    ("model", "strength"), [(BASE, None), ("lean", None), ("lean", 0.5), ("lean", -1.0), ("lean", 0.0), ("other", 2.0)]
)
def test_answers_are_those_of_the_plan_at_the_strength(
    client: openai.OpenAI, subject: Subject, plans: dict[str, Plan], model: str, strength: float | None
) -> None:
    found = ask(client, model, strength)
    plan, at = (Plan(), 0.0) if model == BASE else (plans[model], 1.0 if strength is None else strength)
    assert found.choices[0].message.content == expected(subject, plan, at)
    assert (found.choices[0].finish_reason, found.model, found.strength) == ("length", model, at)
    assert found.usage.completion_tokens == TOKENS
    assert found.usage.prompt_tokens == found.usage.total_tokens - TOKENS > 0


def test_plans_and_strengths_make_a_difference(client: openai.OpenAI) -> None:
    asked = [(BASE, None), ("lean", None), ("lean", 0.5), ("other", None)]
    answers = {ask(client, model, s, max_tokens=30).choices[0].message.content for model, s in asked}
    assert len(answers) == len(asked)
    assert ask(client, "lean", 0).choices[0].message.content == ask(client, BASE).choices[0].message.content


def test_pieces_of_a_stream_add_up_to_the_answer(client: openai.OpenAI) -> None:
    whole = ask(client, max_tokens=40)
    chunks = list(ask(client, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == whole.choices[0].message.content
    assert len(pieces) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_frees_its_row(client: openai.OpenAI, served: Served, stream: bool) -> None:
    whole, before = ask(client, max_tokens=60).choices[0].message.content, served.worker.counts["canceled"]
    stop = whole[9:12]
    found = ask(client, max_tokens=LONG, stop=[stop, "never to be seen"], stream=stream)
    if stream:
        chunks = list(found)
        text, finish = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, finish = found.choices[0].message.content, found.choices[0].finish_reason
    assert (text, finish) == (whole.partition(stop)[0], "stop")
    wait_until(lambda: not served.worker.running)
    assert served.worker.counts["canceled"] == before  # nobody is gone


def test_a_text_is_continued_without_the_template(client: openai.OpenAI, subject: Subject) -> None:
    ids = subject.tokenizer("The sky is")["input_ids"]
    found = client.completions.create(model=BASE, prompt="The sky is", max_tokens=TOKENS)
    assert found.choices[0].text == AnswerDecoder.create(subject).decode(generate(subject, [ids], TOKENS)[0])
    pieces = client.completions.create(model=BASE, prompt=["The sky is"], max_tokens=TOKENS, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == found.choices[0].text


def test_draws_follow_the_seed(client: openai.OpenAI) -> None:
    drawn = [ask(client, temperature=1.5, max_tokens=30, **seed) for seed in ({"seed": 1}, {"seed": 1}, {}, {})]
    texts = [one.choices[0].message.content for one in drawn]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3  # without a seed each answer is drawn anew


def test_turns_may_come_in_parts_and_with_nothing_in_their_other_fields(client: openai.OpenAI) -> None:
    first = ask(client).choices[0].message.model_dump()  # refusal, audio and others are null
    parts = [{"type": "text", "text": "And "}, {"type": "text", "text": "why?"}]
    system = {"role": "developer", "content": "Be short."}
    found = ask(client, messages=[system, *ASKED, first, {"role": "user", "content": parts}])
    plain = ask(client, messages=[{**system, "role": "system"}, *ASKED, first, {"role": "user", "content": "And why?"}])
    assert found.choices[0].message.content == plain.choices[0].message.content
    assert found.usage.prompt_tokens == plain.usage.prompt_tokens


def test_models_are_listed(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert [(model.id, model.plan) for model in listed] == [(BASE, False), ("lean", True), ("other", True)]
    assert client.models.retrieve("lean").parent == BASE


def test_defaults_hold_for_requests_that_do_not_say(subject: Subject, plans: dict[str, Plan]) -> None:
    defaults = Defaults(AnswerLimits(5, temperature=2.0), strength=0.0)
    with serving(subject, plans, defaults=defaults) as served:
        found = [ask(served.client(), max_tokens=openai.omit) for _ in range(3)]
    assert {one.usage.completion_tokens for one in found} == {5}
    assert {one.strength for one in found} == {0.0}
    assert len({one.choices[0].message.content for one in found}) > 1


# ------------------------------------------------------------------------------------------ wrong requests
WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "leen"}, 404, "model 'leen' does not exist; did you mean 'lean'?"),
    ({"model": BASE, "strength": 0.5}, 400, "strength 0.5: tiny:llama is the unedited model; name a plan"),
    ({"strength": 3}, 400, "strength 3: give a number from -1 to 2"),
    ({"strength": "high"}, 400, "strength: input should be a valid number"),
    ({"messages": []}, 400, "messages: list should have at least 1 item"),
    ({"messages": [{"role": "user", "content": "word " * 100}]}, 400, "and the model's context is 256 tokens"),
    ({"max_tokens": 500}, 400, "tokens and asks for 500 more, and the model's context is 256 tokens"),
    ({"max_tokens": 0}, 400, "max_tokens: input should be greater than or equal to 1"),
    ({"temperature": -1}, 400, "temperature: input should be greater than or equal to 0"),
    ({"top_p": 0}, 400, "top_p: input should be greater than 0"),
    ({"stop": [""]}, 400, "stop: give at most 4 texts, none of them empty"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options: they need stream: true"),
    ({"n": 2}, 400, "n: this server does not support it; leave it out, or give 1"),
    ({"n": True}, 400, "n: this server does not support it"),
    ({"tools": [{"type": "function"}]}, 400, "tools: this server does not support it"),
    ({"logprobs": True}, 400, "logprobs: this server does not support it"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format: this server does not support it"),
    ({"strenght": 0.5}, 400, "strenght: this server does not support it; leave it out"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0: role 'tool' does not exist"),
    ({"messages": [{"role": "user", "content": ""}]}, 400, "messages.0.content: the turn is empty"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content: input should be a valid string"),
    ({"messages": [{"role": "user", "name": "Ada", "content": "x"}]}, 400, "messages.0.name: this server does not"),
    ({"messages": [*ASKED, {"role": "assistant", "content": "x"}]}, 400, "the last turn must be the user's"),
    ({"messages": [*ASKED, {"role": "system", "content": "x"}, *ASKED]}, 400, "at most one system turn"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages.0.content: only parts of type text are supported",
    ),
]


@pytest.mark.parametrize(("change", "status", "said"), WRONG, ids=[said[:40] for _, _, said in WRONG])
def test_what_is_wrong_is_one_line_and_runs_nothing(
    served: Served, client: openai.OpenAI, change: dict[str, Any], status: int, said: str
) -> None:
    before = dict(served.worker.counts)
    body = {"model": "lean", "messages": ASKED, "max_tokens": TOKENS, **change}
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert caught.value.status_code == status
    error: Any = caught.value.body
    assert said in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert served.worker.counts == before


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "said"),
    [
        ("POST", "/v1/chat/completions", b"{", {}, 400, "the request's body cannot be read: invalid JSON"),
        ("POST", "/v1/chat/completions", b"[" * 100_000, {}, 400, "the request's body cannot be read"),
        ("POST", "/v1/chat/completions", b"\xff\xfe", {}, 400, "the request's body cannot be read"),
        ("POST", "/v1/chat/completions", b"{}", {"content-type": "text/plain"}, 415, "send content-type: application/"),
        ("POST", "/v1/chat/completions", b" " * (MAX_BODY + 1), {}, 413, "the request is larger than 8 MB"),
        ("POST", "/v1/completions", b'{"model": "lean", "prompt": ["a", "b"]}', {}, 400, "give one text, and not 2"),
        ("POST", "/v1/completions", b'{"model": "lean", "prompt": "a", "echo": true}', {}, 400, "echo: this server"),
        ("POST", "/v1/embeddings", b"{}", {}, 404, "POST /v1/embeddings: not here; this server has /v1/chat"),
        ("GET", "/v1/models/leen", b"", {}, 404, "model 'leen' does not exist"),
        ("GET", "/v1/chat/completions", b"", {}, 405, "GET /v1/chat/completions: this path takes another method"),
        ("GET", "/health", b"", {"host": "evil.example"}, 403, "call this server as localhost or 127.0.0.1"),
    ],
)
def test_what_is_no_request_is_one_line_too(
    served: Served, method: str, path: str, body: bytes, headers: dict[str, str], status: int, said: str
) -> None:
    connection = HTTPConnection(served.url.removeprefix("http://"), timeout=PATIENCE)
    connection.request(method, path, body, {"content-type": "application/json", **headers})
    answer = connection.getresponse()
    error = json.loads(answer.read())["error"]
    connection.close()
    assert answer.status == status
    assert said in error["message"]
    assert "\n" not in error["message"]


def test_a_key_is_asked_for(subject: Subject) -> None:
    with serving(subject, {}, key=KEY) as served:
        assert ask(served.client(api_key=KEY), BASE).choices[0].message.content
        for wrong in ("none", KEY[:-1]):
            with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                ask(served.client(api_key=wrong), BASE)


@pytest.mark.parametrize(
    ("host", "key", "said"),
    [
        ("0.0.0.0", "", "--host 0.0.0.0: others can reach this address; give --api-key"),
        ("127.0.0.1", "short", "--api-key: give at least 16 ASCII characters"),
        ("127.0.0.1", "with a space in its middle", "--api-key: give at least 16"),
    ],
)
def test_a_key_that_could_be_guessed_is_refused(host: str, key: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_key(host, key)
    check_key("127.0.0.1", "")
    check_key("0.0.0.0", KEY)


@pytest.mark.parametrize("grace", [-1.0, math.inf])
def test_a_grace_that_cannot_be_is_refused(grace: float) -> None:
    with pytest.raises(UserError, match="--grace"):
        Settings(grace=grace)


def test_a_plan_of_the_models_name_is_refused(subject: Subject) -> None:
    with pytest.raises(UserError, match="give the plan another, as NAME=FOLDER"):
        check_names(subject, {BASE: Plan()})


# ------------------------------------------------------------------------------------- many, gone, and the end
def test_fifty_requests_at_once_are_all_answered_right(
    served: Served, client: openai.OpenAI, subject: Subject, plans: dict[str, Plan]
) -> None:
    settings = [("lean", 1.0), ("lean", 0.5), ("other", 1.0), (BASE, 0.0), ("other", -1.0)]
    alone = {pair: expected(subject, plans.get(pair[0], Plan()), pair[1]) for pair in settings}
    with ThreadPoolExecutor(50) as pool:
        asked = [(pair, pool.submit(ask, client, *pair)) for pair in settings * 10]
        wrong = [pair for pair, one in asked if one.result().choices[0].message.content != alone[pair]]
    assert wrong == []
    assert served.worker.summarize()["running"] == served.worker.summarize()["waiting"] == 0


def test_beyond_the_queue_clients_are_told_at_once(subject: Subject, plans: dict[str, Plan]) -> None:
    with serving(subject, plans, limits=ServerLimits(rows=1, queue=1)) as served:
        client = served.client()
        with ThreadPoolExecutor(2) as pool:
            taken = [pool.submit(ask, client, max_tokens=LONG) for _ in range(2)]
            wait_until(lambda: served.worker.waiting and served.worker.running)
            with pytest.raises(
                openai.RateLimitError, match="the queue is full: this server takes on 1 answers"
            ) as full:
                ask(client)
            assert full.value.response.headers["retry-after"] == "1"
            assert {one.result().usage.completion_tokens for one in taken} == {LONG}
        assert served.worker.counts == {"length": 2, "refused": 1}


def test_clients_that_hang_up_free_their_rows_and_places(subject: Subject, plans: dict[str, Plan]) -> None:
    """One in the middle of a stream, one before its first token, and one in the queue."""

    async def hang_up(served: Served) -> None:
        client = served.async_client()
        stream = await client.chat.completions.create(model="lean", messages=ASKED, max_tokens=LONG, stream=True)
        await anext(aiter(stream))
        whole = asyncio.create_task(client.chat.completions.create(model="lean", messages=ASKED, max_tokens=LONG))
        while len(served.worker.running) < 2:
            await asyncio.sleep(0.01)
        waits = asyncio.create_task(
            client.chat.completions.create(model="lean", messages=ASKED, max_tokens=LONG, stream=True)
        )
        while not served.worker.waiting:
            await asyncio.sleep(0.01)
        await stream.close()
        whole.cancel()
        waits.cancel()
        await client.close()

    with serving(subject, plans, limits=ServerLimits(rows=2, queue=4)) as served:
        asyncio.run(hang_up(served))
        wait_until(lambda: not (served.worker.running or served.worker.waiting))
        assert served.worker.batch.cache is None
        assert ask(served.client()).choices[0].message.content == expected(subject, plans["lean"], 1.0)
        assert served.worker.counts["canceled"] == 3


def test_a_late_answer_is_an_error_that_is_not_asked_again(subject: Subject) -> None:
    with serving(subject, {}, limits=ServerLimits(seconds=0.02)) as served:
        client = served.client(max_retries=2)
        with pytest.raises(openai.InternalServerError, match=r"not complete after 0.02 seconds") as late:
            ask(client, BASE, max_tokens=LONG)
        assert (late.value.status_code, late.value.code) == (504, "time_limit")
        with pytest.raises(openai.APIError, match="not complete after"):
            list(ask(client, BASE, max_tokens=LONG, stream=True))
        assert served.worker.counts == {"late": 2}


@pytest.mark.parametrize("grace", [0.0, float(PATIENCE)])
def test_at_the_end_running_answers_are_completed_or_told(subject: Subject, grace: float) -> None:
    with serving(subject, {}, limits=ServerLimits(rows=1), grace=grace) as served:
        client = served.client()
        stream = iter(ask(client, BASE, max_tokens=LONG, stream=True))
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(ask, client, BASE)
            wait_until(lambda: bool(served.worker.waiting))
            served.server.stop()
            with pytest.raises(openai.APIError, match="the server is stopping"):
                waits.result()
        if grace:
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        else:
            with pytest.raises(openai.APIError, match="the server is stopping"):
                list(stream)
    assert served.worker.counts == {"stopping": 1, "length": 1} if grace else {"stopping": 2}
    with pytest.raises(openai.APIConnectionError):
        ask(client, BASE)


def test_nothing_is_left_of_a_server(subject: Subject) -> None:
    before = set(threading.enumerate())
    with serving(subject, {}) as served, socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))):
        ask(served.client(), BASE)  # beside a connection on which nothing is asked
    assert {thread for thread in threading.enumerate() if thread.is_alive()} <= before
    assert not any(module._forward_hooks for module in subject.model.modules())
