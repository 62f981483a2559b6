"""Images among text: what block 0 is told of them, windows that cut none, and every refusal by name."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from api_schemas.calibration import Calibration
from api_schemas.errors import InvalidCalibration
from compression.core.picture_encoder import Encoded, PictureEncoder
from compression.core.picture_rows import PictureRow, picture_rows
from compression.core.picture_windows import Filling, load_pictures, seeing
from compression.core.sensitivity import Metrics, walk_backward
from compression.core.streamed_model import StreamedModel
from compression.core.texts import IMAGE, Windows
from preflight.checkpoint import open_checkpoint
from preflight.composite_rows import COMPOSITES
from preflight.families import resolve
from tests.picture_rows import file_of, in_row, mixed_rows, picture, write_rows
from tests.tiny_composites import IMAGE as IMAGE_SIDE
from tests.tiny_composites import KINDS, make_tiny_composite

# mistral3's processor asks for torchvision
SEEING = [kind for kind in KINDS if kind != "mistral3" and not COMPOSITES[kind].blind]


def source(path: Path, **more: Any) -> Calibration:
    return Calibration.model_validate(
        {"source": "file", "path": str(path), "image_field": "image", "sequence_length": 48, **more}
    )


def streamed(folder: Path) -> StreamedModel:
    decoder = open_checkpoint(folder).decoder
    return StreamedModel(folder, resolve(decoder.config), decoder.tensors)


def windows_of(folder: Path, kind: str, rows: list[Any], wanted: int = 6, **more: Any) -> Windows:
    path = write_rows(folder / "rows.jsonl", rows)
    asked, tokenizer = source(path, **more), AutoTokenizer.from_pretrained(folder)
    return load_pictures(
        asked, wanted, picture_rows(path, asked, tokenizer, None), PictureEncoder(folder, COMPOSITES[kind])
    )


@pytest.mark.parametrize("kind", SEEING)
@pytest.mark.parametrize("text", ["what is this?", "before <image> after"])
def test_block_0_is_told_what_stock_code_tells_it(tmp_path: Path, kind: str, text: str) -> None:
    folder = make_tiny_composite(tmp_path, kind, COMPOSITES[kind].decoder)
    encoder, row = PictureEncoder(folder, COMPOSITES[kind]), PictureRow(text, picture(1), "", "row 1")
    encoded = encoder.encode(row)
    placed = text if "<image>" in text else f"<image>{text}"
    inputs = encoder.processor(images=[row.image], text=[placed], add_special_tokens=False, return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.inference_mode():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[0][0]
    assert encoded.tokens == inputs["input_ids"][0].tolist()
    assert len(encoded.places) > 2
    torch.testing.assert_close(encoded.states, hidden[encoded.places], rtol=1e-5, atol=1e-5)
    other = encoder.encode(PictureRow(text, picture(2), "", "row 2"))
    assert not torch.allclose(other.states, encoded.states)


@pytest.mark.parametrize("kind", SEEING)
def test_windows_hold_whole_images_at_their_places(tmp_path: Path, kind: str) -> None:
    folder = make_tiny_composite(tmp_path, kind, COMPOSITES[kind].decoder)
    windows, model = windows_of(folder, kind, mixed_rows(12)), streamed(folder)
    assert windows.pictures is not None
    marked = windows.tokens == IMAGE
    assert windows.use.image_tokens == int(marked.sum()) == len(windows.pictures)
    assert windows.use.images > 2
    assert windows.use.tokens_used == windows.tokens.numel()
    hidden = windows.embed(model)
    torch.testing.assert_close(hidden[marked], windows.pictures)
    torch.testing.assert_close(hidden[~marked], model.embed(windows.tokens.clamp_min(0))[~marked])
    torch.testing.assert_close(windows.embed(model, slice(2, 5)), hidden[2:5])
    torch.testing.assert_close(seeing(model, windows, slice(2, 5)).embed(windows.tokens[2:5]), hidden[2:5])
    with pytest.raises(ValueError, match="other windows"):
        seeing(model, windows, slice(2, 5)).embed(windows.tokens[1:4])


def test_an_image_in_tiles_is_whole_with_the_words_between_them(tmp_path: Path) -> None:
    """Idefics 3 cuts large images into tiles, each behind words that say its row and column."""
    folder = make_tiny_composite(tmp_path, "idefics3")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"do_image_splitting": True, "size": {"longest_edge": 2 * IMAGE_SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    encoder = PictureEncoder(folder, COMPOSITES["idefics3"])
    encoded = encoder.encode(PictureRow("what is this?", picture(1), "", "row 1"))
    tiles = 4 * 5  # two by two, and the whole
    assert len(encoded.places) == tiles
    assert encoded.places[-1] - encoded.places[0] >= tiles  # words between
    rows = [{"image": in_row(picture(seed)), "text": f"number {seed} " * 9} for seed in range(9)]
    windows = windows_of(folder, "idefics3", rows, wanted=3, sequence_length=2 * len(encoded.tokens) + 20)
    marked = (windows.tokens == IMAGE).sum(dim=1)
    assert (marked % tiles == 0).all()
    assert windows.use.image_tokens == tiles * windows.use.images > 0


def test_the_report_knows_one_image_from_another(tmp_path: Path) -> None:
    folder = make_tiny_composite(tmp_path)
    rows = mixed_rows(12)
    one = windows_of(folder, "llava", rows)
    assert one.use.sha256 == windows_of(folder, "llava", rows).use.sha256
    rows[1]["image"] = in_row(picture(99))
    other = windows_of(folder, "llava", rows)
    assert torch.equal(one.tokens, other.tokens)
    assert one.use.sha256 != other.use.sha256
    assert one.text_hash != other.text_hash


Rows = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 7), st.integers(0, 30)), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(rows=Rows, length=st.integers(16, 40), separated=st.booleans())
def test_every_window_is_full_no_image_is_cut_and_no_token_is_used_twice(
    rows: list[tuple[int, int, int]], length: int, separated: bool
) -> None:
    """Rows of (tokens before, image tokens, tokens after); token ids are unique, so that each can be followed."""
    filling, fresh, sent, left = Filling(length, [0] if separated else []), 1, set[int](), 0
    spans: list[int] = []
    for number, (before, image, after) in enumerate(rows):
        ids = list(range(fresh, fresh + before + image + after))
        fresh += len(ids)
        places = list(range(before, before + image))
        sent |= set(ids) - {ids[at] for at in places}
        if not image:
            filling.add_text(ids)
            continue
        already = filling.left_out
        filling.add_picture(Encoded(ids, places, torch.full((image, 1), float(number))), str(number), "row")
        left += filling.left_out - already
        if filling.left_out == already:
            spans.append(image)
    assert all(len(window) == length for window in filling.full)
    used = [token for window in (*filling.full, filling.open, filling.waiting) for token in window]
    words = [token for token in used if token > 0]
    assert len(words) == len(set(words))
    assert set(words) == sent
    states = [int(state) for one in (*filling.pictures, *filling.open_pictures) for state in one.states[:, 0]]
    assert states == sorted(states)
    assert [token for token in used].count(IMAGE) == len(states) == sum(spans)
    at = 0
    for window in filling.full:
        runs = "".join("i" if token == IMAGE else "." for token in window)
        inside = runs.count("i")
        seen = 0
        while seen < inside:
            seen += len(filling.pictures[at].states)
            at += 1
        assert seen == inside
    assert filling.left_out == left


def test_the_loss_does_not_ask_for_image_tokens(tmp_path: Path) -> None:
    """The metric of the last MLP against autograd through stock code, image positions left out of the loss."""
    folder = make_tiny_composite(tmp_path, layers=1)
    windows, model = windows_of(folder, "llava", mixed_rows(9), wanted=3), streamed(folder)
    found: list[Metrics] = []
    part = slice(0, 3)
    walk_backward(
        seeing(model, windows, part),
        model.size,
        windows.tokens[part],
        lambda _index, _block, _inputs, _statistics, metrics: found.append(metrics),
    )
    stock = AutoModelForImageTextToText.from_pretrained(folder).eval()
    said: list[torch.Tensor] = []
    down = stock.model.language_model.layers[0].mlp.down_proj
    down.register_forward_hook(lambda _m, _i, out: (out.retain_grad(), said.append(out))[0])
    hidden = stock.model.language_model(inputs_embeds=windows.embed(model)).last_hidden_state
    logits = stock.lm_head(hidden)[:, :-1]
    targets = windows.tokens[:, 1:]
    asked = targets >= 0
    torch.nn.functional.cross_entropy(logits[asked], targets[asked], reduction="sum").backward()
    assert said[0].grad is not None
    g = said[0].grad.flatten(0, 1).double()
    torch.testing.assert_close(found[0].mlp, g.T @ g / len(g), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "code"),
    [
        ({"bytes": "###"}, "bad_image"),
        ({"bytes": ""}, "bad_image"),
        ({"bytes": "R0lGODlhAQABAAAAACw="}, "bad_image"),
        (7, "bad_image"),
        ("absent.png", "text_not_found"),
        ("../outside.png", "path_not_allowed"),
        ("torn.png", "bad_image"),
        ("wide.png", "image_too_large"),
        ("wide.webp", "image_too_large"),
    ],
)
def test_an_image_that_cannot_serve_is_refused_by_name(tmp_path: Path, image: Any, code: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "outside.png").write_bytes(file_of(picture(0)))
    (tmp_path / "in" / "torn.png").write_bytes(file_of(picture(0))[:200])
    (tmp_path / "in" / "wide.png").write_bytes(file_of(Image.new("1", (9000, 9000))))
    # Pillow would ask for gigabytes before it says how large this one is
    bomb = b"RIFF" + bytes(4) + b"WEBPVP8X" + bytes(8) + 2 * (11999).to_bytes(3, "little")
    (tmp_path / "in" / "wide.webp").write_bytes(bomb)
    path = write_rows(tmp_path / "in" / "rows.jsonl", [{"text": "fine"}, {"text": "words", "image": image}])
    rows = picture_rows(path, source(path), None, [tmp_path / "in"])
    assert next(rows).image is None
    with pytest.raises(InvalidCalibration) as refused:
        next(rows)
    assert refused.value.code == code
    assert "line 2" in refused.value.message


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_images_become_red_green_and_blue_as_the_camera_was_held(tmp_path: Path, mode: str) -> None:
    kind = "JPEG" if mode in ("RGB", "L", "CMYK") else "PNG"
    turned, held = Image.Exif(), io.BytesIO()
    turned[0x0112] = 6  # a quarter turn
    picture(0, (20, 10)).convert(mode).save(held, kind, exif=turned)
    given = {"text": "words", "image": {"bytes": base64.b64encode(held.getvalue()).decode()}}
    path = write_rows(tmp_path / "rows.jsonl", [given])
    image = next(picture_rows(path, source(path), None, None)).image
    assert image is not None
    assert (image.mode, image.size) == ("RGB", (10, 20))


def test_an_upload_cannot_name_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(file_of(picture(0)))
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "words", "image": "a.png"}])
    uploaded = Calibration(source="upload", file_id="file-1", image_field="image")
    with pytest.raises(InvalidCalibration) as refused:
        next(picture_rows(path, uploaded, None, None))
    assert refused.value.code == "image_path_refused"
    assert next(picture_rows(path, source(path), None, None)).image is not None


def test_a_plain_text_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("words")
    with pytest.raises(InvalidCalibration) as refused:
        next(picture_rows(path, source(path), None, None))
    assert refused.value.code == "images_need_rows"


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([{"text": "word " * 60 + "<image>", "image": in_row(picture(0))}], "image_too_long"),
        ([{"text": "<image> and <image>", "image": in_row(picture(0))}], "bad_row"),
        ([{"text": "word " * 200}], "no_images"),
        ([{"text": "a", "image": in_row(picture(0))}], "text_too_short"),
    ],
)
def test_rows_that_make_no_windows_are_refused_by_name(tmp_path: Path, rows: list[Any], code: str) -> None:
    folder = make_tiny_composite(tmp_path)
    with pytest.raises(InvalidCalibration) as refused:
        windows_of(folder, "llava", rows)
    assert refused.value.code == code


@pytest.mark.parametrize("named", ["LlamaTokenizer", "NoSuchProcessor"])
def test_a_processor_that_cannot_be_loaded_is_refused_by_name(tmp_path: Path, named: str) -> None:
    folder = make_tiny_composite(tmp_path)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": named}))
    with pytest.raises(InvalidCalibration, match=named) as refused:
        PictureEncoder(folder, COMPOSITES["llava"])
    assert refused.value.code == "processor_unavailable"


@pytest.mark.parametrize("wrong", [{"source": "builtin"}, {"source": "file", "path": "a", "text_field": "image"}])
def test_a_source_without_rows_has_no_images(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="image_field"):
        Calibration.model_validate({"image_field": "image", **wrong})
