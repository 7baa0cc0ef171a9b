"""The evidence store: examples and what each model makes of them, in unrounded sums.

    store.json          what makes the numbers inside comparable: aligned model, engine, dtype, encoding, tokenizer
    parts/, ledger/     examples, scores and corpora; see ``curate.ledger``
    models/<id>.json    who the models are
    plan.json           what the latest ``curate score`` set out to do
    lock, quarantine/   the one writer, and what it put aside as damaged

Readers never write: they refuse a damaged store. A writer moves damage aside, so that its rows are missing again.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from curate.core.documents import Document, ModelIdentity, Part
from curate.core.errors import Exit, UserError
from curate.core.files import canonical_json, sha256
from curate.core.sources import Source
from curate.ledger import FOLDERS, TEMPORARY, Entry, Finding, Kind, Ledger, Lock, listed, put_aside, temporaries

EXAMPLES_SCHEMA = pa.schema([
    pa.field("example_id", pa.string(), nullable=False), pa.field("corpus", pa.string(), nullable=False),
    pa.field("prompt", pa.string(), nullable=False), pa.field("answer", pa.string(), nullable=False),
    pa.field("messages", pa.string(), nullable=False), pa.field("meta", pa.string(), nullable=False),
    pa.field("n_prompt_tokens", pa.int32(), nullable=False), pa.field("n_answer_tokens", pa.int32(), nullable=False),
    pa.field("status", pa.string(), nullable=False)])
"""``messages`` and ``meta`` are JSON; ``status`` is ok, too_long or empty_answer."""

NLL_SCHEMA = pa.schema([
    pa.field("example_id", pa.string(), nullable=False), pa.field("model_id", pa.string(), nullable=False),
    pa.field("nll_sum", pa.float64()), pa.field("n_tokens", pa.int32(), nullable=False),
    pa.field("eot_nll", pa.float64()), pa.field("status", pa.string(), nullable=False)])
"""``nll_sum`` is in nats over the ``n_tokens`` answer tokens, ``eot_nll`` in nats of the end-of-turn token."""

CORPUS_SCHEMA = pa.schema([pa.field("key", pa.string(), nullable=False),
                           pa.field("example_id", pa.string(), nullable=False)])

SCHEMAS: Mapping[Kind, pa.Schema] = {"examples": EXAMPLES_SCHEMA, "nll": NLL_SCHEMA, "corpus": CORPUS_SCHEMA}
INDEX = {"example_id": pl.String, "n_prompt_tokens": pl.Int32, "n_answer_tokens": pl.Int32, "status": pl.String}


class StoreHeader(Document):
    """What all numbers of a store have in common; with another value they could not be compared."""

    KIND: ClassVar[str] = "safeset.store"

    aligned: ModelIdentity
    engine: str
    dtype: str
    encoding: str
    """Version of the chat encoding."""
    tokenizer: str
    max_tokens: int

    def compared(self) -> dict[str, Any]:
        """Return the fields that must agree; a model's name and revision may change, its content may not."""
        fields = self.model_dump(mode="json")
        aligned = fields.pop("aligned")
        return {f"aligned {k}": aligned[k] for k in ("weights", "tokenizer", "adapter")} | fields


class ScoredModel(Document):
    """A model with numbers in the store; ``name`` is unique there."""

    KIND: ClassVar[str] = "safeset.scored-model"

    role: Literal["aligned", "member"]
    name: str
    identity: ModelIdentity


class PlannedCorpus(Part):
    """A corpus as it was read: its source, the folder that file names refer to, and the key of its rows."""

    label: str
    source: Source
    folder: str
    key: str = Field(pattern="^([0-9a-f]{24})?$")
    n_rows: int
    """Distinct examples."""


class Plan(Document):
    """What the latest ``curate score`` set out to do; ``counts`` by status add up to ``n_rows``, the rows read."""

    KIND: ClassVar[str] = "safeset.plan"

    corpora: tuple[PlannedCorpus, ...]
    n_rows: int
    counts: dict[str, int]


def corpus_key(label: str, source: Source, sampling: Mapping[str, Any]) -> str:
    """Return 24 hexadecimal digits that stand for a corpus as it was asked for."""
    return sha256(canonical_json([label, source.model_dump(mode="json"), dict(sampling)]))[:24]


class Store:
    """A folder of evidence; open it with ``create_or_open`` to write or ``open_read`` to read."""

    def __init__(self, path: Path, header: StoreHeader, ledger: Ledger) -> None:
        self.path = path
        self.header = header
        self.quarantined: list[str] = []
        self._ledger = ledger
        self._held: ExitStack | None = None
        self._index: pl.DataFrame | None = None
        self._scored: tuple[str, set[str]] | None = None

    @classmethod
    def create_or_open(cls, path: Path, header: StoreHeader) -> Store:
        """Open a store for its one writer, making it if need be, and move what is damaged aside.

        Raises ``UserError``: locked, incompatible (the first field of the header that differs), or no store.
        """
        _check_folder(path)
        with ExitStack() as held:
            try:
                for folder in (path, *(path / name for name in FOLDERS)):
                    folder.mkdir(parents=True, exist_ok=True)
                lock = Lock(path / "lock")
                lock.acquire()
            except OSError as err:
                raise UserError(f"{path} cannot be written: {err.strerror}.", "Choose another --store.",
                                Exit.ENVIRONMENT) from err
            held.callback(lock.release)
            for leftover in temporaries(path):
                leftover.unlink()
            store = cls(path, _agreed(path, header), Ledger.load(path))
            store.quarantined = store._ledger.mend() + _mend_documents(path)
            store._held = held.pop_all()
        return store

    @classmethod
    def open_read(cls, path: Path) -> Store:
        """Open a store to read, without a lock; damage is refused by whatever would have to rely on it."""
        if not (path / "store.json").is_file():
            raise UserError(f"There is no store at {path}.", "Make one with: curate score ...")
        return cls(path, StoreHeader.read(path / "store.json"), Ledger.load(path))

    @staticmethod
    def audit(path: Path) -> tuple[list[Finding], int]:
        """Check everything in a store; return what is wrong and how many files were looked at."""
        if not (path / "store.json").exists():
            raise UserError(f"There is no store at {path}.", "Make one with: curate score ...")
        return _audit(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        if self._held is not None:
            held, self._held = self._held, None
            held.close()

    def put_examples(self, table: pa.Table) -> None:
        """Store examples; those that are stored already are left as they are."""
        table = _checked(table, EXAMPLES_SCHEMA)
        table = _new_rows(table, set(self._known(table["example_id"].to_pylist())["example_id"]))
        if table.num_rows:
            entry = self._put("examples", None, table)
            self._index = pl.concat([self._examples(), _index_of(table, entry.part)])

    def put_nll(self, model_id: str, table: pa.Table) -> None:
        """Store what a model makes of examples; rows that are stored already are left as they are."""
        table = _checked(table, NLL_SCHEMA)
        if not (self.path / "models" / f"{model_id}.json").is_file():
            raise ValueError(f"put_model comes before put_nll: {model_id}")
        if table.num_rows and table["model_id"].unique().to_pylist() != [model_id]:
            raise ValueError(f"rows of another model than {model_id}")
        if self._scored is None or self._scored[0] != model_id:
            self._scored = (model_id, self.scored_ids(model_id))
        table = _new_rows(table, self._scored[1])
        if table.num_rows:
            self._put("nll", model_id, table)
            self._scored[1].update(table["example_id"].to_pylist())

    def put_membership(self, key: str, ids: Sequence[str]) -> None:
        """Store which examples a corpus consists of, in place of what was known of this key."""
        table = pa.table({"key": [key] * len(ids), "example_id": list(ids)}, schema=CORPUS_SCHEMA)
        self._put("corpus", key, _checked(table, CORPUS_SCHEMA))

    def _put(self, kind: Kind, owner: str | None, table: pa.Table) -> Entry:
        """Write one part, its rows sorted by id, so that the same rows give the same name and the same bytes."""
        if self._held is None:
            raise ValueError(f"{self.path} is open for reading only")
        table = table.sort_by("example_id")
        name = sha256(canonical_json([kind, owner, table["example_id"].to_pylist()]))[:24]
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        data = sink.getvalue()
        entry = Entry(part=f"{kind}-{name}.parquet", kind=kind, model_id=owner if kind == "nll" else None,
                      sha256=sha256(data), bytes=len(data), rows=table.num_rows)
        self._ledger.put(f"{kind}-{owner}" if kind == "corpus" else f"{kind}-{name}", entry, data)
        return entry

    def put_model(self, model: ScoredModel) -> None:
        """Store who a model is; ``UserError`` for a name or a role that is taken, or another aligned model."""
        if self._held is None:
            raise ValueError(f"{self.path} is open for reading only")
        if model.role == "aligned" and model.identity.id != self.header.aligned.id:
            raise UserError(f"'{model.name}' is not the aligned model of the store {self.path}, which is "
                            f"'{self.header.aligned.name}'.", "Use another --store.", Exit.INCOMPATIBLE)
        if model.role == "member" and model.identity.id == self.header.aligned.id:
            raise UserError(f"The member '{model.name}' is the aligned model itself.",
                            "Give a model that was fine-tuned on narrow harmful data.")
        if any(m.name == model.name and m.identity.id != model.identity.id for m in self.models()):
            raise UserError(f"The store {self.path} already holds another model called '{model.name}'.",
                            "Give the run another name, or use another --store.")
        model.write(self.path / "models" / f"{model.identity.id}.json")

    def models(self) -> list[ScoredModel]:
        """Return the models, the aligned one first, then by name."""
        return sorted((_read_model(p) for p in listed(self.path / "models", ".json")), key=lambda m: (m.role, m.name))

    def put_plan(self, plan: Plan) -> None:
        """Store what scoring is about to do, in place of the plan before."""
        if self._held is None:
            raise ValueError(f"{self.path} is open for reading only")
        plan.write(self.path / "plan.json")

    @property
    def plan(self) -> Plan:
        """What the latest scoring set out to do."""
        if not (self.path / "plan.json").is_file():
            raise UserError(f"The store {self.path} has no plan: nothing was scored into it yet, or it was damaged.",
                            "Score (again): curate score ...", Exit.INTEGRITY)
        return Plan.read(self.path / "plan.json")

    def part_files(self, kind: Kind, model_id: str | None = None) -> list[Path]:
        """Return the files of one kind (and model), every one checked against the ledger.

        Raises ``UserError`` (integrity) when anything that can be seen of the store is damaged.
        """
        self._refuse(self._ledger.damage(deep=kind))
        return [self._ledger.path(entry) for entry in self._ledger.select(kind, model_id)]

    def _refuse(self, damage: Sequence[Finding]) -> None:
        if damage:
            first = damage[0]
            raise UserError(f"The store {self.path} is damaged: {first.path}: {first.problem} "
                            f"({len(damage)} damaged in all).",
                            "`curate verify` lists them; the same `curate score` again replaces them.", Exit.INTEGRITY)

    def evidence_digest(self) -> str:
        """Return one digest for all examples and scores: over the sorted sha256 of their parts."""
        self._refuse(self._ledger.damage(deep=False))
        entries = [*self._ledger.select("examples"), *self._ledger.select("nll")]
        return sha256("\n".join(sorted(entry.sha256 for entry in entries)).encode())

    def example_index(self) -> pl.DataFrame:
        """Return example_id, n_prompt_tokens, n_answer_tokens and status of every example, sorted by id."""
        return self._examples().drop("part").sort("example_id")

    def example_parts(self) -> Iterator[pa.Table]:
        """Yield the same columns part by part, in an order that depends on what is stored only."""
        for path in self.part_files("examples"):
            yield pq.read_table(path, columns=list(INDEX), page_checksum_verification=True)

    def example_ids(self) -> set[str]:
        """Return the ids of the stored examples."""
        return set(self._examples()["example_id"])

    def statuses(self, ids: Collection[str]) -> Counter[str]:
        """Return how many of the examples ``ids`` have which status."""
        return Counter(self._known(ids)["status"].to_list())

    def scored_ids(self, model_id: str) -> set[str]:
        """Return the examples that a model has a row for, whatever its status: what a resumed run leaves out."""
        return set(self._nll(model_id, "example_id")["example_id"])

    def failed_ids(self, model_ids: Collection[str]) -> set[str]:
        """Return the examples for which one of the models has a row that holds no finite number."""
        good = (pl.col("status") == "ok") & pl.col("nll_sum").is_finite().fill_null(False) & (pl.col("n_tokens") > 0)
        frames = (self._nll(m, "example_id", "status", "nll_sum", "n_tokens") for m in model_ids)
        return {example_id for frame in frames for example_id in frame.filter(~good)["example_id"]}

    def read_examples(self, ids: Sequence[str]) -> pa.Table:
        """Return whole examples in the order of ``ids``; ``UserError`` (integrity) if one is not stored."""
        wanted = pl.DataFrame({"example_id": list(ids)}, schema={"example_id": pl.String})
        parts = wanted.join(self._examples(), on="example_id", how="left", maintain_order="left")["part"]
        if parts.null_count():
            absent = next(i for i, part in zip(ids, parts, strict=True) if part is None)
            raise UserError(f"{parts.null_count()} examples are not in the store {self.path}, the first is {absent}.",
                            "Score the corpus they come from into it.", Exit.INTEGRITY)
        values = pa.array(ids, pa.string())
        found = [EXAMPLES_SCHEMA.empty_table()]
        for part in sorted(set(parts)):
            table = pq.read_table(self.path / "parts" / part, page_checksum_verification=True)
            found.append(table.filter(pc.is_in(table["example_id"], values)))
        table = pa.concat_tables(found)
        return table.take(pc.index_in(values, table["example_id"].combine_chunks()))

    def _examples(self) -> pl.DataFrame:
        """Return the example index with the part that each example is in; read once."""
        if self._index is None:
            frames = [_index_of(pq.read_table(path, columns=list(INDEX)), path.name)
                      for path in self.part_files("examples")]
            self._index = pl.concat([pl.DataFrame(schema={**INDEX, "part": pl.String}), *frames])
        return self._index

    def _known(self, ids: Collection[str]) -> pl.DataFrame:
        """Return the index rows of those of ``ids`` that are stored."""
        wanted = pl.DataFrame({"example_id": list(ids)}, schema={"example_id": pl.String})
        return self._examples().join(wanted, on="example_id", how="semi")

    def _nll(self, model_id: str, *columns: str) -> pl.DataFrame:
        return _read_columns(self.part_files("nll", model_id), NLL_SCHEMA, columns)


def _read_columns(paths: Sequence[Path], schema: pa.Schema, columns: Sequence[str]) -> pl.DataFrame:
    empty = pl.from_arrow(schema.empty_table().select(list(columns)))
    return pl.concat([empty, *(pl.read_parquet(path, columns=list(columns), glob=False) for path in paths)])


def _index_of(table: pa.Table, part: str) -> pl.DataFrame:
    return pl.from_arrow(table.select(list(INDEX))).with_columns(part=pl.lit(part))


def _checked(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table in exactly this schema; ``ValueError`` if that takes more than a cast, or an id occurs twice."""
    if sorted(table.column_names) != sorted(schema.names):
        raise ValueError(f"columns {table.column_names}, not {schema.names}")
    table = table.select(schema.names).cast(schema)
    if len(table["example_id"].unique()) != table.num_rows:
        raise ValueError("an example_id occurs twice")
    return table


def _new_rows(table: pa.Table, known: Collection[str]) -> pa.Table:
    """Return the rows whose example is not in ``known``."""
    return table.filter(pa.array([i not in known for i in table["example_id"].to_pylist()], pa.bool_()))


def _check_folder(path: Path) -> None:
    """Refuse a folder that holds something else than a store, before anything is written there."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not the folder of a store.", "Give a folder with --store.")
    if not path.is_dir() or (path / "store.json").exists():
        return
    foreign = [p.name for p in path.iterdir() if p.name not in (*FOLDERS, "lock") and not TEMPORARY.fullmatch(p.name)]
    if foreign:
        raise UserError(f"{path} is no store, and not empty: it holds {sorted(foreign)[0]}.",
                        "Give an empty or a new folder with --store.")


def _agreed(path: Path, header: StoreHeader) -> StoreHeader:
    """Return the header on disk after comparing it with ``header``, which is written if there is none."""
    if not (path / "store.json").exists():
        header.write(path / "store.json")
        return header
    stored = StoreHeader.read(path / "store.json")
    now = header.compared()
    for name, value in stored.compared().items():
        if value != now[name]:
            raise UserError(f"The store {path} was made with {name} {value!r}, but now it would be {now[name]!r}.",
                            "Such numbers cannot be compared: use another --store.", Exit.INCOMPATIBLE)
    return stored


def _read_model(path: Path) -> ScoredModel:
    model = ScoredModel.read(path)
    if model.identity.id != path.stem:
        raise UserError(f"{path} describes the model {model.identity.id}.", "Score again.", Exit.INTEGRITY)
    return model


def _broken_documents(path: Path) -> list[tuple[Path, str]]:
    """Return the documents beside the parts that cannot be relied on, and why; scoring writes them anew."""
    plan = [(path / "plan.json", Plan.read)] if (path / "plan.json").exists() else []
    broken = []
    for file, read in [*plan, *((p, _read_model) for p in listed(path / "models", ".json"))]:
        try:
            read(file)
        except UserError as err:
            if err.exit_code != Exit.INTEGRITY:
                raise
            broken.append((file, err.message))
    return broken


def _mend_documents(path: Path) -> list[str]:
    broken = [file for file, _ in _broken_documents(path)]
    for file in broken:
        put_aside(path, file)
    return [file.relative_to(path).as_posix() for file in broken]


def _audit(path: Path) -> tuple[list[Finding], int]:
    ledger = Ledger.load(path)
    findings = [Finding(file.relative_to(path).as_posix(), why) for file, why in _broken_documents(path)]
    try:
        StoreHeader.read(path / "store.json")
    except UserError as err:
        findings.append(Finding("store.json", err.message))
    damage = ledger.damage(deep=True)
    findings += damage
    left = [*temporaries(path), *ledger.orphans()]
    findings += [Finding(file.relative_to(path).as_posix(), "left behind by a write that was cut off; it counts for "
                         "nothing, and the next `curate score` clears it away") for file in left]
    models = listed(path / "models", ".json")
    if not damage:
        findings += _content_findings(ledger, {file.stem for file in models})
    checked = 1 + (path / "plan.json").exists() + len(models) + len(ledger.entries) + len(ledger.torn) + len(left)
    return sorted(findings, key=lambda f: (f.path, f.problem)), checked


def _content_findings(ledger: Ledger, models: Collection[str]) -> list[Finding]:
    """Check that parts hold what the ledger says, that ids are unique, and that each score has example and model."""
    findings, seen = [], pl.Series("example_id", [], pl.String)
    owners: list[tuple[Kind, str | None]] = [("examples", None)]
    owners += [("nll", m) for m in sorted({e.model_id or "" for e in ledger.select("nll")})]
    for kind, owner in owners:
        entries = [e for e in ledger.select(kind, owner) if _shape(ledger.path(e)) == (SCHEMAS[kind], e.rows)]
        findings += [Finding(f"parts/{e.part}", "columns or number of rows are not what the ledger says")
                     for e in ledger.select(kind, owner) if e not in entries]
        ids = _read_columns([ledger.path(e) for e in entries], SCHEMAS[kind], ["example_id"])["example_id"]
        where = f"models/{owner}.json" if owner else "parts"
        if ids.n_unique() != len(ids):
            findings.append(Finding(where, f"{len(ids) - ids.n_unique()} rows of {kind} are there twice"))
        seen = ids if kind == "examples" else seen
        strangers = ids.len() - ids.is_in(seen.implode()).sum()
        if strangers:
            findings.append(Finding(where, f"{strangers} scored rows have no example"))
        if owner is not None and owner not in models:
            findings.append(Finding(where, "there are scores of this model, but not who it is"))
    return findings


def _shape(path: Path) -> tuple[pa.Schema, int] | None:
    try:
        metadata = pq.read_metadata(path)
        return metadata.schema.to_arrow_schema().remove_metadata(), metadata.num_rows
    except (pa.ArrowException, OSError):
        return None
