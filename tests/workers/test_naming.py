"""Names of artifacts."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from api_schemas.models import ModelName
from api_schemas.recipe import Recipe
from workers.naming import compressed_name

JOB = "job-0123456789abcdef01234567"
RECIPE = Recipe.model_validate({"steps": [{"method": "modegpt", "sparsity": 0.2}]})


def name(model: str = "smol", suffix: str | None = None, taken: frozenset[str] = frozenset()) -> str:
    made = compressed_name(model, RECIPE, suffix, JOB, taken.__contains__)
    return TypeAdapter(ModelName).validate_python(made)


def test_the_method_or_the_suffix_names_it() -> None:
    assert name() == "smol-modegpt-20pct-portable-012345"
    assert name(suffix="mine") == "smol-mine-012345"


@pytest.mark.parametrize(
    ("target", "label"),
    [
        ({"bytes": "90 MB"}, "90MB"),
        ({"bytes": "8 GiB"}, "8.59GB"),
        ({"bytes": 12}, "12B"),
        ({"parameters": 110_500_000}, "110.5M"),
        ({"perplexity_increase": 0.1}, "ppl10pct"),
        ({"perplexity_increase": 0.00123456}, "ppl0.1235pct"),
    ],
)
def test_a_target_names_it_too(target: dict[str, Any], label: str) -> None:
    asked = Recipe.model_validate({"steps": [{"method": "modegpt", "target": target}]})
    assert compressed_name("smol", asked, None, JOB, lambda _: False) == f"smol-modegpt-{label}-portable-012345"


def test_each_step_of_a_recipe_is_in_the_name() -> None:
    steps = [{"method": "modegpt", "sparsity": 0.2, "layout": "full"}, {"method": "gptq", "bits": 8}]
    made = compressed_name("smol", Recipe.model_validate({"steps": steps}), None, JOB, lambda _: False)
    assert made == "smol-modegpt-20pct-full-gptq-int8-012345"


def test_a_long_name_is_cut_so_that_the_digits_stay() -> None:
    assert len(name(model="m" * 128, suffix="s" * 64)) == 128
    assert name(model="m" * 128, suffix="s" * 64).endswith("-" + "s" * 64 + "-012345")


def test_a_taken_name_gets_more_digits() -> None:
    assert name(taken=frozenset({name()})) == "smol-modegpt-20pct-portable-0123456789ab"
    with pytest.raises(ValueError, match="every name"):
        compressed_name("smol", RECIPE, None, JOB, lambda _: True)
