"""One run from its manifest to its run card: checked, trained, saved; skipped when done, continued when interrupted.

    out/started.json   what this folder is for: mix, base and recipe; written before training, removed at the end
    out/checkpoints/   while training
    out/adapter/       appears at once, complete
    out/losses.csv, out/loss.png
    out/mix.json       the manifest, as it was trained on; its paths are relative to where it came from (the card's
                       ``mix_root``)
    out/run.json       the run card, written last: a folder that has one is finished
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from curate.core.documents import DefenseRecord, ModelIdentity, RunCard
from curate.core.errors import Exit, UserError
from curate.core.files import canonical_json, sync_folder, write_atomic
from curate.core.identity import identify, read_run, with_adapter
from curate.core.model import Loaded, load, pick_device, pick_dtype
from curate.core.nll import TOLERANCE_NATS, check_forward
from curate.core.provenance import git_state, versions
from curate.core.refs import ref_in, way_to
from curate.core.terminal import quiet_libraries, say
from train import checkpoints
from train.adapters import adapter, save_adapter
from train.curve import loss_png, losses_csv
from train.data import EncodedMix, encode_mix
from train.defenses.moments import Defense
from train.jobs import Job, claimed, prepare
from train.recipe import Recipe
from train.trainer import MixTrainer, Step, finish, train
from train.world import join

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD, STARTED, ADAPTER, CHECKPOINTS = "run.json", "started.json", "adapter", "checkpoints"
MIX = "mix.json"
OURS = (CARD, STARTED, ADAPTER, CHECKPOINTS, "losses.csv", "loss.png", MIX, "steps.jsonl", "reward.png", "warmup",
        "warmup-checkpoints")
Trained = Callable[[Any, "Base", tuple[DefenseRecord, ...]], RunCard]
"""Trains a job in its folder, which is locked, and writes the card."""


class Base:
    """The base model of one or more runs: found out about and loaded when first needed, then shared."""

    def __init__(self, recipe: Recipe) -> None:
        quiet_libraries()
        self.ref = recipe.base
        self.device = pick_device(recipe.device)
        self.world = join(self.device, recipe.shard)
        self.dtype = pick_dtype(recipe.dtype, self.device)
        self.in_4bit = recipe.load_in_4bit
        if self.in_4bit and self.world.shards:
            raise UserError("A base in 4 bits cannot be split over processes.", "Leave out --load-in-4bit, or --shard "
                            "(with accelerate: launch without FSDP).")

    @cached_property
    def known(self) -> tuple[ModelIdentity, PreTrainedTokenizerBase]:
        """Who the model is, and its tokenizer."""
        return identify(self.ref)

    @cached_property
    def loaded(self) -> Loaded:
        """The model itself; where it will be split over processes, in main memory."""
        return load(self.ref, self.dtype, "cpu" if self.world.shards else self.device, self.in_4bit)

    @contextmanager
    def whole(self, model: PeftModel, recipe: Recipe) -> Iterator[PeftModel]:
        """Give a trained model with all weights of the base as they are on disk: loaded anew where it has others."""
        if not (self.world.shards or self.in_4bit):
            yield model
            return
        with adapter(load(self.ref, self.dtype, "cpu"), recipe) as again:
            set_peft_model_state_dict(again, get_peft_model_state_dict(model, save_embedding_layers=False))
            yield again

    def let_go(self) -> None:
        """Forget the model where it was split, so that the next run loads it anew."""
        if self.world.shards:
            vars(self).pop("loaded", None)


def run(recipe: Recipe, manifest_path: Path, out: Path, root: Path | None = None, overwrite: bool = False) -> RunCard:
    """Train ``recipe`` on a mix and return the run card; see ``prepare`` and ``run_job``."""
    return run_jobs([prepare(recipe, manifest_path, out, root)], overwrite)[0]


def run_jobs(jobs: Sequence[Job], overwrite: bool = False) -> list[RunCard]:
    """Train jobs of one base, device and dtype one after the other and return their cards; the base is loaded once."""
    base = Base(jobs[0].recipe)
    with base.world.together():
        return [run_job(job, base, overwrite) for job in jobs]


def run_job(job: Job, base: Base, overwrite: bool = False, trained: Trained | None = None) -> RunCard:
    """Train a checked job in its folder and return the run card.

    A finished run is not trained again; an interrupted one goes on from its last complete checkpoint. Raises
    ``UserError`` where the folder holds another run (unless ``overwrite``), where a second process trains in it, or
    where training fails. Of several processes, the first does all that concerns the folder.
    """
    job = replace(job, recipe=replace(job.recipe, dtype=base.dtype, device=base.device))
    identity, _ = base.known
    with ExitStack() as stack:
        records, card = base.world.once(lambda: _opened(job, identity, overwrite, stack))
        if card is None:
            card = (trained or _trained)(job, base, records)
        base.world.once(lambda: _remove(job.out, (STARTED, CHECKPOINTS, "warmup-checkpoints")))
    return card


def _opened(job: Job, base: ModelIdentity, overwrite: bool,
            stack: ExitStack) -> tuple[tuple[DefenseRecord, ...], RunCard | None]:
    """Lock the run's folder until ``stack`` closes; return the defences' records and, if it is finished, its card."""
    job.out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(_locked(job.out))
    if overwrite:
        _remove(job.out, OURS)
    records = job.records(base)
    return records, _finished(job, base, records)


def _finished(job: Job, base: ModelIdentity, records: Sequence[DefenseRecord]) -> RunCard | None:
    """Return the card of the run in the folder if it is this one; refuse a folder that is another run's."""
    claim = job.claim(base, records)
    if (job.out / CARD).exists():
        card, _ = read_run(job.out)
        _refuse_other(job.out, claimed(card.mix, card.base.id, card.recipe, card.defenses), claim)
        say(f"{job.out} is finished (same mix, base and recipe), skipped.")
        return card
    if (job.out / STARTED).exists():
        _refuse_other(job.out, _started(job.out), claim)
        return None
    foreign = next((name for name in OURS if name != MIX and (job.out / name).exists()), None)
    if foreign:
        raise UserError(f"{job.out} has something called {foreign}, but neither {CARD} nor {STARTED}, so it is not "
                        "known whose that is.", "Choose another --out, or replace it with --overwrite.")
    write_atomic(job.out / STARTED, canonical_json(claim))
    return None


def _started(out: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((out / STARTED).read_bytes()))
    except (ValueError, TypeError):
        raise UserError(f"{out / STARTED} is not as it was written.", "Start again with --overwrite.",
                        Exit.INTEGRITY) from None


def _trained(job: Job, base: Base, records: tuple[DefenseRecord, ...]) -> RunCard:
    mix = encode_mix(base.known[1], job.rows, job.recipe.max_tokens)
    left_out = {status: n for status, n in mix.statuses.items() if status != "ok"}
    if left_out:
        say(f"{job.name}: not trained on: " + ", ".join(f"{n} rows {status}" for status, n in left_out.items()))
    found = base.world.once(lambda: checkpoints.newest(job.out / CHECKPOINTS))
    if found:
        say(f"{job.name}: going on from {found[0].name}.")
    check_forward(base.loaded.model, mix.rows, TOLERANCE_NATS[base.dtype])
    with adapter(base.loaded, job.recipe) as model:
        trainer = MixTrainer(model, mix.rows, job.recipe, job.out / CHECKPOINTS, job.defenses, base.world)
        steps = train(trainer, f"train {job.name}", found)
        base.world.once(lambda: _finish(job, base, model))
    base.let_go()
    seconds = trainer.seconds()
    return base.world.once(lambda: _written(job, mix, steps, _card(job, base, mix, steps, seconds, records)))


def _finish(job: Job, base: Base, model: PeftModel) -> None:
    """Let the defences change the trained adapter, and put it into the run's folder."""
    if all(type(defense).after is Defense.after for defense in job.defenses):
        finish(model, ())
        write_adapter(model, job.out)
        return
    with base.whole(model, job.recipe) as whole:
        finish(whole, job.defenses)
        write_adapter(whole, job.out)


def _written(job: Job, mix: EncodedMix, steps: Sequence[Step], card: RunCard) -> RunCard:
    """Write the run's results, the card last, and return it."""
    write_atomic(job.out / "losses.csv", losses_csv(steps))
    title = f"{job.name}: {mix.n_finetune} fine-tuning + {mix.n_safe} safe rows"
    write_atomic(job.out / "loss.png", loss_png(steps, title))
    job.manifest.write(job.out / MIX)
    card.write(job.out / CARD)
    return card


def _card(job: Job, base: Base, mix: EncodedMix, steps: Sequence[Step], seconds: float,
          records: tuple[DefenseRecord, ...]) -> RunCard:
    identity = base.known[0]
    last = steps[-max(1, len(steps) // 10):]
    return RunCard(
        name=job.name, base_ref=ref_in(base.ref, job.out), base=identity,
        model=with_adapter(identity, f"{identity.name}+{job.name}", job.out / ADAPTER), adapter=ADAPTER,
        recipe=job.recipe.as_json(), defenses=records, mix=job.manifest.digest, method=job.manifest.method,
        n_finetune=mix.n_finetune, n_safe=mix.n_safe, statuses=mix.statuses, n_steps=len(steps),
        n_trained_tokens=steps[-1].tokens, loss_first_nats=steps[0].loss_nats,
        loss_last_nats=sum(s.loss_nats for s in last) / len(last), seconds=round(seconds, 1),
        device=base.device + (f" x {base.world.size}" if base.world.size > 1 else ""),
        versions=versions(), git=git_state(), mix_root=way_to(job.root, job.out))


def write_adapter(model: PeftModel, out: Path) -> None:
    """Put the adapter into ``out/adapter``, whole or not at all."""
    _remove(out, (ADAPTER, f".{ADAPTER}.tmp"))
    temporary = out / f".{ADAPTER}.tmp"
    with checkpoints.writing(f"the adapter {out / ADAPTER}"):
        save_adapter(model, temporary)
        checkpoints.sync_tree(temporary)
        temporary.rename(out / ADAPTER)
        sync_folder(out)


def _refuse_other(out: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise a ``UserError`` that names the first difference between what a folder holds and what it is wanted for."""
    for name in sorted(there.keys() | here.keys(), key=lambda n: (n not in ("mix", "base", "defenses"), n)):
        if there.get(name) != here.get(name):
            raise UserError(f"{out} holds another run: its {name} is {_short(there.get(name))}, "
                            f"not {_short(here.get(name))}.", "Choose another --out, or replace it with --overwrite.")


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 40 else repr(value)


def _remove(out: Path, names: Sequence[str]) -> None:
    """Remove these files and folders of ours, in this order."""
    for path in (out / name for name in names):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold a folder so that no second process trains in it; the lock ends with the process."""
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process is training in {out}.", "Wait for it, or choose another --out.",
                            Exit.LOCKED) from None
        yield
    finally:
        os.close(handle)
