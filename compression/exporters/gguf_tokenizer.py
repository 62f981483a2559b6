"""The keys of a GGUF file that hold its tokenizer: tokens, merges, special tokens, chat template.

Whether a text gets a first or last special token is not read from settings but seen: the tokenizer encodes one.
"""

import json
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from api_schemas.errors import InvalidRecipe
from compression.exporters.source import ExportSource
from preflight.gguf_rules import gguf_tokenizer

ADDED_SCORE = -1000.0  # SentencePiece merges never reach it
SPECIAL = ("bos", "eos", "unk", "sep", "pad")


@dataclass
class _Vocabulary:
    """Token texts, scores and kinds by id; ids that no token has are filled so that every row has one."""

    texts: list[str]
    scores: list[float]
    kinds: list[int]

    @classmethod
    def empty(cls, rows: int) -> "_Vocabulary":
        return cls([f"[PAD{index}]" for index in range(rows)], [-10000.0] * rows, [TokenType.UNUSED] * rows)

    def put(self, index: int, text: str, score: float, kind: int) -> None:
        self.texts[index], self.scores[index], self.kinds[index] = text, score, kind


def tokenizer_keys(writer: GGUFWriter, source: ExportSource) -> None:
    """Add the folder's tokenizer.

    Raises:
        InvalidRecipe: `gguf_tokenizer`.
    """
    folder = source.model.folder
    names = gguf_tokenizer(folder)
    if isinstance(names, str):
        raise InvalidRecipe("gguf_tokenizer", f"export gguf: {names}", "exports")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    vocabulary = _Vocabulary.empty(source.size.vocabulary)
    writer.add_tokenizer_model(names.model)
    writer.add_tokenizer_pre(names.pre)
    if names.model == "gpt2":
        _byte_level(vocabulary, tokenizer)
        writer.add_token_merges(_merges(tokenizer))
    else:
        _sentencepiece(vocabulary, str(folder / "tokenizer.model"))
        writer.add_add_space_prefix(tokenizer.tokenize("a", add_special_tokens=False)[0].startswith("▁"))
    for index, token in tokenizer.added_tokens_decoder.items():
        kind = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
        vocabulary.put(index, token.content, ADDED_SCORE, kind)
    writer.add_token_list(vocabulary.texts)
    if names.model != "gpt2":
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.kinds)
    _special_tokens(writer, tokenizer, source)


def _byte_level(vocabulary: _Vocabulary, tokenizer: Any) -> None:
    for text, index in tokenizer.get_vocab().items():
        vocabulary.put(index, text, 0.0, TokenType.NORMAL)


def _merges(tokenizer: Any) -> list[str]:
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _sentencepiece(vocabulary: _Vocabulary, path: str) -> None:
    model = SentencePieceProcessor(model_file=path)
    kinds = (
        (model.IsUnknown, TokenType.UNKNOWN),
        (model.IsControl, TokenType.CONTROL),
        (model.IsUnused, TokenType.UNUSED),
        (model.IsByte, TokenType.BYTE),
    )
    for index in range(model.vocab_size()):
        kind = next((kind for holds, kind in kinds if holds(index)), TokenType.NORMAL)
        vocabulary.put(index, model.IdToPiece(index), model.GetScore(index), kind)


def _special_tokens(writer: GGUFWriter, tokenizer: Any, source: ExportSource) -> None:
    """Ids, whether texts get them, and the chat template."""
    ids = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in SPECIAL}
    for kind in ("bos", "eos"):
        if ids[kind] is None and isinstance(source.config.get(f"{kind}_token_id"), int):
            ids[kind] = source.config[f"{kind}_token_id"]
    for kind, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    encoded = tokenizer("a", add_special_tokens=True)["input_ids"]
    writer.add_add_bos_token(ids["bos"] is not None and encoded[0] == ids["bos"])
    writer.add_add_eos_token(ids["eos"] is not None and encoded[-1] == ids["eos"])
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
