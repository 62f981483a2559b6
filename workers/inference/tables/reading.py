"""What a loaded model reads tables with: its rule, and the tokenizer of its table encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from api_schemas.errors import InvalidCheckpoint, InvalidRequest
from preflight.tables import RULE_FILE, TEXT, TOKENIZER_FILE, TableRule, read_rule
from workers.inference.registry import ModelSource


@dataclass(frozen=True)
class TableReader:
    """How a model is shown tables.

    Attributes:
        rule: of the model.
        tokenizer: of its table encoder; None where tables are shown as text.
    """

    rule: TableRule
    tokenizer: Any = None


def load_table_reader(source: ModelSource, model: Any) -> TableReader | None:
    """Return how a model is shown tables; None where it has no rule for them.

    Raises:
        InvalidCheckpoint: `invalid_table_rule`, also where rule and model do not fit; `table_tokenizer_invalid`.
    """
    rule = read_rule(source.folder)
    if rule is None or rule.rule == TEXT:
        return None if rule is None else TableReader(rule)
    kind = (getattr(model.config, "table_encoder", None) or {}).get("kind")
    if kind != rule.rule:
        has = f"has a table encoder of kind {kind!r}" if kind else "has no table encoder"
        message = f"{RULE_FILE} of '{source.id}' says {rule.rule!r}, and the model {has}; correct the file"
        raise InvalidCheckpoint("invalid_table_rule", message, "model")
    return TableReader(rule, _tokenizer(source.id, source.folder / TOKENIZER_FILE, rule))


def refuse_tables(source: ModelSource, places: Sequence[str]) -> None:
    """Refuse tables for a model that has no rule for them, before it is loaded.

    Args:
        source: the model.
        places: of the tables in the request, at least one.

    Raises:
        InvalidRequest: as `not_supported`.
    """
    if read_rule(source.folder) is None:
        raise not_supported(source.id, places[0])


def not_supported(model: str, place: str) -> InvalidRequest:
    """Return the error `tables_not_supported` for a table at this place of a request."""
    message = (
        f"{place} is a table, and model '{model}' has no {RULE_FILE} that says how to show it one; write the table "
        "into the text, or choose a model whose input_modalities have 'table'"
    )
    return InvalidRequest("tables_not_supported", message, place)


def _tokenizer(model: str, path: Path, rule: TableRule) -> Any:
    if not path.is_file():
        message = f"model '{model}' has no {TOKENIZER_FILE}, with which its table encoder reads; import it again"
        raise InvalidCheckpoint("table_tokenizer_invalid", message, "model")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        message = f"{TOKENIZER_FILE} of '{model}' cannot be loaded: {error}; import the model again"
        raise InvalidCheckpoint("table_tokenizer_invalid", message, "model") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(rule.tokens)
    return tokenizer
