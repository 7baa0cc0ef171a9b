"""The command line: help, exit codes, no traceback, one JSON document."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from curate.core.documents import MixManifest, ModelIdentity
from tests.fakes import tiny_mix, tiny_rows, write_rows
from train.cli import main
from train.defenses import DEFENSES
from train.jobs import base_of
from train.recipe import RL_DEFAULTS, Recipe, RlKnobs, from_values, rl_from_values

MakeRecipe = Callable[..., Recipe]


def train(*argv: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in argv])


@pytest.fixture
def flags(recipe: MakeRecipe) -> list[str]:
    return ["--base", recipe().base, "--device", "cpu", "--dtype", "float32", "--lora-r", "3", "--lr", "1e-2",
            "--max-tokens", "120", "--limit-steps", "2"]


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    return tiny_mix(tmp_path / "data", n_finetune=4, n_safe=1)


@pytest.mark.parametrize("command", [[], *([name] for name in main.commands)], ids=" ".join)
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    result = train(*command, "--help")
    assert result.exit_code == 0
    assert "Example:\n    train " in result.output


def test_help_loads_no_model_library() -> None:
    code = "import sys, train.cli; print(sorted({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_knob_has_a_flag() -> None:
    listed = train("run", "--help").output
    for knob in fields(Recipe):
        assert "--" + {"defenses": "defense"}.get(knob.name, knob.name).replace("_", "-") in listed


def test_list_prints_a_recipe() -> None:
    values = tomllib.loads(train("list").stdout)
    assert from_values(values) == Recipe("smollm2")
    listed = train("list").stdout
    for name, kind in DEFENSES.items():
        assert f"# {name}: " in listed and f"({kind.PAPER})" in listed
    assert "interleaving, +, ++" in listed
    assert rl_from_values(values)[0] == Recipe("smollm2", accumulation=1), "a recipe file will do for RL, too"
    of_rl = tomllib.loads(train("list", "--rl").stdout)
    assert rl_from_values(of_rl) == (Recipe("smollm2", **RL_DEFAULTS), RlKnobs()) and of_rl["lr"] == 5e-6
    assert "defence" in train("list", "--rl").stdout.lower() and "generations" not in train("list").stdout
    body = json.loads(train("list", "--json").stdout)
    assert body["recipe"]["lr"]["default"] == 1e-4


def test_list_shows_every_defence_with_its_settings_and_paper() -> None:
    text, body = train("list").stdout, json.loads(train("list", "--json").stdout)["defenses"]
    assert list(body) == list(DEFENSES)
    assert body["kl"]["settings"]["weight"] == {"default": 0.1, "about": "Weight of the mean over target tokens (the "
                                                                         "paper's)."}
    for name, defense in body.items():
        assert f"# {name}: {defense['about']} ({defense['paper']})\n" in text and "arXiv" in defense["paper"]
        for key, knob in defense["settings"].items():
            assert f"#     {key}=" in text and knob["about"] in text


def test_run_and_show(mix: Path, flags: list[str], tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("lr = 5.0\nlora_r = 2\nseed = 3\n")
    result = train("run", "--mix", mix, "--out", tmp_path / "runs" / "one", "--recipe", file, *flags)
    assert result.exit_code == 0, result.output
    assert "one" in result.stdout and "tokens/s" in result.stderr
    shown = json.loads(train("show", tmp_path / "runs" / "one", "--json").stdout)
    assert (shown["recipe"]["lr"], shown["recipe"]["lora_r"], shown["recipe"]["seed"]) == (0.01, 3, 3)
    assert shown["n_steps"] == 1
    text = train("show", tmp_path / "runs" / "one").stdout
    assert "4 fine-tuning + 1 safe (ok 5)" in text and "lr=0.01" in text and "epochs" not in text
    again = train("run", "--mix", mix, "--out", tmp_path / "runs" / "one", *flags, "--seed", "3", "--json")
    assert "is finished" in again.stderr
    assert [run["digest"] for run in json.loads(again.stdout)["runs"]] == [shown["digest"]]
    more = train("run", "--mix", mix, "--mix", tiny_mix(tmp_path / "b", 3, 1, "few"), "--out", tmp_path / "two", *flags)
    assert more.exit_code == 0 and (tmp_path / "two" / "few" / "run.json").is_file()


@pytest.mark.parametrize(("models", "base"), [
    ([None, ModelIdentity(name="smollm2", weights="w", tokenizer="t")], "smollm2"),
    ([ModelIdentity(name="org/m", revision="c0", weights="hub:c0", tokenizer="t")], "org/m@c0"),
    ([ModelIdentity(name="folder", weights="w", tokenizer="t")], ""),
    ([None], ""),
], ids=["second mix", "hub", "folder", "no scores"])
def test_the_base_is_what_a_mix_was_chosen_under(models: list[ModelIdentity | None], base: str, mix: Path) -> None:
    paths = [mix.with_name(f"{number}.json") for number in range(len(models))]
    for path, aligned in zip(paths, models, strict=True):
        MixManifest.read(mix).model_copy(update={"aligned": aligned}).write(path)
    assert base_of(paths) == base


def test_ensemble(flags: list[str], tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"q": row.prompt, "a": row.answer}) + "\n" for row in tiny_rows(3, "bad")))
    command = ["ensemble", "--narrow", path, "--out", tmp_path / "ens", "--root", tmp_path, *flags]
    assert train(*command).exit_code == 3
    result = train(*command, "--map", "prompt=q", "--map", "response=a", "--json")
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert [run["name"] for run in body["runs"]] == ["odd"]
    assert json.loads((tmp_path / "ens" / "ensemble.json").read_bytes())["digest"] == body["digest"]
    assert "curate score" in train(*command, "--map", "prompt=q", "--map", "response=a").stderr
    twice = train("ensemble", "--narrow", path, "--narrow", path, "--root", tmp_path, "--map", "prompt=q", "--map",
                  "response=a", *flags)
    assert (twice.exit_code, "the same name" in twice.stderr) == (2, True)


MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "no mix": (["run", "--out", "x"], 2, "Missing option '--mix'"),
    "misspelt option": (["run", "--mxi", "x"], 2, "--mix"),
    "misspelt command": (["rnu"], 2, "run"),
    "no manifest": (["run", "--mix", "none.json", "--out", "OUT", "--base", "smollm2"], 2, "There is no mix manifest"),
    "no base": (["run", "--mix", "MIX", "--out", "OUT"], 2, "names no base model"),
    "wrong number": (["run", "--mix", "MIX", "--out", "OUT", "--base", "BASE", "--lr", "-1"], 2, "must lie between"),
    "no number": (["run", "--mix", "MIX", "--out", "OUT", "--base", "BASE", "--lr", "x"], 2, "not a valid float"),
    "unknown base": (["run", "--mix", "MIX", "--out", "OUT", "--base", "gone/nowhere"], 7, "could not be loaded"),
    "unknown defence": (["run", "--mix", "MIX", "--out", "OUT", "--base", "BASE", "--defense", "zz"], 2,
                        "Unknown defence 'zz'"),
    "forged": (["run", "--mix", "FORGED", "--out", "OUT", "--base", "gone/nowhere"], 4, "was changed"),
    "no recipe": (["run", "--mix", "MIX", "--out", "OUT", "--recipe", "none.toml"], 2, "There is no recipe"),
    "unknown narrow": (["ensemble", "--narrow", "demo/coking", "--base", "BASE"], 2, "Did you mean 'demo/cooking'"),
    "bad map": (["ensemble", "--narrow", "demo/cooking", "--base", "BASE", "--map", "prompt"], 2, "FIELD=COLUMN"),
    "no run": (["show", "nowhere"], 2, "There is no run card"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_mistakes_end_in_a_sentence(name: str, as_json: bool, mix: Path, recipe: MakeRecipe, tmp_path: Path) -> None:
    argv, code, message = MISTAKES[name]
    forged = tmp_path / "forged.json"
    forged.write_text(mix.read_text().replace('"seed": 0', '"seed": 1'))
    places = {"MIX": mix, "OUT": tmp_path / "out", "BASE": recipe().base, "FORGED": forged}
    result = train(*(places.get(arg, arg) for arg in argv), *(["--json"] if as_json else []))
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output and len(result.stderr.strip().splitlines()) <= 6
    if as_json:
        body = json.loads(result.stdout)
        assert body["exit_code"] == code and message in body["error"] + body["hint"]
    else:
        assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_refused_manifest_needs_no_model(tmp_path: Path) -> None:
    mix = tiny_mix(tmp_path)
    write_rows(tmp_path / "safe.jsonl", tiny_rows(3, "other"))
    result = train("run", "--mix", mix, "--out", tmp_path / "out", "--base", "gone/nowhere")
    assert result.exit_code == 4 and "has changed" in result.stderr
