"""Parts and their ledger: the files of a store, each of which counts only when an entry vouches for it.

    parts/<kind>-<sha256>.parquet   put whole, named by its bytes: whoever writes it, it is the same
    ledger/<slot>.json              put after its part: size, rows and sha256

A slot says what work an entry is about, and there is one entry for it: ``nll-<digest of model and examples>`` for the
scores of a chunk, ``corpus-<key>`` for a corpus, whose entry names the latest part, and ``examples-<number>``, counted
from 1, for examples. Slots of examples and scores are created, never replaced, so that of several writers one wins and
no row is stored twice. A crash between the two puts leaves a part without an entry, which counts for nothing. An entry
that is torn, or whose part is missing or changed, is damage: readers refuse it, a writer puts it aside.

Many small parts of scores may be merged into one (``curate.compact``), whose entry ``nll-merged-<number>`` names the
slots and digests that it replaces. From the moment when it is created they count for nothing, whether they are still
there or come again from a writer that was late; they are removed later (``sweep``), so that whoever was reading them
can go on. Numbers are created in turn, so two machines cannot merge the same rows at the same time; a merged part is
not merged again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from curate.core.documents import Part
from curate.core.files import canonical_json, sha256
from curate.storage import Storage, documents

Kind = Literal["examples", "nll", "corpus"]
MERGED = re.compile(r"nll-merged-(\d{6,})")
LOOKS = 5
"""How often the entries are listed again when some of them vanish while they are read."""


@dataclass(frozen=True)
class Finding:
    """Something wrong in a store: which file (relative to the store) and what."""

    path: str
    problem: str


class Entry(Part):
    """What the ledger says of one part."""

    slot: str
    part: str = Field(pattern=r"^(examples|nll|corpus)-[0-9a-f]{24}\.parquet$")
    kind: Kind
    model_id: str | None
    sha256: str
    bytes: int
    rows: int
    replaces: tuple[tuple[str, str], ...] = ()
    """Slot and sha256 of each part whose rows a merged part holds."""

    @classmethod
    def of(cls, slot: str, data: bytes, rows: int, model_id: str | None = None,
           replaces: Sequence[tuple[str, str]] = ()) -> Entry:
        """Return the entry of a part with these bytes."""
        kind, digest = slot.partition("-")[0], sha256(data)
        return cls.model_validate({"slot": slot, "part": part_name(kind, digest), "kind": kind, "model_id": model_id,
                                   "sha256": digest, "bytes": len(data), "rows": rows, "replaces": tuple(replaces)})

    @property
    def path(self) -> str:
        """The part's name in the store."""
        return f"parts/{self.part}"

    @property
    def evidence(self) -> tuple[str, ...]:
        """The sha256 of the parts in which the rows were stored first."""
        return tuple(digest for _, digest in self.replaces) or (self.sha256,)

    def to_bytes(self) -> bytes:
        """Return the entry's file: canonical JSON with a digest over the other fields."""
        fields = self.model_dump(mode="json")
        if not self.replaces:
            del fields["replaces"]
        return canonical_json({**fields, "digest": sha256(canonical_json(fields))}) + b"\n"

    @classmethod
    def from_bytes(cls, slot: str, data: bytes) -> Entry:
        """Read an entry; ``ValueError`` when a single bit differs from what ``to_bytes`` wrote."""
        body = json.loads(data)
        if not isinstance(body, dict):
            raise ValueError("no object")
        entry = cls.model_validate({k: v for k, v in body.items() if k != "digest"})
        named = part_name(entry.kind, entry.sha256)
        if entry.to_bytes() != data or entry.slot != slot or entry.part != named or not slot.startswith(entry.kind):
            raise ValueError("digest")
        if bool(entry.replaces) != bool(MERGED.fullmatch(slot)):
            raise ValueError("only a merged part replaces others")
        return entry


def part_name(kind: str, digest: str) -> str:
    """Return the file name of a part with this sha256."""
    return f"{kind}-{digest[:24]}.parquet"


@dataclass
class Ledger:
    """The entries of a store by slot, and the files whose entries cannot be read."""

    storage: Storage
    entries: dict[str, Entry] = field(default_factory=dict)
    torn: list[Finding] = field(default_factory=list)
    replaced: dict[str, str] = field(default_factory=dict)
    """Slot and sha256 of what merged parts hold, whether it is still there or not."""

    @classmethod
    def load(cls, storage: Storage) -> Ledger:
        """Read every entry; an unreadable one is kept in ``torn``."""
        ledger = cls(storage)
        ledger.refresh()
        return ledger

    def refresh(self) -> bool:
        """Read the entries that others have added since; return whether there was anything new.

        Entries that vanish between listing and reading were replaced by a merged one, which the next listing shows.
        """
        found = False
        for _ in range(LOOKS):
            names = [Path(name).stem for name in documents(self.storage, "ledger")]
            merged = sorted(filter(MERGED.fullmatch, names), key=_number)
            found |= self._read(merged)
            wanted = set(names) - set(merged) - self.replaced.keys()
            found |= self._read(sorted(wanted))
            if self._known() >= wanted:
                break
        return found

    def _known(self) -> set[str]:
        return set(self.entries) | {Path(finding.path).stem for finding in self.torn}

    def _read(self, slots: Sequence[str]) -> bool:
        """Read the entries of ``slots`` that are not known; return whether there were any."""
        known, found = self._known(), False
        for name, data in self.storage.get_many([f"ledger/{slot}.json" for slot in slots if slot not in known]):
            slot, found = Path(name).stem, True
            try:
                entry = Entry.from_bytes(slot, data)
            except (ValueError, RecursionError):
                self.torn.append(Finding(name, "the entry is torn or was changed"))
                continue
            if any(replaced in self.replaced for replaced, _ in entry.replaces):
                self.torn.append(Finding(name, "another merged part holds some of its rows"))
            else:
                self._take(entry)
        return found

    def _take(self, entry: Entry) -> None:
        """Let an entry count, and no longer those that it replaces."""
        self.entries[entry.slot] = entry
        for slot, digest in entry.replaces:
            self.replaced[slot] = digest
            self.entries.pop(slot, None)

    def add(self, entry: Entry, data: bytes) -> bool:
        """Put a part and create its entry; False when another writer has filled the slot."""
        self.storage.put(entry.path, data)
        if not self.storage.create(f"ledger/{entry.slot}.json", entry.to_bytes()):
            return False
        self.entries[entry.slot] = entry
        return True

    def replace(self, entry: Entry, data: bytes) -> None:
        """Put a part and the entry that makes it count; on a folder, the part that the slot named before is removed.

        On shared storage it stays, because someone may be reading it.
        """
        before = self.entries.get(entry.slot)
        self.storage.put(entry.path, data)
        self.storage.put(f"ledger/{entry.slot}.json", entry.to_bytes())
        self.entries[entry.slot] = entry
        if before is not None and before.part != entry.part and not self.storage.shared:
            self.storage.delete(before.path)

    def merge(self, entries: Sequence[Entry], data: bytes, rows: int) -> bool:
        """Put a part with the rows of several entries in their place; False when another merge came first."""
        if any(self.entries.get(one.slot) != one for one in entries):
            return False
        numbers = [_number(slot) for slot in self._known() if MERGED.fullmatch(slot)]
        entry = Entry.of(f"nll-merged-{max(numbers, default=0) + 1:06d}", data, rows, entries[0].model_id,
                         [(one.slot, one.sha256) for one in entries])
        if not self.add(entry, data):
            self.refresh()
            return False
        self._take(entry)
        return True

    def withdraw(self, entry: Entry) -> None:
        """Put a part aside, whole as it is, with its entry; what a merged one had replaced counts again if it is there.

        The entry goes first: a kill between the two leaves a part without an entry, never the other way round.
        """
        self.storage.put_aside(f"ledger/{entry.slot}.json")
        del self.entries[entry.slot]
        self.storage.put_aside(entry.path)
        self.replaced = {slot: digest for e in self.entries.values() for slot, digest in e.replaces}
        if entry.replaces:
            self.refresh()

    def sweep(self) -> int:
        """Remove the parts and entries that merged parts have replaced; return how many parts there were."""
        named = {entry.part for entry in self.entries.values()}
        parts, slots = self.storage.listed("parts"), self.storage.listed("ledger")
        gone = [part for digest in self.replaced.values() if (part := part_name("nll", digest)) in parts
                and part not in named]
        self.storage.delete(*(f"parts/{part}" for part in gone))
        self.storage.delete(*(f"ledger/{slot}.json" for slot in self.replaced if f"{slot}.json" in slots))
        return len(gone)

    def next_slot(self) -> str:
        """Return the first free slot for examples."""
        number = 1
        while f"examples-{number:06d}" in self.entries:
            number += 1
        return f"examples-{number:06d}"

    def select(self, kind: Kind, model_id: str | None = None) -> list[Entry]:
        """Return the entries of one kind (and model), in an order that depends on their content only."""
        found = (e for e in self.entries.values() if e.kind == kind and model_id in (None, e.model_id))
        return sorted(found, key=lambda e: e.part)

    def files(self, entries: Sequence[Entry]) -> list[Path]:
        """Return local files with the parts of entries, each checked against its sha256; one that is not is absent."""
        found = self.storage.files({entry.path: entry.sha256 for entry in entries})
        return [found[entry.path] for entry in entries if entry.path in found]

    def damage(self, deep: Kind | bool, fresh: bool = False) -> list[Finding]:
        """Return what is damaged: the size of every part is checked, the sha256 of the kind ``deep`` (True: of all).

        A part with a verified local copy is not read again from where it lies, unless ``fresh``.
        """
        found, listed = list(self.torn), self.storage.listed("parts")
        entries = sorted(self.entries.values(), key=lambda e: e.part)
        wanted = {e.path: e.sha256 for e in entries if deep in (True, e.kind) and e.part in listed
                  and listed[e.part].size == e.bytes}
        whole = self.storage.whole(wanted) if fresh else set(self.storage.files(wanted))
        for entry in entries:
            if entry.part not in listed:
                found.append(Finding(entry.path, "the part is missing"))
            elif listed[entry.part].size != entry.bytes:
                found.append(Finding(entry.path, f"the part has {listed[entry.part].size} bytes, the ledger says "
                                                 f"{entry.bytes}"))
            elif deep in (True, entry.kind) and entry.path not in whole:
                found.append(Finding(entry.path, "the part's sha256 is not the ledger's"))
        return found

    def damage_now(self, deep: Kind | bool, fresh: bool = False) -> list[Finding]:
        """Return what is damaged; parts that were merged since the entries were read are no damage."""
        damage = self.damage(deep, fresh)
        return self.damage(deep, fresh) if damage and self.refresh() else damage

    def disregard_damage(self) -> list[str]:
        """Let damaged parts and entries count for nothing, here only, and return their names.

        What a damaged merged part had replaced is missing then, whether it is still there or not.
        """
        damage = self.damage_now(deep=True)
        gone = {finding.path for finding in damage}
        self.entries = {slot: entry for slot, entry in self.entries.items() if entry.path not in gone}
        self.torn.clear()
        return sorted(gone)

    def orphans(self) -> list[str]:
        """Return the parts that no entry names: what a write that was cut off leaves behind.

        None on shared storage, where a part without an entry may be another writer's that is about to get one.
        """
        if self.storage.shared:
            return []
        named = {entry.part for entry in self.entries.values()}
        named |= {part_name("nll", digest) for digest in self.replaced.values()}
        return sorted(f"parts/{name}" for name in self.storage.listed("parts")
                      if name.endswith(".parquet") and name not in named)

    def mend(self) -> list[str]:
        """Put damaged parts and entries aside and return their names; orphans go too, but are no damage.

        On shared storage of the parts with local copies only those are read that were put again after their entry, and
        each that is damaged is looked at once more just before, because another writer may have mended it already.
        What two writers that mend at the same moment still take from each other is missing afterwards, never wrong.
        """
        mended, merged = [], True
        while merged:
            damage = [*self.damage(deep=True), *self._overwritten()]
            mended += [finding.path for finding in damage]
            merged = self._put_aside(damage)
        for name in self.orphans():
            self.storage.put_aside(name)
        return mended

    def _overwritten(self) -> list[Finding]:
        """Return the damaged ones of the parts on shared storage that were put again after their entries."""
        if not self.storage.shared:
            return []
        parts, slots = self.storage.listed("parts"), self.storage.listed("ledger")
        later = {}
        for slot, entry in self.entries.items():
            part, told = parts.get(entry.part), slots.get(f"{slot}.json")
            if part and told and part.size == entry.bytes and (part.modified or 0.0) > (told.modified or 0.0):
                later[entry.path] = entry.sha256
        copied = set(self.storage.files(later))  # the others are found damaged without a second look
        return [Finding(path, "the part's sha256 is not the ledger's")
                for path in sorted(copied - self.storage.whole({path: later[path] for path in copied}))]

    def _put_aside(self, damage: Sequence[Finding]) -> bool:
        """Put damaged parts aside with their entries; return whether one was merged.

        Then what it had replaced counts again, as far as it is still there.
        """
        slots: dict[str, list[str]] = {}
        for slot, entry in self.entries.items():
            slots.setdefault(entry.path, []).append(slot)
        merged = False
        for finding in damage:
            named = slots.get(finding.path, [])
            if self.storage.shared and named and self.storage.whole({finding.path: self.entries[named[0]].sha256}):
                continue
            for slot in named:
                self.storage.put_aside(f"ledger/{slot}.json")
                del self.entries[slot]
            self.storage.put_aside(finding.path)
            merged |= any(MERGED.fullmatch(slot) for slot in [*named, Path(finding.path).stem])
        self.torn.clear()
        if merged:
            self.replaced = {slot: digest for e in self.entries.values() for slot, digest in e.replaces}
            self.refresh()
        return merged


def _number(slot: str) -> int:
    return int(slot.rpartition("-")[2])
