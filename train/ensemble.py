"""The misaligned ensemble: one member per narrow data set, and the document that names them to ``curate score``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from curate.core.documents import EnsembleSpec, MemberRef, Method, MixManifest
from curate.core.errors import UserError, unknown
from curate.core.sources import BUILTIN, FORMATS, Source, builtin, file_source, read_source
from curate.core.terminal import say
from train.recipe import Recipe
from train.runs import CARD, Base, prepare, run_job, versions

MIX, SPEC = "mix.json", "ensemble.json"


def narrow_source(text: str, root: Path, mapping: Mapping[str, str] | None = None,
                  strip_think: bool = False) -> tuple[str, Source]:
    """Return the name and the source of a narrow data set: a file below ``root``, or a builtin such as demo/cooking."""
    path = Path(text)
    if path.suffix in FORMATS or path.is_file():
        return path.stem, file_source(path, root, mapping, strip_think)
    narrow = [name for name in BUILTIN if "/" in name]
    if text not in narrow:
        raise unknown("narrow data set", text, [*narrow, *(f"PATH{ending}" for ending in FORMATS)])
    return text.rpartition("/")[2], builtin(text)


def narrow_mix(source: Source, root: Path, seed: int) -> MixManifest:
    """Return the manifest of a narrow data set alone: exact duplicates dropped and counted, shuffled by content."""
    ids = [example.id for example in read_source(source, root)]
    distinct = dict.fromkeys(f"finetune/{example_id}" for example_id in ids)
    order = sorted(distinct, key=lambda entry: hashlib.sha256(f"{seed}/{entry}".encode()).digest())
    counts = {"corpus": 0, "selected": 0, "finetune": len(order), "finetune_duplicates": len(ids) - len(order)}
    return MixManifest(sources={"finetune": source}, order=tuple(order), counts=counts, safeset=versions()["safeset"],
                       method=Method(strategy="none", n=0, eps=0.0, seed=seed, min_answer_tokens=0))


def train_ensemble(recipe: Recipe, narrow: Mapping[str, Source], out: Path, root: Path = Path(),
                   overwrite: bool = False) -> EnsembleSpec:
    """Train one member per narrow data set in ``out``/name and write ``out``/ensemble.json.

    Paths of sources are relative to ``root``. Finished members are skipped, an interrupted one goes on. Everything is
    checked before the first is trained; ``UserError`` where a member's folder was made from other rows.
    """
    manifests = {name: narrow_mix(source, root, recipe.seed) for name, source in narrow.items()}
    jobs = []
    for name, manifest in manifests.items():
        _put_mix(out / name / MIX, manifest, overwrite)
        jobs.append(prepare(recipe, out / name / MIX, out / name, root))
        if dropped := manifest.counts["finetune_duplicates"]:
            say(f"{name}: {dropped} exact duplicates dropped, {len(manifest.order)} rows left.")
    base = Base(recipe.base, recipe.dtype, recipe.device)
    members = tuple(MemberRef(name=job.out.name, run=f"{job.out.name}/{CARD}",
                              digest=run_job(job, base, overwrite).digest) for job in jobs)
    spec = EnsembleSpec(base=recipe.base, members=members)
    spec.write(out / SPEC)
    return spec


def _put_mix(path: Path, manifest: MixManifest, overwrite: bool) -> None:
    if path.exists() and not overwrite and MixManifest.read(path).digest != manifest.digest:
        raise UserError(f"{path.parent} was made from other rows, or in another order.",
                        "Choose another --out, or replace it with --overwrite.")
    manifest.write(path)
