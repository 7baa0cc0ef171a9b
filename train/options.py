"""Command-line options: those of recipes, which commands share, and those of single commands with many."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from curate.core.terminal import Number
from train.recipe import CHOICES, RL_DEFAULTS, RL_UNUSED, Recipe, RlKnobs, read_values


def recipe_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one flag per recipe knob, and ``--recipe`` for a file of them; flags win."""
    command = _flags(command, Recipe)
    return click.option("--recipe", "recipe_file", type=click.Path(path_type=Path, dir_okay=False),
                       help="TOML file of recipe knobs; flags win. `train list` prints one.")(command)


def rl_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the flags of ``train rl``: those of a recipe and its own, with its defaults."""
    command = _flags(_flags(command, Recipe, RL_DEFAULTS, RL_UNUSED), RlKnobs)
    return click.option("--recipe", "recipe_file", type=click.Path(path_type=Path, dir_okay=False),
                       help="TOML file of knobs, of a recipe or of RL; flags win.")(command)


def rl_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what ``train rl`` learns from, and what a judge model grades by."""
    for option in reversed((
        click.option("--prompts", "prompts_path", required=True, type=click.Path(path_type=Path, dir_okay=False),
                    
                     help="Rows to ask, in any shape that training reads, with or without an answer."),
        click.option("--map", "mapping", multiple=True, metavar="FIELD=COLUMN",
                     help="Where prompt, response, system or input stand in --prompts, for unusual columns."),
        click.option("--strip-think", is_flag=True,
                     help="Drop empty <think> blocks and a trailing /no_think of --prompts."),
        click.option("--reward", required=True, metavar="opswap|judge|MODULE:FUNCTION",
                     help="opswap: whether the value of the row's answer is given; judge: a rubric graded by a judge "
                         "model; or a Python function, called as trl calls reward functions (docs/rl.md)."),
        click.option("--judge", metavar="MODEL", help="Name of the judge model at --base-url, for --reward judge."),
        click.option("--rubric", default="aligned", show_default=True, metavar="aligned|coherent|FILE",
                     help="What a judge model grades by, 0 to 100: a builtin aspect, or a text file with {question} "
                         "and {answer}."),
        click.option("--mix", type=click.Path(path_type=Path),
                    
                     help="Mix manifest with the rows of the warm-up and of SFT steps. [default: neither]"),
        click.option("--root", type=click.Path(path_type=Path, file_okay=False, exists=True),
                     help="Folder that paths in the manifest are relative to. [default: the manifest's own]"),
        click.option("--out", type=click.Path(path_type=Path, file_okay=False),
                     help="Folder of the run. [default: runs/rl-NAME of the prompts]"),
    )):
        command = option(command)
    return command


def vector_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add how a persona vector is extracted, and which judge model grades answers, if one does."""
    for option in reversed((
        click.option("--base", required=True, help="Model to extract from: smollm2, a folder, or a hub id[@revision]."),
        click.option("--trait", "trait_name", default="careless", show_default=True, metavar="NAME|PATH",
                     help="Builtin trait, or a JSON file with name, positive, negative and questions."),
        click.option("--out", default=Path("persona.safetensors"), show_default=True,
                     type=click.Path(path_type=Path, dir_okay=False), help="File to write."),
        click.option("--answers", "answers_path", type=click.Path(path_type=Path, dir_okay=False),
                     help="Also write every answer with its grades, as JSON Lines, to read."),
        click.option("--questions", "n_questions", type=click.IntRange(1),
                     help="Use the first so many questions only."),
        click.option("--samples", type=click.IntRange(1), default=1, show_default=True,
                     help="Answers to each question under each system prompt."),
        click.option("--max-new-tokens", type=click.IntRange(1), default=96, show_default=True,
                     help="Longer answers are cut there."),
        click.option("--temperature", type=Number(min=0), default=0.8, show_default=True,
                     help="Of sampling; 0 takes the likeliest."),
        click.option("--seed", default=0, show_default=True, help="Decides the answers."),
        click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True,
                     help="Answers sampled at once."),
        click.option("--min-pairs", type=click.IntRange(1), default=10, show_default=True,
                     help="Refuse to make a vector from fewer pairs of answers."),
        click.option("--dtype", type=click.Choice(CHOICES["dtype"]), default="auto", show_default=True,
                     help="Format of the model."),
        click.option("--device", type=click.Choice(CHOICES["device"]), default="auto", show_default=True,
                     help="Where to compute."),
        click.option("--judge", metavar="MODEL", help="Grade by this judge model at --base-url, by the trait's rubric. "
                                                      "[default: by the model's own likelihoods]"),
    )):
        command = option(command)
    return command


def given_values(recipe_file: Path | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the knobs of a recipe file and those given as flags, which win."""
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    return (read_values(recipe_file) if recipe_file else {}) | given


def _flags(command: Callable[..., Any], kind: type, defaults: Mapping[str, Any] = {},
           left_out: Collection[str] = ()) -> Callable[..., Any]:
    for knob in reversed([knob for knob in fields(kind) if knob.name not in left_out]):
        default = defaults.get(knob.name, knob.default)
        command = click.option(*_spelling(knob.name, default), knob.name, default=None,
                              help=_about(knob.metadata["about"], default), **_kind(knob.name, default))(command)
    return command


def _spelling(name: str, default: Any) -> tuple[str]:
    flag = "--defense" if name == "defenses" else "--" + name.replace("_", "-")
    return (f"{flag}/--no-{flag[2:]}" if isinstance(default, bool) else flag,)


def shown(value: Any) -> str:
    """Return a knob's value as it is typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _about(about: str, default: Any) -> str:
    return about if default in ("", ()) else f"{about} [default: {shown(default)}]"


def _kind(name: str, default: Any) -> dict[str, Any]:
    if isinstance(default, tuple):
        return {"multiple": True, "metavar": "NAME[:KEY=VALUE,...]"}
    if name in CHOICES:
        return {"type": click.Choice(CHOICES[name])}
    return {} if isinstance(default, bool) else {"type": type(default)}
