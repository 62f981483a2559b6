"""TableGPT2 from its published files: the result computes what an independent reimplementation of the original does."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import compression.runtime  # noqa: F401  (registers TableGPT2)
from api_schemas.errors import InvalidCheckpoint
from api_schemas.imports import TableGpt2Import
from compression.importers import tablegpt2
from compression.importers.ledger import read_ledger
from compression.importers.sanity import TEXT, TOKENS
from tests import tiny_tablegpt2 as original
from tests.tiny_models import make_tiny_model


def convert(folder, target):
    return tablegpt2.convert(TableGpt2Import(family="tablegpt2", folder=str(folder)), target)


def loaded(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def inputs_of(tables):
    """What our runtime takes for tables of token ids by row and column."""
    cells = [cell for table in tables for row in table for cell in row]
    longest = max(map(len, cells))
    ids = torch.tensor([cell + [0] * (longest - len(cell)) for cell in cells])
    mask = torch.tensor([[1] * len(cell) + [0] * (longest - len(cell)) for cell in cells])
    sizes = torch.tensor([[len(table), len(table[0])] for table in tables])
    return {"table_cells": ids, "table_mask": mask, "table_sizes": sizes}


def prompt_of(tables):
    places = [original.PLACE] * (original.QUERIES * sum(len(table[0]) for table in tables))
    return [5, 6, 7, *places, 8, 9, 10, 11]


def close(ours, theirs):
    """Within 1e-5 of the scale; families.md 8."""
    return float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


@pytest.fixture(scope="module")
def reference():
    return original.random_weights(original.CellTableGPT())


@pytest.fixture(scope="module")
def imported(reference, tmp_path_factory):
    """Folders by layout."""
    root = tmp_path_factory.mktemp("tablegpt2")
    made = {}
    for layout in ("safetensors", "bin", "parts"):
        source = original.write_original(root / f"from-{layout}", reference, original.cell_config(), layout)
        convert(source, made.setdefault(layout, root / layout))
    return made


@pytest.mark.parametrize("layout", ["safetensors", "bin", "parts"])
@torch.inference_mode()
def test_logits_are_the_originals(reference, imported, layout):
    tables = [original.table_ids(4, 3), original.table_ids(2, 5, seed=1)]
    prompt = prompt_of(tables)
    ours = loaded(imported[layout])(input_ids=torch.tensor([prompt]), **inputs_of(tables)).logits[0]
    assert close(ours, reference.logits(prompt, tables))


@torch.inference_mode()
def test_generation_reads_the_table_once_and_answers_as_without_a_cache(reference, imported):
    tables, model = [original.table_ids(3, 2)], loaded(imported["bin"])
    prompt = prompt_of(tables)
    written = model.generate(
        input_ids=torch.tensor([prompt]), **inputs_of(tables), max_new_tokens=6, do_sample=False, eos_token_id=383
    )[0].tolist()
    tokens = list(prompt)
    for _ in range(6):
        tokens.append(int(reference.logits(tokens, tables)[-1].argmax()))
    assert written == tokens


@torch.inference_mode()
def test_the_order_of_rows_means_nothing_and_that_of_columns_something(imported):
    table, model = original.table_ids(5, 3), loaded(imported["bin"])
    states = model.encode_tables(*inputs_of([table]).values())
    assert close(model.encode_tables(*inputs_of([table[::-1]]).values()), states)
    turned = model.encode_tables(*inputs_of([[row[::-1] for row in table]]).values())
    moved = turned.unflatten(0, (3, original.QUERIES)).flip(0).flatten(0, 1)
    assert close(moved, states)  # columns have no positions either: each takes its own along
    assert not close(turned, states)


@torch.inference_mode()
def test_a_residual_of_the_usual_kind_is_caught(reference, imported):
    table, model = original.table_ids(4, 3), loaded(imported["bin"])
    wanted = reference.positions(table)
    assert close(model.encode_tables(*inputs_of([table]).values()), wanted)
    attention = model.table_encoder.blocks[0].across
    kept = attention.forward
    attention.forward = lambda states: kept(states) - attention.norm(states) + states  # x + f(LN(x))
    assert not close(model.encode_tables(*inputs_of([table]).values()), wanted)


def test_what_was_dropped_and_folded_stands_in_the_ledger(reference, imported):
    record = read_ledger(imported["parts"])
    assert set(record["dropped"]) == {"contrastive_head"}
    keys = record["dropped"]["contrastive_head"]["keys"]
    assert keys == [
        f"encoder:col_specific_projection_head.layers.{i}.{leaf}" for i in (0, 2) for leaf in ("bias", "weight")
    ]
    head = reference.encoder.col_specific_projection_head
    assert record["dropped"]["contrastive_head"]["bytes"] == 4 * sum(p.numel() for p in head.parameters())
    score = record["targets"]["table_encoder.summary.score.weight"]
    assert score["from"] == ["encoder:qformer.q", "encoder:qformer.to_kv.weight"]
    theirs = sum(parameter.numel() for parameter in reference.parameters())
    folded = reference.encoder.qformer.q.numel() + original.HIDDEN * original.CELL  # queries and keys …
    folded -= original.QUERIES * original.HIDDEN // original.SUMMARY_HEAD_DIM * original.CELL  # … as scores
    assert {"what": "queries_folded_into_keys", "bytes": 4 * folded} in record["savings"]
    assert record["variant"] == "with table encoder, over cells"
    assert record["text_loss"]["guessing"] == pytest.approx(math.log(384))
    assert record["warnings"][0].startswith("answers_like_noise: ")  # random weights know no English
    ours = sum(parameter.numel() for parameter in loaded(imported["parts"]).parameters())
    assert theirs - ours == folded + sum(p.numel() for p in head.parameters())


def test_the_result_is_whole_and_nothing_of_the_authors_code_is_in_it(imported):
    names = {path.name for path in imported["bin"].iterdir()}
    assert {"tables.json", "table_tokenizer.json", "tokenizer.json", "import_ledger.json"} <= names
    assert not [name for name in names if name.endswith((".py", ".bin"))]
    assert "auto_map" not in (imported["bin"] / "config.json").read_text()
    rule = json.loads((imported["bin"] / "tables.json").read_text())
    assert (rule["rule"], rule["rows"], rule["columns"]) == ("cells", original.ROWS, original.COLUMNS)


def test_the_real_sizes():
    """The published configuration on the meta device; the authors' encoder has 260,100,224 parameters."""
    from compression.importers.tablegpt2_config import whole_config
    from compression.runtime.tablegpt2 import empty_model

    config = original.cell_config()
    config["llm_config"] = {**original.DECODER, "hidden_size": 3584, "num_attention_heads": 28}
    config["encoder_config"] |= {"depth": 12, "heads": 16, "dim_head": 64, "qformer_dim_head": 128}
    sentence = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    config["encoder_config"]["st_config"] = {
        **original.SENTENCE,
        **sentence,
        "intermediate_size": 1536,
        "max_position_embeddings": 512,
    }
    model = empty_model(whole_config(config, 3584))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["table_encoder.blocks.11.down.query_key_value.weight"] == (3072, 384)
    assert shapes["table_encoder.summary.mlp.up.weight"] == (28672, 3584)
    assert shapes["projector.1.weight"] == (3584, 3584)
    ours = sum(parameter.numel() for parameter in model.table_encoder.parameters())
    head = 384 * 384 + 384 + 384 * 256 + 256
    folded = 3 * 3584 + 3584 * 384 - 84 * 384
    assert ours + head + folded == 260_100_224


@torch.inference_mode()
def test_the_variant_that_reads_markdown(tmp_path):
    reference = original.random_weights(original.MarkupTableGPT(), seed=2)
    source = original.write_original(tmp_path / "source", reference, original.markup_config(), "safetensors")
    convert(source, tmp_path / "made")
    tables = [[7, 9, 4, 100, 3], [11, 2, 5]]
    prompt = [5, 6, *[original.PLACE] * 8, 9, 10]
    ids = torch.tensor([tables[0], [*tables[1], 0, 0]])
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    ours = loaded(tmp_path / "made")(
        input_ids=torch.tensor([prompt]), table_cells=ids, table_mask=mask, table_sizes=torch.tensor([[1, 1], [1, 1]])
    ).logits[0]
    assert close(ours, reference.logits(prompt, tables))
    record = read_ledger(tmp_path / "made")
    assert list(record["dropped"]) == ["causal_mask"]


@torch.inference_mode()
def test_the_decoder_alone(tmp_path):
    source = make_tiny_model(tmp_path / "source", "qwen2", seed=7)
    record = convert(source, tmp_path / "made")
    assert not record["dropped"]
    assert record["variant"] == "decoder only"
    tokens = torch.tensor([AutoTokenizer.from_pretrained(source)(TEXT)["input_ids"][:TOKENS]])
    loss = loaded(source)(tokens, labels=tokens).loss
    assert record["text_loss"]["nats_per_token"] == pytest.approx(float(loss), rel=1e-4)
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(tmp_path / "made")(tokens).logits, loaded(source)(tokens).logits)
    assert json.loads((tmp_path / "made" / "tables.json").read_text()) == {"rule": "text", "rows": 5}


@torch.inference_mode()
def test_a_head_that_is_the_embedding_is_kept_once_and_another_refused(tmp_path):
    reference = original.random_weights(original.CellTableGPT(), seed=8)
    config = original.cell_config()
    config["llm_config"] = {**original.DECODER, "tie_word_embeddings": True}
    with pytest.raises(InvalidCheckpoint) as caught:
        convert(original.write_original(tmp_path / "untied", reference, config, "parts"), tmp_path / "made")
    assert (caught.value.code, caught.value.param) == ("untied_head", "lm_head.weight")
    reference.decoder.lm_head.weight = reference.decoder.model.embed_tokens.weight
    record = convert(original.write_original(tmp_path / "tied", reference, config, "bin"), tmp_path / "made")
    assert record["dropped"]["tied_head"]["keys"] == ["model:decoder.lm_head.weight"]
    tables = [original.table_ids(3, 2)]
    prompt = prompt_of(tables)
    ours = loaded(tmp_path / "made")(input_ids=torch.tensor([prompt]), **inputs_of(tables)).logits[0]
    assert close(ours, reference.logits(prompt, tables))


def broken(tmp_path, reference, change, layout="bin"):
    """Import a published folder after `change(state, config, folder)`; return the error."""
    folder = original.write_original(tmp_path / "source", reference, original.cell_config(), layout)
    state = torch.load(folder / "pytorch_model.bin") if layout == "bin" else {}
    config = json.loads((folder / "config.json").read_text())
    change(state, config, folder)
    if state:
        torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidCheckpoint) as caught:
        convert(folder, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    return caught.value


def test_a_renamed_key_is_named(tmp_path, reference):
    def rename(state, _, __):
        state["encoder.transformer.layers.1.2.fn.to_qkv.weight"] = state.pop(
            "encoder.transformer.layers.1.2.fn.fn.to_qkv.weight"
        )

    error = broken(tmp_path, reference, rename)
    assert error.code == "missing_tensor"
    assert "encoder.transformer.layers.1.2.fn.fn.to_qkv.weight" in error.message


def test_a_key_that_nothing_uses_is_named(tmp_path, reference):
    error = broken(tmp_path, reference, lambda state, *_: state.update({"encoder.cls": torch.zeros(3)}))
    assert (error.code, error.param) == ("unexpected_tensor", "encoder.cls")


def test_another_decoder_is_refused_with_the_shapes(tmp_path, reference):
    error = broken(tmp_path, reference, lambda _, config, __: config["llm_config"].update(vocab_size=400))
    assert error.code == "wrong_shape"
    assert "[400, 32]" in error.message
    assert "[384, 32]" in error.message


def test_more_blocks_than_stored(tmp_path, reference):
    error = broken(tmp_path, reference, lambda _, config, __: config["encoder_config"].update(depth=3))
    assert error.code == "missing_tensor"


def test_fewer_blocks_than_stored(tmp_path, reference):
    error = broken(tmp_path, reference, lambda _, config, __: config["encoder_config"].update(depth=1))
    assert error.code == "unexpected_tensor"
    assert "encoder.transformer.layers.1." in error.message


def test_a_truncated_file(tmp_path, reference):
    def cut(_, __, folder):
        path = folder / "decoder.bin"
        path.write_bytes(path.read_bytes()[:-2000])

    assert broken(tmp_path, reference, cut, "parts").code == "truncated_file"


def test_a_part_that_is_absent(tmp_path, reference):
    folder = original.write_original(tmp_path / "source", reference, original.cell_config(), "parts")
    (folder / "projector.bin").unlink()
    with pytest.raises(Exception, match=r"projector\.bin") as caught:
        convert(folder, tmp_path / "made")
    assert caught.value.code == "file_not_found"


def test_two_sets_of_weights(tmp_path, reference):
    error = broken(tmp_path, reference, lambda _, __, folder: (folder / "encoder.bin").write_bytes(b"x"))
    assert error.code == "two_layouts"


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"attentiontype": "col"}, "unsupported_table_encoder", "encoder_config.attentiontype"),
        ({"pooling": "cls"}, "unsupported_table_encoder", "encoder_config.pooling"),
        ({"depth": "two"}, "invalid_config", "encoder_config.depth"),
        ({"st_config": None}, "invalid_config", "encoder_config.st_config"),
    ],
)
def test_encoders_that_are_not_the_published_one(tmp_path, reference, change, code, param):
    error = broken(tmp_path, reference, lambda _, config, __: config["encoder_config"].update(change))
    assert (error.code, error.param) == (code, param)


def test_another_model(tmp_path, reference):
    error = broken(tmp_path, reference, lambda _, config, __: config.update(model_type="llama"))
    assert (error.code, error.param) == ("not_tablegpt2", "model_type")


def test_no_tokenizer_for_cells(tmp_path, reference):
    error = broken(tmp_path, reference, lambda _, __, folder: (folder / "encoder" / "tokenizer.json").unlink())
    assert error.code == "table_tokenizer_missing"


def test_a_link_to_elsewhere_is_not_followed(tmp_path, reference):
    (tmp_path / "secret.json").write_text("{}")

    def link(_, __, folder):
        (folder / "encoder" / "tokenizer.json").unlink()
        (folder / "encoder" / "tokenizer.json").symlink_to(tmp_path / "secret.json")

    error = broken(tmp_path, reference, link)
    assert (error.code, error.param) == ("symlink_refused", "encoder/tokenizer.json")


def test_no_chat_template(tmp_path, reference):
    error = broken(tmp_path, reference, lambda _, __, folder: (folder / "chat_template.jinja").unlink())
    assert error.code == "chat_template_missing"


def test_places_and_positions_must_agree(imported):
    tables, model = [original.table_ids(3, 2)], loaded(imported["bin"])
    with pytest.raises(ValueError, match="places for 9 positions of tables, and the tables have 6"):
        model(input_ids=torch.tensor([prompt_of([original.table_ids(3, 3)])]), **inputs_of(tables))
