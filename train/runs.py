"""One run from its manifest to its run card: checked, trained, saved; skipped when done, continued when interrupted.

    out/started.json   what this folder is for: mix, base and recipe; written before training, removed at the end
    out/checkpoints/   while training
    out/adapter/       appears at once, complete
    out/losses.csv, out/loss.png
    out/run.json       the run card, written last: a folder that has one is finished
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.core.documents import MixManifest, ModelIdentity, RunCard
from curate.core.errors import Exit, UserError
from curate.core.files import canonical_json, sync_folder, write_atomic
from curate.core.model import Loaded, identify, load, pick_device, pick_dtype, read_run, with_adapter
from curate.core.nll import check_forward
from curate.core.terminal import quiet_libraries, say
from train import checkpoints
from train.curve import loss_png, losses_csv
from train.data import EncodedMix, MixRow, encode_mix, load_mix
from train.defenses import Defense, parse
from train.recipe import Recipe, learnt
from train.trainer import MixTrainer, Step, adapter, save_adapter, train

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

CARD, STARTED, ADAPTER, CHECKPOINTS = "run.json", "started.json", "adapter", "checkpoints"
OURS = (CARD, STARTED, ADAPTER, CHECKPOINTS, "losses.csv", "loss.png")
PACKAGES = ("safeset", "torch", "transformers", "peft")
TOLERANCE_NATS = {"float32": 1e-3, "bfloat16": 0.15}
"""How far the packed pass may differ from the model's plain one; wrong masks and scaled logits differ by whole nats."""


class Base:
    """The base model of one or more runs: found out about and loaded when first needed, then shared."""

    def __init__(self, ref: str, dtype: str = "auto", device: str = "auto") -> None:
        quiet_libraries()
        self.ref = ref
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)

    @cached_property
    def known(self) -> tuple[ModelIdentity, PreTrainedTokenizerBase]:
        """Who the model is, and its tokenizer."""
        return identify(self.ref)

    @cached_property
    def loaded(self) -> Loaded:
        """The model itself."""
        return load(self.ref, self.dtype, self.device)


@dataclass(frozen=True)
class Job:
    """A run whose manifest and rows were found in order, before any model was touched."""

    recipe: Recipe
    manifest: MixManifest
    rows: Sequence[MixRow]
    defenses: tuple[Defense, ...]
    out: Path

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.out.resolve().name

    def claim(self, base: ModelIdentity) -> dict[str, Any]:
        """Return what decides the adapter: two folders with the same claim hold the same run."""
        return {"mix": self.manifest.digest, "base": base.id, **learnt(self.recipe.as_json())}


def prepare(recipe: Recipe, manifest_path: Path, out: Path, root: Path | None = None) -> Job:
    """Check a run's manifest, rows and defences; paths in the manifest are relative to ``root``, or to its folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("Training runs in one process, on one device.", "Start it without torchrun.")
    manifest = MixManifest.read(manifest_path)
    rows: Sequence[MixRow] = load_mix(manifest, root if root is not None else manifest_path.parent)
    defenses = tuple(parse(spec) for spec in recipe.defenses)
    for defense in defenses:
        changed = defense.examples(rows)
        if len(changed) != len(rows):
            raise ValueError(f"{type(defense).__name__}.examples made {len(changed)} rows of {len(rows)}")
        rows = changed
    return Job(recipe, manifest, rows, defenses, out)


def run(recipe: Recipe, manifest_path: Path, out: Path, root: Path | None = None, overwrite: bool = False) -> RunCard:
    """Train ``recipe`` on a mix and return the run card; see ``run_job``."""
    return run_job(prepare(recipe, manifest_path, out, root), Base(recipe.base, recipe.dtype, recipe.device), overwrite)


def run_all(recipe: Recipe, mixes: Sequence[Path], out: Path, root: Path | None = None,
            overwrite: bool = False) -> list[tuple[Path, RunCard]]:
    """Train one recipe on several mixes, sharing the base; return each run's folder and card, in the order given.

    With one mix its folder is ``out``, with several ``out`` / the name of the manifest. All mixes are checked before
    the first is trained.
    """
    stems = [path.stem for path in mixes]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"Two mixes are called '{stem}', so their runs would share a folder.",
                            "Rename one, or train it with another --out.")
    folders = [out] if len(mixes) == 1 else [out / stem for stem in stems]
    jobs = [prepare(recipe, mix, folder, root) for mix, folder in zip(mixes, folders, strict=True)]
    base = Base(recipe.base, recipe.dtype, recipe.device)
    return [(job.out, run_job(job, base, overwrite)) for job in jobs]


def run_job(job: Job, base: Base, overwrite: bool = False) -> RunCard:
    """Train a checked job in its folder and return the run card.

    A finished run is not trained again; an interrupted one goes on from its last complete checkpoint. Raises
    ``UserError`` where the folder holds another run (unless ``overwrite``), where a second process trains in it, or
    where training fails.
    """
    job = replace(job, recipe=replace(job.recipe, dtype=base.dtype, device=base.device))
    identity, tokenizer = base.known
    job.out.mkdir(parents=True, exist_ok=True)
    with _locked(job.out):
        if overwrite:
            _remove(job.out, OURS)
        card = _finished(job, identity)
        if card is None:
            card = _trained(job, base, encode_mix(tokenizer, job.rows, job.recipe.max_tokens))
        _remove(job.out, (STARTED, CHECKPOINTS))
    return card


def _finished(job: Job, base: ModelIdentity) -> RunCard | None:
    """Return the card of the run in the folder if it is this one; refuse a folder that is another run's."""
    claim = job.claim(base)
    if (job.out / CARD).exists():
        card, _ = read_run(job.out)
        _refuse_other(job.out, {"mix": card.mix, "base": card.base.id, **learnt(card.recipe)}, claim)
        say(f"{job.out} is finished (same mix, base and recipe), skipped.")
        return card
    if (job.out / STARTED).exists():
        _refuse_other(job.out, json.loads((job.out / STARTED).read_bytes()), claim)
    else:
        _remove(job.out, (CHECKPOINTS,))
        write_atomic(job.out / STARTED, canonical_json(claim))
    return None


def _trained(job: Job, base: Base, mix: EncodedMix) -> RunCard:
    left_out = {status: n for status, n in mix.statuses.items() if status != "ok"}
    if left_out:
        say(f"{job.name}: not trained on: " + ", ".join(f"{n} rows {status}" for status, n in left_out.items()))
    found = checkpoints.newest(job.out / CHECKPOINTS)
    if found:
        say(f"{job.name}: going on from {found[0].name}.")
    shortest = sorted(mix.rows, key=lambda row: len(row.ids))[:3]
    check_forward(base.loaded.model, shortest, TOLERANCE_NATS[base.dtype])
    with adapter(base.loaded, job.recipe) as model:
        trainer = MixTrainer(model, mix.rows, job.recipe, job.out / CHECKPOINTS, job.defenses)
        steps = train(trainer, f"train {job.name}", found)
        _save_adapter(model, job.out)
    write_atomic(job.out / "losses.csv", losses_csv(steps))
    title = f"{job.name}: {mix.n_finetune} fine-tuning + {mix.n_safe} safe rows"
    write_atomic(job.out / "loss.png", loss_png(steps, title))
    card = _card(job, base, mix, steps, trainer.seconds())
    card.write(job.out / CARD)
    return card


def _card(job: Job, base: Base, mix: EncodedMix, steps: Sequence[Step], seconds: float) -> RunCard:
    identity = base.known[0]
    last = steps[-max(1, len(steps) // 10):]
    return RunCard(
        name=job.name, base_ref=base.ref, base=identity,
        model=with_adapter(identity, f"{identity.name}+{job.name}", job.out / ADAPTER), adapter=ADAPTER,
        recipe=job.recipe.as_json(), mix=job.manifest.digest, method=job.manifest.method,
        n_finetune=mix.n_finetune, n_safe=mix.n_safe, statuses=mix.statuses, n_steps=len(steps),
        n_trained_tokens=steps[-1].tokens, loss_first_nats=steps[0].loss_nats,
        loss_last_nats=sum(s.loss_nats for s in last) / len(last), seconds=round(seconds, 1), device=base.device,
        versions=versions(), git=git_state())


def _save_adapter(model: PeftModel, out: Path) -> None:
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
    for name in sorted(there.keys() | here.keys(), key=lambda n: (n not in ("mix", "base"), n)):
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


def versions() -> dict[str, str]:
    """Return the versions that a run was made with."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_state() -> str | None:
    """Return the commit of the checkout that this code lies in (with ``-dirty``), or None where it is no checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40",
               "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
