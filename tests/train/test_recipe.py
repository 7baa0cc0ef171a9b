"""Recipes: the paper's values, and every wrong knob named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from curate.core.errors import Exit, UserError
from train.recipe import Recipe, from_values, learnt, read_values


def test_the_papers_values_are_the_defaults() -> None:
    recipe = Recipe("smollm2")
    assert (recipe.lora_r, recipe.lora_alpha, recipe.rslora, recipe.lr) == (32, 64.0, True, 1e-4)


@pytest.mark.parametrize(("values", "message", "hint"), [
    ({"learning_rate": 1}, "Unknown recipe knob 'learning_rate'", "Possible"),
    ({"lora_rank": 4}, "Unknown recipe knob 'lora_rank'", "Did you mean 'lora_r'?"),
    ({"lora_r": 4.0}, "lora_r is 4.0, but must be a whole number", "train list"),
    ({"lora_r": True}, "lora_r is True, but must be a whole number", "train list"),
    ({"lr": "fast"}, "lr is 'fast', but must be a number", "train list"),
    ({"lr": -1.0}, "lr is -1.0, but must lie between", "train list"),
    ({"lr": float("nan")}, "lr is nan, but must lie between", "train list"),
    ({"rslora": 1}, "rslora is 1, but must be true or false", "train list"),
    ({"defenses": "kl"}, "defenses is 'kl', but must be a list of texts", "train list"),
    ({"schedule": "linaer"}, "Unknown schedule 'linaer'", "Did you mean 'linear'?"),
    ({"dtype": "float16"}, "Unknown dtype 'float16'", "float"),
    ({"base": ""}, "names no base model", "--base"),
])
def test_a_wrong_knob_is_named(values: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        from_values({"base": "smollm2", **values})
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.exit_code == Exit.USAGE


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('base = "smollm2"\nlr = 1\ndefenses = ["a", "b:x=1"]\n')
    recipe = from_values(read_values(path))
    assert (recipe.lr, recipe.defenses) == (1.0, ("a", "b:x=1"))
    path.write_text("lr = = 1")
    with pytest.raises(UserError, match="no readable TOML") as caught:
        read_values(path)
    assert caught.value.exit_code == Exit.BAD_DATA
    with pytest.raises(UserError, match="There is no recipe"):
        read_values(tmp_path / "none.toml")


def test_what_does_not_decide_the_result_is_no_part_of_a_runs_identity() -> None:
    one, other = Recipe("smollm2", save_every=1, device="cpu"), Recipe("smollm2")
    assert learnt(one.as_json()) == learnt(other.as_json())
    assert learnt(one.as_json()) != learnt(Recipe("smollm2", seed=1).as_json())
