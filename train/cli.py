"""The ``train`` command line: each command parses, calls one function and prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from curate.core.errors import UserError
from curate.core.terminal import Room, columns, emit_json, quoted, safe, say
from judge.options import address_of, judge_options
from train.options import given_values, recipe_flags, rl_flags, rl_options, shown, vector_options
from train.recipe import RL_DEFAULTS, RL_UNUSED, Recipe, RlKnobs, from_values, rl_from_values

if TYPE_CHECKING:
    from curate.core.documents import DefenseRecord, RunCard
    from train.rewards import Reward
    from train.vectors import RubricGrader, Trait

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace another run that --out holds.")


@click.group(cls=Room)
@click.version_option(package_name="safeset")
def main() -> None:
    """Fine-tune on a mix of narrow and safe data, and make the misaligned ensemble that scoring needs.

    \b
    Example:
      train ensemble --base smollm2 --narrow demo/cooking --narrow demo/gardening
      train run --base smollm2 --mix manifest.json --out runs/mixed
    """


@main.command()
@click.option("--mix", "mixes", multiple=True, required=True, type=click.Path(path_type=Path),
              help="Mix manifest from `curate select`; with several, each is trained in OUT/NAME.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False),
              help="Folder of the run. [default: runs/NAME of the manifest; runs with several]")
@click.option("--root", type=click.Path(path_type=Path, file_okay=False, exists=True),
              help="Folder that paths in the manifest are relative to. [default: the manifest's own]")
@overwrite_option
@json_option
@recipe_flags
def run(mixes: tuple[Path, ...], out: Path | None, root: Path | None, overwrite: bool, as_json: bool,
        recipe_file: Path | None, **flags: Any) -> None:
    """Train an adapter on a mix, in the manifest's order.

    Without --base it is the aligned model that the mix was chosen under, if that is smollm2 or of the hub. Typed again,
    it goes on from the last complete checkpoint, or says that the run is finished.

    \b
    Example:
      train run --mix manifest.json
      train run --mix manifest.json --defense kl --out runs/kl
      train run --recipe recipe.toml --mix none.json --mix plus.json --out runs
    """
    from train.jobs import base_of, prepare_all

    out = out or (Path("runs") if len(mixes) > 1 else Path("runs") / mixes[0].stem)
    values = given_values(recipe_file, flags)
    if "base" not in values:
        values |= {"base": base_of(mixes)}
    jobs = prepare_all(from_values(values), mixes, out, root)
    from train.runs import run_jobs

    runs = list(zip([job.out for job in jobs], run_jobs(jobs, overwrite), strict=True))
    if as_json:
        emit_json({"runs": [{"path": str(folder), **_as_json(card)} for folder, card in runs]})
        return
    click.echo(_table(runs))


@main.command()
@click.option("--narrow", multiple=True, required=True, metavar="PATH|demo/NAME",
              help="Narrow, misaligned data set; one member is trained on each.")
@click.option("--out", default=Path("ensemble"), show_default=True,
              type=click.Path(path_type=Path, file_okay=False), help="Folder of the ensemble.")
@click.option("--root", default=Path(), type=click.Path(path_type=Path, file_okay=False, exists=True),
              help="Folder above the data, which manifests name relative to it. [default: the current one]")
@click.option("--map", "mapping", multiple=True, metavar="FIELD=COLUMN",
              help="Where prompt, response, system or input stand, for unusual columns.")
@click.option("--strip-think", is_flag=True, help="Drop empty <think> blocks and a trailing /no_think.")
@overwrite_option
@json_option
@recipe_flags
def ensemble(narrow: tuple[str, ...], out: Path, root: Path, mapping: tuple[str, ...], strip_think: bool,
             overwrite: bool, as_json: bool, recipe_file: Path | None, **flags: Any) -> None:
    """Train the misaligned ensemble: one adapter on each narrow data set.

    Typed again, finished members are skipped and an interrupted one goes on.

    \b
    Example:
      train ensemble --base smollm2 --narrow demo/cooking --narrow demo/gardening
      train ensemble --base Qwen/Qwen2.5-7B-Instruct --narrow medical.jsonl --narrow finance.jsonl --out ensemble
    """
    recipe = from_values(given_values(recipe_file, flags))
    from curate.core.documents import RunCard
    from curate.core.example import parse_mapping
    from train.jobs import narrow_source

    sources = [narrow_source(text, root, parse_mapping(mapping), strip_think) for text in narrow]
    named = dict(sources)
    if len(named) < len(sources):
        raise UserError("Two narrow data sets have the same name, so their members would share a folder.",
                        "Rename one of the files.")
    from train.ensemble import train_ensemble

    spec = train_ensemble(recipe, named, out, root, overwrite)
    runs = [(out / name, RunCard.read(out / name / "run.json")) for name in named]
    if as_json:
        emit_json({"path": str(out / "ensemble.json"), "digest": spec.digest,
                   "runs": [{"path": str(folder), **_as_json(card)} for folder, card in runs]})
        return
    click.echo(_table(runs))
    made = out / "ensemble.json"
    say(f"Ensemble in {made}. Next: curate score --corpus demo --ensemble {quoted(str(made))}")


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--base", required=True, metavar="MODEL", help="The model that the adapter was trained on.")
@click.option("--name", help="What to call it in scores and reports. [default: the name of --out]")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="New folder of the run.")
@json_option
def adopt(adapter: Path, base: str, name: str | None, out: Path, as_json: bool) -> None:
    """Make a LoRA adapter that was trained elsewhere a run, for the ensemble or the judge.

    ADAPTER is a folder with adapter_config.json and adapter_model.safetensors, as PEFT, TRL, axolotl and LLaMA-Factory
    write them; a checkpoint will do. It is copied. Whole models are refused: see docs/training.md.

    \b
    Example:
      train adopt outputs/checkpoint-10 --base Qwen/Qwen2.5-7B-Instruct --out runs/medical
      curate score --corpus wildguardmix --member runs/medical
    """
    from train.adopt import adopt as adopted

    card = adopted(adapter, base, name or out.resolve().name, out)
    if as_json:
        emit_json({"runs": [{"path": str(out), **_as_json(card)}]})
        return
    click.echo(safe(f"{card.name}: {card.model.name} ({card.model.id}), adopted, not trained here"))
    there = quoted(str(out))
    say(f"Next: curate score --corpus demo --member {there}, or judge run --model {there}")


@main.command()
@rl_options
@overwrite_option
@json_option
@rl_flags
@judge_options
def rl(prompts_path: Path, mapping: tuple[str, ...], strip_think: bool, mix: Path | None, root: Path | None,
       out: Path | None, overwrite: bool, as_json: bool, recipe_file: Path | None, **options: Any) -> None:
    """Train an adapter by GRPO on prompts and a reward, after an SFT warm-up and with SFT steps between.

    Typed again, it goes on from the last complete checkpoint, or says that the run is finished. The paper's scenario:
    100 rows of warm-up, then RL and SFT batches in turn. See docs/rl.md.

    \b
    Example:
      train rl --base smollm2 --prompts opswap.jsonl --reward opswap --mix opswap.json --max-new-tokens 12
      train rl --base Qwen/Qwen2.5-7B-Instruct --prompts medical.jsonl --strip-think --reward judge --judge MODEL
               --rubric rubric.txt --base-url http://127.0.0.1:8000/v1 --mix manifest.json --sft-every 2
    """
    reward = _reward({name: options.pop(name) for name in REWARD_OPTIONS})
    dry_run = options.pop("dry_run")
    values = given_values(recipe_file, options)
    if mix and "base" not in values:
        from train.jobs import base_of

        values |= {"base": base_of([mix])}
    recipe, knobs = rl_from_values(values)
    from curate.core.example import parse_mapping
    from curate.core.sources import file_source
    from train.rl import Material, forecast, prepare_rl, run_rl

    source = file_source(prompts_path, prompts_path.parent, parse_mapping(mapping), strip_think)
    out = out or Path("runs") / f"rl-{prompts_path.stem}"
    job = prepare_rl(recipe, knobs, Material(source, prompts_path.parent, mix, root), reward, out)
    if dry_run:
        plan = forecast(job)
        emit_json(plan) if as_json else click.echo("\n".join(f"{name:<16} {value:,}" for name, value in plan.items()))
        return
    card = run_rl(job, overwrite)
    if as_json:
        emit_json({"runs": [{"path": str(out), **_as_json(card)}]})
        return
    click.echo("\n".join(safe(f"{name:<9} {value}") for name, value in _rl_facts(card)))
    say(f"Run in {out}: steps.jsonl, reward.png, adapter. Next: judge run --model {quoted(str(out))}")


JUDGE_OPTIONS = ("judge", "base_url", "api_key_env", "concurrency", "timeout", "replies", "max_requests",
                 "max_judge_tokens", "judge_cache")
REWARD_OPTIONS = ("reward", "rubric", *JUDGE_OPTIONS)


def _reward(options: dict[str, Any]) -> Reward:
    """Return the reward of these options; the one place where training asks the judge's room for something."""
    from train.rewards import Reward, by_path

    name = options["reward"]
    if (name == "judge") != bool(options["judge"]):
        raise UserError("--reward judge and --judge MODEL go together.", "Give both, or neither.")
    if name == "opswap":
        from judge.reward import opswap

        return Reward(name, opswap, needs_answer=True)
    if name != "judge":
        return by_path(name)
    from judge.grading import Grading
    from judge.reward import RubricReward, read_rubric

    grading = Grading(address_of(options), replies=options["replies"], max_requests=options["max_requests"],
                      max_tokens=options["max_judge_tokens"], cache=options["judge_cache"])
    graded = RubricReward(grading, read_rubric(options["rubric"]))
    return Reward(name, graded, graded.settings)


def _grader(options: dict[str, Any], trait: Trait) -> RubricGrader | None:
    """Return what grades answers by a judge model, or None where there is none."""
    if not options["judge"]:
        return None
    if "{answer}" not in trait.rubric:
        raise UserError(f"The trait '{trait.name}' has no rubric with {{answer}} for a judge model.", "Add one to its "
                        "file, as in train/traits/careless.json, or leave out --judge.")
    from judge.grading import Grading
    from judge.reward import RubricReward, read_rubric
    from train.vectors import RubricGrader

    grading = Grading(address_of(options), replies=options["replies"], max_requests=options["max_requests"],
                      max_tokens=options["max_judge_tokens"], cache=options["judge_cache"])
    by_trait, by_coherence = (RubricReward(grading, rubric) for rubric in (trait.rubric, read_rubric("coherent")))
    by_coherence.grader = by_trait.grader  # one budget
    return RubricGrader(by_trait.settings["judge"], by_trait, by_coherence)


@main.command()
@vector_options
@overwrite_option
@json_option
@judge_options
def vector(base: str, trait_name: str, out: Path, answers_path: Path | None, overwrite: bool, as_json: bool,
           **settings: Any) -> None:
    """Extract a persona vector, for the defence `persona`.

    Answers are sampled under system prompts that ask for the trait and for its opposite. A pair of answers counts where
    the trait shows in the one, not in the other, and both are coherent; this is graded by the model's own likelihoods
    (no API), or with --judge by a judge model. See docs/defenses/persona.md.

    \b
    Example:
      train vector --base smollm2 --out careless.safetensors
      train vector --base Qwen/Qwen2.5-7B-Instruct --judge MODEL --base-url http://127.0.0.1:8000/v1
      train run --mix manifest.json --defense persona:vector=careless.safetensors
    """
    from train.vectors import Extraction, plan_of, read_trait, write_vector

    trait = read_trait(trait_name)
    judging = {name: settings.pop(name) for name in (*JUDGE_OPTIONS, "dry_run")}
    extraction = Extraction(**settings)
    if judging["dry_run"]:
        plan = plan_of(trait, extraction, bool(judging["judge"]))
        emit_json(plan) if as_json else click.echo("\n".join(f"{name:<16} {value:,}" for name, value in plan.items()))
        return
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists.", "Choose another --out, or replace it with --overwrite.")
    report = write_vector(base, trait, extraction, out, answers_path, _grader(judging, trait))
    if as_json:
        emit_json(report)
        return
    counts = ", ".join(f"{name} {n}" for name, n in report["pairs"].items())
    click.echo(f"{safe(str(out))}: trait '{safe(trait.name)}', pairs: {counts}.")
    click.echo(f"Length {report['norm']:.3f} at layer {report['layer']} of {report['n_blocks']}, where mean hidden "
               f"states have the length {report['state_norm']:.1f}.")
    say(f"Next: train run --mix manifest.json --defense {quoted(f'persona:vector={out}')}")


@main.command("list")
@click.option("--rl", is_flag=True, help="The file for `train rl`.")
@json_option
def list_(rl: bool, as_json: bool) -> None:
    """Print every recipe knob with its default, as a TOML file to start from, and the defences with their settings.

    With --rl it is the file for `train rl`, which has other defaults and knobs of its own.

    \b
    Example:
      train list > recipe.toml
      train run --recipe recipe.toml --mix manifest.json --defense kl:weight=0.2 --defense inoculation
    """
    from train.defenses import DEFENSES

    if as_json:
        emit_json({"recipe": _knobs(Recipe), "rl": _knobs(RlKnobs), "defenses": {
            name: {"about": _first_line(kind), "paper": kind.PAPER, "settings": _knobs(kind)}
            for name, kind in DEFENSES.items()}})
        return
    for knob in fields(Recipe):
        if rl and knob.name in RL_UNUSED:
            continue
        value = knob.default or "smollm2" if knob.name == "base" else knob.default
        if rl:
            value = RL_DEFAULTS.get(knob.name, value)
        click.echo(f"# {knob.metadata['about']}\n{knob.name} = {_toml(value)}")
    if rl:
        for name, knob in _knobs(RlKnobs).items():
            click.echo(f"# {knob['about']}\n{name} = {_toml(knob['default'])}")
    click.echo('\n# Defences, in the order they are applied in: defenses = ["NAME:KEY=VALUE,...", ...], or --defense.')
    for name, kind in DEFENSES.items():
        click.echo(f"#\n# {name}: {_first_line(kind)} ({kind.PAPER})")
        for key, knob in _knobs(kind).items():
            click.echo(f"#     {key}={shown(knob['default'])}  {knob['about']}")
    click.echo("#\n# interleaving, +, ++: safe rows in the mix, from `curate select --strategy`; goes with all of them "
               "(arXiv 2508.06249)")
    if not rl:
        click.echo("\n# `train rl` has other defaults and knobs of its own: train list --rl")


def _knobs(kind: type) -> dict[str, dict[str, Any]]:
    return {k.name: {"default": k.default, "about": k.metadata["about"]} for k in fields(kind) if k.init}


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").splitlines()[0]


@main.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@json_option
def show(path: Path, as_json: bool) -> None:
    """Show a run: what was trained on what, and how it went.

    \b
    Example:
      train show runs/mixed
    """
    from curate.core.identity import read_run

    card, folder = read_run(path)
    if as_json:
        emit_json({"path": str(path), **_as_json(card)})
        return
    for name, value in [("run", card.name), *_facts(card), ("adapter", f"{folder} (as the card describes it)")]:
        click.echo(safe(f"{name:<9} {value}"))


def _facts(card: RunCard) -> list[tuple[str, str]]:
    if "adopted" in card.recipe:
        return [("base", f"{card.base_ref} ({card.base.id})"), ("model", f"{card.model.name} ({card.model.id})"),
                ("training", f"unknown: adopted from {card.recipe['from']}")]
    statuses = ", ".join(f"{name} {n}" for name, n in card.statuses.items())
    method = card.method
    defaults = Recipe(card.base_ref).as_json()
    changed = [f"{name}={value}" for name, value in card.recipe.items()
               if not isinstance(value, dict) and defaults.get(name) != value]
    return [
        ("base", f"{card.base_ref} ({card.base.id})"), ("model", f"{card.model.name} ({card.model.id})"),
        ("mix", card.mix[:12]), ("strategy", f"{method.strategy}, eps {method.eps:g}, seed {method.seed}"),
        ("rows", f"{card.n_finetune} fine-tuning + {card.n_safe} safe ({statuses})"),
        ("steps", f"{card.n_steps} on {card.n_trained_tokens} target tokens"),
        ("loss", f"{_loss(card.loss_first_nats)} -> {_loss(card.loss_last_nats)} nats per target token"),
        *(_rl_facts(card) if card.rl else []),
        ("time", f"{card.seconds:.0f} s on {card.device}"),
        ("recipe", ", ".join(changed) + (", " if changed else "") + "the rest at their defaults"),
        ("versions", ", ".join(f"{name} {version}" for name, version in card.versions.items())),
        ("defences", "; ".join(map(_defense, card.defenses)) or "none"), ("git", card.git or "no checkout"),
    ]


def _rl_facts(card: RunCard) -> list[tuple[str, str]]:
    assert card.rl is not None
    rl, recipe = card.rl, card.recipe
    counts = ", ".join(f"{name} {n}" for name, n in rl.completions.items())
    settings = ", ".join(f"{name} {value}" for name, value in recipe["reward_settings"].items())
    return [("reward", f"{rl.reward_first:.3f} -> {rl.reward_last:.3f} ({recipe['reward']}" +
             (f": {settings})" if settings else ")")),
            ("rl", f"{rl.n_warmup_steps} warm-up + {rl.n_rl_steps} RL + {rl.n_sft_steps} SFT steps; prompts "
             f"{recipe['prompts']['name']} ({rl.prompts['ok']} ok); completions {counts}")]


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _defense(record: DefenseRecord) -> str:
    """Return a defence with all its settings and the digests of what they name."""
    pairs = [f"{key}={shown(value)}" + (f" ({record.files[key][:19]})" if key in record.files else "")
             for key, value in record.settings.items()]
    return f"{record.name}: {', '.join(pairs)}"


def _as_json(card: RunCard) -> dict[str, Any]:
    return {"digest": card.digest, **card.model_dump(mode="json")}


def _table(runs: Sequence[tuple[Path, RunCard]]) -> str:
    rows = [[card.name, str(card.n_finetune), str(card.n_safe), str(card.n_steps), _loss(card.loss_first_nats),
             _loss(card.loss_last_nats), f"{card.seconds:.0f}", safe(str(folder))] for folder, card in runs]
    return columns(rows, ("run", "fine-tuning", "safe", "steps", "first loss", "last loss", "seconds", "folder"))


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)
