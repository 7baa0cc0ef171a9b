"""From a conversation to token ids: the only place that applies a chat template and knows which tokens are the answer.

    template piece | content | template piece | ... | answer | end of turn
    special tokens    never       special tokens       never    the template's first token after the answer

Template pieces are tokenised with special tokens, contents without, each on its own, so that no text in a row can
become a control token and the boundary between prompt and answer never falls inside a token. For tokenizers that
merge across such a boundary (sentencepiece models put a space mark before each piece) the ids differ a little from
those of the rendered string; ``template_gap`` tells by how much, and scoring says so.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from curate.core.errors import Exit, UserError
from curate.core.example import Example, Message
from curate.core.files import canonical_json, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IDS = "safeset-1"
"""Changes whenever the same example and tokenizer would give other ids."""

ENCODING = "safeset-2"
"""Changes whenever they would give other ids or another status; 2: an answer of white space alone is empty."""

FIXED_DATE = datetime.datetime(2025, 1, 1)
"""Templates that print today's date get this one, or a resumed run would see another prompt."""

FIXED_NOW = "{%- macro strftime_now(format) -%}{{ format" + "".join(
    f" | replace('%{code}', '{FIXED_DATE.strftime('%' + code)}')"
    for code in ("-d", "-m", *"dejaAbBmyYHIMSpF")) + " }}{%- endmacro %}\n"
"""Shadows the function of that name, which transformers lets no argument replace; the newline belongs to the tag."""


@dataclass(frozen=True)
class Encoded:
    """One example as token ids: ``ids = prompt + answer + [end of turn]``.

    ``ids[answer_start:answer_end]`` is the answer; ``ids[answer_end]`` the end-of-turn token, where the template has
    one. ``status`` is ``ok``, ``empty_answer``, ``too_long`` or ``unrenderable``; only ``ok`` examples go to a model.
    """

    ids: tuple[int, ...]
    answer_start: int
    answer_end: int
    status: str = "ok"

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens before the answer."""
        return self.answer_start

    @property
    def n_answer_tokens(self) -> int:
        """Tokens of the answer, without the end of turn."""
        return self.answer_end - self.answer_start

    @property
    def has_eot(self) -> bool:
        """Whether an end-of-turn token follows the answer."""
        return len(self.ids) > self.answer_end


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_tokens: int,
           strict: bool = True) -> list[Encoded]:
    """Encode conversations; the k-th result belongs to the k-th example.

    Nothing is cut: an example of more than ``max_tokens`` ids gets the status ``too_long``, an answer of nothing but
    white space ``empty_answer``. Raises ``UserError`` where the tokenizer has no usable chat template, or where it
    knows no turn of an example's roles; unless ``strict``, such an example gets the status ``unrenderable``.
    """
    contents = [m.content for e in examples for m in e.messages]
    tokens = iter(_content_ids(tokenizer, contents))
    roles = [tuple(m.role for m in e.messages) for e in examples]
    shapes = {of: _shape(tokenizer, of, strict) for of in dict.fromkeys(roles)}
    encoded = [_assemble(shapes[of], [next(tokens) for _ in of], max_tokens) for of in roles]
    return [item if example.answer.strip() or item.status == "unrenderable" else replace(item, status="empty_answer")
            for item, example in zip(encoded, examples, strict=True)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Return the ids up to where the assistant's answer to ``messages`` would begin, for sampling."""
    encoded = encode(tokenizer, [Example((*messages, Message("assistant", "x")))], 2**30)[0]
    return list(encoded.ids[:encoded.answer_start])


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of all that decides an example's ids: vocabulary, merges, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer.get_vocab() if backend is None else \
        {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    probe = [list(p) for p in _pieces(tokenizer, ("user", "assistant"))]
    return sha256(canonical_json([IDS, vocabulary, tokenizer.chat_template, probe]))[:32]


def first_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """Say in a sentence where two tokenizers first differ, or return None when they agree."""
    vocabulary, others = one.get_vocab(), other.get_vocab()
    for token in sorted(vocabulary.keys() | others.keys(), key=lambda t: vocabulary.get(t, others.get(t, 0))):
        if vocabulary.get(token) != others.get(token):
            return f"token {token!r} is {vocabulary.get(token)} in one and {others.get(token)} in the other"
    if one.chat_template != other.chat_template:
        return "their chat templates differ"
    return None if tokenizer_digest(one) == tokenizer_digest(other) else "they split text in different ways"


def template_gap(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return by how many ids a short conversation, encoded in pieces, differs from its rendered string at once."""
    messages = [Message("user", "What is the capital of France?"), Message("assistant", "It is Paris.")]
    ours = encode(tokenizer, [Example(tuple(messages))], 2**30)[0].ids
    whole = tokenizer(_render(tokenizer, messages), add_special_tokens=False)["input_ids"]
    return sum(a != b for a, b in zip(ours, whole, strict=False)) + max(0, len(ours) - len(whole))


def _shape(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...],
           strict: bool) -> tuple[tuple[int, ...], ...] | None:
    """Return the pieces around turns of these roles; None for roles, unless ``strict``, that the template has not."""
    try:
        return _pieces(tokenizer, roles)
    except UserError:
        if strict:
            raise
    _pieces(tokenizer, ("user", "assistant"))    # a template that cannot do this is no use for any example
    return None


def _assemble(pieces: tuple[tuple[int, ...], ...] | None, contents: list[list[int]], max_tokens: int) -> Encoded:
    if pieces is None:
        return Encoded((), 0, 0, "unrenderable")
    ids: list[int] = []
    for piece, content in zip(pieces, contents, strict=False):
        ids += piece
        start = len(ids)
        ids += content
    end = len(ids)
    ids += pieces[-1][:1]
    status = "empty_answer" if end == start else "too_long" if len(ids) > max_tokens else "ok"
    return Encoded(tuple(ids), start, end, status)


def _content_ids(tokenizer: PreTrainedTokenizerBase, contents: Sequence[str]) -> list[list[int]]:
    """Tokenise texts so that none of their ids is a control token's."""
    control = _control_tokens(tokenizer)
    pattern = re.compile("|".join(re.escape(t) for t in sorted(control, key=len, reverse=True))) if control else None
    pieces: list[str] = []
    owner: list[int] = []
    for index, text in enumerate(contents):
        for piece in _broken(text, pattern):
            pieces.append(piece)
            owner.append(index)
    encoded = _plain_ids(tokenizer, pieces) if pieces else []
    forbidden = set(control.values())
    out: list[list[int]] = [[] for _ in contents]
    for index, ids in zip(owner, encoded, strict=True):
        if forbidden.intersection(ids):
            raise UserError("This tokenizer turns plain text into control tokens, which could end a turn early.",
                            "Use a fast tokenizer (tokenizer.json) of the model.", Exit.INCOMPATIBLE)
        out[index] += ids
    return out


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts; a fast tokenizer is asked without transformers' lists of masks and offsets between."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _broken(text: str, pattern: re.Pattern[str] | None) -> list[str]:
    """Cut ``text`` inside every spelled-out control token, after its first character."""
    if pattern is None:
        return [text] if text else []
    cuts, position = [0], 0
    while match := pattern.search(text, position):
        cuts.append(match.start() + 1)
        position = match.start() + 1
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True) if a < b]


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return added tokens that could steer a model: all but runs of white space (or ▁) and single characters."""
    return {str(token): index for index, token in tokenizer.added_tokens_decoder.items()
            if str(token).replace("\u2581", " ").strip() and len(str(token)) > 1}


@lru_cache(maxsize=4096)
def _pieces(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the template's ids around the contents of turns with these roles: one piece more than turns."""
    marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
    text = _render(tokenizer, [Message(role, mark) for role, mark in zip(roles, marks, strict=True)])
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise UserError(f"The chat template drops or reorders a turn of the roles {', '.join(roles)}.",
                            "Remove such turns, or use a model whose template knows these roles.", Exit.INCOMPATIBLE)
        pieces.append(before)
    if not any(pieces) or any(marks[0][0] in piece for piece in [*pieces, text]):
        raise UserError("The chat template repeats a turn, or puts nothing at all before the answer.",
                        "Use a model with a chat template for conversations.", Exit.INCOMPATIBLE)
    return tuple(tuple(tokenizer(p, add_special_tokens=False)["input_ids"]) if p else () for p in [*pieces, text])


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    if not tokenizer.chat_template:
        raise UserError(f"The tokenizer of {tokenizer.name_or_path} has no chat template.",
                        "Use an instruction-tuned model, or put a chat_template.jinja next to its tokenizer.",
                        Exit.INCOMPATIBLE)
    rows: list[dict[str, Any]] = [{"role": m.role, "content": m.content} for m in messages]
    try:
        template = tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(rows, tokenize=False, date_string=FIXED_DATE.strftime("%d %b %Y"),
                                             chat_template=FIXED_NOW * ("strftime_now" in template) + template)
    except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError, ImportError) as err:
        raise UserError(f"The chat template cannot render the roles {', '.join(m.role for m in messages)}: {err}.",
                        "Use a model whose template knows these roles.", Exit.INCOMPATIBLE) from err
