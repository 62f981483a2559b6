"""Incremental text: equal to decoding everything at once, and never half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import make_tiny_tokenizer
from workers.inference.detokenizer import MAX_HELD, REPLACEMENT, Detokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def sentencepiece_like():
    """Words with a leading `▁` and bytes as a fallback, decoded as Llama 2 and Mistral do."""
    words = ["▁Hello", "▁world", "!", "▁"]
    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pieces_of(detokenizer, tokens):
    return [detokenizer.add(token) for token in tokens] + [detokenizer.flush()]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_pieces_join_to_the_whole_text(byte_level, text):
    tokens = byte_level(text, add_special_tokens=False)["input_ids"]
    wanted = byte_level.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces_of(Detokenizer(byte_level), tokens)) == wanted.rstrip(REPLACEMENT)


@settings(max_examples=100, deadline=None)
@given(text=st.text("aé漢😀🏳️‍🌈", min_size=1, max_size=20))
def test_no_piece_holds_half_a_character(byte_level, text):
    tokens = byte_level(text, add_special_tokens=False)["input_ids"]
    assert not any(REPLACEMENT in piece for piece in pieces_of(Detokenizer(byte_level), tokens))


def test_a_character_that_never_completes_is_dropped(byte_level):
    tokens = byte_level("ok 😀", add_special_tokens=False)["input_ids"]
    assert "".join(pieces_of(Detokenizer(byte_level), tokens[:-1])) == "ok "


def test_bytes_that_are_no_text_do_not_hold_the_stream_for_ever(byte_level):
    stray = byte_level.convert_tokens_to_ids("¢")  # the byte-level alphabet's sign for 0xA2, a continuation byte
    detokenizer = Detokenizer(byte_level)
    pieces = [detokenizer.add(stray) for _ in range(MAX_HELD)]
    assert pieces[-1] == REPLACEMENT * MAX_HELD


def test_special_tokens_are_no_text(byte_level):
    word, special = byte_level("fox", add_special_tokens=False)["input_ids"], byte_level.eos_token_id
    assert "".join(pieces_of(Detokenizer(byte_level), [special, *word, special, *word])) == "foxfox"


def test_a_continuation_keeps_its_leading_space_and_a_chat_message_has_none(sentencepiece_like):
    hello, world, mark = 0, 1, 2
    assert "".join(pieces_of(Detokenizer(sentencepiece_like, [hello]), [world, mark])) == " world!"
    assert "".join(pieces_of(Detokenizer(sentencepiece_like), [hello, world, mark])) == "Hello world!"


def test_byte_fallback_waits_for_the_whole_character(sentencepiece_like):
    tokens = [4 + byte for byte in "漢".encode()]
    assert pieces_of(Detokenizer(sentencepiece_like, [0]), tokens) == ["", "", "漢", ""]
