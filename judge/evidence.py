"""Find verdicts: in run folders, in files, and the base's beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from curate.core.documents import RunCard, Verdicts
from curate.core.errors import Exit, UserError
from judge.jobs import BASE_LABEL

CARD, VERDICTS = "run.json", "verdicts.json"
BASE_FILE = f"{BASE_LABEL}.verdicts.json"
BESIDE = ("answers.jsonl", ".lm-eval")
"""What else `judge run` leaves beside verdicts, so that ``runs/*`` names it too."""


def gather(paths: Sequence[Path]) -> list[Verdicts]:
    """Return the verdicts that ``paths`` name, each once, and the base's.

    A path is a run folder, a verdicts file, or a folder of files ``*.verdicts.json``; sampled answers and results of
    lm-eval, which lie beside them, are passed over, and so are the benign runs of those judged. Where none of them is
    the base's, it is looked for beside the files and the run folders. Raises ``UserError`` for a run without verdicts,
    or one that was trained again since it was judged.
    """
    found: dict[str, Verdicts] = {}
    given = [path for path in paths if not path.name.endswith(BESIDE)]
    unjudged = [path for path in given if (path / CARD).is_file() and not (path / VERDICTS).is_file()]
    for path in given:
        if path not in unjudged:
            for verdicts in _read(path):
                found.setdefault(verdicts.digest, verdicts)
    benign = {verdicts.benign_run for verdicts in found.values()}
    for path in unjudged:
        if RunCard.read(path / CARD).digest not in benign:
            raise UserError(f"The run {path} has not been judged.", f"Run: judge run --model {path}")
    places = [path.parent for path in given]
    if not any(v.label == BASE_LABEL for v in found.values()):
        base = next((place / BASE_FILE for place in places if (place / BASE_FILE).is_file()), None)
        if base is None:
            raise UserError(f"There is no {BASE_FILE} beside the runs.",
                            "`judge run` writes it; name it too if it lies elsewhere.")
        found = {"": Verdicts.read(base), **found}
    return list(found.values())


def _read(path: Path) -> list[Verdicts]:
    if (path / CARD).is_file():
        return [_of_run(path)]
    if path.is_dir():
        files = sorted(path.glob("*.verdicts.json"))
        if not files:
            raise UserError(f"{path} holds neither a run nor verdicts.", "Give run folders or what `judge run` wrote.")
        return [Verdicts.read(file) for file in files]
    return [Verdicts.read(path)]


def _of_run(folder: Path) -> Verdicts:
    verdicts = Verdicts.read(folder / VERDICTS)
    if verdicts.run != RunCard.read(folder / CARD).digest:
        raise UserError(f"The verdicts in {folder} are of another run: it was trained again since.",
                        f"Run: judge run --model {folder}", Exit.INTEGRITY)
    return verdicts
