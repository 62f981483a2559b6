"""Limits and the end of a process: least recently used models go, SIGTERM ends streams with an error they can read."""

import json
import signal

import openai
import pytest
from safetensors.torch import load_file, save_file

from tests.servers import wait_until
from tests.workers.inference.server import InferenceServer, started_request
from tests.workers.inference.test_server import GREEDY, MESSAGES


def test_models_are_unloaded_under_a_small_limit_and_too_large_ones_refused(tiny_folders, tiny_loaded, tmp_path):
    one = tiny_loaded["llama"].bytes
    with InferenceServer(tmp_path, MODEPRESS_INFERENCE_MEMORY_BYTES=str(int(one * 1.5))) as server:
        for name in ("llama", "endless"):
            server.register(name, tiny_folders[name])
        server.openai.chat.completions.create(model="llama", **GREEDY)
        assert set(server.loaded()) == {"llama"}
        server.openai.chat.completions.create(model="endless", **GREEDY)
        assert set(server.loaded()) == {"endless"}
        memory = server.http.get("/loaded").json()["memory"]
        assert memory["used_bytes"] <= memory["limit_bytes"]
        assert server.metric("modepress_models_loaded") == 1


def test_a_model_larger_than_the_limit_is_refused_by_name(tiny_folders, tmp_path):
    with InferenceServer(tmp_path, MODEPRESS_INFERENCE_MEMORY_BYTES="1000") as server:
        server.register("llama", tiny_folders["llama"])
        response = server.http.post("/v1/chat/completions", json={"model": "llama"} | GREEDY)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "model_too_large"
        assert server.loaded() == {}


def test_sigterm_ends_what_runs_and_waits_with_an_error_and_the_process_with_it(tiny_folders, tmp_path):
    body = {"model": "endless", "messages": MESSAGES, "temperature": 0, "max_tokens": 500_000}
    with InferenceServer(tmp_path) as server:
        server.register("endless", tiny_folders["endless"])
        with server.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            with started_request(server, body) as waiting:
                wait_until(lambda: server.http.get("/loaded").json()["queue"]["waiting"] == 1, what="a waiting request")
                server.process.send_signal(signal.SIGTERM)
                answer = waiting.getresponse()
                assert answer.status == 503
                assert json.loads(answer.read())["error"]["code"] == "shutting_down"
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert server.stop() in (0, -signal.SIGTERM)
        assert "Traceback" not in server.log()


def test_damaged_models_leave_the_process_up(copy_of, tiny_folders, tmp_path):
    folder = copy_of("llama")
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    undefined = copy_of("endless")
    weights = load_file(undefined / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, undefined / "model.safetensors", metadata={"format": "pt"})
    with InferenceServer(tmp_path / "home") as server:
        server.register("damaged", folder)
        server.register("undefined", undefined)
        server.register("llama", tiny_folders["llama"])
        response = server.http.post("/v1/chat/completions", json={"model": "damaged"} | GREEDY)
        assert response.status_code == 400
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        with pytest.raises(openai.BadRequestError, match="computes NaN"):
            server.openai.chat.completions.create(model="undefined", **GREEDY)
        with pytest.raises(openai.APIError, match="computes NaN"):  # after the first byte, so inside the stream
            list(server.openai.chat.completions.create(model="undefined", stream=True, **GREEDY))
        assert server.openai.chat.completions.create(model="llama", **GREEDY).choices
        assert server.http.get("/healthz").status_code == 200
