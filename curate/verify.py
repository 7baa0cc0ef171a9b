"""Is a store or a manifest what it was when it was written?"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from curate.core.documents import MixManifest
from curate.core.errors import UserError
from curate.core.sources import check_pinned, named_rows
from curate.store import Store


@dataclass(frozen=True)
class Verdict:
    """How many things were checked and what is wrong with which."""

    checked: int
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """Return plain values."""
        return {"checked": self.checked, "problems": list(self.problems), "ok": not self.problems}


def verify_store(place: Path | str) -> Verdict:
    """Check every part of a store against the ledger, and that each scored row has its example."""
    findings, checked = Store.audit(place)
    return Verdict(checked, tuple(f"{f.path}: {f.problem}" for f in findings))


def verify_manifest(path: Path, root: Path) -> Verdict:
    """Check a manifest's digest, that its sources are pinned and as they were, and that they hold each of its rows."""
    manifest = MixManifest.read(path)
    problems = [f"{entry} stands {n} times in the order" for entry, n in Counter(manifest.order).items() if n > 1]
    for entry in manifest.order:
        if entry.partition("/")[0] not in manifest.sources:
            problems.append(f"{entry} names a source that the manifest does not have")
    for name, source in manifest.sources.items():
        wanted = set(manifest.ids(name))
        try:
            check_pinned(name, source)
            wanted -= named_rows(source, root, wanted).keys()
        except UserError as err:
            problems.append(f"{name}: {err.message}")
            continue
        problems += [f"{name}/{example_id} is in no row of {source.name}" for example_id in sorted(wanted)]
    return Verdict(len(manifest.order) + len(manifest.sources) + 1, tuple(problems))
