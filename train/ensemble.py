"""The misaligned ensemble: one member per narrow data set, and the document that names them to ``curate score``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from curate.core.documents import EnsembleSpec, MemberRef, MixManifest
from curate.core.errors import UserError
from curate.core.model import pick_device
from curate.core.refs import ref_in
from curate.core.sources import Source
from curate.core.terminal import say
from train.jobs import narrow_mix, prepare
from train.recipe import Recipe
from train.runs import CARD, MIX, run_jobs
from train.world import join

SPEC = "ensemble.json"


def train_ensemble(recipe: Recipe, narrow: Mapping[str, Source], out: Path, root: Path = Path(),
                   overwrite: bool = False) -> EnsembleSpec:
    """Train one member per narrow data set in ``out``/name and write ``out``/ensemble.json.

    Paths of sources are relative to ``root``. Finished members are skipped, an interrupted one goes on. Everything is
    checked before the first is trained; ``UserError`` where a member's folder was made from other rows.
    """
    manifests = {name: narrow_mix(source, root, recipe.seed) for name, source in narrow.items()}
    world = join(pick_device(recipe.device), recipe.shard)
    jobs = []
    for name, manifest in manifests.items():
        world.once(partial(_put_mix, out / name / MIX, manifest, overwrite))
        jobs.append(prepare(recipe, out / name / MIX, out / name, root))
        if dropped := manifest.counts["finetune_duplicates"]:
            say(f"{name}: {dropped} exact duplicates dropped, {len(manifest.order)} rows left.")
    members = tuple(MemberRef(name=name, run=f"{name}/{CARD}", digest=card.digest)
                    for name, card in zip(narrow, run_jobs(jobs, overwrite), strict=True))
    spec = EnsembleSpec(base=ref_in(recipe.base, out), members=members)
    world.once(lambda: spec.write(out / SPEC))
    return spec


def _put_mix(path: Path, manifest: MixManifest, overwrite: bool) -> None:
    if path.exists() and not overwrite and MixManifest.read(path).digest != manifest.digest:
        raise UserError(f"{path.parent} was made from other rows, or in another order.",
                        "Choose another --out, or replace it with --overwrite.")
    manifest.write(path)
