"""mPLUG-2 from its published files: the result computes what an independent reimplementation of the original does."""

import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import compression.runtime  # noqa: F401  (registers mPLUG-2)
from api_schemas.errors import InvalidCheckpoint
from api_schemas.imports import MPlug2Import
from compression.importers import mplug2
from compression.importers.ledger import read_ledger
from compression.importers.mplug2_files import BertSizes
from compression.runtime.beam_search import BeamSettings
from compression.runtime.mplug2 import MPlug2Config, empty_model, frame_numbers, frame_pixels
from tests import tiny_mplug2 as original

QUESTION = torch.tensor([[2, 8, 9, 10, 11, 3]])
MASK = torch.ones_like(QUESTION)
WRITTEN = torch.tensor([[2, 5, 6, 12]])


def request_for(folder, task):
    return MPlug2Import(
        family="mplug2",
        checkpoint=str(folder / "mPLUG2_tiny.pth"),
        bert_config=str(folder / "config_bert.json"),
        tokenizer=str(folder / "bert"),
        task=task,
        frames=4,
    )


def convert(folder, target, task):
    return mplug2.convert(request_for(folder, task), target)


def loaded(folder):
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def close(ours, theirs):
    return float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


@pytest.fixture(scope="module")
def captioner():
    return original.random_weights(original.MPlug2())


@pytest.fixture(scope="module")
def answerer():
    return original.random_weights(original.MPlug2(twins=True), seed=1)


@pytest.fixture(scope="module")
def caption_folder(captioner, tmp_path_factory):
    root = tmp_path_factory.mktemp("caption")
    convert(original.write_original(root / "from", captioner, "module"), root / "made", "caption")
    return root / "made"


@pytest.fixture(scope="module")
def question_folder(answerer, tmp_path_factory):
    root = tmp_path_factory.mktemp("question")
    convert(original.write_original(root / "from", answerer), root / "made", "question")
    return root / "made"


@torch.inference_mode()
def test_captions_are_the_originals(captioner, caption_folder):
    model, pixels = loaded(caption_folder), original.clip(clips=2)
    written = WRITTEN.expand(2, -1)
    assert close(model.see(pixels), captioner.see(pixels))
    assert close(model(pixels, written).logits, captioner.logits(pixels, written))


@torch.inference_mode()
def test_answers_are_the_originals_with_and_without_padding(answerer, question_folder):
    model, pixels = loaded(question_folder), original.clip(1)
    theirs = answerer.logits(pixels, WRITTEN, QUESTION, MASK)
    assert close(model(pixels, WRITTEN, QUESTION).logits, theirs)
    padded = torch.cat([QUESTION, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = torch.cat([MASK, torch.zeros(1, 3, dtype=torch.long)], 1)
    assert close(model(pixels, WRITTEN, padded, mask).logits, answerer.logits(pixels, WRITTEN, padded, mask))
    assert close(model(pixels, WRITTEN, padded, mask).logits, theirs)


@pytest.mark.parametrize(("beams", "shortest", "longest"), [(5, 4, 12), (1, 0, 6), (3, 0, 10)])
@torch.inference_mode()
def test_beam_search_with_a_cache_is_the_published_loop_without(captioner, caption_folder, beams, shortest, longest):
    settings = BeamSettings(original.START, original.END, beams=beams, shortest=shortest, longest=longest)
    for seed in range(3):
        pixels = original.clip(seed)
        ours = loaded(caption_folder).generate(pixels, settings=settings)[0]
        theirs = captioner.search(pixels, beams, shortest, longest)
        assert [tokens for _, tokens in ours] == [tokens for _, tokens in theirs]
        assert torch.allclose(
            torch.tensor([one for one, _ in ours]), torch.tensor([one for one, _ in theirs]), atol=1e-5
        )


@torch.inference_mode()
def test_beam_search_over_a_question(answerer, question_folder):
    ours = loaded(question_folder).generate(original.clip(5), QUESTION)[0]
    theirs = answerer.search(original.clip(5), 5, 4, 20, QUESTION, MASK)
    assert [tokens for _, tokens in ours] == [tokens for _, tokens in theirs]


@torch.inference_mode()
def test_two_clips_and_two_orders_of_frames_look_different(caption_folder):
    model = loaded(caption_folder)
    first, second = model.see(original.clip(0)), model.see(original.clip(1))
    assert not close(first, second)
    backwards = model.see(original.clip(0).flip(2))[:, 0]  # the class token: the mean over frames
    assert not close(backwards, first[:, 0])


@pytest.mark.parametrize(
    "part",
    [
        "vision.blocks.0.before",
        "vision.blocks.1.between",
        "reader.layers.0.crossing",
        "vision_norm",
        "reader.layers.1.mlp",
    ],
)
@torch.inference_mode()
def test_each_part_counts(captioner, caption_folder, part):
    model, pixels = loaded(caption_folder), original.clip()
    model.get_submodule(part).forward = lambda states, *_: states
    assert not close(model.see(pixels), captioner.see(pixels))


def test_a_caption_file_loses_just_what_captions_do_not_run(captioner, caption_folder):
    dropped = read_ledger(caption_folder)["dropped"]
    groups = {rule: {key.partition(":")[2].split(".")[0] for key in found["keys"]} for rule, found in dropped.items()}
    assert {rule: names for rule, names in groups.items() if names} == {
        "clip_text_tower": {"visual_encoder"},
        "clip_projection": {"visual_encoder"},
        "text_reading": {"text_encoder"},
        "fusion_encoder": {"fusion_encoder"},
        "unused_vision_mlp": {"text_encoder", "text_decoder"},
        "decoder_latents": {"text_decoder"},
        "positions": {"text_encoder", "text_decoder"} | {"fusion_encoder"},
        "tied_head": {"text_decoder"},
    }
    layers = {key.split("encoder.layer.")[1][0] for key in dropped["text_reading"]["keys"] if "layer." in key}
    assert layers == {"0", "1"}
    state = captioner.state_dict()
    kept = sum(p.numel() for p in loaded(caption_folder).parameters())
    gone = sum(state[key.partition(":")[2]].numel() for rule in dropped.values() for key in rule["keys"])
    assert kept + gone == sum(tensor.numel() for tensor in state.values())


def test_a_question_file_loses_its_twins_and_the_lower_fusion_layers(question_folder):
    dropped = read_ledger(question_folder)["dropped"]
    assert "text_reading" not in dropped
    assert dropped["momentum_twin"]["bytes"] > 0
    layers = {key.split("encoder.layer.")[1][0] for key in dropped["fusion_below"]["keys"] if "layer." in key}
    assert layers == {"0", "1"}
    assert dropped["optimizer_state"]["bytes"] == 400
    saved = read_ledger(question_folder)["savings"]
    assert saved[0]["what"] == "momentum_twin"
    assert {one["what"]: one["bytes"] for one in saved}["optimizer_state"] == 400


def test_the_real_sizes(monkeypatch):
    """The published configuration on the meta device: 1,555 million parameters in a file for captions, 622 needed."""
    for name, value in {
        "WIDTH": 1024,
        "SIDE": 16,
        "BLOCKS": 24,
        "CLIP_WIDTH": 768,
        "CLIP_BLOCKS": 12,
        "CLIP_WORDS": 49408,
        "CLIP_LENGTH": 77,
        "SHARED": 768,
    }.items():
        monkeypatch.setattr(original, name, value)
    large = {"hidden_size": 1024, "intermediate_size": 4096, "max_position_embeddings": 512, "num_attention_heads": 16}
    layers = {"num_hidden_layers": 24, "text_encoder_layers": 24, "fusion_layers": 6, "text_decode_layers": 12}
    with torch.device("meta"):
        published = original.MPlug2({**original.SIZES, **large, **layers, "vocab_size": 30522})
    tied = 30522 * 1024  # once as the decoder's embedding, once as its head
    assert round((sum(parameter.numel() for parameter in published.parameters()) + tied) / 1e6) == 1555
    sizes = BertSizes(1024, 16, 4096, 1e-12, 30522, 512, 2, 24, 24, 6, 12)
    vision = {"width": 1024, "patch": 14, "image": 224, "blocks": 24}
    needed = {}
    for task, count, fusion in (("caption", 2, 0), ("question", 24, 6)):
        config = MPlug2Config(
            task=task, vision=vision, text=sizes.text(count), fusion_layers=fusion, decoder=sizes.decoder(0)
        )
        needed[task] = sum(parameter.numel() for parameter in empty_model(config).parameters())
    assert (round(needed["caption"] / 1e6), round(needed["question"] / 1e6)) == (622, 1032)
    assert (round((needed["caption"] + tied) / 1e6), round((needed["question"] + tied) / 1e6)) == (653, 1063)


@torch.inference_mode()
def test_names_of_a_pretraining_file(captioner, tmp_path):
    source = original.write_original(tmp_path / "from", captioner, pretraining_names=True)
    convert(source, tmp_path / "made", "caption")
    pixels = original.clip()
    assert close(loaded(tmp_path / "made").see(pixels), captioner.see(pixels))


@torch.inference_mode()
def test_a_tower_of_another_width_than_the_text(tmp_path):
    reference = original.random_weights(original.MPlug2({**original.SIZES, "hidden_size": 32}), seed=3)
    convert(original.write_original(tmp_path / "from", reference), tmp_path / "made", "caption")
    pixels = original.clip()
    assert close(loaded(tmp_path / "made")(pixels, WRITTEN).logits, reference.logits(pixels, WRITTEN))


def test_frames_are_the_middles_of_equal_spans_and_the_last_again():
    assert frame_numbers(16, 4) == [1, 5, 9, 13]
    assert frame_numbers(10, 4) == [0, 3, 5, 8]
    assert frame_numbers(3, 4) == [0, 1, 2, 2]
    assert frame_numbers(1, 4) == [0, 0, 0, 0]


@torch.inference_mode()
def test_one_image_is_a_clip_that_stands_still(captioner, caption_folder):
    model = loaded(caption_folder)
    image = torch.randint(0, 256, (50, 31, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    pixels = frame_pixels([image], model.config)
    assert pixels.shape == (1, 3, 4, 28, 28)
    assert torch.equal(pixels[:, :, 0], pixels[:, :, 3])
    red = image[50 * 3 // 28, 31 * 7 // 28, 0].item()
    assert pixels[0, 0, 0, 3, 7].item() == pytest.approx((red / 255 - 0.48145466) / 0.26862954, abs=1e-6)
    assert close(model(pixels, WRITTEN).logits, captioner.logits(pixels, WRITTEN))


def test_the_folder_has_a_tokenizer_and_says_its_task(caption_folder):
    config = json.loads((caption_folder / "config.json").read_text())
    assert (config["model_type"], config["task"], config["prompt"]) == ("modepress_mplug2", "caption", "a video of")
    assert (config["beams"]["start"], config["beams"]["end"]) == (original.START, original.END)
    assert AutoTokenizer.from_pretrained(caption_folder).decode([5, 6, 7]) == "a video of"


def broken(tmp_path, model, change, task="caption"):
    """Import a published file after `change(state, sizes, folder)`; return the error."""
    folder = original.write_original(tmp_path / "from", model)
    content = torch.load(folder / "mPLUG2_tiny.pth")
    sizes = json.loads((folder / "config_bert.json").read_text())
    change(content["model"], sizes, folder)
    torch.save(content, folder / "mPLUG2_tiny.pth")
    (folder / "config_bert.json").write_text(json.dumps(sizes))
    with pytest.raises(InvalidCheckpoint) as caught:
        convert(folder, tmp_path / "made", task)
    assert not (tmp_path / "made").exists()
    return caught.value


def test_a_renamed_key_is_named(tmp_path, captioner):
    name = "visual_encoder.visual.transformer.resblocks.1.lmhra2.conv.weight"
    error = broken(tmp_path, captioner, lambda state, *_: state.update(renamed=state.pop(name)))
    assert (error.code, error.param) == ("missing_tensor", name)


def test_a_key_that_no_rule_knows_is_named(tmp_path, captioner):
    error = broken(tmp_path, captioner, lambda state, *_: state.update({"itm_head.weight": torch.zeros(2, 64)}))
    assert (error.code, error.param) == ("unexpected_tensor", "itm_head.weight")


def test_a_file_for_questions_is_no_file_for_captions(tmp_path, answerer):
    error = broken(tmp_path, answerer, lambda *_: None)
    assert (error.code, error.param) == ("wrong_task", "task")


def test_one_tensor_under_two_names(tmp_path, captioner):
    name = "text_encoder.encoder.layer.3.output.dense.bias"
    twice = name.replace("text_encoder.", "text_encoder.bert.")
    error = broken(tmp_path, captioner, lambda state, *_: state.update({twice: state[name]}))
    assert error.code == "duplicate_tensor"


def test_a_head_that_is_not_the_embedding(tmp_path, captioner):
    def untie(state, *_):
        state["text_decoder.cls.predictions.decoder.weight"] = torch.zeros(40, 64)

    assert broken(tmp_path, captioner, untie).code == "untied_head"


def test_a_file_of_clip_alone(tmp_path, captioner):
    def leave_clip(state, *_):
        for name in [name for name in state if not name.startswith("visual_encoder.transformer")]:
            del state[name]

    error = broken(tmp_path, captioner, leave_clip)
    assert (error.code, error.param) == ("missing_tensor", "visual_encoder.visual.conv1.weight")


def test_a_tower_that_samples_time(tmp_path, captioner):
    def widen(state, *_):
        state["visual_encoder.visual.conv1.weight"] = torch.zeros(64, 3, 3, 14, 14)

    assert broken(tmp_path, captioner, widen).code == "unsupported_video_encoder"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"num_uni_layer": 3}, "num_uni_layer"),
        ({"stride_layer": 1}, "stride_layer"),
        ({"fusion_layers": 9}, "fusion_layers"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_sizes_that_the_published_code_does_not_have(tmp_path, captioner, change, param):
    error = broken(tmp_path, captioner, lambda _, sizes, __: sizes.update(change))
    assert (error.code, error.param) == ("invalid_config", param)


def test_sizes_of_another_model(tmp_path, captioner):
    error = broken(tmp_path, captioner, lambda _, sizes, __: sizes.update(hidden_size=128))
    assert error.code in ("wrong_shape", "missing_tensor")


def test_a_truncated_file(tmp_path, captioner):
    folder = original.write_original(tmp_path / "from", captioner)
    path = folder / "mPLUG2_tiny.pth"
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(InvalidCheckpoint) as caught:
        convert(folder, tmp_path / "made", "caption")
    assert caught.value.code == "truncated_file"


def test_a_question_is_needed_or_refused(caption_folder, question_folder):
    with pytest.raises(ValueError, match="takes none"):
        loaded(caption_folder).generate(original.clip(), QUESTION)
    with pytest.raises(ValueError, match="needs a question"):
        loaded(question_folder).generate(original.clip())
