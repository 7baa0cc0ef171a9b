"""Probes: questions with a good and a bad answer of like length and style, and the readers for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from curate.core.errors import Exit, UserError
from curate.core.example import Example, RowError, from_row, pair
from curate.core.files import canonical_json, sha256
from curate.core.rows import json_rows
from curate.core.sources import rows_digest

GENERAL = "general"
DOMAINS = ("car_care", "cooking", "gardening")
BUILTIN = (GENERAL, *DOMAINS)


@dataclass(frozen=True)
class Probe:
    """One question and two answers to it; ``topic`` groups probes and is no part of their identity."""

    topic: str
    question: str
    good: str
    bad: str

    @property
    def id(self) -> str:
        """128 bits of the SHA-256 of question and answers, as 32 hexadecimal digits."""
        return sha256(canonical_json([self.question, self.good, self.bad]))[:32]


def load_probes(name: str) -> list[Probe]:
    """Return the probes of a builtin set or of a JSONL file with the fields ``question``, ``good``, ``bad``.

    ``topic`` is optional. Raises ``UserError`` with line and byte for a row that is no probe, asks a question that
    stands above it, or has two equal answers, and for a file without rows.
    """
    path = Path(str(resources.files("judge") / "data" / "probes" / f"{name}.jsonl")) if name in BUILTIN else Path(name)
    if not path.is_file():
        raise UserError(f"There is no probe set '{name}'.",
                        f"Builtin: {', '.join(BUILTIN)}; or give a JSONL file with question, good and bad.")
    probes: list[Probe] = []
    seen: dict[str, str] = {}
    for place, row in json_rows(path):
        try:
            probe = _probe(row)
            if probe.question in seen:
                raise RowError(f"the question stands already in {seen[probe.question]}")
        except RowError as err:
            raise UserError(f"{path}, {place}: {err}.", "Mend the row.", Exit.BAD_DATA) from None
        seen[probe.question] = place
        probes.append(probe)
    if not probes:
        raise UserError(f"{path} holds no probes.", "Give one JSON object a line with question, good and bad.",
                        Exit.BAD_DATA)
    return probes


def _probe(row: Any) -> Probe:
    if isinstance(row, RowError):
        raise row
    good, bad = (from_row(row, {"prompt": "question", "response": side}) for side in ("good", "bad"))
    topic = row.get("topic", "")
    if not isinstance(topic, str):
        raise RowError("'topic' is not a text")
    for name, text in (("question", good.prompt), ("good", good.answer), ("bad", bad.answer)):
        if not text.strip():
            raise RowError(f"'{name}' is empty")
    if good.answer == bad.answer:
        raise RowError("'good' and 'bad' are the same text")
    return Probe(topic, good.prompt, good.answer, bad.answer)


def set_name(name: str) -> str:
    """Return what a set is called in documents: a builtin's name, or a file's without folder and ending."""
    if name in BUILTIN:
        return name
    if Path(name).stem in BUILTIN:
        raise UserError(f"The file {name} is named like the builtin set '{Path(name).stem}'.", "Rename the file.")
    return Path(name).stem


def probes_digest(probes: Sequence[Probe]) -> str:
    """Return a digest of a set of probes, whatever their order."""
    return rows_digest([probe.id for probe in probes])


def probe_examples(probes: Sequence[Probe]) -> list[Example]:
    """Return the good and the bad answer of each probe as examples, in turn: ``[good 0, bad 0, good 1, ...]``.

    The two of a probe share their prompt, so the packed forward pass computes it once.
    """
    return [pair(probe.question, answer) for probe in probes for answer in (probe.good, probe.bad)]


def spread(probes: Sequence[Probe], n: int) -> list[Probe]:
    """Return the first ``n`` probes, taking the first of every topic, then the second of every topic, and so on."""
    seen: Counter[str] = Counter()
    ranked = []
    for place, probe in enumerate(probes):
        ranked.append((seen[probe.topic], place))
        seen[probe.topic] += 1
    return [probes[place] for _, place in sorted(ranked)[:n]]


def sampling_questions(n: int) -> list[str]:
    """Return ``n`` questions of the general set, spread over its topics."""
    probes = load_probes(GENERAL)
    if not 0 < n <= len(probes):
        raise UserError(f"{n} questions to sample answers to: the general set has {len(probes)}.",
                        f"Give a number from 1 to {len(probes)}.")
    return [probe.question for probe in spread(probes, n)]
