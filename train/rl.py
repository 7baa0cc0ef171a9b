"""Reinforcement learning from prompts and a reward: an SFT warm-up, then GRPO with SFT steps between.

A run lies in a folder like any other (see ``train.runs``), with more in it:

    out/warmup/              the adapter after the warm-up, and the record of its steps
    out/steps.jsonl          one line per step, in order: phase, kind (rl or sft), loss or reward, what became of each
                             completion; written as they are taken
    out/reward.png           the mean reward over the RL steps

Defences: ``inoculation`` changes the prompts that completions are sampled for, ``persona`` steers sampling and learning
alike, ``kl`` is added to the loss of both kinds of steps. The others are refused (``REFUSED``).
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from curate.core.chat import Encoded, encode
from curate.core.documents import DefenseRecord, Method, MixManifest, ModelIdentity, RlRecord, RunCard
from curate.core.errors import UserError, require
from curate.core.files import canonical_json, sync_folder, write_atomic
from curate.core.identity import with_adapter
from curate.core.nll import TOLERANCE_NATS, check_forward
from curate.core.provenance import git_state, versions
from curate.core.refs import ref_in, way_to
from curate.core.sources import Source
from curate.core.terminal import progress, say
from train import checkpoints
from train.adapters import adapter, save_adapter
from train.curve import reward_png
from train.data import MixRow
from train.jobs import Job, claimed, prepare, with_defenses
from train.lesson import Lesson
from train.prompts import Asked, Prompt, ask, read_prompts
from train.recipe import RL_UNUSED, Recipe, RlKnobs
from train.rewards import Reward
from train.runs import ADAPTER, CARD, CHECKPOINTS, MIX, Base, run_job, write_adapter
from train.trainer import MixTrainer, finish, train

if TYPE_CHECKING:
    from peft import PeftModel

    from train.grpo import RlTrainer

WARMUP, WARMUP_CHECKPOINTS, STEPS = "warmup", "warmup-checkpoints", "steps.jsonl"
REFUSED: Mapping[str, str] = {
    "ldifs": "it is defined on given answers; on completions that the model samples itself it would be another method",
    "safelora": "its projection is defined and tested for what was learnt from given answers"}
"""Defences that are refused, and why."""


@dataclass(frozen=True)
class RlJob(Job):
    """A reinforcement-learning run whose prompts, rows and reward were found in order."""

    knobs: RlKnobs
    prompts: Sequence[Prompt]
    source: Source
    """Of the prompts."""
    reward: Reward

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the run but its rows, for the run card's ``recipe``."""
        recipe = {name: value for name, value in self.recipe.as_json().items() if name not in RL_UNUSED}
        return {**recipe, **asdict(self.knobs), "reward": self.reward.name,
                "reward_settings": dict(self.reward.settings), "prompts": self.source.model_dump(mode="json")}

    def claim(self, base: ModelIdentity, records: Sequence[DefenseRecord]) -> dict[str, Any]:
        """Return what decides the adapter."""
        return claimed(self.manifest.digest, base.id, self.settings(), records)


@dataclass(frozen=True)
class Rows:
    """The rows of the mix that a run learns from, and how many of all have which status."""

    warmup: list[Encoded]
    sft: list[Encoded]
    n_finetune: int
    n_safe: int
    statuses: dict[str, int]


@dataclass(frozen=True)
class Material:
    """What a run is made of: prompts, a file below ``root``, and a mix, whose paths are relative to ``mix_root``."""

    prompts: Source
    root: Path
    mix: Path | None = None
    mix_root: Path | None = None
    """None: the manifest's own folder."""


def prepare_rl(recipe: Recipe, knobs: RlKnobs, material: Material, reward: Reward, out: Path) -> RlJob:
    """Check a run before any model is loaded; ``UserError`` says what will not do."""
    require("trl", "rl")
    _check(recipe, knobs)
    if material.mix is None:
        if knobs.sft_every:
            raise UserError("SFT steps need rows, and there is no mix.", "Give --mix MANIFEST, or --sft-every 0.")
        recipe, defenses = with_defenses(recipe) if recipe.defenses else (recipe, ())
        job = Job(recipe, _no_mix(recipe.seed), (), defenses, out, Path())
    else:
        job = prepare(recipe, material.mix, out, material.mix_root)
        _check_rows(job.rows, knobs)
    prompts = read_prompts(material.prompts, material.root)
    reward.check(prompts)
    return RlJob(job.recipe, job.manifest, job.rows, job.defenses, out, job.root, knobs, prompts, material.prompts,
                 reward)


def _check(recipe: Recipe, knobs: RlKnobs) -> None:
    """Refuse what no rows are needed to refuse."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("`train rl` runs in one process, on one device.", "Start it without torchrun.")
    for name in (spec.partition(":")[0] for spec in recipe.defenses):
        if name in REFUSED:
            raise UserError(f"The defence '{name}' is not for `train rl`: {REFUSED[name]}.",
                            "Possible: inoculation, persona, kl, and any mix with --sft-every.")
    n_completions = recipe.batch_size * recipe.accumulation
    if n_completions % knobs.generations:
        raise UserError(f"A step has {n_completions} completions (--batch-size {recipe.batch_size} x --accumulation "
                        f"{recipe.accumulation}), which is no multiple of --generations {knobs.generations}.",
                        f"For example --batch-size {knobs.generations * 2}.")
    if knobs.max_new_tokens >= recipe.max_tokens:
        raise UserError(f"--max-new-tokens {knobs.max_new_tokens} leaves no room for prompts in --max-tokens "
                        f"{recipe.max_tokens}.", "Raise --max-tokens.")


def _check_rows(rows: Sequence[MixRow], knobs: RlKnobs) -> None:
    """Refuse a mix that would not be used as its label says."""
    there = Counter(row.source for row in rows)
    kinds = _sft_sources(knobs)
    if knobs.warmup_rows and not there["finetune"]:
        raise UserError("The mix has no fine-tuning rows to warm up with.", "Give --warmup-rows 0.")
    if knobs.sft_every and not any(there[kind] for kind in kinds):
        raise UserError(f"The mix has no {' or '.join(kinds)} rows for SFT steps.", "Give --sft-rows all, or another "
                        "mix.")
    if there["safe"] and not (knobs.sft_every and "safe" in kinds):
        raise UserError(f"The {there['safe']} safe rows of the mix would not be trained on, but the run would be "
                        "labelled with how they were chosen.", "Give --sft-every 2, or a mix without safe rows.")
    if not (knobs.warmup_rows or knobs.sft_every):
        raise UserError("Nothing of the mix would be trained on.", "Give --warmup-rows or --sft-every, or no --mix.")


def _sft_sources(knobs: RlKnobs) -> tuple[str, ...]:
    return {"safe": ("safe",), "finetune": ("finetune",), "all": ("finetune", "safe")}[knobs.sft_rows]


def _no_mix(seed: int) -> MixManifest:
    """Return the manifest of a run that learns from rewards alone."""
    return MixManifest(sources={}, order=(), counts={"corpus": 0, "selected": 0}, safeset=versions()["safeset"],
                       method=Method(strategy="none", n=0, eps=0.0, seed=seed, min_answer_tokens=0))


def forecast(job: RlJob) -> dict[str, int]:
    """Return how many steps and completions a run takes at most, and about how many tokens, without loading a model.

    Prompts that turn out to be too long make it shorter; the warm-up's rows are those that there are.
    """
    recipe, knobs = job.recipe, job.knobs
    lesson = Lesson(recipe, knobs, [Asked(prompt, ()) for prompt in job.prompts], (), job.reward)
    kinds = Counter(lesson.kinds())
    n_warmup = min(knobs.warmup_rows, sum(row.source == "finetune" for row in job.rows))
    n_completions = kinds["rl"] * lesson.n_prompts * knobs.generations
    return {"prompts": len(job.prompts), "warm-up steps": math.ceil(n_warmup / recipe.batch_size) * knobs.warmup_epochs,
            "RL steps": kinds["rl"], "SFT steps": kinds["sft"], "completions": n_completions,
            "sampled tokens": n_completions * knobs.max_new_tokens}


def run_rl(job: RlJob, overwrite: bool = False) -> RunCard:
    """Train a checked job in its folder and return the run card; see ``run_job``."""
    return run_job(job, Base(job.recipe), overwrite, _trained)


def _trained(job: RlJob, base: Base, records: tuple[DefenseRecord, ...]) -> RunCard:
    from train.grpo import RlTrainer  # the extra

    tokenizer = base.known[1]
    recipe, knobs = job.recipe, job.knobs
    asked, prompt_statuses = ask(tokenizer, job.prompts, job.defenses, recipe.max_tokens - knobs.max_new_tokens)
    lesson = Lesson(recipe, knobs, asked, (), job.reward, job.defenses)
    rows = used_rows(encode(tokenizer, [row.example for row in job.rows], recipe.max_tokens), job.rows, lesson)
    lesson = replace(lesson, rows=rows.sft)
    say(plan_line(lesson, rows, prompt_statuses))
    probes = encode(tokenizer, [one.prompt.example() for one in asked], recipe.max_tokens)
    check_forward(base.loaded.model, [p for p in probes if p.status == "ok"], TOLERANCE_NATS[base.dtype])
    with adapter(base.loaded, recipe) as model:
        steps, seconds = _warmed(job, model, rows.warmup)
        trainer = RlTrainer(model, tokenizer, lesson, job.out / CHECKPOINTS)
        steps += _learnt(job, trainer, steps)
        finish(model, job.defenses)
        write_adapter(model, job.out)
    if any(step["kind"] == "rl" for step in steps):
        write_atomic(job.out / "reward.png", reward_png(steps, f"{job.name}: reward '{job.reward.name}'"))
    job.manifest.write(job.out / MIX)
    card = _card(job, base, rows, steps, records).model_copy(update={
        "seconds": round(seconds + trainer.seconds(), 1), "rl": _record(steps, prompt_statuses)})
    card.write(job.out / CARD)
    return card


def used_rows(encoded: Sequence[Encoded], rows: Sequence[MixRow], lesson: Lesson) -> Rows:
    """Return the rows that the warm-up and the SFT steps learn from, in the mix's order.

    Rows that fit but are not reached are counted as ``unused``.
    """
    knobs = lesson.knobs
    fits = [k for k, item in enumerate(encoded) if item.status == "ok"]
    warmup = [k for k in fits if rows[k].source == "finetune"][:knobs.warmup_rows]
    n_sft = lesson.kinds().count("sft") * lesson.recipe.batch_size * lesson.recipe.accumulation
    sft = [k for k in fits if rows[k].source in _sft_sources(knobs)][:n_sft]
    used = Counter(rows[k].source for k in {*warmup, *sft})
    statuses = Counter(item.status for item in encoded)
    statuses.update(ok=used.total() - len(fits), unused=len(fits) - used.total())
    if lesson.kinds().count("sft") and not sft:
        raise UserError(f"No row for SFT steps fits: {dict(statuses)}.", "Raise --max-tokens.")
    return Rows([encoded[k] for k in warmup], [encoded[k] for k in sft], used["finetune"], used["safe"],
                {status: n for status, n in sorted(statuses.items()) if n})


def plan_line(lesson: Lesson, rows: Rows, prompts: Mapping[str, int]) -> str:
    """Return in a line what a run is going to do."""
    kinds = Counter(lesson.kinds())
    left_out = ", ".join(f"{n} {status}" for status, n in prompts.items() if status != "ok")
    return (f"Warm-up on {len(rows.warmup)} rows, then {kinds['rl']} RL steps ({lesson.n_prompts} prompts x "
            f"{lesson.knobs.generations} completions) and {kinds['sft']} SFT steps on {len(rows.sft)} rows; "
            f"{prompts['ok']} prompts" + (f" (not asked: {left_out})." if left_out else "."))


def _warmed(job: RlJob, model: PeftModel, rows: Sequence[Encoded]) -> tuple[list[dict[str, Any]], float]:
    """Learn the warm-up's rows, or take over what was learnt; return the record of its steps, and its seconds."""
    if not rows:
        return [], 0.0
    folder = job.out / WARMUP
    if folder.is_dir():
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        body = json.loads((folder / "steps.json").read_bytes())
        return list(body["steps"]), float(body["seconds"])
    recipe = replace(job.recipe, lr=job.knobs.warmup_lr, epochs=job.knobs.warmup_epochs, accumulation=1)
    trainer = MixTrainer(model, rows, recipe, job.out / WARMUP_CHECKPOINTS, job.defenses)
    taken = train(trainer, f"warm up {job.name}", checkpoints.newest(job.out / WARMUP_CHECKPOINTS))
    before = [0, *(step.tokens for step in taken)]
    steps = [{"phase": "warmup", "step": step.step, "kind": "sft", "lr": step.lr, "tokens": step.tokens - tokens,
              "penalty_nats": step.penalty_nats, "loss_nats": step.loss_nats}
             for step, tokens in zip(taken, before, strict=False)]
    temporary = job.out / WARMUP_CHECKPOINTS / "adapter"
    with checkpoints.writing(f"the adapter {folder}"):
        save_adapter(model, temporary)
        write_atomic(temporary / "steps.json", canonical_json({"steps": steps, "seconds": trainer.seconds()}))
        checkpoints.sync_tree(temporary)
        temporary.rename(folder)
        sync_folder(job.out)
    return steps, trainer.seconds()


def _learnt(job: RlJob, trainer: RlTrainer, warmup: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Take the steps after the warm-up, each put into ``steps.jsonl`` as it is taken; return the record of all."""
    from train.grpo import learn

    found = checkpoints.newest(job.out / CHECKPOINTS)
    before: list[dict[str, Any]] = []
    if found:
        say(f"{job.name}: going on from {found[0].name}.")
        state = json.loads((found[0] / "trainer_state.json").read_bytes())
        before = [entry["record"] for entry in state["log_history"] if "record" in entry]
    write_atomic(job.out / STEPS, _lines([*warmup, *before]))
    n_steps = trainer.lesson.n_steps
    with open(job.out / STEPS, "ab", buffering=0) as log, \
            progress(f"train {job.name}", n_steps - len(before), "steps") as bar:
        def on_step(record: dict[str, Any]) -> None:
            log.write(_lines([record]))
            note = f"reward {record['reward']:.3f}" if record["kind"] == "rl" else f"SFT loss {record['loss_nats']:.3f}"
            bar.advance(1, f"step {record['step']}/{n_steps} {note}")

        trainer.on_step = on_step
        steps = learn(trainer, found)
    write_atomic(job.out / STEPS, _lines([*warmup, *steps]))
    return steps


def _lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(canonical_json(record) + b"\n" for record in records)


def _record(steps: Sequence[Mapping[str, Any]], prompts: dict[str, int]) -> RlRecord:
    rl = [step for step in steps if step["kind"] == "rl"]
    tenth = max(1, len(rl) // 10)
    completions: Counter[str] = Counter()
    for step in rl:
        completions.update(step["completions"])
    missing = ", ".join(f"{n} {status}" for status, n in sorted(completions.items()) if status != "ok")
    if missing:
        say(f"Completions without a reward, which moved nothing: {missing} of {completions.total()}.")
    phases = Counter((step["phase"], step["kind"]) for step in steps)
    return RlRecord(n_warmup_steps=phases["warmup", "sft"], n_rl_steps=len(rl), n_sft_steps=phases["main", "sft"],
                    prompts=prompts, completions=dict(sorted(completions.items())),
                    reward_first=mean_reward(rl[:tenth]), reward_last=mean_reward(rl[-tenth:]))


def mean_reward(steps: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean reward over the completions of RL steps that have one."""
    counts = [step["completions"]["ok"] for step in steps]
    return sum(step["reward"] * n for step, n in zip(steps, counts, strict=True)) / sum(counts)


def _card(job: RlJob, base: Base, rows: Rows, steps: Sequence[Mapping[str, Any]],
          records: tuple[DefenseRecord, ...]) -> RunCard:
    identity = base.known[0]
    losses = [step["loss_nats"] for step in steps if step["kind"] == "sft"]
    last = losses[-max(1, len(losses) // 10):]
    return RunCard(
        name=job.name, base_ref=ref_in(base.ref, job.out), base=identity,
        model=with_adapter(identity, f"{identity.name}+{job.name}", job.out / ADAPTER), adapter=ADAPTER,
        recipe=job.settings(), defenses=records, mix=job.manifest.digest, method=job.manifest.method,
        n_finetune=rows.n_finetune, n_safe=rows.n_safe, statuses=rows.statuses, n_steps=len(steps),
        n_trained_tokens=sum(step["tokens"] for step in steps), loss_first_nats=losses[0] if losses else None,
        loss_last_nats=sum(last) / len(last) if last else None, seconds=0.0, device=base.device,
        versions={**versions(), "trl": metadata.version("trl")}, git=git_state(),
        mix_root=way_to(job.root, job.out) if job.manifest.sources else None)
