"""What can be known of a tokenizer from its files: that it is there, sound, and has a chat template."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api_schemas.errors import InvalidCheckpoint
from preflight.strict_json import read_object

FAST = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
MAX_TOKENIZER_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class TokenizerFacts:
    """What the tokenizer's files say.

    Attributes:
        present: whether a tokenizer is there at all.
        has_chat_template: in any of the places where one may lie.
        largest_id: the largest token id of tokenizer.json, or None where that is not known.
    """

    present: bool
    has_chat_template: bool
    largest_id: int | None


def read_tokenizer(folder: Path, files: tuple[str, ...]) -> TokenizerFacts:
    """Read the tokenizer's files without building a tokenizer.

    Raises:
        InvalidCheckpoint: `invalid_tokenizer`: a file is not the JSON it should be.
    """
    settings = read_object(folder / SETTINGS, "invalid_tokenizer") if SETTINGS in files else {}
    present = FAST in files or "tokenizer.model" in files or {"vocab.json", "merges.txt"} <= set(files)
    return TokenizerFacts(
        present=present,
        has_chat_template=bool(settings.get("chat_template")) or any(name in files for name in TEMPLATES),
        largest_id=_largest_id(folder / FAST) if FAST in files else None,
    )


def _largest_id(path: Path) -> int | None:
    content = read_object(path, "invalid_tokenizer", max_bytes=MAX_TOKENIZER_BYTES)
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict | list):
        raise InvalidCheckpoint(
            "invalid_tokenizer", f"{path.name} has no model with a vocab; push the tokenizer again", path.name
        )
    added = content.get("added_tokens")
    ids: list[Any] = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
    if isinstance(added, list):
        ids += [token.get("id") for token in added if isinstance(token, dict)]
    whole = [number for number in ids if isinstance(number, int)]
    return max(whole, default=None)
