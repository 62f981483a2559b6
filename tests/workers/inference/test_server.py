"""The routes of a real process, through the stock `openai` client where it has the call."""

import json

import httpx
import openai
import pytest

from tests.servers import wait_until
from tests.workers.inference.server import started_request

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"messages": MESSAGES, "temperature": 0, "max_tokens": 24}


def sse(server, path, body):
    """Return the `data:` payloads of a stream, the last one as it is."""
    with server.http.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def test_chat(server):
    answer = server.openai.chat.completions.create(model="llama", **GREEDY)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "llama"
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 1 <= usage.completion_tokens <= 24


@pytest.mark.parametrize("model", ["llama", "mistral", "qwen2", "full", "endless"])
def test_streamed_pieces_join_to_the_whole_answer(server, model):
    whole = server.openai.chat.completions.create(model=model, **GREEDY)
    stream = server.openai.chat.completions.create(
        model=model, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_the_chunks_are_openais(server):
    options = {"stream_options": {"include_usage": True}}
    *payloads, last = sse(server, "/v1/chat/completions", GREEDY | {"model": "endless"} | options)
    chunks = [json.loads(payload) for payload in payloads]
    assert last == "[DONE]"
    assert {(chunk["object"], chunk["model"]) for chunk in chunks} == {("chat.completion.chunk", "endless")}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in chunks[1:-2])
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-2])
    assert chunks[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 24


def test_usage_is_streamed_only_when_asked_for(server):
    *payloads, _ = sse(server, "/v1/chat/completions", GREEDY | {"model": "llama"})
    chunks = [json.loads(payload) for payload in payloads]
    assert not any("usage" in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"]


def test_completions_and_their_stream(server):
    values = {"model": "bare", "prompt": "The quick brown", "temperature": 0, "max_tokens": 12}
    whole = server.openai.completions.create(**values)
    assert whole.object == "text_completion"
    chunks = list(server.openai.completions.create(stream=True, **values))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert {chunk.object for chunk in chunks} == {"text_completion"}


def test_a_prompt_of_token_ids(server):
    answer = server.openai.completions.create(model="bare", prompt=[5, 6, 7], max_tokens=3)
    assert answer.usage.prompt_tokens == 3


def test_seeds_reproduce(server):
    def ask(seed):
        answer = server.openai.chat.completions.create(model="llama", messages=MESSAGES, seed=seed, max_tokens=24)
        return answer.choices[0].message.content

    assert ask(5) == ask(5)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_stop_strings_in_both_forms(server):
    whole = server.openai.chat.completions.create(model="endless", **GREEDY).choices[0].message.content
    stop = whole[4:9]
    cut = server.openai.chat.completions.create(model="endless", stop=stop, **GREEDY).choices[0]
    stream = server.openai.chat.completions.create(model="endless", stop=[stop], stream=True, **GREEDY)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert cut.message.content == text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("path", "change", "status", "code", "param"),
    [
        ("chat/completions", {"model": "nobody"}, 404, "model_not_found", "model"),
        ("chat/completions", {"model": "bare"}, 400, "chat_template_missing", "model"),
        ("chat/completions", {"temperature": 9}, 400, "invalid_value", "temperature"),
        ("chat/completions", {"messages": []}, 400, "invalid_value", "messages"),
        ("chat/completions", {"messages": [{"role": "pope", "content": ""}]}, 400, "invalid_value", "messages.0.role"),
        ("chat/completions", {"logit_bias": {}}, 400, "unknown_field", "logit_bias"),
        ("chat/completions", {"max_tokens": 9999}, 400, "context_length_exceeded", "max_tokens"),
        ("chat/completions", {"stop": ""}, 400, "invalid_stop", "stop"),
        ("chat/completions", {"n": 9}, 400, "invalid_value", "n"),
        ("completions", {"messages": None, "prompt": [9999]}, 400, "invalid_token", "prompt.0"),
        ("nothing", {}, 404, "not_found", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_four_keys_before_the_first_byte(server, path, change, status, code, param, stream):
    body = {"model": "llama"} | GREEDY | {"stream": stream} | change
    body = {key: value for key, value in body.items() if value is not None}
    response = server.http.post(f"/v1/{path}", json=body)
    error = response.json()["error"]
    assert response.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        b'{"model": "llama", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "\\u0000", "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "llama", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "llama", "messages": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    ],
)
def test_no_body_makes_the_server_fail(server, body):
    response = server.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 404)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_an_image_is_refused_with_its_place(server):
    parts = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.chat.completions.create(model="llama", messages=[{"role": "user", "content": parts}])
    assert (caught.value.code, caught.value.param) == ("images_not_supported", "messages.0.content.1")


def test_a_model_that_is_not_ready(server, tiny_folders):
    server.register("coming", tiny_folders["llama"], status="downloading")
    with pytest.raises(openai.ConflictError) as caught:
        server.openai.chat.completions.create(model="coming", **GREEDY)
    assert caught.value.code == "model_not_ready"


@pytest.mark.parametrize("asked", ["doomed", "llama"])
def test_a_deleted_model_is_refused_and_unloaded_by_the_next_request(server, tiny_folders, asked):
    server.register("doomed", tiny_folders["llama"])
    server.openai.chat.completions.create(model="doomed", **GREEDY)
    assert "doomed" in server.loaded()
    server.unregister("doomed")
    response = server.http.post("/v1/chat/completions", json={"model": asked} | GREEDY)
    assert response.status_code == (404 if asked == "doomed" else 200)
    assert "doomed" not in server.loaded()


def test_what_is_loaded_and_why_so(server):
    server.openai.chat.completions.create(model="llama", **GREEDY)
    entry = server.loaded()["llama"]
    assert entry["bytes"] > 0
    assert entry["dtype"] == "float32"
    assert entry["dtype_reason"]
    assert entry["last_used_at"] > 0
    assert entry["users"] == 0


def test_metrics_count_what_was_read_and_written(server):
    before = {
        name: server.metric(f"vllm:{name}_tokens_total", model_name="mistral") for name in ("prompt", "generation")
    }
    usage = server.openai.chat.completions.create(model="mistral", **GREEDY).usage
    wait_until(lambda: server.metric("vllm:num_requests_running", model_name="mistral") == 0, what="end of request")
    assert server.metric("vllm:prompt_tokens_total", model_name="mistral") == before["prompt"] + usage.prompt_tokens
    written = server.metric("vllm:generation_tokens_total", model_name="mistral")
    assert written == before["generation"] + usage.completion_tokens
    for name in ("time_to_first_token", "e2e_request_latency"):
        assert server.metric(f"vllm:{name}_seconds_count", model_name="mistral") >= 1
    assert server.metric("vllm:request_success_total", model_name="mistral") >= 1
    assert server.metric("modepress_models_loaded") >= 1


def endless(server):
    """A request that would run for very long."""
    body = {"model": "endless", "messages": MESSAGES, "temperature": 0, "max_tokens": 500_000, "stream": True}
    return server.http.stream("POST", "/v1/chat/completions", json=body)


def queue(server):
    return server.http.get("/loaded").json()["queue"]


def test_a_client_that_goes_away_ends_its_generation(server):
    aborted = server.metric("vllm:request_success_total", model_name="endless", finished_reason="abort")
    with endless(server) as response:
        lines = response.iter_lines()
        for _ in range(5):
            next(lines)
        assert server.metric("vllm:num_requests_running", model_name="endless") == 1
    wait_until(lambda: server.metric("vllm:num_requests_running", model_name="endless") == 0, what="end of generation")
    now = server.metric("vllm:request_success_total", model_name="endless", finished_reason="abort")
    assert now == aborted + 1
    assert queue(server)["running"] == 0


def test_a_client_that_goes_away_without_streaming_ends_its_generation(server):
    body = {"model": "endless", "messages": MESSAGES, "temperature": 0, "max_tokens": 500_000}
    before = server.metric("vllm:generation_tokens_total", model_name="endless")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=1.0)
    wait_until(lambda: queue(server)["running"] == 0, what="end of generation")
    assert server.metric("vllm:generation_tokens_total", model_name="endless") > before


def test_a_full_line_is_429_with_a_time_and_a_waiting_client_may_leave(server):
    body = {"model": "llama", **GREEDY}
    with endless(server) as running:
        lines = running.iter_lines()
        next(lines)
        with started_request(server, body):
            wait_until(lambda: queue(server)["waiting"] == 1, what="a waiting request")
            assert server.metric("vllm:num_requests_waiting", model_name="llama") == 1
            refused = server.http.post("/v1/chat/completions", json=body)
            assert server.http.get("/healthz").json() == {"status": "ok"}
        wait_until(lambda: queue(server)["waiting"] == 0, what="the line to empty")
        assert queue(server)["running"] == 1
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) >= 1
    wait_until(lambda: queue(server)["running"] == 0, what="end of generation")
    assert server.openai.chat.completions.create(model="llama", **GREEDY).choices
