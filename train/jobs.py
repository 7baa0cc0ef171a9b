"""What is to be trained, checked before any model library is loaded: mixes, narrow data sets, defences."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.core import processes
from curate.core.documents import DefenseRecord, Method, MixManifest, ModelIdentity
from curate.core.errors import UserError, unknown
from curate.core.provenance import versions
from curate.core.refs import ref_of
from curate.core.sources import BUILTIN, FORMATS, Source, builtin, file_source, read_source
from train.data import MixRow, load_mix
from train.recipe import Recipe, learnt

if TYPE_CHECKING:
    from train.defenses import Defense


@dataclass(frozen=True)
class Job:
    """A run whose manifest and rows were found in order, before any model was touched."""

    recipe: Recipe
    manifest: MixManifest
    rows: Sequence[MixRow]
    defenses: tuple[Defense, ...]
    out: Path
    root: Path
    """Folder that file names in the manifest are relative to."""

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.out.resolve().name

    def records(self, base: ModelIdentity) -> tuple[DefenseRecord, ...]:
        """Check the defences against the base and return what they are, for the run card."""
        names = [spec.partition(":")[0] for spec in self.recipe.defenses]
        return tuple(DefenseRecord(name=name, files=defense.check(base), settings={
            setting.name: getattr(defense, setting.name) for setting in fields(defense) if setting.init})
            for name, defense in zip(names, self.defenses, strict=False))

    def claim(self, base: ModelIdentity, records: Sequence[DefenseRecord]) -> dict[str, Any]:
        """Return what decides the adapter: two folders with the same claim hold the same run."""
        return claimed(self.manifest.digest, base.id, self.recipe.as_json(), records)


def claimed(mix: str, base: str, recipe: Mapping[str, Any], records: Sequence[DefenseRecord]) -> dict[str, Any]:
    """Return a run's mix, base, recipe as far as it decides what is learnt, and its defences.

    Files of a defence stand there by digest: the path by which one was called decides nothing.
    """
    settings = {f"{record.name} {name}": value for record in records
                for name, value in {**record.settings, **record.files}.items()}
    return {"mix": mix, "base": base, **learnt(recipe), "defenses": [record.name for record in records], **settings}


def prepare(recipe: Recipe, manifest_path: Path, out: Path, root: Path | None = None) -> Job:
    """Check a run's manifest, rows and defences; paths in the manifest are relative to ``root``, or to its folder.

    Of several processes each is given the recipe's batches, so the run is that of one process which accumulates as
    many times more; as such it is written down.
    """
    recipe = replace(recipe, accumulation=recipe.accumulation * processes.count())
    manifest = MixManifest.read(manifest_path)
    root = root if root is not None else manifest_path.parent
    rows: Sequence[MixRow] = load_mix(manifest, root)
    recipe, defenses = with_defenses(recipe) if recipe.defenses else (recipe, ())
    for defense in defenses:
        changed = defense.examples(rows)
        if len(changed) != len(rows):
            raise ValueError(f"{type(defense).__name__}.examples made {len(changed)} rows of {len(rows)}")
        rows = changed
    return Job(recipe, manifest, rows, defenses, out, root)


def with_defenses(recipe: Recipe) -> tuple[Recipe, tuple[Defense, ...]]:
    """Return the defences that a recipe names, in their order, and the recipe with their canonical names."""
    from train.defenses import canonical, ordered, parse  # loads torch, so not before the rows are checked

    specs = ordered(recipe.defenses)
    defenses = tuple(parse(spec) for spec in specs)
    names = [canonical(spec.partition(":")[0], defense) for spec, defense in zip(specs, defenses, strict=True)]
    return replace(recipe, defenses=tuple(names)), defenses


def base_of(mixes: Sequence[Path]) -> str:
    """Return the aligned model of the first manifest whose scores name one that loads anywhere, else an empty text."""
    aligned = (MixManifest.read(path).aligned for path in mixes)
    return next((ref for model in aligned if model is not None and (ref := ref_of(model))), "")


def prepare_all(recipe: Recipe, mixes: Sequence[Path], out: Path, root: Path | None = None) -> list[Job]:
    """Check one recipe on several mixes: a single one is trained in ``out``, more in ``out`` / their names."""
    stems = [path.stem for path in mixes]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"Two mixes are called '{stem}', so their runs would share a folder.",
                            "Rename one, or train it with another --out.")
    folders = [out] if len(mixes) == 1 else [out / stem for stem in stems]
    return [prepare(recipe, mix, folder, root) for mix, folder in zip(mixes, folders, strict=True)]


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
