"""Several answers to one prompt: each as if it had been asked for alone, by a seed of its own."""

from dataclasses import replace

import pytest

from api_schemas.errors import InvalidRequest
from api_schemas.inference import ChatRequest, CompletionRequest
from workers.inference.generation import generate
from workers.inference.prompts import refuse_too_much
from workers.inference.sampling import SamplingChoice, of_choice
from workers.inference.tasks import GenerationTask

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
ASKED = {"model": "llama", "messages": MESSAGES, "max_tokens": 16, "seed": 7}
WARM = SamplingChoice(seed=7)


def task_of(loaded, choices, sampling=WARM, prompt="The quick brown fox"):
    tokens = list(loaded.tokenizer(prompt)["input_ids"])
    return GenerationTask(tokens, 16, sampling, (), continues_prompt=True, choices=choices)


def texts(loaded, task):
    """Return the text of each answer."""
    said = [""] * task.choices
    for piece in generate(loaded, task, lambda: False):
        said[piece.index] += piece.text
    return said


@pytest.mark.parametrize("name", ["llama", "mistral", "full"])
def test_each_is_the_answer_to_its_own_seed_whatever_n_is(tiny_loaded, name):
    """Alone, with the prompt read anew: so a copied cache holds the prompt and nothing of an earlier answer."""
    loaded = tiny_loaded[name]
    four = texts(loaded, task_of(loaded, 4))
    alone = [texts(loaded, task_of(loaded, 1, of_choice(WARM, index)))[0] for index in range(4)]
    assert four == alone
    assert len(set(four)) == 4
    assert four[:2] == texts(loaded, task_of(loaded, 2))
    assert four == texts(loaded, task_of(loaded, 4))
    assert four[0] == texts(loaded, task_of(loaded, 1))[0]


def test_seeds_are_derived_apart_and_are_seeds():
    seeds = {of_choice(SamplingChoice(seed=seed), index).seed for seed in (-(2**63), -1, 0, 1, 2) for index in range(8)}
    assert len(seeds) == 40
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert of_choice(WARM, 0) == WARM
    assert replace(of_choice(WARM, 3), seed=7) == WARM


def test_greedy_answers_are_equal(tiny_loaded):
    loaded = tiny_loaded["full"]
    assert len(set(texts(loaded, task_of(loaded, 3, SamplingChoice(0.0))))) == 1


def test_the_prompt_is_read_once(tiny_loaded):
    loaded = tiny_loaded["llama"]
    task = task_of(loaded, 5)
    lengths = []
    with loaded.model.register_forward_pre_hook(
        lambda _, __, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    ):
        texts(loaded, task)
    assert lengths[0] == len(task.prompt) > 1
    assert set(lengths[1:]) == {1}


@pytest.mark.parametrize("seen", [3, 16, 20])
def test_giving_up_ends_all_answers(tiny_loaded, seen):
    loaded = tiny_loaded["endless"]
    pieces = []
    for piece in generate(loaded, task_of(loaded, 4, SamplingChoice(0.0)), lambda: len(pieces) == seen):
        pieces.append(piece)
    assert len(pieces) == seen


def test_answers_together_have_the_bound_of_one():
    def refusal(request):
        with pytest.raises(InvalidRequest) as caught:
            refuse_too_much(request)
        return caught.value

    for field in ("max_tokens", "max_completion_tokens"):
        body = {"model": "m", "messages": MESSAGES, "n": 4}
        refuse_too_much(ChatRequest.model_validate(body | {field: 250_000}))
        error = refusal(ChatRequest.model_validate(body | {field: 250_001}))
        assert (error.code, error.param) == ("choices_too_long", "n")
        assert f"{field} 250001" in error.message
    assert refusal(CompletionRequest(model="m", prompt="a", n=2, max_tokens=500_001)).code == "choices_too_long"


def test_chat_through_the_stock_client(server):
    chat = server.openai.chat.completions
    whole = chat.create(n=3, logprobs=True, **ASKED)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    said = [choice.message.content for choice in whole.choices]
    assert len(set(said)) == 3
    assert said[:2] == [choice.message.content for choice in chat.create(n=2, **ASKED).choices]
    one = chat.create(**ASKED)
    assert (one.choices[0].message.content, one.usage.prompt_tokens) == (said[0], whole.usage.prompt_tokens)
    for choice in whole.choices:
        shown = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
        assert shown.decode(errors="replace") == choice.message.content

    chunks = list(chat.create(n=3, stream=True, stream_options={"include_usage": True}, **ASKED))
    streamed, reasons, roles = [""] * 3, [None] * 3, []
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        roles += [choice.index] * (choice.delta.role == "assistant")
    assert (streamed, roles) == (said, [0, 1, 2])
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].usage == whole.usage


def test_usage_counts_the_tokens_of_all_answers(server):
    asked = {"model": "endless", "prompt": "The quick", "temperature": 0, "max_tokens": 5}
    whole = server.openai.completions.create(n=4, **asked)
    assert whole.usage.completion_tokens == 20
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 20
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in whole.choices}) == 1
    headers = {"x-modepress-count-tokens": "1"}  # as the API asks, which counts them per owner
    told = server.http.post("/v1/completions", json=asked | {"n": 4, "stream": True}, headers=headers).text
    assert f": tokens {whole.usage.total_tokens}\n" in told


@pytest.mark.parametrize("n", [0, 9])
def test_how_many_there_may_be(server, n):
    response = server.http.post("/v1/chat/completions", json=ASKED | {"n": n})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", "n")
    too_long = server.http.post("/v1/chat/completions", json=ASKED | {"n": 8, "max_tokens": 200_000, "stream": True})
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "choices_too_long")
