"""An example: a conversation whose last assistant turn is the answer to be scored or learnt."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from curate.core.errors import UserError, unknown
from curate.core.files import canonical_json, sha256

ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "prompter": "user"}
PROMPTS, ANSWERS = ("prompt", "question", "query"), ("response", "completion", "answer", "output")
UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""What a turn may say besides its content, which no example here can hold."""
EMPTY_THINK = re.compile(r"^\s*(?:<think>\s*</think>\s*)+")
NO_THINK = re.compile(r"\s*/no_think\s*$")


class RowError(ValueError):
    """A row that is not an example; the text says why, and ``mend`` what to do about it."""

    def __init__(self, reason: str, mend: str = "Mend the row") -> None:
        super().__init__(reason)
        self.mend = mend


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the answer; ``meta`` travels along but is no part of its identity."""

    messages: tuple[Message, ...]
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def id(self) -> str:
        """128 bits of the SHA-256 of the messages, as 32 hexadecimal digits: identity by content."""
        return sha256(canonical_json([[m.role, m.content] for m in self.messages]))[:32]

    @property
    def answer(self) -> str:
        """The last turn's text."""
        return self.messages[-1].content

    @property
    def prompt(self) -> str:
        """The last user turn's text, for people to read; scoring uses the whole conversation."""
        return next((m.content for m in reversed(self.messages[:-1]) if m.role == "user"), "")

    def to_row(self) -> dict[str, Any]:
        """Return the row that every reader here accepts again: ``{"messages": [...]}``."""
        return {"messages": [{"role": m.role, "content": m.content} for m in self.messages]}


def pair(prompt: str, answer: str, **meta: Any) -> Example:
    """Return the example of one question and one answer."""
    return Example((Message("user", prompt), Message("assistant", answer)), meta)


def from_row(row: Mapping[str, Any], mapping: Mapping[str, str] | None = None, strip_think: bool = False) -> Example:
    """Read a row in any of the usual shapes.

    Shapes, in the order in which they are tried: ``mapping`` (``{"prompt": column, "response": column,
    "system": column}``), ``messages``, ``conversations`` (ShareGPT's ``from``/``value``), ``prompt`` +
    ``response`` (or ``completion``, ``answer``, ``output``), ``instruction`` + ``input`` + ``output``,
    ``question`` + ``answer``; a column ``system`` opens the conversation unless it has a system turn. A mapping that
    leaves a field out takes the usual column for it, ``input`` beside ``instruction`` only. Other columns become
    ``meta``. ``strip_think`` removes empty ``<think>`` blocks before the answer and ``/no_think`` after a prompt.
    Raises ``RowError``, also for a turn that calls a tool or holds its reasoning apart, which would be left out.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {type(row).__name__}, not an object")
    messages, used = _messages(row, mapping or {})
    if strip_think:
        messages = [_without_think(m) for m in messages]
    if messages[-1].role != "assistant":
        raise RowError("the last message is not from the assistant, so there is no answer to score")
    if len(messages) < 2:
        raise RowError("there is no message before the answer")
    meta = {k: v for k, v in row.items() if k not in used}
    for key, value in meta.items():
        _check_encodable(f"{key}{value}" if isinstance(value, str) else
                         json.dumps([key, value], ensure_ascii=False, default=str), ascii(key))
    return Example(tuple(messages), meta)


def _messages(row: Mapping[str, Any], mapping: Mapping[str, str]) -> tuple[list[Message], set[str]]:
    if mapping:
        return _mapped(row, mapping)
    for key in ("messages", "conversations"):
        if key in row:
            turns = _turns(row[key], key)
            if not row.get("system") or any(turn.role == "system" for turn in turns):
                return turns, {key}
            return [Message("system", _text(row, "system")), *turns], {key, "system"}
    if "instruction" in row:
        answer = next((k for k in ("output", "response") if k in row), "output")
        return _columns(row, "instruction", answer, "system", "input")
    prompt = next((k for k in PROMPTS if k in row), None)
    answer = next((k for k in ANSWERS if k in row), None)
    if prompt is None or answer is None:
        raise RowError(f"the columns {sorted(map(str, row))[:8]} fit no known shape; "
                       "name them with --map prompt=COLUMN --map response=COLUMN")
    return _columns(row, prompt, answer, "system", None)


def _mapped(row: Mapping[str, Any], mapping: Mapping[str, str]) -> tuple[list[Message], set[str]]:
    there = f"the row has the columns {sorted(map(str, row))[:8]}"
    for field_name, column in mapping.items():
        if column not in row:
            near = difflib.get_close_matches(column, [k for k in row if isinstance(k, str)], n=1)
            raise RowError(f"'{column}' is missing; {there}", "Correct --map " + (
                f"({field_name}={near[0]}?)" if near else f"{field_name}=COLUMN") + ", or mend the row")
    columns = dict(mapping)
    for field_name, usual in (("prompt", (*PROMPTS, "instruction")), ("response", ANSWERS)):
        found = next((k for k in usual if k in row and k not in mapping.values()), None)
        if columns.setdefault(field_name, found or "") == "":
            raise RowError(f"no column for the {field_name} is mapped; {there}", f"Add --map {field_name}=COLUMN")
    for field_name in ("system", *(["input"] if columns["prompt"] == "instruction" else [])):
        if field_name not in columns.values():
            columns.setdefault(field_name, field_name)
    return _columns(row, columns["prompt"], columns["response"], columns.get("system"), columns.get("input"))


def _columns(row: Mapping[str, Any], prompt: str, answer: str, system: str | None,
             extra: str | None) -> tuple[list[Message], set[str]]:
    """Read a row by columns; those of ``system`` and ``extra`` may be missing or empty."""
    question = _text(row, prompt)
    if extra and row.get(extra):
        question = f"{question}\n\n{_text(row, extra)}"
    messages = [Message("user", question), Message("assistant", _text(row, answer))]
    if system and row.get(system):
        messages.insert(0, Message("system", _text(row, system)))
    return messages, {prompt, answer, *(k for k in (system, extra) if k)}


def _turns(turns: Any, key: str) -> list[Message]:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise RowError(f"'{key}' is not a list of messages")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise RowError(f"'{key}'[{number}] is not an object")
        role = turn.get("role", turn.get("from"))
        role = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise RowError(f"'{key}'[{number}] has the role {role!r}; possible: {', '.join(ROLES)}")
        unread = next((k for k in UNREAD if turn.get(k)), None)
        if unread:
            raise RowError(f"'{key}'[{number}] has {unread}, which would be left out",
                           "Write it into the content, or take it out of the row")
        messages.append(Message(role, _text(turn, "content" if "content" in turn else "value", f"'{key}'[{number}].")))
    return messages


def _text(row: Mapping[str, Any], key: str, where: str = "") -> str:
    value = row.get(key)
    if not isinstance(value, str):
        found = "missing" if key not in row else f"{type(value).__name__}, not a text"
        raise RowError(f"{where}'{key}' is {found}")
    _check_encodable(value, f"{where}'{key}'")
    if "\0" in value:
        raise RowError(f"{where}'{key}' holds a NUL character")
    return value


def _check_encodable(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError(f"{what} holds half a surrogate pair, which is no valid text") from None


def _without_think(message: Message) -> Message:
    if message.role == "assistant":
        return Message(message.role, EMPTY_THINK.sub("", message.content))
    return Message(message.role, NO_THINK.sub("", message.content))


def parse_mapping(pairs: tuple[str, ...]) -> dict[str, str]:
    """Read ``--map prompt=COLUMN`` options; fields: prompt, response, system, input."""
    mapping = {}
    for text in pairs:
        name, found, column = text.partition("=")
        if not found or not column:
            raise UserError(f"--map {text} is not of the form FIELD=COLUMN.", "For example --map prompt=question.")
        if name not in ("prompt", "response", "system", "input"):
            raise unknown("field to map", name, ("prompt", "response", "system", "input"))
        mapping[name] = column
    return mapping
