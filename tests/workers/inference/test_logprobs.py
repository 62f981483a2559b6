"""Log-probabilities of an answer's tokens: the model's own, and in step with the text that goes out."""

import copy
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from api_schemas.errors import InvalidRequest
from api_schemas.inference import ChatRequest
from workers.inference.generation import Writer, generate
from workers.inference.logprobs import standing
from workers.inference.prompts import chat_logprobs
from workers.inference.sampling import SamplingChoice
from workers.inference.spelling import Spelling
from workers.inference.tasks import GenerationTask

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
ASKED = {"messages": MESSAGES, "max_tokens": 12, "seed": 3}
TEXT = "aé 漢 😀🏳️‍🌈 quick"


def task_of(loaded, sampling, max_tokens=24, stops=(), logprobs=4):
    prompt = list(loaded.tokenizer("The quick brown fox")["input_ids"])
    return GenerationTask(prompt, max_tokens, sampling, tuple(stops), continues_prompt=True, logprobs=logprobs)


def answer(loaded, task):
    """Return text and scored tokens."""
    pieces = list(generate(loaded, task, lambda: False))
    return "".join(piece.text for piece in pieces), [score for piece in pieces for score in piece.scores]


def joined(scores):
    return b"".join(score.bytes for score in scores).decode(errors="replace")


@pytest.mark.parametrize("name", ["llama", "qwen2", "full"])
@pytest.mark.parametrize(
    "sampling",
    [SamplingChoice(0.0), SamplingChoice(0.4, 0.8, 5, seed=1), SamplingChoice(1.7, repetition_penalty=3.0, seed=2)],
)
def test_they_are_the_log_softmax_of_transformers_logits(tiny_loaded, name, sampling):
    """In float64, on the whole text at once; temperature, filters and penalty change which tokens are written alone."""
    loaded = tiny_loaded[name]
    spelling = Spelling(loaded.tokenizer)
    ids = {spelling.text_of(token): token for token in range(loaded.vocabulary)}
    task = task_of(loaded, sampling)
    _, scores = answer(loaded, task)
    written = [ids[score.token] for score in scores]
    with torch.inference_mode():
        logits = copy.deepcopy(loaded.model).double()(torch.tensor([task.prompt + written])).logits[0]
    logs = torch.log_softmax(logits, dim=-1)[len(task.prompt) - 1 :]
    assert len(scores) > 3
    for place, score in enumerate(scores):
        assert score.logprob == pytest.approx(float(logs[place, written[place]]), abs=1e-4)
        top = [(ids[other.token], other.logprob) for other in score.alternatives]
        assert [log for _, log in top] == pytest.approx(logs[place].topk(4).values.tolist(), abs=1e-4)
        assert [log for _, log in top] == pytest.approx([float(logs[place, token]) for token, _ in top], abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "endless"])
def test_bytes_join_to_the_text_also_of_bytes_that_are_no_characters(tiny_loaded, name):
    loaded = tiny_loaded[name]
    for seed in range(12):
        text, scores = answer(loaded, task_of(loaded, SamplingChoice(seed=seed), max_tokens=20 + seed))
        assert joined(scores) == text


def test_a_stop_string_cuts_tokens_where_it_cuts_the_text(tiny_loaded):
    loaded = tiny_loaded["endless"]
    whole, every = answer(loaded, task_of(loaded, SamplingChoice(0.0)))
    assert "\ufffd" in whole or whole.isascii()
    for start in range(0, len(whole) - 5, 2):
        text, scores = answer(loaded, task_of(loaded, SamplingChoice(0.0), stops=[whole[start : start + 5]]))
        assert joined(scores) == text == whole[: whole.index(whole[start : start + 5])]
        assert all(score.bytes for score in scores)
        assert [score.logprob for score in scores] == [score.logprob for score in every[: len(scores)]]
        assert [score.offset for score in scores] == [score.offset for score in every[: len(scores)]]


@pytest.mark.parametrize("stop", [None, "quick", "é", "😀", "漢 😀", "\U0001f308 q", "ic", "k"])
def test_characters_of_several_tokens(tiny_loaded, stop):
    """Written token by token, as if a model had; whatever is out has its tokens out, and no more."""
    loaded = tiny_loaded["llama"]
    tokens = loaded.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(tokens) > len(TEXT)
    writer = Writer(loaded, task_of(loaded, SamplingChoice(), len(tokens), [stop] if stop else []))
    pieces = []
    for token in tokens:
        pieces.append(writer.write(token, torch.zeros(384)))
        if pieces[-1].finish_reason:
            break
    scores = [score for piece in pieces for score in piece.scores]
    text = "".join(piece.text for piece in pieces)
    assert b"".join(score.bytes for score in scores) == text.encode()
    assert text == (TEXT.split(stop)[0] if stop else TEXT)
    assert {score.logprob for score in scores} == {-math.log(384)}
    starts = [len(b"".join(one.bytes for one in scores[:at]).decode(errors="ignore")) for at in range(len(scores))]
    assert [score.offset for score in scores] == starts
    assert any(score.token.startswith("bytes:\\x") for score in scores) == (stop != "é")


def test_tokens_of_a_character_that_never_came_have_no_entry(tiny_loaded):
    loaded = tiny_loaded["llama"]
    tokens = loaded.tokenizer("fox 😀", add_special_tokens=False)["input_ids"][:-1]
    writer = Writer(loaded, task_of(loaded, SamplingChoice(), len(tokens)))
    pieces = [writer.write(token, torch.zeros(384)) for token in tokens]
    assert joined([score for piece in pieces for score in piece.scores]) == "fox "


def test_special_tokens_have_a_name_and_no_bytes(tiny_loaded):
    spelling = Spelling(tiny_loaded["llama"].tokenizer)
    assert (spelling.text_of(1), spelling.bytes_of(1)) == ("<|im_start|>", b"")
    assert spelling.text_of(9999) == "<token 9999>"


def test_sentencepiece_spells_spaces_and_bytes():
    vocabulary = {"▁Hello": 0, "▁": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    spelling = Spelling(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert [spelling.bytes_of(token) for token in (0, 1, 2 + 0xE6)] == [b" Hello", b" ", b"\xe6"]
    assert spelling.text_of(2 + 0xE6) == "bytes:\\xe6"


@pytest.mark.parametrize(
    ("spelled", "text", "wanted"),
    [
        ([b" Hello"], "Hello", [b"Hello"]),  # a chat answer of Llama 2 has no first space
        ([b" Hello"], "He", [b"He"]),
        ([b"\xe6", b"\xbc\xa2!"], "漢", [b"\xe6", b"\xbc\xa2"]),
        ([b"a\xff", b"b"], "a\ufffdb", [b"a\xff", b"b"]),
        ([b"##a", b"##b"], "ab", [b"", b"ab"]),  # not what the vocabulary spells: no byte is lost
        ([b"abc"], "", [b""]),
    ],
)
def test_what_stands_in_a_text(spelled, text, wanted):
    assert standing(spelled, text) == wanted


def test_nothing_is_computed_that_nobody_asks_for(tiny_loaded):
    loaded = tiny_loaded["llama"]
    assert answer(loaded, task_of(loaded, SamplingChoice(0.0), logprobs=None))[1] == []


def test_top_logprobs_need_logprobs():
    with pytest.raises(InvalidRequest) as caught:
        chat_logprobs(ChatRequest.model_validate({"model": "m", "messages": MESSAGES, "top_logprobs": 2}))
    assert (caught.value.code, caught.value.param) == ("logprobs_missing", "top_logprobs")


def test_chat_through_the_stock_client(server):
    chat = server.openai.chat.completions
    (choice,) = chat.create(model="llama", logprobs=True, top_logprobs=3, **ASKED).choices
    content = choice.logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode(errors="replace") == choice.message.content
    assert all(one.logprob <= 0 and len(one.top_logprobs) == 3 for one in content)
    chunks = list(chat.create(model="llama", logprobs=True, top_logprobs=3, stream=True, **ASKED))
    assert [one for chunk in chunks if (said := chunk.choices[0].logprobs) for one in said.content] == content
    (bare,) = chat.create(model="llama", logprobs=True, **ASKED).choices
    assert {len(one.top_logprobs) for one in bare.logprobs.content} == {0}
    (silent,) = chat.create(model="llama", logprobs=False, **ASKED).choices
    assert (silent.logprobs, silent.message.content) == (None, choice.message.content)


@pytest.mark.parametrize("likeliest", [0, 2])
def test_completions_through_the_stock_client(server, likeliest):
    asked = {"model": "bare", "prompt": "The quick", "temperature": 0.8, "seed": 3, "max_tokens": 12}
    complete = server.openai.completions.create
    (choice,) = complete(logprobs=likeliest, **asked).choices
    said = choice.logprobs
    assert len(said.tokens) == len(said.token_logprobs) == len(said.top_logprobs) == len(said.text_offset) > 0
    for token, logprob, top in zip(said.tokens, said.token_logprobs, said.top_logprobs, strict=True):
        assert top[token] == logprob
        assert likeliest <= len(top) <= likeliest + 1
    assert said.text_offset == sorted(said.text_offset)
    assert said.text_offset[0] == 0
    chunks = list(complete(logprobs=likeliest, stream=True, **asked))
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for part in parts for one in getattr(part, name)] == getattr(said, name)
    assert complete(**asked).choices[0].logprobs is None


@pytest.mark.parametrize(
    ("path", "change", "code", "param"),
    [
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ("chat/completions", {"top_logprobs": 2}, "logprobs_missing", "top_logprobs"),
        ("chat/completions", {"logprobs": 3}, "invalid_value", "logprobs"),
        ("completions", {"logprobs": 6}, "invalid_value", "logprobs"),
        ("completions", {"logprobs": True}, "invalid_value", "logprobs"),
        ("completions", {"top_logprobs": 2}, "unknown_field", "top_logprobs"),
    ],
)
def test_what_cannot_be_listed_is_refused(server, path, change, code, param):
    asked = {"messages": MESSAGES} if path.startswith("chat") else {"prompt": "a"}
    response = server.http.post(f"/v1/{path}", json={"model": "llama"} | asked | change)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
