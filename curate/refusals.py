"""Which answers are refusals: a word of apology or inability among the first ten words.

Interleaving++ (arXiv 2508.06249) drops answers with "sorry", "apologize" or "cannot" there. We take the forms of
these words (apologies, apologise, can't, can not) as well. It is a rule about words, not about meaning: it misses a
refusal that avoids them and takes some condolence for one; ``curate show --refusals`` lets one look.
"""

from __future__ import annotations

import re

FIRST_WORDS = 10
PATTERN = r"\b(sorry|apolog(?:y|ies|ize|ise|izing|ising)|cannot|can ?not|can['’]t)\b"
"""In the syntax that Python's ``re`` and DuckDB's RE2 share; applied to lower-cased text."""
_SPACE = r"[\s\x0b\x1c-\x1f\x85\p{Z}]+"
"""What Python's ``str.split`` takes for white space, in the syntax of RE2."""


def refusal_reason(answer: str) -> str | None:
    """Return the first word in ``answer`` that marks a refusal, or None.

    Words are what stands between white space; only the first ten count.
    """
    found = re.search(PATTERN, " ".join(answer.lower().split()[:FIRST_WORDS]))
    return found.group(1) if found else None


def refusal_sql(column: str) -> str:
    """Return the same rule as a DuckDB expression over a text column; NULL where there is no refusal."""
    words = f"regexp_split_to_array(regexp_replace(lower({column}), '^{_SPACE}', ''), '{_SPACE}')[1:{FIRST_WORDS}]"
    pattern = PATTERN.replace("'", "''")
    return f"nullif(regexp_extract(array_to_string({words}, ' '), '{pattern}', 1), '')"
