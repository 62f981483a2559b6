"""Text as windows of tokens: cut, packed, reported, and never the same for calibration and evaluation."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from api_schemas.calibration import Calibration, Evaluation, TextSource
from api_schemas.errors import InvalidCalibration
from compression.core import text_rows
from compression.core.texts import Windows, assert_disjoint, hold_out, load_windows
from tests.tiny_models import PROSE, make_tiny_tokenizer

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def load(tokenizer: Any) -> Callable[..., Windows]:
    def loads(source: TextSource, wanted: int = 4, **given: Any) -> Windows:
        options = {"files": {}, "roots": None, "hub_offline": True, "role": "calibration", "write_text": None}
        return load_windows(source, wanted, given.pop("tokenizer", tokenizer), **(options | given))

    return loads


def file_source(path: Path, **given: Any) -> Calibration:
    return Calibration(source="file", path=str(path), **({"sequence_length": LENGTH} | given))


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(load: Callable[..., Windows], source: TextSource, **given: Any) -> InvalidCalibration:
    with pytest.raises(InvalidCalibration) as caught:
        load(source, **given)
    return caught.value


def test_a_text_is_tokenised_whole_and_cut(load: Callable[..., Windows], tokenizer: Any, tmp_path: Path) -> None:
    text = "\ufeffTwo lines,\nGröße & 東京.\n" + PROSE * 20
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = load(file_source(path), 3)
    assert windows.tokens.dtype == torch.int64
    assert windows.tokens.flatten().tolist() == ids[: 3 * LENGTH]
    everything = load(file_source(path), 10_000)
    assert everything.tokens.flatten().tolist() == ids[: len(ids) // LENGTH * LENGTH]


@pytest.mark.parametrize("ending", ["\r\n", "\r"])
def test_line_ends_of_other_systems_are_the_same_text(
    load: Callable[..., Windows], tmp_path: Path, ending: str
) -> None:
    """A file's perplexity is that of its text, whatever system wrote it."""
    lines = PROSE.replace(". ", ".\n") * 3
    (tmp_path / "here.txt").write_bytes(lines.encode())
    (tmp_path / "there.txt").write_bytes(lines.replace("\n", ending).encode())
    here, there = (load(file_source(tmp_path / name)) for name in ("here.txt", "there.txt"))
    assert torch.equal(here.tokens, there.tokens)


def test_use_says_what_was_asked_and_what_there_was(load: Callable[..., Windows], tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(PROSE)
    windows = load(file_source(path), 128)
    use = windows.use
    assert (use.source, use.requested, use.sequence_length) == ("file:text.txt", 128, LENGTH)
    assert 0 < use.used < 128
    assert use.used == windows.tokens.shape[0]
    assert use.tokens_used == windows.tokens.numel()
    assert use.sha256 == hashlib.sha256(windows.tokens.numpy().astype("<i8").tobytes()).hexdigest()


def test_held_out_windows_come_after_the_others_and_both_parts_say_what_they_are(
    load: Callable[..., Windows], tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one two three four five six seven eight nine ten " * 40)
    whole = load(file_source(path), 10)
    used = len(whole.tokens)
    first, second = hold_out(whole, 4, 8)
    assert len(second.tokens) == max(1, used // 5)
    assert torch.equal(torch.cat([first.tokens, second.tokens]), whole.tokens)
    assert (first.use.requested, second.use.requested) == (8, 2)
    assert (first.use.used, second.use.used) == (len(first.tokens), len(second.tokens))
    assert first.use.tokens_used + second.use.tokens_used == whole.use.tokens_used
    assert len({first.use.sha256, second.use.sha256, whole.use.sha256}) == 3
    with pytest.raises(InvalidCalibration, match="1 window"):
        hold_out(load(file_source(path), 1), 4, 8)


def test_less_than_one_window_is_an_error_with_both_numbers(load: Callable[..., Windows], tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abc")
    error = refused(load, file_source(path))
    assert (error.code, error.param) == ("text_too_short", "calibration.sequence_length")
    assert re.search(rf"has [123] tokens, fewer than one window of {LENGTH}", error.message)
    path.write_text("")
    assert refused(load, file_source(path)).code == "text_too_short"


def test_rows_of_any_length_are_packed_without_padding(
    load: Callable[..., Windows], tokenizer: Any, tmp_path: Path
) -> None:
    rows = ["a b c", "", PROSE, "x", "   ", "the model"] * 3
    path = write_rows(tmp_path / "rows.jsonl", [{"text": row, "id": 1} for row in rows])
    expected: list[int] = []
    for row in rows:
        ids = tokenizer(row, add_special_tokens=False)["input_ids"]
        if ids:
            expected += ([tokenizer.eos_token_id] if expected else []) + ids
    windows = load(file_source(path), 10_000)
    assert windows.tokens.flatten().tolist() == expected[: len(expected) // LENGTH * LENGTH]
    separators = sum(1 for row in rows if row) - 1
    assert (windows.tokens == tokenizer.pad_token_id).sum() <= separators  # pad and end are one token here


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_settings_of_the_tokenizer_change_nothing(
    load: Callable[..., Windows], tmp_path: Path, side: str
) -> None:
    other = make_tiny_tokenizer(tmp_path)
    other.padding_side = other.truncation_side = side
    other.pad_token = "!"
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a b c"}, {"text": PROSE}] * 4)
    assert torch.equal(load(file_source(path), tokenizer=other).tokens, load(file_source(path)).tokens)


def test_rows_without_an_end_token_are_joined_by_a_newline(load: Callable[..., Windows], tmp_path: Path) -> None:
    other = make_tiny_tokenizer(tmp_path)
    other.eos_token = None
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "one two three four"}] * 20)
    assert other.decode(load(file_source(path), tokenizer=other).tokens.flatten()).startswith("one two three four\none")


def test_chats_are_written_by_the_template(load: Callable[..., Windows], tokenizer: Any, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris"}]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": chat}] * 4)
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered in tokenizer.decode(load(file_source(path), 10_000).tokens.flatten())


def test_reading_stops_once_there_is_enough(load: Callable[..., Windows], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": PROSE}] * 3)
    with path.open("a") as file:
        file.write("broken\n")
    assert load(file_source(path), 2).use.used == 2
    assert refused(load, file_source(path), wanted=10_000).code == "bad_row"


@pytest.mark.parametrize(
    "row",
    [
        "{",
        "[]",
        "5",
        '{"other": "x"}',
        '{"text": 5}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        "[" * 100_000,
    ],
)
def test_a_bad_row_is_named_by_its_line(load: Callable[..., Windows], tmp_path: Path, row: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n\n' + row + "\n")
    error = refused(load, file_source(path))
    assert error.code == "bad_row"
    assert "line 3" in error.message


def test_a_chat_row_needs_a_template_that_takes_it(load: Callable[..., Windows], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    bare = make_tiny_tokenizer(tmp_path, chat_template=False)
    assert refused(load, file_source(path), tokenizer=bare).code == "no_chat_template"
    bare.chat_template = "{{ raise_exception('roles must alternate') }}"
    error = refused(load, file_source(path), tokenizer=bare)
    assert error.code == "bad_row"
    assert "roles must alternate" in error.message


def test_text_in_another_field(load: Callable[..., Windows], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.ndjson", [{"body": PROSE}])
    assert load(file_source(path, text_field="body"), 1).use.used == 1


def test_an_upload_without_suffix_is_known_by_its_first_line(load: Callable[..., Windows], tmp_path: Path) -> None:
    rows, text = write_rows(tmp_path / "aaa", [{"text": PROSE}]), tmp_path / "bbb"
    text.write_text("{ not a row\n" + PROSE)
    files = {"file-rows": rows, "file-text": text}
    decoded = {}
    for file_id in files:
        source = Calibration(source="upload", file_id=file_id, sequence_length=LENGTH)
        windows = load(source, 1, files=files)
        decoded[file_id] = windows.tokens
        assert windows.use.source == f"upload:{file_id}"
    assert not torch.equal(decoded["file-rows"], decoded["file-text"])
    missing = Calibration(source="upload", file_id="file-gone", sequence_length=LENGTH)
    assert refused(load, missing, files=files).code == "file_not_found"


@pytest.mark.parametrize("content", [b"\xff\xfe", b"text\0more", b"\x89PNG\r\n\x1a\n"])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x"])
def test_binary_files(load: Callable[..., Windows], tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert refused(load, file_source(tmp_path / name)).code == "not_text"


def test_a_lone_surrogate_is_no_text(load: Callable[..., Windows], tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "\\ud800"}\n')
    assert refused(load, file_source(tmp_path / "x.jsonl")).code == "not_text"


def test_limits_of_size(load: Callable[..., Windows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "MAX_TEXT_BYTES", 100)
    monkeypatch.setattr(text_rows, "MAX_ROW_BYTES", 100)
    (tmp_path / "x.txt").write_text(PROSE)
    assert refused(load, file_source(tmp_path / "x.txt")).code == "text_too_large"
    write_rows(tmp_path / "x.jsonl", [{"text": PROSE}])
    assert refused(load, file_source(tmp_path / "x.jsonl")).code == "bad_row"


def test_files_that_are_none(load: Callable[..., Windows], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert refused(load, file_source(tmp_path)).code == "not_a_file"
    assert refused(load, file_source(tmp_path / "pipe.txt")).code == "not_a_file"
    assert refused(load, file_source(tmp_path / "gone.txt")).code == "text_not_found"
    assert refused(load, file_source(Path("/a\0b"))).code == "path_not_allowed"


def test_paths_stay_under_the_roots(load: Callable[..., Windows], tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    for folder in (inside, outside):
        (folder / "text.txt").write_text(PROSE)
    (inside / "link.txt").symlink_to(outside / "text.txt")
    (inside / "good.txt").symlink_to(inside / "text.txt")
    assert load(file_source(inside / "text.txt"), roots=[inside]).use.used > 0
    assert load(file_source(inside / "good.txt"), roots=[inside]).use.used > 0
    for path in (outside / "text.txt", inside / "link.txt", inside / ".." / "outside" / "text.txt", Path("/etc/gone")):
        error = refused(load, file_source(path), roots=[inside], role="evaluation")
        assert (error.code, error.param) == ("path_not_allowed", "evaluation.path")
    assert refused(load, file_source(inside / "text.txt"), roots=[]).code == "path_not_allowed"


def test_the_models_own_writing(load: Callable[..., Windows]) -> None:
    asked = []

    def write(tokens: int) -> list[str]:
        asked.append(tokens)
        return [PROSE, PROSE]

    source = Calibration(source="self", sequence_length=LENGTH)
    assert load(source, 4, write_text=write).use.source == "self"
    assert asked == [4 * LENGTH]
    assert refused(load, source).code == "self_not_available"


def test_the_hub(load: Callable[..., Windows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Calibration(source="hub", dataset="wikitext", sequence_length=LENGTH)
    offline = refused(load, source)
    assert offline.code == "hub_unavailable"
    assert "offline" in offline.message
    monkeypatch.setitem(sys.modules, "datasets", None)
    absent = refused(load, source, hub_offline=False)
    assert absent.code == "hub_unavailable"
    assert "not installed" in absent.message
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    for name in ("../x", "/etc", "a/b/c", "local", "https://x.y"):
        other = Calibration(source="hub", dataset=name, sequence_length=LENGTH)
        assert refused(load, other, hub_offline=False).code == "bad_dataset_name"


def test_builtin_halves_share_nothing(load: Callable[..., Windows]) -> None:
    calibration = load(Calibration(sequence_length=LENGTH), 10_000)
    evaluation = load(Evaluation(sequence_length=LENGTH), 10_000, role="evaluation")
    assert min(calibration.use.used, evaluation.use.used) > 1000
    assert calibration.use.source != evaluation.use.source
    assert_disjoint(calibration, evaluation)
    halves = [{p.strip() for p in text_rows.builtin_text(role).split("\n\n")} for role in ("calibration", "evaluation")]
    assert halves[0] & halves[1] <= {""}


def test_evaluation_on_the_calibration_text_is_refused(load: Callable[..., Windows], tmp_path: Path) -> None:
    path, excerpt = tmp_path / "text.txt", tmp_path / "excerpt.txt"
    words = "".join(f"The boat number {number} went out. " for number in range(500))
    path.write_text(words)
    excerpt.write_text(words[3001:9001])
    calibration = load(file_source(path), 1000)
    for same in (
        load(file_source(path), 2),
        load(file_source(path, sequence_length=48), 2),
        load(file_source(excerpt), 20),
    ):
        with pytest.raises(InvalidCalibration, match="another text") as caught:
            assert_disjoint(calibration, same)
        assert (caught.value.code, caught.value.param) == ("evaluation_is_calibration", "evaluation")
    other = tmp_path / "other.txt"
    other.write_text("".join(f"Seven wizards watch {number} rivers. " for number in range(500)))
    assert_disjoint(calibration, load(file_source(other), 20))
