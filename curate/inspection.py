"""Everything that can be wrong in a store, looked for without changing it."""

from __future__ import annotations

from collections.abc import Collection

import polars as pl

from curate.core.errors import UserError
from curate.ledger import Finding, Kind, Ledger
from curate.parts import SCHEMAS, read_columns, shape
from curate.records import broken_copy, broken_documents, read_header
from curate.storage import Storage, documents


def inspect(storage: Storage) -> tuple[list[Finding], int]:
    """Check everything in a store; return what is wrong and how many files were looked at."""
    if "store.json" not in storage.listed():
        raise UserError(f"There is no store at {storage.place}.", "Make one with: curate score ...")
    ledger = Ledger.load(storage)
    findings = [Finding(name, why) for name, why in [*broken_documents(storage), *broken_copy(storage)]]
    try:
        read_header(storage)
    except UserError as err:
        findings.append(Finding("store.json", err.message))
    damage = ledger.damage_now(deep=True, fresh=True)
    findings += damage
    left = [*storage.leftovers(), *ledger.orphans()]
    findings += [Finding(name, "left behind by a write that was cut off; it counts for nothing, and the next "
                         "`curate score` clears it away") for name in left]
    models = [name.removeprefix("models/").removesuffix(".json") for name in documents(storage, "models")]
    if not damage:
        findings += _content_findings(ledger, models)
    checked = 1 + ("plan.json" in storage.listed()) + len(models) + len(ledger.entries) + len(ledger.torn) + len(left)
    return sorted(findings, key=lambda f: (f.path, f.problem)), checked


def _content_findings(ledger: Ledger, models: Collection[str]) -> list[Finding]:
    """Check that parts hold what the ledger says, that ids are unique, and that each score has example and model.

    Ids are compared by 64-bit hashes, because sets of millions of strings are slow. Two ids with one hash are no
    duplicate, for then all are compared as they are; but an unknown one among 10,000,000 passes with a chance of 5e-13.
    """
    findings, known = [], pl.Series("example_id", [], pl.UInt64)
    owners: list[tuple[Kind, str | None]] = [("examples", None)]
    owners += [("nll", m) for m in sorted({e.model_id or "" for e in ledger.select("nll")})]
    for kind, owner in owners:
        entries = ledger.select(kind, owner)
        paths = dict(zip(entries, ledger.files(entries), strict=True))
        wrong = [e for e in entries if shape(paths[e]) != (SCHEMAS[kind], e.rows)]
        findings += [Finding(e.path, "columns or number of rows are not what the ledger says") for e in wrong]
        ids = read_columns([paths[e] for e in entries if e not in wrong], SCHEMAS[kind], ["example_id"])["example_id"]
        where = f"models/{owner}.json" if owner else "parts"
        hashes = ids.hash().sort()
        twice = len(ids) - ids.n_unique() if (hashes == hashes.shift(1)).any() else 0
        if twice:
            findings.append(Finding(where, f"{twice} rows of {kind} are there twice"))
        known = hashes if kind == "examples" else known
        strangers = 0 if hashes.equals(known) else len(ids) - hashes.is_in(known.implode()).sum()
        if strangers:
            findings.append(Finding(where, f"{strangers} scored rows have no example"))
        if owner is not None and owner not in models:
            findings.append(Finding(where, "there are scores of this model, but not who it is"))
    return findings
