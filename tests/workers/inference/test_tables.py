"""Tables in chat: as text that pandas would print, as what a table encoder reads, or refused by name."""

import json
from dataclasses import replace

import httpx
import openai
import pytest
import torch
from tokenizers import Tokenizer

from api_schemas.errors import InvalidCheckpoint, InvalidRequest
from api_schemas.imports import TableGpt2Import
from api_schemas.inference import ChatRequest
from api_schemas.table_parts import Table
from compression.importers.tablegpt2 import convert
from preflight.checkpoint import describe, open_checkpoint
from tests import tiny_tablegpt2 as original
from tests.tiny_models import make_tiny_model
from tests.workers.inference.server import InferenceServer
from workers.inference.generation import generate
from workers.inference.loading import load, plan_load
from workers.inference.prompts import chat_task
from workers.inference.registry import ModelSource
from workers.inference.sampling import of_choice
from workers.inference.tables.frames import cell_texts, read_frame
from workers.inference.tables.printing import to_markdown, to_string

SALES = {
    "columns": [
        {"name": "city", "dtype": "object", "values": ["Oslo", "Zürich", None], "contains_nan": True},
        {"name": "sold", "dtype": "float64", "values": [1.5, None, 4.0], "is_unique": True},
    ]
}
HEAD = "  city  sold\n  Oslo   1.5\nZürich   NaN\n   NaN   4.0"  # printed by pandas 3.1.1


def table(*columns, name=None):
    made = [{"name": one, "dtype": dtype, "values": values} for one, dtype, values in columns]
    return {"columns": made} | ({"name": name} if name else {})


def frame(*columns):
    return read_frame(Table.model_validate(table(*columns)), "messages.0.content.0")


def part(content):
    return {"type": "table", "table": content}


def words(text):
    return {"type": "text", "text": text}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def task_of(loaded, messages, **values):
    return chat_task(loaded, ChatRequest.model_validate({"model": "m", "messages": messages, **values}))


def prompt_text(loaded, messages):
    return loaded.tokenizer.decode([token for token in task_of(loaded, messages).prompt if token >= 0])


def refusal(loaded, messages):
    with pytest.raises(InvalidRequest) as caught:
        task_of(loaded, messages)
    assert caught.value.status == 400
    return caught.value


@pytest.fixture(scope="module")
def references():
    return {
        "cells": original.random_weights(original.CellTableGPT()),
        "markup": original.random_weights(original.MarkupTableGPT(), seed=2),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory, references):
    root = tmp_path_factory.mktemp("tables")
    configs = {"cells": original.cell_config(), "markup": original.markup_config()}
    for name, config in configs.items():
        source = original.write_original(root / "from" / name, references[name], config, "bin")
        convert(TableGpt2Import(family="tablegpt2", folder=str(source)), root / name)
    plain = make_tiny_model(root / "from" / "text", "qwen2")
    convert(TableGpt2Import(family="tablegpt2", folder=str(plain)), root / "text")
    return {name: root / name for name in (*configs, "text")} | {"bare": make_tiny_model(root / "bare")}


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: load(plan_load(ModelSource(name, folder, 1.0))) for name, folder in folders.items()}


# What pandas 3.1.1 (with tabulate 0.10) printed for the same columns.
@pytest.mark.parametrize(
    ("columns", "printed"),
    [
        ([("a", "int64", [1, 2]), ("name", "object", ["x", "yy"])], " a name\n 1    x\n 2   yy"),
        (
            [("a", "float64", [1.0, 2.5]), ("longname", "int64", [1, -200])],
            "  a  longname\n1.0         1\n2.5      -200",
        ),
        (
            [("a", "float64", [1e-7, 2.5]), ("b", "float64", [1234567.891234, 0.1])],
            "           a            b\n1.000000e-07 1.234568e+06\n2.500000e+00 1.000000e-01",
        ),
        (
            [("a", "float64", [0.123456789, None]), ("b", "object", ["x", None]), ("c", "bool", [True, False])],
            "       a   b     c\n0.123457   x  True\n     NaN NaN False",
        ),
        (
            [("a", "float64", [1e10, 2.5e9]), ("b", "int64", [3, None])],
            "           a   b\n1.000000e+10 3.0\n2.500000e+09 NaN",
        ),
        ([("a", "float64", [123456.789, 0.001])], "         a\n123456.789\n     0.001"),
    ],
)
def test_text_is_what_pandas_prints(columns, printed):
    assert to_string(frame(*columns), index=False) == printed


def test_markdown_and_a_head_with_row_numbers_are_what_pandas_prints():
    mixed = frame(
        ("a", "int64", [1, 20]), ("name", "object", ["x|z", "yy"]), ("f", "float64", [1.123456789, 1234567.0])
    )
    assert to_markdown(mixed) == (
        "|    |   a | name   |           f |\n|---:|----:|:-------|------------:|\n"
        "|  0 |   1 | x|z    | 1.12346     |\n|  1 |  20 | yy     | 1.23457e+06 |"
    )
    bits = frame(("bb", "bool", [False, True]))
    assert to_markdown(bits) == "|    |   bb |\n|---:|-----:|\n|  0 |    0 |\n|  1 |    1 |"
    short = frame(("a", "int64", [1, 20]), ("name", "object", ["x", "yy"]), ("f", "float64", [1.5, None]))
    assert to_string(short, index=True) == "    a name    f\n0   1    x  1.5\n1  20   yy  NaN"


def test_cells_are_what_the_encoder_was_given():
    mixed = frame(("a", "int64", [1, 2, 4]), ("b", "float64", [1.5, None, 2.0]), ("c", "object", ["x", None, "é"]))
    assert cell_texts(mixed, 9) == [["1", "1.5", "x"], ["2", "1.75", "nan"], ["4", "2.0", "é"]]
    numbers = frame(("a", "int64", [1, 2]), ("b", "float64", [None, None]))
    assert cell_texts(numbers, 9) == [["1.0", "0.0"], ["2.0", "0.0"]]


def test_too_many_rows_are_chosen_the_same_way_each_time():
    long = frame(("a", "int64", list(range(10))))
    assert cell_texts(long, 4) == [["0"], ["2"], ["5"], ["7"]]
    assert cell_texts(long, 10) == [[str(row)] for row in range(10)]


def test_a_decoder_alone_reads_text(loaded):
    text = prompt_text(loaded["text"], user(words("Here:\n"), part(SALES), words("How many?")))
    assert text == f"<|im_start|>user\nHere:\n{HEAD}\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    named = prompt_text(loaded["text"], user(part(SALES | {"name": "sales"}), words("How many?")))
    about = '/*\n"sales.head(5).to_string(index=False)" as follows:\n'
    assert f"user\n{about}{HEAD}\n*/\nHow many?<" in named


@torch.inference_mode()
def test_an_encoders_prompt_and_logits_are_the_originals(loaded, references, folders):
    numbers = table(("id", "int64", [7, 8]), ("x", "float64", [0.5, 1.5]), name="other")
    messages = user(part(SALES | {"name": "sales"}), part(numbers), words("How many?"))
    task = task_of(loaded["cells"], messages)
    marked = "<insert_sep><insert_embs><insert_sep>"
    about = "/*\nDetails about the '{}' dataframe that can be used as follows:\n- {} '{}' {}\n- {} '{}' {}\n*/\n"
    text = "<|im_start|>user\n"
    text += about.format("sales", marked, "city", "object", marked, "sold", "float64")
    text += about.format("other", marked, "id", "int64", marked, "x", "float64")
    text += "How many?<|im_end|>\n<|im_start|>assistant\n"
    prompt = []
    for index, piece in enumerate(text.split("<insert_embs>")):
        prompt += [original.PLACE] * (3 if index else 0) + loaded["cells"].tokenizer(piece)["input_ids"]
    assert task.prompt == prompt
    cells = Tokenizer.from_file(str(folders["cells"] / "table_tokenizer.json"))
    cells.no_padding()
    cells.enable_truncation(original.CELL_TOKENS)
    tables = [
        [["Oslo", "1.5"], ["Zürich", "2.75"], ["nan", "4.0"]],
        [["7.0", "0.5"], ["8.0", "1.5"]],
    ]
    ids = [[[cells.encode(cell).ids for cell in row] for row in rows] for rows in tables]
    wanted = references["cells"].logits(prompt, ids)
    ours = loaded["cells"].model(input_ids=torch.tensor([task.prompt]), **task.pictures).logits[0]
    assert float((ours - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@torch.inference_mode()
def test_two_tables_as_markdown(loaded, references, folders):
    small = table(("id", "int64", [7, 8]))
    messages = user(part(SALES | {"name": "sales"}), part(small), words("How many?"))
    task = task_of(loaded["markup"], messages)
    printed = [
        "|    | city   |   sold |\n|---:|:-------|-------:|\n|  0 | Oslo   |    1.5 |\n|  1 | Zürich |  nan   |\n"
        "|  2 | nan    |    4   |",
        "|    |   id |\n|---:|-----:|\n|  0 |    7 |\n|  1 |    8 |",
    ]
    reader = Tokenizer.from_file(str(folders["markup"] / "table_tokenizer.json"))
    reader.no_padding()
    reader.enable_truncation(48)
    ids = [reader.encode(text).ids for text in printed]
    assert task.prompt.count(original.PLACE) == sum(map(len, ids))
    wanted = references["markup"].logits(task.prompt, ids)
    ours = loaded["markup"].model(input_ids=torch.tensor([task.prompt]), **task.pictures).logits[0]
    assert float((ours - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_refusals_by_name(loaded):
    error = refusal(loaded["bare"], user(words("x"), part(SALES)))
    assert (error.code, error.param) == ("tables_not_supported", "messages.0.content.1")
    wide = table(*((f"c{i}", "int64", [1]) for i in range(original.COLUMNS + 1)))
    error = refusal(loaded["cells"], user(part(wide)))
    assert (error.code, error.param) == ("table_too_wide", "messages.0.content.0.table.columns")
    error = refusal(loaded["cells"], user(part(table(("a", "int64", [1, "two"])))))
    assert (error.code, error.param) == ("table_value_mismatch", "messages.0.content.0.table.columns.0.values.1")
    for sneaky in (user(words("<insert_embs>")), user(part(SALES), words("x <insert_embs>"))):
        assert refusal(loaded["cells"], sneaky).code == "table_mark_in_text"
    named = table(("<insert_embs>", "int64", [1]))
    assert refusal(loaded["cells"], user(part(named))).code == "table_mark_in_text"


def test_several_answers_about_a_table_are_each_as_if_alone(loaded):
    task = task_of(
        loaded["cells"], user(part(SALES), words("How many?")), max_tokens=8, temperature=1.5, top_p=1.0, seed=4, n=3
    )
    pieces = list(generate(loaded["cells"], task, lambda: False))
    said = ["".join(piece.text for piece in pieces if piece.index == index) for index in range(3)]
    assert len(set(said)) == 3
    for index in range(3):
        alone = replace(task, choices=1, sampling=of_choice(task.sampling, index))
        assert "".join(piece.text for piece in generate(loaded["cells"], alone, lambda: False)) == said[index]


def test_a_penalty_on_repetition_minds_no_place_of_a_table(loaded):
    messages = user(part(SALES), words("How many?"))
    task = task_of(loaded["cells"], messages, max_tokens=3, temperature=0)
    assert min(task.prompt) == original.PLACE
    assert list(generate(loaded["cells"], task, lambda: False))


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("text", {"rule": "cells", "rows": 5, "place": "<x>"}, "invalid_table_rule"),
        ("cells", {"rule": "markup", "rows": 5, "place": "<x>"}, "invalid_table_rule"),
        ("cells", {"rule": "cells", "rows": 5}, "invalid_table_rule"),
        ("text", {"rule": "text", "rows": 0}, "invalid_table_rule"),
    ],
)
def test_rules_that_do_not_fit(folders, tmp_path, name, change, code):
    import shutil

    copy = shutil.copytree(folders[name], tmp_path / "copy")
    (copy / "tables.json").write_text(json.dumps(change))
    with pytest.raises(InvalidCheckpoint) as caught:
        load(plan_load(ModelSource("copy", copy, 1.0)))
    assert caught.value.code == code


def test_what_the_models_say_of_themselves(folders):
    facts = {name: describe(open_checkpoint(folder)) for name, folder in folders.items()}
    assert {name: fact.reads_tables for name, fact in facts.items()} == {
        "cells": True,
        "markup": True,
        "text": True,
        "bare": False,
    }
    assert {name: fact.modality for name, fact in facts.items()} == {
        "cells": "table-text",
        "markup": "table-text",
        "text": "text",
        "bare": "text",
    }


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    with InferenceServer(tmp_path_factory.mktemp("home")) as running:
        for name, folder in folders.items():
            running.register(name, folder)
        yield running


def test_over_http_two_tables_read_differently_and_the_same_one_the_same(server):
    def ask(content, model="cells"):
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "ai", "content": "Yes."},
            {"role": "tool", "content": [words("4")], "tool_call_id": "call_1"},
            *user(words("Here:"), part(content), words("How many?")),
        ]
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 12}
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()

    first = ask(SALES)["choices"][0]["message"]["content"]
    assert first == ask(SALES)["choices"][0]["message"]["content"]
    other = {"columns": [SALES["columns"][0] | {"values": ["Rome", "Bern", "Lima"]}, SALES["columns"][1]]}
    assert first != ask(other)["choices"][0]["message"]["content"]
    assert ask(SALES, "text")["choices"][0]["finish_reason"] in ("length", "stop")
    refused = ask(SALES, "bare")["error"]
    assert (refused["code"], refused["param"]) == ("tables_not_supported", "messages.3.content.1")


def test_a_ragged_table_is_named_by_its_column(server):
    content = table(("a", "int64", [1, 2]), ("b", "int64", [3]))
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.chat.completions.create(model="cells", messages=user(part(content)))
    assert "column 'b' has 1 values and 'a' has 2" in caught.value.body["message"]


def test_the_role_ai_is_the_assistant():
    request = ChatRequest.model_validate({"model": "m", "messages": [{"role": "ai", "content": "x"}]})
    assert request.messages[0].role == "assistant"
