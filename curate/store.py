"""The evidence store: examples and what each model makes of them, in unrounded sums.

    store.json          what makes the numbers inside comparable: aligned model, engine, dtype, encoding, tokenizer
    parts/, ledger/     examples, scores and corpora; see ``curate.ledger``
    models/<id>.json    who the models are; models/store.json.copy has the bytes of store.json
    plan.json           the corpora that there are, and what the latest ``curate score`` set out to do
    lock, quarantine/   the one writer of a folder, and what was put aside as damaged

A store is a folder or a URL; ``curate.storage`` says what either has to do. Readers never write: they refuse a damaged
store. A writer moves damage aside, so that its rows are missing again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.core.errors import Exit, UserError
from curate.core.files import canonical_json, sha256
from curate.inspection import inspect
from curate.ledger import LOOKS, Entry, Finding, Kind, Ledger
from curate.parts import (
    CORPUS_SCHEMA,
    EXAMPLES_SCHEMA,
    INDEX,
    NLL_SCHEMA,
    Lookup,
    checked,
    new_rows,
    part_bytes,
    read_columns,
)
from curate.records import (
    HEADER,
    Plan,
    PlannedCorpus,
    ScoredModel,
    StoreHeader,
    agreed,
    broken_documents,
    mend_header,
    read_header,
    read_model,
)
from curate.storage import Storage, documents, storage_at


class Store:
    """A folder of evidence; open it with ``create_or_open`` to write or ``open_read`` to read."""

    def __init__(self, storage: Storage, header: StoreHeader, ledger: Ledger) -> None:
        self.path = storage.place
        self.header = header
        self.quarantined: list[str] = []
        self.storage = storage
        self._ledger = ledger
        self.swept = 0
        """How many parts were removed because a merged part had replaced them."""
        self._held: ExitStack | None = None
        self._index: pl.DataFrame | None = None
        self._lookup: Lookup | None = None
        self._ids: set[str] | None = None
        self._scored: tuple[str, set[str]] | None = None
        self._named: set[str] = set()

    @classmethod
    def create_or_open(cls, place: Path | str, header: StoreHeader) -> Store:
        """Open a store to write, making it if need be, and move what is damaged aside.

        Raises ``UserError``: locked, incompatible (the first field of the header that differs), or no store.
        """
        storage = storage_at(place)
        storage.check_new()
        with ExitStack() as held:
            held.enter_context(storage.open_to_write())
            mended = mend_header(storage) if HEADER in storage.listed() else []
            store = cls(storage, agreed(storage, header), Ledger.load(storage))
            mended += mend_header(storage)
            broken = [name for name, _ in broken_documents(storage)]
            for name in broken:
                storage.put_aside(name)
            store.quarantined = store._ledger.mend() + broken + mended
            store.swept = 0 if storage.shared else store._ledger.sweep()
            store._held = held.pop_all()
        return store

    @classmethod
    def open_read(cls, place: Path | str) -> Store:
        """Open a store to read, without a lock; damage is refused by whatever would have to rely on it."""
        storage = storage_at(place)
        return cls(storage, read_header(storage), Ledger.load(storage))

    @staticmethod
    def audit(place: Path | str) -> tuple[list[Finding], int]:
        """Check everything in a store; return what is wrong and how many files were looked at."""
        return inspect(storage_at(place))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop writing."""
        if self._held is not None:
            held, self._held = self._held, None
            held.close()

    def _check_writable(self) -> None:
        if self._held is None:
            raise ValueError(f"{self.path} is open for reading only")

    def put_examples(self, table: pa.Table) -> None:
        """Store examples; those that are stored already, by whomever, are left as they are."""
        self._check_writable()
        table = checked(table, EXAMPLES_SCHEMA)
        while True:
            table = new_rows(table, self._stored_ids())
            if not table.num_rows:
                return
            data = part_bytes(table)
            added = self._ledger.add(Entry.of(self._ledger.next_slot(), data, table.num_rows), data)
            self._index = self._lookup = None
            if added:
                self._stored_ids().update(table["example_id"].to_pylist())
                return
            self._ledger.refresh()
            self._ids = None

    def put_nll(self, model_id: str, table: pa.Table) -> None:
        """Store what a model makes of examples; rows that are stored already, by whomever, are left as they are."""
        self._check_writable()
        table = checked(table, NLL_SCHEMA)
        if model_id not in self._named:
            self._named = {model.identity.id for model in self.models()}
        if model_id not in self._named:
            raise ValueError(f"put_model comes before put_nll: {model_id}")
        if table.num_rows and table["model_id"].unique().to_pylist() != [model_id]:
            raise ValueError(f"rows of another model than {model_id}")
        if self._scored is None or self._scored[0] != model_id:
            self._scored = (model_id, self.scored_ids(model_id))
        table = new_rows(table, self._scored[1])
        if not table.num_rows:
            return
        data = part_bytes(table)
        work = sha256(canonical_json([model_id, sorted(table["example_id"].to_pylist())]))[:24]
        if not self._ledger.add(Entry.of(f"nll-{work}", data, table.num_rows, model_id), data):
            self._ledger.refresh()
        self._scored[1].update(table["example_id"].to_pylist())

    def withdraw_nll(self, model_id: str, ids: Collection[str]) -> None:
        """Put the parts with a model's scores of ``ids`` aside, so that these are missing again.

        What else a merged part holds is stored again at once; a kill in between leaves it missing, too, never wrong.
        """
        self._check_writable()
        unwanted, kept = pa.array(sorted(ids), pa.string()), []
        while hit := [entry for entry, path in self._nll_files(model_id)
                      if pc.any(pc.is_in(_ids_in(path), unwanted)).as_py()]:
            for entry in hit:
                table = pq.read_table(self._ledger.files([entry])[0], page_checksum_verification=True)
                kept.append(table.filter(pc.invert(pc.is_in(table["example_id"], unwanted))))
                self._ledger.withdraw(entry)
        self._scored = None
        for table in kept:
            self.put_nll(model_id, table)

    def merge_nll(self, entries: Sequence[Entry]) -> bool:
        """Store the rows of several parts of one model's scores as one part, which counts in their place.

        False when another merge came first. The parts stay where they are until ``sweep``.
        """
        self._check_writable()
        paths = self._ledger.files(entries)
        if len(paths) < len(entries):
            self._refuse(self._ledger.damage_now("nll"))
            return False
        tables = [pq.read_table(path, page_checksum_verification=True) for path in paths]
        table = checked(pa.concat_tables(tables), NLL_SCHEMA)
        return self._ledger.merge(entries, part_bytes(table), table.num_rows)

    def sweep(self) -> None:
        """Remove what merged parts have replaced; on a folder this happens whenever it is opened to write."""
        self._check_writable()
        self.swept += self._ledger.sweep()

    def put_membership(self, key: str, ids: Sequence[str]) -> None:
        """Store which examples a corpus consists of, in place of what was known of this key."""
        self._check_writable()
        table = pa.table({"key": [key] * len(ids), "example_id": list(ids)}, schema=CORPUS_SCHEMA)
        data = part_bytes(checked(table, CORPUS_SCHEMA))
        self._ledger.replace(Entry.of(f"corpus-{key}", data, len(ids)), data)

    def put_model(self, model: ScoredModel) -> None:
        """Store who a model is; ``UserError`` for a name or a role that is taken, or another aligned model."""
        self._check_writable()
        if model.role == "aligned" and model.identity.id != self.header.aligned.id:
            raise UserError(f"'{model.name}' is not the aligned model of the store {self.path}, which is "
                            f"'{self.header.aligned.name}'.", "Use another --store.", Exit.INCOMPATIBLE)
        if model.role == "member" and model.identity.id == self.header.aligned.id:
            raise UserError(f"The member '{model.name}' is the aligned model itself.",
                            "Give a model that was fine-tuned on narrow harmful data.")
        if any(m.name == model.name and m.identity.id != model.identity.id for m in self.models()):
            raise UserError(f"The store {self.path} already holds another model called '{model.name}'.",
                            "Give the run another name, or use another --store.")
        self.storage.put(f"models/{model.identity.id}.json", model.to_bytes())

    def models(self) -> list[ScoredModel]:
        """Return the models, the aligned one first, then by name."""
        found = self.storage.get_many(documents(self.storage, "models"))
        return sorted((read_model(name, data) for name, data in found), key=lambda m: (m.role, m.name))

    def put_plan(self, plan: Plan) -> None:
        """Store which corpora there are and what scoring is about to do, in place of the plan before.

        Two machines that put theirs at the same moment leave one; the other's corpora are named again when it scores.
        """
        self._check_writable()
        self.storage.put("plan.json", plan.to_bytes())

    @property
    def plan(self) -> Plan:
        """Which corpora there are, and what the latest scoring set out to do."""
        try:
            return Plan.from_bytes(self.storage.get("plan.json"), f"{self.path}/plan.json")
        except FileNotFoundError:
            raise UserError(f"The store {self.path} has no plan: nothing was scored into it yet, or it was damaged.",
                            "Score (again): curate score ...", Exit.INTEGRITY) from None

    def planned_corpora(self) -> tuple[PlannedCorpus, ...]:
        """Return the corpora that were scored into the store so far, the latest last; none where there is no plan."""
        return self.plan.corpora if "plan.json" in self.storage.listed() else ()

    def part_files(self, kind: Kind, model_id: str | None = None) -> list[Path]:
        """Return local files of one kind (and model), every one checked against the ledger.

        Raises ``UserError`` (integrity) when anything that can be seen of the store is damaged.
        """
        for _ in range(LOOKS):
            self._refuse(self._ledger.damage_now(kind))
            entries = self._ledger.select(kind, model_id)
            paths = self._ledger.files(entries)
            if len(paths) == len(entries):
                return paths
        raise UserError(f"The parts of the store {self.path} are removed while they are read.",
                        "Another process is merging or mending them; try again.", Exit.INTEGRITY)

    def _refuse(self, damage: Sequence[Finding]) -> None:
        if damage:
            first = damage[0]
            raise UserError(f"The store {self.path} is damaged: {first.path}: {first.problem} "
                            f"({len(damage)} damaged in all).",
                            "`curate verify` lists them; the same `curate score` again replaces them.", Exit.INTEGRITY)

    def evidence_digest(self) -> str:
        """Return one digest for all examples and scores: over the sorted sha256 of the parts they were stored in."""
        self._refuse(self._ledger.damage_now(False))
        entries = [*self._ledger.select("examples"), *self._ledger.select("nll")]
        return sha256("\n".join(sorted(digest for entry in entries for digest in entry.evidence)).encode())

    def example_index(self) -> pl.DataFrame:
        """Return example_id, n_prompt_tokens, n_answer_tokens and status of every example, sorted by id."""
        return self._examples().sort("example_id")

    def example_parts(self) -> Iterator[pa.Table]:
        """Yield the same columns part by part, in an order that depends on what is stored only."""
        for path in self.part_files("examples"):
            yield pq.read_table(path, columns=list(INDEX), page_checksum_verification=True)

    def example_ids(self) -> set[str]:
        """Return the ids of the stored examples."""
        return set(self._stored_ids())

    def holds(self, example_id: str) -> bool:
        """Return whether an example is stored."""
        return example_id in self._stored_ids()

    def statuses(self, ids: Collection[str]) -> Counter[str]:
        """Return how many of the examples ``ids`` have which status."""
        return Counter(self._known(ids)["status"].to_list())

    def scored_ids(self, model_id: str) -> set[str]:
        """Return the examples that a model has a row for, whatever its status: what a resumed run leaves out."""
        return set(self._nll(model_id, "example_id")["example_id"])

    def n_scored(self, model_id: str) -> int:
        """Return how many rows of a model there are, by the ledger alone."""
        return sum(entry.rows for entry in self._ledger.select("nll", model_id))

    def entries(self) -> list[Entry]:
        """Return the ledger."""
        return list(self._ledger.entries.values())

    def writes(self) -> list[tuple[float, int, Kind]]:
        """Return when (seconds since 1970) how many rows of which kind were stored, as far as that is known."""
        times = self.storage.listed("ledger")
        found = ((times.get(f"{slot}.json"), entry) for slot, entry in self._ledger.entries.items()
                 if not entry.replaces)
        return [(at.modified, entry.rows, entry.kind) for at, entry in found if at and at.modified is not None]

    def failed_ids(self, model_ids: Collection[str]) -> set[str]:
        """Return the examples for which one of the models has a row that holds no finite number."""
        good = (pl.col("status") == "ok") & pl.col("nll_sum").is_finite().fill_null(False) & (pl.col("n_tokens") > 0)
        frames = (self._nll(m, "example_id", "status", "nll_sum", "n_tokens") for m in model_ids)
        return {example_id for frame in frames for example_id in frame.filter(~good)["example_id"]}

    def read_examples(self, ids: Sequence[str], columns: Sequence[str] = tuple(EXAMPLES_SCHEMA.names)) -> pa.Table:
        """Return columns of examples in the order of ``ids``; ``UserError`` (integrity) if one is not stored.

        A thread may read them while another stores scores, but not while examples are stored.
        """
        self._lookup = self._lookup or self._looked_up()
        held, strangers = self._lookup.parts(ids)
        if strangers:
            raise UserError(f"{len(strangers)} examples are not in the store {self.path}, the first is {strangers[0]}.",
                            "Score the corpus they come from into it.", Exit.INTEGRITY)
        values, wanted = pa.array(ids, pa.string()), list(dict.fromkeys(["example_id", *columns]))
        found = [EXAMPLES_SCHEMA.empty_table().select(wanted)]
        paths = self._ledger.files(held)
        if len(paths) < len(held):
            self._refuse(self._ledger.damage_now("examples"))
        for path in paths:
            table = pq.read_table(path, columns=wanted, page_checksum_verification=True)
            found.append(table.filter(pc.is_in(table["example_id"], values)))
        table = pa.concat_tables(found)
        return table.take(pc.index_in(values, table["example_id"].combine_chunks()))

    def _looked_up(self) -> Lookup:
        entries = self._ledger.select("examples")
        return Lookup.of(entries, self.part_files("examples"))

    def _stored_ids(self) -> set[str]:
        """Return the ids of the stored examples, the set itself."""
        if self._ids is None:
            self._ids = set(self._examples()["example_id"])
        return self._ids

    def _examples(self) -> pl.DataFrame:
        """Return the example index; read once."""
        if self._index is None:
            self._index = read_columns(self.part_files("examples"), EXAMPLES_SCHEMA, list(INDEX))
        return self._index

    def _known(self, ids: Collection[str]) -> pl.DataFrame:
        """Return the index rows of those of ``ids`` that are stored."""
        wanted = pl.DataFrame({"example_id": list(ids)}, schema={"example_id": pl.String})
        return self._examples().join(wanted, on="example_id", how="semi")

    def _nll(self, model_id: str, *columns: str) -> pl.DataFrame:
        return read_columns(self.part_files("nll", model_id), NLL_SCHEMA, columns)

    def _nll_files(self, model_id: str) -> list[tuple[Entry, Path]]:
        paths = self.part_files("nll", model_id)
        return list(zip(self._ledger.select("nll", model_id), paths, strict=True))


def _ids_in(path: Path) -> pa.ChunkedArray:
    return pq.read_table(path, columns=["example_id"])["example_id"]
