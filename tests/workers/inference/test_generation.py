"""The token loop, against transformers' own generate()."""

import pytest
import torch

from api_schemas.inference import CompletionRequest
from workers.inference import generation
from workers.inference.generation import generate
from workers.inference.prompts import completion_task
from workers.inference.sampling import SamplingChoice
from workers.inference.tasks import GenerationTask

PROMPT = "The quick brown fox"
GREEDY = SamplingChoice(temperature=0.0)


def make_task(loaded, max_tokens=40, sampling=GREEDY, stops=()):
    prompt = list(loaded.tokenizer(PROMPT)["input_ids"])
    return GenerationTask(prompt, max_tokens, sampling, tuple(stops), continues_prompt=True)


def run(loaded, task):
    return list(generate(loaded, task, lambda: False))


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def reference(loaded, task):
    """What transformers generates greedily: text, tokens, and whether the end token came."""
    ids = torch.tensor([task.prompt])
    output = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=task.max_tokens, do_sample=False
    )
    new = output[0, len(task.prompt) :].tolist()
    return loaded.tokenizer.decode(new, skip_special_tokens=True), len(new), new[-1] in loaded.eos_ids


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "full", "endless"])
def test_greedy_is_what_transformers_generates(tiny_loaded, name):
    loaded = tiny_loaded[name]
    task = make_task(loaded)
    text, tokens, ended = reference(loaded, task)
    pieces = run(loaded, task)
    assert text_of(pieces) == text.rstrip("\ufffd")
    assert pieces[-1].tokens == tokens == len(pieces)
    assert pieces[-1].finish_reason == ("stop" if ended else "length")
    assert all(piece.finish_reason is None for piece in pieces[:-1])


def test_the_cache_changes_nothing(tiny_loaded):
    loaded = tiny_loaded["full"]
    task = make_task(loaded, max_tokens=12)
    tokens = list(task.prompt)
    for _ in range(task.max_tokens):
        with torch.inference_mode():
            tokens.append(int(loaded.model(torch.tensor([tokens])).logits[0, -1].argmax()))
    ours = loaded.tokenizer.decode(tokens[len(task.prompt) :], skip_special_tokens=True)
    assert text_of(run(loaded, task)) == ours.rstrip("\ufffd")


def test_a_prompt_read_in_chunks_gives_the_same_answer(tiny_loaded, monkeypatch):
    loaded = tiny_loaded["llama"]
    whole = text_of(run(loaded, make_task(loaded)))
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 3)
    assert text_of(run(loaded, make_task(loaded))) == whole


def test_the_end_token_ends_the_answer_and_counts(tiny_loaded):
    loaded = tiny_loaded["endless"]
    task = make_task(loaded)
    third = loaded.model.generate(torch.tensor([task.prompt]), max_new_tokens=3, do_sample=False)[0, -1].item()
    ending = type(loaded)(**{**vars(loaded), "eos_ids": frozenset({third})})
    pieces = run(ending, task)
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].tokens <= 3


def test_a_stop_string_ends_the_answer_before_itself(tiny_loaded):
    loaded = tiny_loaded["endless"]
    whole = text_of(run(loaded, make_task(loaded)))
    for start in range(1, len(whole) - 6, 3):
        stop = whole[start : start + 5]  # across token borders, mostly
        pieces = run(loaded, make_task(loaded, stops=[stop]))
        assert text_of(pieces) == whole[: whole.index(stop)]
        assert pieces[-1].finish_reason == "stop"


def test_what_is_held_for_a_stop_string_comes_out_at_the_length_limit(tiny_loaded):
    loaded = tiny_loaded["endless"]
    whole = text_of(run(loaded, make_task(loaded)))
    pieces = run(loaded, make_task(loaded, stops=[whole[-4:] + "never"]))
    assert text_of(pieces) == whole
    assert pieces[-1].finish_reason == "length"


def test_a_seed_reproduces_an_answer_and_leaves_global_randomness_alone(tiny_loaded):
    loaded = tiny_loaded["llama"]
    before = torch.random.get_rng_state()
    answers = [text_of(run(loaded, make_task(loaded, sampling=SamplingChoice(seed=seed)))) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_stops_between_two_tokens_when_cancelled(tiny_loaded):
    loaded = tiny_loaded["endless"]
    seen = []
    for piece in generate(loaded, make_task(loaded), lambda: len(seen) == 3):
        seen.append(piece)
    assert len(seen) == 3
    assert seen[-1].finish_reason is None


def test_it_stops_between_two_chunks_of_the_prompt_when_cancelled(tiny_loaded):
    assert list(generate(tiny_loaded["llama"], make_task(tiny_loaded["llama"]), lambda: True)) == []


def test_the_whole_context_can_be_used(tiny_loaded):
    loaded = tiny_loaded["llama"]
    request = CompletionRequest(model="m", prompt=[5] * 500, max_tokens=12, temperature=0)
    assert run(loaded, completion_task(loaded, request))[-1].tokens <= 12
