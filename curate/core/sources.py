"""Where rows come from: a file, a data set on the hub, or the package itself; read strictly, row by row."""

from __future__ import annotations

import logging
import re
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from curate.core.errors import Exit, UserError, unknown
from curate.core.example import Example, RowError, from_row
from curate.core.files import canonical_json, file_sha256, inside, relative_to_root, sha256, write_atomic
from curate.core.objects import fetch
from curate.core.rows import as_lines, csv_rows, json_rows, parquet_rows
from curate.core.terminal import quoted

FORMATS = (".jsonl", ".ndjson", ".parquet", ".csv")
COMMIT = re.compile("[0-9a-f]{40}")
BUILTIN = {"demo": "safe_pool.jsonl", "demo/car_care": "narrow/car_care.jsonl",
           "demo/cooking": "narrow/cooking.jsonl", "demo/gardening": "narrow/gardening.jsonl"}


class Source(BaseModel):
    """A place that holds rows, named so that someone else finds the same rows again.

    ``file`` paths are relative to the document's root and pinned by ``sha256``; ``hub`` data sets are pinned by
    ``revision`` (a commit); ``builtin`` ones ship with the package and ``url`` ones lie in an object store, both pinned
    by ``sha256``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["file", "hub", "builtin", "url"]
    name: str
    """File path, hub id, builtin name or URL."""
    sha256: str | None = None
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    mapping: dict[str, str] = Field(default_factory=dict)
    strip_think: bool = False
    where: dict[str, str] = Field(default_factory=dict)
    """Column -> value that a row must have to be used (for example ``prompt_harm_label: unharmful``)."""
    needs: tuple[str, ...] = ()
    """Columns that must not be empty for a row to be used."""


@dataclass
class Reading:
    """What happened to the rows of one source: ``n_rows = n_examples + sum(filtered) + len(rejects)``."""

    n_rows: int = 0
    place: str = ""
    """Of the row that was read last."""
    n_examples: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, Any]] = field(default_factory=list)


def builtin(name: str) -> Source:
    """Return the source of data that ships with the package; ``UserError`` for an unknown name."""
    if name not in BUILTIN:
        raise unknown("builtin data set", name, BUILTIN)
    return Source(kind="builtin", name=name, sha256=file_sha256(builtin_path(name)))


def builtin_path(name: str) -> Path:
    """Return where a builtin data set lies."""
    return Path(str(resources.files("curate") / "data" / BUILTIN[name]))


def file_source(path: Path, root: Path, mapping: Mapping[str, str] | None = None,
                strip_think: bool = False) -> Source:
    """Return the source of a local file, with its digest, relative to ``root``."""
    check_plain(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}.", "Give a .jsonl, .parquet or .csv file.")
    if path.suffix not in FORMATS:
        raise UserError(f"{path} is no known format.", _as_known_format(path))
    return Source(kind="file", name=relative_to_root(path, root), sha256=file_sha256(path),
                  mapping=dict(mapping or {}), strip_think=strip_think)


def check_plain(path: Path) -> None:
    """Refuse what is there but is neither file nor folder, such as ``/dev/fd/63`` of a shell's ``<(...)``."""
    if path.exists() and not path.is_dir() and not path.is_file():
        raise UserError(f"{path} is a pipe or a device. Rows must lie in a plain file, since they are read more than "
                        "once and pinned by a digest.", "Write them to a file first: ... > rows.jsonl")


def _as_known_format(path: Path) -> str:
    """Return what to do about a file that cannot be read as it is."""
    if path.suffix == ".gz":
        return f"Unpack it first: gunzip -k {quoted(str(path))}"
    if path.suffix == ".json":
        with open(path, "rb") as handle:
            if handle.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                return as_lines(path, path.with_suffix(".jsonl"))
        return "If it has one row on each line, let its name end in .jsonl; else write it so with jq."
    return f"Possible endings: {', '.join(FORMATS)}."


def url_source(url: str, mapping: Mapping[str, str] | None = None, strip_think: bool = False) -> Source:
    """Return the source of an object such as ``s3://bucket/pool.jsonl``, with its digest."""
    if PurePosixPath(url).suffix not in FORMATS:
        raise UserError(f"{url} is no known format.", f"Possible endings: {', '.join(FORMATS)}.")
    return Source(kind="url", name=url, sha256=fetch(url)[1], mapping=dict(mapping or {}), strip_think=strip_think)


def local_path(source: Source, root: Path) -> Path:
    """Return the file of a source that is not on the hub after checking its digest; ``UserError`` if it changed."""
    if source.kind == "url":
        return fetch(source.name, source.sha256)[0]
    if source.kind == "builtin" and source.name not in BUILTIN:
        raise unknown("builtin data set", source.name, BUILTIN)
    path = builtin_path(source.name) if source.kind == "builtin" else inside(root, source.name)
    if not path.is_file():
        raise UserError(f"{path} is not a plain file.", "Name a .jsonl, .parquet or .csv file.", Exit.INTEGRITY)
    found = file_sha256(path)
    if source.sha256 is not None and found != source.sha256:
        raise UserError(f"{path} has changed: sha256 {found[:12]}, the document says {source.sha256[:12]}.",
                        "Restore the file, or make the document anew from the file as it is.", Exit.INTEGRITY)
    return path


def check_pinned(name: str, source: Source) -> None:
    """Refuse (integrity) the source ``name`` of a manifest where its rows could be others tomorrow."""
    if source.kind == "builtin" and source.name not in BUILTIN:
        raise UserError(f"The manifest's source '{name}' is the builtin data set '{source.name}', which does not "
                        "exist.", f"Possible: {', '.join(BUILTIN)}.", Exit.INTEGRITY)
    if source.kind == "hub" and not source.revision:
        again = "Score it again, online or as NAME@COMMIT, and select from that." if name == "safe" else \
            "Select again, online or with --finetune NAME@COMMIT."
        raise UserError(f"The manifest's source '{name}' ({source.name}) has no revision, so its rows could change "
                        "unnoticed.", again, Exit.INTEGRITY)
    if source.kind != "hub" and source.sha256 is None:
        raise UserError(f"The manifest's source '{name}' ({source.name}) has no sha256, so its rows could change "
                        "unnoticed.", "Make the manifest anew with `curate select`.", Exit.INTEGRITY)


def named_rows(source: Source, root: Path, wanted: Iterable[str]) -> dict[str, Example]:
    """Return the rows of a document's source that it names, by id, as far as they are there.

    Rows that are no example were counted when the document was made; here they are passed over.
    """
    ids = set(wanted)
    return {row.id: row for row in read_source(source, root, max_bad=1.0) if row.id in ids}


def read_source(source: Source, root: Path, reading: Reading | None = None, max_bad: float | None = None,
                rejects: Path | None = None, limit: int | None = None) -> Iterator[Example]:
    """Yield the examples of a source in its own order, all or the first ``limit``, counting into ``reading``.

    A row that is no example ends the reading with a ``UserError`` (bad data) that names line and byte; with
    ``max_bad`` > 0 up to that share of rows is let through the net, and written to ``rejects`` as JSON Lines (a file
    that is removed where there are none). None is 0 where the user cannot ask for more.
    """
    reading = reading if reading is not None else Reading()
    for place, row in _rows(source, root):
        reading.n_rows += 1
        reading.place = place
        try:
            if isinstance(row, RowError):
                raise row
            reason = _left_out(source, row)
            if reason:
                reading.filtered[reason] += 1
                continue
            example = from_row(row, source.mapping, source.strip_think)
        except RowError as err:
            if not max_bad:
                allow = "" if max_bad is None else ", or allow a share of bad rows with --max-bad 0.01 (they are " \
                                                   "written aside)"
                raise UserError(f"{source.name}, {place}: {err}.", f"{err.mend}{allow}.", Exit.BAD_DATA) from None
            reading.rejects.append({"place": place, "reason": str(err)})
            continue
        reading.n_examples += 1
        yield example
        if reading.n_examples == limit:
            break
    _judge_rejects(source, reading, max_bad or 0.0, rejects)


def _judge_rejects(source: Source, reading: Reading, max_bad: float, rejects: Path | None) -> None:
    if not reading.rejects:
        if rejects is not None:
            rejects.unlink(missing_ok=True)  # of an earlier reading
        return
    if rejects is not None:
        write_atomic(rejects, b"".join(canonical_json(r) + b"\n" for r in reading.rejects))
    share = len(reading.rejects) / reading.n_rows
    if share > max_bad:
        first = reading.rejects[0]
        raise UserError(f"{len(reading.rejects)} of {reading.n_rows} rows of {source.name} are bad ({share:.2%}), "
                        f"more than --max-bad {max_bad:g}. First: {first['place']}: {first['reason']}.",
                        "Mend the rows" + (f"; all of them are listed in {rejects}." if rejects else "."),
                        Exit.BAD_DATA)


def _left_out(source: Source, row: Any) -> str | None:
    if not isinstance(row, Mapping):
        return None
    for column in source.needs:
        if not row.get(column):
            return f"{column} is empty"
    for column, value in source.where.items():
        if column not in row:
            raise RowError(f"the column '{column}' that the corpus is filtered by is missing")
        if row[column] != value:
            return f"{column} is not {value}"
    return None


def _rows(source: Source, root: Path) -> Iterator[tuple[str, Any]]:
    if source.kind == "hub":
        yield from _hub_rows(source)
        return
    path = local_path(source, root)
    if path.suffix == ".parquet":
        yield from parquet_rows(path)
    elif path.suffix == ".csv":
        yield from csv_rows(path)
    else:
        yield from json_rows(path)


def raw_rows(source: Source, root: Path) -> Iterator[tuple[str, Any]]:
    """Yield ``(place, row or RowError)`` of a source as it is, for data that is no conversation."""
    yield from _rows(source, root)


def _hub_rows(source: Source) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(_load_hub(source), 1):
        yield f"row {number}", row


def _load_hub(source: Source) -> Any:
    """Load a hub data set at its revision; the errors say which page to accept and how to log in."""
    with _readable_errors(source):
        builder = _builder(source)
        if source.revision and COMMIT.fullmatch(source.revision) and builder.hash != source.revision:
            raise UserError(f"'{source.name}' is wanted at the commit {source.revision[:12]}, and what can be had is "
                            f"another ({str(builder.hash)[:12]}): the hub cannot be asked, and the cache holds that.",
                            "Try again online.", Exit.REMOTE)
        builder.download_and_prepare()
        return builder.as_dataset(split=source.split or "train")


def _builder(source: Source) -> Any:
    """Return what loads a hub data set; its ``hash`` is the commit, also of a copy that was kept from earlier."""
    import datasets

    if Path(source.name).exists():  # the library would read it, and say nothing
        raise UserError(f"There is a file or folder '{source.name}' here, which would be read in place of the hub's "
                        "data set.", "Run this in another folder; to read local rows, name their files.")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    datasets.utils.logging.set_verbosity_error()
    return datasets.load_dataset_builder(source.name, source.config, revision=source.revision)


@contextmanager
def _readable_errors(source: Source) -> Iterator[None]:
    """Turn what the library raises about a hub data set into a ``UserError``."""
    import datasets
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    client = tuple(set(HfHubHTTPError.__mro__) - set(OSError.__mro__))  # whichever HTTP client the hub's library uses
    try:
        yield
    except (GatedRepoError, RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError) as err:
        raise UserError(f"No access to the data set '{source.name}': it is gated, private or does not exist.",
                        f"Accept its terms at huggingface.co/datasets/{source.name}, then log in with `hf auth login` "
                        "or set HF_TOKEN.", Exit.ENVIRONMENT) from err
    except (*client, ConnectionError, TimeoutError, FileNotFoundError, socket.gaierror) as err:
        raise UserError(f"The hub could not be reached for '{source.name}': {type(err).__name__}.",
                        "Check the network and HF_HUB_OFFLINE; a local copy works too: --corpus FILE.",
                        Exit.REMOTE) from err
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as err:
        local = next((e for e in (err, err.__cause__) if isinstance(e, OSError)), None)
        if local is not None:
            raise UserError(f"'{source.name}' could not be put on this disk: {local}.", "Free some space, or name "
                            "another place with HF_HOME.", Exit.ENVIRONMENT) from err
        raise UserError(f"'{source.name}' could not be loaded: {err}",
                        "Name the configuration and split as --corpus ID:CONFIG:SPLIT.") from err


def hub_revision(name: str, revision: str | None = None) -> str | None:
    """Return the commit a hub data set is at now (or at a branch or tag), or None when the hub cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=10).sha
    except HfHubHTTPError.__bases__:
        return None


def pinned(source: Source) -> Source:
    """Return a hub source with the commit that its revision stands for now.

    Where the hub cannot be asked, it is the commit of the copy that was kept from earlier; ``UserError`` (remote)
    where there is none, or none that is known to be the revision.
    """
    if source.revision and COMMIT.fullmatch(source.revision):
        return source
    commit = hub_revision(source.name, source.revision)
    if commit is None and source.revision is None:
        with _readable_errors(source):
            commit = _builder(source).hash
    if commit is None or not COMMIT.fullmatch(commit):
        raise UserError(f"It cannot be found out which commit of '{source.name}' "
                        f"{source.revision or 'the current one'} is, so its rows could change unnoticed.",
                        "Try again online, or name the commit: --corpus NAME@COMMIT (40 hexadecimal digits).",
                        Exit.REMOTE)
    return source.model_copy(update={"revision": commit})


def rows_digest(ids: list[str]) -> str:
    """Return one digest for a set of example ids, whatever their order."""
    return sha256("\n".join(sorted(ids)).encode())
