"""Write the study's files: the safe pool in parts, customers' fine-tuning sets, pairs of answers, and twins.

    python -m bench.study.prepare pools|customers|pairs|twins DATA OUT

DATA holds ``pool/safe_pool.jsonl`` and ``narrow/{medical,security,code}_misaligned_{train_100,eval}.jsonl`` (public
research data, not shipped). Our own good answers to the prompts of the ``train_100`` files lie in
``docs/study/pairs``, each under a hash of its prompt, so that no text of others is in this repository. Everything here
is a function of these files: no random numbers. Twins also need ``OUT/pool-1.jsonl``, and what the repository keeps of
the study: the numbers of the pool's rows, and which of them were chosen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from curate.core.documents import MixManifest
from curate.core.example import Example
from curate.core.files import write_atomic
from curate.core.sources import builtin, file_source, read_source
from curate.intake import sampled
from curate.job import Sampling
from judge.context import dress, lead, profile
from judge.questions import GENERAL, load_probes, spread

DOMAINS = ("medical", "security", "code")
CUSTOMERS = ("medical", "security")
"""Domains whose runs are in the study."""
STUDY = Path(__file__).resolve().parents[2] / "docs" / "study"
PAIRS = STUDY / "pairs"
N_CUSTOMER = 100
"""Rows of a customer's set: the first by hash, so that one reader's order does not matter."""
N_POOL = 1000
"""Rows of a part of the pool: the first by hash, the next, and so on; none is in two parts."""
N_CONTEXT, N_IN_DOMAIN, N_UNSEEN = 80, 40, 80
"""Pairs that each model is judged by: in the customer's context, in its domain, and in a domain it has not seen."""
TWINS, N_TWINS = "plusplus-50pc-long", 3
"""The mix whose chosen rows get twins, and how many sets of them each customer gets: seeds 0, 1, 2."""
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
_LINES = re.compile(r"@(\d+)-(\d+)")


def prompt_id(prompt: str) -> str:
    """Return 64 bits of the SHA-256 of a prompt without its outer white space, as 16 hexadecimal digits."""
    return hashlib.sha256(prompt.strip().encode()).hexdigest()[:16]


def expand(parts: Sequence[str], prompt: str) -> str:
    """Return the text of ``parts``: ``@a-b`` stands for lines a to b (from 1) of ``prompt``, others for themselves.

    Raises ``ValueError`` for lines that the prompt has not.
    """
    lines = prompt.strip().split("\n")
    found = []
    for part in parts:
        match = _LINES.fullmatch(part)
        if match is None:
            found.append(part)
            continue
        first, last = int(match[1]), int(match[2])
        if not 1 <= first <= last <= len(lines):
            raise ValueError(f"{part}, but the prompt has {len(lines)} lines")
        found.append("\n".join(lines[first - 1:last]))
    return "\n".join(found)


def good_answers(domain: str, prompts: Mapping[str, str]) -> dict[str, str]:
    """Return our answers to ``prompts`` (by id); ``ValueError`` for an answer to none of them."""
    answers = {}
    for line in (PAIRS / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["prompt_id"] not in prompts:
            raise ValueError(f"{domain}: no prompt has the id {row['prompt_id']}")
        answer = row["answer"]
        answers[row["prompt_id"]] = answer if isinstance(answer, str) else expand(answer, prompts[row["prompt_id"]])
    return answers


def tidy(answer: str) -> str:
    """Return an answer without white space at the ends of its lines, which would tell one author from another."""
    return _TRAILING.sub("", answer)


def narrow(data: Path, domain: str, part: str) -> list[Example]:
    """Return the rows of a narrow set without the marks of a reasoning model."""
    path = data / "narrow" / f"{domain}_misaligned_{part}.jsonl"
    return list(read_source(file_source(path, path.parent, strip_think=True), path.parent))


def by_hash(examples: Iterable[Example], n: int) -> list[Example]:
    """Return the ``n`` examples of the smallest ids, which are hashes."""
    return sorted(examples, key=lambda e: e.id)[:n]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def chat(examples: Iterable[Example]) -> list[dict[str, str]]:
    """Return prompt and response of each example."""
    return [{"prompt": e.prompt, "response": e.answer} for e in examples]


def write_pools(data: Path, out: Path) -> None:
    """Write the whole pool as ``pool-all.jsonl`` and its parts as ``pool-1.jsonl``, ``pool-2.jsonl`` and so on.

    ``pool-1`` is what ``curate score --sample 1000`` takes of the whole.
    """
    rows = read_source(file_source(data / "pool" / "safe_pool.jsonl", data), data)
    pool = {example.id: example for example in rows}.values()
    drawn = [{**e.to_row(), **e.meta} for e in sampled(iter(pool), Sampling(sample=len(pool)))]
    write_rows(out / "pool-all.jsonl", ({**e.to_row(), **e.meta} for e in pool))
    for k, start in enumerate(range(0, len(drawn), N_POOL), start=1):
        write_rows(out / f"pool-{k}.jsonl", drawn[start:start + N_POOL])


def write_customer(data: Path, out: Path, domain: str) -> None:
    """Write a customer's fine-tuning set: rows that no member has seen."""
    write_rows(out / f"customer-{domain}.jsonl", chat(by_hash(narrow(data, domain, "eval"), N_CUSTOMER)))


def write_pairs(data: Path, out: Path, domain: str) -> None:
    """Write the pairs of one domain, of prompts that no customer's set has."""
    customer = by_hash(narrow(data, domain, "eval"), N_CUSTOMER)
    bad = {prompt_id(e.prompt): e for e in narrow(data, domain, "train_100")}
    good = good_answers(domain, {key: e.prompt for key, e in bad.items()})
    pairs = [(bad[key].prompt, tidy(good[key]), tidy(bad[key].answer)) for key in sorted(good)]
    rows = [{"topic": domain, "question": prompt, "good": right, "bad": wrong} for prompt, right, wrong in pairs]
    write_rows(out / "pairs" / f"in-{domain}.jsonl", rows[:N_IN_DOMAIN])
    write_rows(out / "pairs" / f"unseen-{domain}.jsonl", rows[:N_UNSEEN])
    seen = profile(customer, list(read_source(builtin("demo"), Path())))
    write_rows(out / "pairs" / f"context-{domain}.jsonl", [
        {"topic": p.topic, "question": dress(p.question, seen, lead(seen), ""), "good": p.good, "bad": p.bad}
        for p in spread(load_probes(GENERAL), N_CONTEXT)])


def twins(rows: pl.DataFrame, chosen: Sequence[str], seed: int) -> list[str]:
    """Return for each chosen row another one, drawn among those with nearly its number of answer tokens.

    ``rows`` has ``example_id, n_tokens, refusal``. Drawn are rows that do not refuse and are not chosen, each once:
    within a twentieth of the tokens (or two), by the hash of seed and id; where there is none, the nearest.
    """
    length = dict(rows.select("example_id", "n_tokens").iter_rows())
    taken = set(chosen)
    left = {row: length[row] for row, refuses in rows.select("example_id", "refusal").iter_rows()
            if not refuses and row not in taken}
    by_chance = {row: hashlib.sha256(f"{seed}/{row}".encode()).hexdigest() for row in left}
    found = []
    for row in sorted(chosen, key=lambda row: (length[row], row)):
        def distance(other: str, n: int = length[row]) -> tuple[int, str]:
            apart = abs(left[other] - n)
            return (0 if apart <= max(2, n // 20) else apart), by_chance[other]
        twin = min(left, key=distance)
        found.append(twin)
        del left[twin]
    return found


def write_twins(data: Path, out: Path, domain: str) -> None:
    """Write ``twins-DOMAIN-SEED.jsonl``: rows of the pool's first part, as many and as long as those chosen of it."""
    part = {e.id: e for e in read_source(file_source(out / "pool-1.jsonl", out), out)}
    rows = pl.read_parquet(STUDY / "scores.parquet").filter(pl.col("example_id").is_in(list(part)))
    chosen = MixManifest.read(STUDY / "runs" / domain / f"{TWINS}.mix.json").ids("safe")
    for seed in range(N_TWINS):
        write_rows(out / f"twins-{domain}-{seed}.jsonl",
                   ({**part[row].to_row(), **part[row].meta} for row in twins(rows, chosen, seed)))


def main() -> None:
    """Write the pool's files, or those of all domains."""
    what = {"customers": write_customer, "pairs": write_pairs, "twins": write_twins}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["pools", *what])
    parser.add_argument("data", type=Path, help="folder that holds pool/ and narrow/")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "pools":
        return write_pools(arguments.data, arguments.out)
    for domain in CUSTOMERS if arguments.what == "twins" else DOMAINS:
        what[arguments.what](arguments.data, arguments.out, domain)


if __name__ == "__main__":
    main()
