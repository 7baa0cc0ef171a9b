"""Keys of servers: where they come from, and that they stand in nothing that is said."""

from __future__ import annotations

import json
import os
import re

from curate.core.errors import Exit, UserError


def key_in(variable: str) -> str:
    """Return the key in an environment variable, "" where there is none; ``UserError`` for one no header can carry."""
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[\x20-\x7e]*", key):
        raise UserError(f"The key in the environment variable {variable} has characters that no key has: line breaks, "
                        "control characters or letters outside ASCII.",
                        f"Set it again, without what else was copied: export {variable}=...", Exit.ENVIRONMENT)
    return key


def without_key(text: str, key: str) -> str:
    """Return ``text`` with "[key]" in the place of ``key``, also where it is quoted as Python or JSON does it."""
    for form in dict.fromkeys((key, repr(key)[1:-1], json.dumps(key)[1:-1])):
        text = text.replace(form, "[key]") if form else text
    return text
