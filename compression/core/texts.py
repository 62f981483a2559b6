"""Text as windows of tokens: what calibration and evaluation run on.

A text file is tokenised whole, without special tokens, and cut into consecutive windows; a last partial one is dropped.
Rows (JSONL, a hub data set, the model's own writing) are tokenised one by one and packed end to end, with the
tokenizer's end-of-text token between them, or a newline where it has none; reading stops once there are enough.
Either way every position holds a token of the text: there is no padding and so no mask to get wrong.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from api_schemas.calibration import TextSource
from api_schemas.errors import InvalidCalibration
from api_schemas.reports import TextUse
from compression.core.protocols import Streamed
from compression.core.text_rows import Role, builtin_text, hub_rows, is_jsonl, jsonl_rows, text_sha256, whole_text
from preflight.text_paths import resolve_text_path

PIECE = 64  # tokens; two texts that share so long a run share a passage, not a phrase
MAX_SHARED = 0.1


IMAGE = -100  # stands in `tokens` where a part of an image stands in the window; as a target, the loss ignores it


@dataclass(frozen=True)
class Windows:
    """Tokens of a text, and images among them.

    Attributes:
        tokens: `[num_windows, sequence_length]`, int64; `IMAGE` where an image stands.
        use: which text, how much was asked for and how much there was.
        text_hash: SHA-256 of the text that was read.
        pictures: `[image tokens, hidden]` float32, what block 0 is told at these places, in their order; None without.
    """

    tokens: torch.Tensor
    use: TextUse
    text_hash: str
    pictures: torch.Tensor | None = None

    def embed(self, model: Streamed, part: slice = slice(None)) -> torch.Tensor:
        """Hidden states `[windows, tokens, hidden]` at block 0 of the windows of `part`, in float32."""
        tokens = self.tokens[part]
        if self.pictures is None:
            return model.embed(tokens)
        marked = self.tokens == IMAGE
        place = torch.zeros_like(self.tokens)
        place[marked] = torch.arange(int(marked.sum()), device="cpu")
        hidden = model.embed(tokens.clamp_min(0))
        hidden[marked[part].to(hidden.device)] = self.pictures[place[part][marked[part]]].to(hidden.device)
        return hidden


def load_windows(
    source: TextSource,
    wanted: int,
    tokenizer: Any,
    *,
    files: Mapping[str, Path],
    roots: Sequence[Path] | None,
    hub_offline: bool,
    role: Role,
    write_text: Callable[[int], list[str]] | None,
) -> Windows:
    """Read, tokenise and cut a text.

    Args:
        source: which text, and the window's length.
        wanted: windows asked for; fewer are returned where the text is shorter (`use` says so), never none.
        tokenizer: of the model.
        files: stored uploads by file id.
        roots: folders that server-side paths must lie under; None allows any.
        hub_offline: whether the hub must not be asked.
        role: decides the half of the builtin text and the field named in errors.
        write_text: for source `self`: makes the model write about so many tokens.

    Raises:
        InvalidCalibration: `text_too_short` when there is not one full window, and the errors of `text_rows` and
            `resolve_text_path`.
    """
    length = source.sequence_length
    if source.source == "hub":
        rows: Iterable[str] = hub_rows(source, tokenizer, hub_offline, role)
        ids, text_hash = _pack(rows, tokenizer, wanted * length)
    elif source.source == "self":
        ids, text_hash = _pack(_written(write_text, wanted * length, role), tokenizer, wanted * length)
    elif source.source == "builtin":
        ids, text_hash = _whole(builtin_text(role), tokenizer)
    else:
        path = text_path(source, files, roots, role)
        if is_jsonl(path):
            ids, text_hash = _pack(jsonl_rows(path, source.text_field, tokenizer, role), tokenizer, wanted * length)
        else:
            ids, text_hash = _whole(whole_text(path, role), tokenizer)
    tokens = _cut(ids, wanted, length, role)
    return Windows(tokens=tokens, use=text_use(source, tokens, wanted, role), text_hash=text_hash)


def hold_out(windows: Windows, share: int, wanted: int) -> tuple[Windows, Windows]:
    """Part the last windows from the others: what a search is judged on is not what it is calibrated on.

    Args:
        windows: of one text, in its order.
        share: one window is held out beyond so many others; where the text is short, both parts shrink alike.
        wanted: windows that were asked for, for calibration alone.

    Raises:
        InvalidCalibration: `search_text_too_short` when there is only one window.
    """
    count = len(windows.tokens)
    if count < 2:
        raise InvalidCalibration(
            "search_text_too_short",
            f"calibration: the text has {count} window of {windows.use.sequence_length} tokens, and a target for "
            "perplexity needs one more to judge its trials on; give a longer text or a smaller sequence_length",
            "calibration.sequence_length",
        )
    held = max(1, count // (share + 1))
    asked = (wanted, windows.use.requested - wanted)
    parts = (windows.tokens[: count - held], windows.tokens[count - held :])
    first, second = (
        Windows(
            tokens=part,
            use=windows.use.model_copy(update={"requested": number, **_amounts(part)}),
            text_hash=windows.text_hash,
        )
        for part, number in zip(parts, asked, strict=True)
    )
    return first, second


def assert_disjoint(calibration: Windows, evaluation: Windows) -> None:
    """Refuse an evaluation on what was calibrated on: it would flatter the result.

    The same text is refused even where different windows of it would be used, for windows are always taken from its
    start. So is a text of which more than a tenth, in pieces of 64 tokens, stands in the calibration text.

    Raises:
        InvalidCalibration: `evaluation_is_calibration`.
    """
    shared = 1.0 if calibration.text_hash == evaluation.text_hash else _shared_fraction(calibration, evaluation)
    if shared > MAX_SHARED:
        raise InvalidCalibration(
            "evaluation_is_calibration",
            f"evaluation: {shared:.0%} of {evaluation.use.source} is in the calibration text {calibration.use.source}; "
            "evaluate on another text",
            "evaluation",
        )


def text_path(source: TextSource, files: Mapping[str, Path], roots: Sequence[Path] | None, role: Role) -> Path:
    """Where the text of source `file` or `upload` lies.

    Raises:
        InvalidCalibration: `file_not_found`, and the codes of `resolve_text_path`.
    """
    if source.source == "file":
        return resolve_text_path(source.path or "", roots, f"{role}.path")
    path = files.get(source.file_id or "")
    if path is None:
        raise InvalidCalibration(
            "file_not_found",
            f"{role}.file_id {source.file_id!r} is no uploaded file; upload it first",
            f"{role}.file_id",
        )
    return resolve_text_path(str(path), None, f"{role}.file_id")


def _written(write_text: Callable[[int], list[str]] | None, tokens: int, role: Role) -> list[str]:
    if write_text is None:
        raise InvalidCalibration("self_not_available", f"{role}: the model cannot write its own text here", role)
    return write_text(tokens)


def _encode(text: str, tokenizer: Any) -> list[int]:
    # verbose=False: a text longer than the model's context is what is wanted here
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _whole(text: str, tokenizer: Any) -> tuple[list[int], str]:
    return _encode(text, tokenizer), text_sha256([text])


def _pack(rows: Iterable[str], tokenizer: Any, enough: int) -> tuple[list[int], str]:
    """Put rows end to end until there are enough tokens; empty rows add nothing, not even a separator."""
    end = tokenizer.eos_token_id
    separator = [end] if end is not None else _encode("\n", tokenizer)
    ids: list[int] = []
    read: list[str] = []
    for row in rows:
        row_ids = _encode(row, tokenizer)
        if row_ids:
            ids += separator + row_ids if ids else row_ids
            read.append(row)
        if len(ids) >= enough:
            break
    return ids, text_sha256(read)


def _cut(ids: list[int], wanted: int, length: int, role: Role) -> torch.Tensor:
    used = min(wanted, len(ids) // length)
    if used == 0:
        raise InvalidCalibration(
            "text_too_short",
            f"{role}: the text has {len(ids)} tokens, fewer than one window of {length}; give a longer text or a "
            "smaller sequence_length",
            f"{role}.sequence_length",
        )
    return torch.tensor(ids[: used * length], dtype=torch.int64).reshape(used, length)


def text_use(source: TextSource, tokens: torch.Tensor, wanted: int, role: Role) -> TextUse:
    """What the report says of a text that was cut into these windows."""
    names = {
        "file": f"file:{Path(source.path or '').name}",
        "upload": f"upload:{source.file_id}",
        "hub": ":".join(part for part in ("hub", source.dataset, source.subset, source.split) if part),
        "self": "self",
        "builtin": f"builtin:pydoc_data.topics/{role}",
    }
    return TextUse(
        source=names[source.source],
        requested=wanted,
        sequence_length=source.sequence_length,
        **_amounts(tokens),
    )


def _amounts(tokens: torch.Tensor) -> dict[str, Any]:
    return {
        "sha256": hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest(),
        "used": tokens.shape[0],
        "tokens_used": tokens.numel(),
    }


def _shared_fraction(calibration: Windows, evaluation: Windows) -> float:
    """How much of the evaluation, in consecutive pieces, occurs anywhere in the calibration's tokens."""
    known = _fingerprints(calibration.tokens.flatten())
    pieces = _fingerprints(evaluation.tokens.flatten())[::PIECE]
    return torch.isin(pieces, known).double().mean().item() if len(pieces) else 0.0


def _fingerprints(tokens: torch.Tensor) -> torch.Tensor:
    """A number (modulo 2**64) for each run of PIECE tokens, one run starting at each position."""
    runs = max(0, tokens.numel() - PIECE + 1)
    weights = torch.randint(-(2**62), 2**62, (PIECE,), generator=torch.Generator().manual_seed(PIECE))
    sums = torch.zeros(runs, dtype=torch.int64)
    for offset, weight in enumerate(weights):
        sums += (tokens[offset : offset + runs] + 1) * weight
    return sums
