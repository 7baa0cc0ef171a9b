"""The documents beside a store's parts: what all its numbers share, who its models are, what was set out to do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from curate.core.documents import Document, ModelIdentity, Part
from curate.core.errors import Exit, UserError
from curate.core.files import canonical_json, sha256
from curate.core.sources import Source
from curate.storage import Storage, documents

HEADER, HEADER_COPY = "store.json", "models/store.json.copy"
"""What all numbers share, and the same bytes once more: nothing else could make them again."""


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

    @property
    def place(self) -> str:
        """See ``corpus_place``."""
        return corpus_place(self.label, self.source, self.folder)

    def same(self, other: PlannedCorpus) -> bool:
        """Is this another reading of the same corpus: the same rows elsewhere, or the same place with other rows?"""
        return self.key == other.key or self.place == other.place


class Plan(Document):
    """Which corpora the store holds, those of the latest ``curate score`` last, and what that set out to do.

    ``counts`` by status add up to ``n_rows``, the rows that it read.
    """

    KIND: ClassVar[str] = "safeset.plan"
    VERSION: ClassVar[int] = 2

    corpora: tuple[PlannedCorpus, ...]
    models: dict[str, int] = Field(default_factory=dict)
    """Model id -> rows that it will have scored at the end; empty until that is worked out."""
    n_rows: int
    counts: dict[str, int]


def corpus_key(label: str, source: Source, sampling: Mapping[str, Any]) -> str:
    """Return 24 hexadecimal digits that stand for a corpus as it was asked for."""
    return sha256(canonical_json([label, source.model_dump(mode="json"), dict(sampling)]))[:24]


def corpus_place(label: str, source: Source, folder: Path | str) -> str:
    """Return where a corpus lies, whatever is there now: a file's path, a URL, or the name that was asked for."""
    if source.kind == "file":
        return str(Path(folder) / source.name)
    return source.name if source.kind == "url" else label


def told_apart(place: str, others: Collection[str]) -> str:
    """Return the shortest tail of a path or URL that none of ``others`` is or ends in, or else all of it."""
    words = place.split("/")
    tails = ("/".join(words[-n:]) for n in range(1, len(words) + 1))
    return next((tail for tail in tails if tail and not any(f"/{o}".endswith(f"/{tail}") for o in others)), place)


def read_header(storage: Storage) -> StoreHeader:
    """Read what all numbers share; ``UserError`` when there is no store, or (integrity) when it cannot be read."""
    try:
        data = storage.get(HEADER)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"There is no store at {storage.place}.", "Make one with: curate score ...") from None
    try:
        return StoreHeader.from_bytes(data, f"{storage.place}/{HEADER}")
    except UserError as err:
        if _copied_header(storage) is None:
            raise
        raise UserError(err.message, "The same `curate score` again restores it from its copy.",
                        Exit.INTEGRITY) from None


def _copied_header(storage: Storage) -> StoreHeader | None:
    """Return what the copy of the header says, if it can be read."""
    try:
        return StoreHeader.from_bytes(storage.get(HEADER_COPY), HEADER_COPY)
    except (FileNotFoundError, UserError):
        return None


def mend_header(storage: Storage) -> list[str]:
    """Restore an unreadable header from its copy, or the copy from the header; return the name of what was damaged.

    Raises what ``read_header`` raises when both cannot be read.
    """
    copied = _copied_header(storage)
    try:
        header = read_header(storage)
    except UserError:
        if copied is None:
            raise
        storage.put(HEADER, copied.to_bytes())
        return [HEADER]
    if copied is not None and copied.digest == header.digest:
        return []
    torn = HEADER_COPY.rpartition("/")[2] in storage.listed("models")
    storage.put(HEADER_COPY, header.to_bytes())
    return [HEADER_COPY] if torn else []


def agreed(storage: Storage, header: StoreHeader) -> StoreHeader:
    """Return the stored header after comparing it with ``header``, which is put if there is none.

    On shared storage the put is tried twice: an endpoint that lets the second one through ignores conditions, and
    several writers there could store rows twice.
    """
    if storage.create(HEADER, header.to_bytes()):
        if storage.shared and storage.create(HEADER, header.to_bytes()):
            raise UserError(f"The endpoint of {storage.place} ignores conditional puts (If-None-Match), which keep "
                            "several writers apart.", "Use one that knows them (S3 and MinIO do), or a local --store.",
                            Exit.ENVIRONMENT)
        return header
    return matching(storage, header)


def matching(storage: Storage, header: StoreHeader) -> StoreHeader:
    """Return the stored header; ``UserError`` (incompatible) names the first field in which ``header`` differs."""
    stored = read_header(storage)
    now = header.compared()
    for name, value in stored.compared().items():
        if value != now[name]:
            raise UserError(f"The store {storage.place} was made with {name} {value!r}, but now it would be "
                            f"{now[name]!r}.", "Such numbers cannot be compared: use another --store.",
                            Exit.INCOMPATIBLE)
    return stored


def broken_copy(storage: Storage) -> list[tuple[str, str]]:
    """Return name and problem of the header's copy if it is there and does not say what the header says."""
    if HEADER_COPY.rpartition("/")[2] not in storage.listed("models"):
        return []
    copied = _copied_header(storage)
    try:
        same = copied is not None and copied.digest == read_header(storage).digest
    except UserError:
        same = copied is not None
    return [] if same else [(HEADER_COPY, "it is not what store.json says")]


def read_model(name: str, data: bytes) -> ScoredModel:
    """Read the document of a model; ``UserError`` (integrity) when it stands under another model's name."""
    model = ScoredModel.from_bytes(data, name)
    if model.identity.id != Path(name).stem:
        raise UserError(f"{name} describes the model {model.identity.id}.", "Score again.", Exit.INTEGRITY)
    return model


def broken_documents(storage: Storage) -> list[tuple[str, str]]:
    """Return name and problem of the documents that cannot be relied on; scoring puts them anew.

    A plan of another version is one of them: scoring its corpora again tells all that it told.
    """
    broken = []
    for name, data in storage.get_many([*documents(storage, "models"), "plan.json"]):
        try:
            if name == "plan.json":
                Plan.from_bytes(data, name)
            else:
                read_model(name, data)
        except UserError as err:
            if err.exit_code != Exit.INTEGRITY and name != "plan.json":
                raise
            broken.append((name, err.message))
    return broken
