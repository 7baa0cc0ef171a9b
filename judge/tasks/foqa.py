"""FoQA: questions in Faroese about a Faroese text, answered with words of the text (``alexandrainst/foqa``).

A benign task that is new to most models: a little fine-tuning should help, so it shows whether a defence lets a model
learn. Rows are SQuAD-like: ``context``, ``question`` and ``answers.text``. The data set is gated (CC BY-NC 4.0), so
none of it is here; its splits are called ``train``, ``val`` and ``test``.

An answer is scored by exact match and by the overlap of words (F1), each the best over the reference answers. Both
compare *normalised* words: Unicode NFKC, lower case, without punctuation and symbols, single spaces. SQuAD also drops
the English articles; here no word is dropped, since Faroese marks the definite by an ending and its indefinite article
``ein`` is also a numeral. Accents are letters of their own (``a`` is not ``\u00e1``) and stay.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from curate.core.errors import Exit, UserError
from curate.core.example import RowError
from curate.core.files import sha256
from curate.core.sources import FORMATS, Source, file_source, hub_revision, raw_rows
from curate.core.terminal import say

HUB = "alexandrainst/foqa"
SPLITS = ("train", "val", "test")
REQUEST = "Answer with as few words of the text as possible."
"""Ends every prompt: without it a model answers in sentences, which F1 punishes."""


@dataclass(frozen=True)
class Passage:
    """One question about one text, and the answers that count as right."""

    context: str
    question: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """What the user asks: the text, the question, the request."""
        return f"{self.context}\n\n{self.question}\n{REQUEST}"

    @property
    def text_id(self) -> str:
        """What the questions about one text share: 12 hexadecimal digits."""
        return sha256(self.context.encode())[:12]

    def is_extractive(self) -> bool:
        """Return whether every answer occurs in the text."""
        return all(normalised(answer) in normalised(self.context) for answer in self.answers)


@lru_cache(maxsize=4)
def load(name: str = HUB, split: str = "test") -> tuple[Passage, ...]:
    """Return the passages of one split, in their order.

    ``name`` is the hub id (``ID@COMMIT`` pins it), a data file that holds just this split, or a folder with one file
    a split (``test.jsonl``, ``test-00000-of-00001.parquet``), itself or in ``data/``. Raises ``UserError`` with the
    place for a row that is none. Questions that stand twice count once, and answers that do not occur in their text
    count like others; how many there are of both is said, since nobody can mend a published set.
    """
    source, root = place(name, split)
    found: list[Passage] = []
    for where, row in _rows(source, root):
        try:
            found.append(read(row))
        except RowError as err:
            raise UserError(f"{source.name}, {where}: {err}.", "Mend the row.", Exit.BAD_DATA) from None
    if not found:
        raise UserError(f"{source.name} holds no rows.", "Give a file with context, question and answers.",
                        Exit.BAD_DATA)
    once = tuple(dict.fromkeys(found))
    if twice := len(found) - len(once):
        say(f"{source.name}: {twice} of {len(found)} questions of '{split}' stand twice and count once.")
    if lost := sum(not passage.is_extractive() for passage in once):
        say(f"{source.name}: {lost} of {len(once)} questions of '{split}' have an answer that is not in their text.")
    return once


def _rows(source: Source, root: Path) -> list[tuple[str, Any]]:
    try:
        return list(raw_rows(source, root))
    except UserError as err:
        if source.kind != "hub":
            raise
        raise UserError(err.message, "Accept the terms on the data set's page and log in with `hf auth login`, or give "
                        "a local copy with --foqa PATH.", err.exit_code) from err


def place(name: str, split: str) -> tuple[Source, Path]:
    """Return the source of a split and the folder its name refers to; a hub set without a commit is pinned now."""
    path = Path(name)
    if path.is_dir():
        files = sorted(p for folder in (path, path / "data") for p in folder.glob(f"{split}*")
                       if p.suffix in FORMATS and p.stem.removeprefix(split)[:1] in ("", "-", "_", "."))
        if len(files) != 1:
            raise UserError(f"{path} holds {len(files)} files of the split '{split}'; one is needed.",
                            f"Name it {split}.jsonl or {split}.parquet, or give the file itself.")
        path = files[0]
    if path.is_file() or path.suffix in FORMATS:
        return file_source(path, path.parent), path.parent
    repo, _, revision = name.partition("@")
    if repo.count("/") != 1 or repo.startswith((".", "/")):
        raise UserError(f"There is no copy of FoQA at {name}.", f"Give a file, a folder, or the hub id {HUB}.")
    return Source(kind="hub", name=repo, revision=revision or hub_revision(repo), split=split), Path()


def read(row: Any) -> Passage:
    """Return the passage in a SQuAD-like row; ``RowError`` says what is wrong with it."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {type(row).__name__}, not an object")
    answers = row.get("answers")
    texts = answers.get("text") if isinstance(answers, Mapping) else None
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts:
        raise RowError("'answers' has no list 'text' of at least one answer")
    for key, value in (("context", row.get("context")), ("question", row.get("question")),
                       *(("answers.text", text) for text in texts)):
        if not isinstance(value, str) or not value.strip():
            raise RowError(f"'{key}' is missing, empty or no text")
    return Passage(row["context"].strip(), row["question"].strip(), tuple(dict.fromkeys(t.strip() for t in texts)))


def chosen(passages: Sequence[Passage], n: int | None, seed: int = 0) -> list[Passage]:
    """Return ``n`` passages (None: all), in an order that content and seed decide."""
    if n is not None and n > len(passages):
        raise UserError(f"FoQA has {len(passages)} rows here and {n} were asked for.", f"Ask for at most "
                        f"{len(passages)}.")
    return sorted(passages, key=lambda p: sha256(f"{seed}\n{p.prompt}".encode()))[:n]


def normalised(text: str) -> str:
    """Return ``text`` for comparison: NFKC, lower case, no punctuation or symbols, single spaces."""
    plain = unicodedata.normalize("NFKC", text).lower()
    return " ".join("".join(char for char in plain if unicodedata.category(char)[0] not in "PS").split())


def answer_of(reply: str) -> str:
    """Return the part of a reply that is scored: its first line that is not blank."""
    return reply.strip().partition("\n")[0].strip()


def exact_match(passage: Passage, reply: str) -> bool:
    """Return whether the reply's first line is one of the answers, normalised."""
    said = normalised(answer_of(reply))
    return any(said == normalised(answer) for answer in passage.answers)


def f1(passage: Passage, reply: str) -> float:
    """Return the best F1 = 2 c / (r + a) over the answers: c words in common, r words replied, a in the answer.

    Words count as often as they stand. Where reply or answer has no word left, it is 1 if neither has, else 0.
    """
    said = normalised(answer_of(reply)).split()
    return max(_overlap(said, normalised(answer).split()) for answer in passage.answers)


def _overlap(said: Sequence[str], right: Sequence[str]) -> float:
    if not said or not right:
        return float(said == right)
    return 2 * (Counter(said) & Counter(right)).total() / (len(said) + len(right))
