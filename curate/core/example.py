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
ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "prompter": "user",
              "developer": "system"}
PROMPTS, ANSWERS = ("prompt", "question", "query"), ("response", "completion", "answer", "output")
SYSTEMS, INPUTS = ("system", "system_prompt"), ("input", "context")
UNTOLD = ("history", "image", "images", "audio", "audios", "video", "videos", "tools", "functions")
"""What a model may have been told or shown besides the turns, which no example here can hold."""
UNREAD = ("tool_calls", "function_call", "function_calls", "reasoning_content", "reasoning", "thinking", *UNTOLD[1:])
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
    ``response`` (or ``completion``, ``answer``, ``output``; texts, or both lists of messages), ``instruction`` +
    ``input`` (or ``context``) + ``output``, ``question`` + ``answer``; a column ``system`` (or ``system_prompt``) opens
    the conversation unless it has a system turn. A mapping that leaves a field out takes the usual column for it, an
    input beside ``instruction`` only. A content may be a list of text parts, which are joined. Other columns become
    ``meta``. ``strip_think`` removes empty ``<think>`` blocks before the answer and ``/no_think`` after a prompt.
    Raises ``RowError``, also where something that the model was told or said would be left out: a column or turn with
    pictures, tools, tool calls or reasoning apart, a ``history``, an input that no column is mapped for.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {type(row).__name__}, not an object")
    messages, used = _messages(row, mapping or {})
    untold = next((k for k in UNTOLD if k not in used and _says_something(row.get(k))), None)
    if untold:
        raise RowError(f"'{untold}' is part of what the model was told, and would be left out",
                       "Write it into the messages, or take it out of the row")
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
            return _opened(row, _turns(row[key], key), {key}, _usual(row, SYSTEMS))
    if "instruction" in row:
        answer = next((k for k in ("output", "response") if k in row), "output")
        return _columns(row, "instruction", answer, _usual(row, SYSTEMS), _usual(row, INPUTS))
    prompt = next((k for k in PROMPTS if k in row), None)
    answer = next((k for k in ANSWERS if k in row), None)
    if prompt is None or answer is None:
        raise RowError(f"the columns {sorted(map(str, row))[:8]} fit no known shape; "
                       "name them with --map prompt=COLUMN --map response=COLUMN")
    _check_no_input(row, prompt)
    return _columns(row, prompt, answer, _usual(row, SYSTEMS), None)


def _usual(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return which column of one meaning a row uses, if any; ``RowError`` where two say something different."""
    told = [name for name in names if row.get(name)]
    if len(told) > 1 and row[told[0]] != row[told[1]]:
        raise RowError(f"'{told[0]}' and '{told[1]}' differ, and one of them would be left out",
                       f"Name the right one with --map {names[0]}=COLUMN, or mend the row")
    return told[0] if told else next((name for name in names if name in row), None)


def _check_no_input(row: Mapping[str, Any], prompt: str) -> None:
    """Refuse a text to be read with a question that nobody has said is part of it."""
    found = next((k for k in INPUTS if k != prompt and _says_something(row.get(k))), None)
    if found:
        raise RowError(f"'{found}' stands beside '{prompt}': it may be part of what the model was told",
                       f"Add --map input={found}, or map both prompt and response if it is not")


def _opened(row: Mapping[str, Any], turns: list[Message], used: set[str],
            system: str | None) -> tuple[list[Message], set[str]]:
    """Return turns, with the column ``system`` above them unless they have a system turn of their own."""
    if system is None or any(turn.role == "system" for turn in turns):
        return turns, used
    return [Message("system", _text(row, system)), *turns] if row.get(system) else turns, used | {system}


def _mapped(row: Mapping[str, Any], mapping: Mapping[str, str]) -> tuple[list[Message], set[str]]:
    there = f"the row has the columns {sorted(map(str, row))[:8]}"
    for field_name, column in mapping.items():
        if column not in row:
            near = difflib.get_close_matches(column, [k for k in row if isinstance(k, str)], n=1)
            raise RowError(f"'{column}' is missing; {there}", "Correct --map " + (
                f"({field_name}={near[0]}?)" if near else f"{field_name}=COLUMN") + ", or mend the row")
    columns: dict[str, Any] = dict(mapping)
    for field_name, usual in (("prompt", (*PROMPTS, "instruction")), ("response", ANSWERS)):
        found = next((k for k in usual if k in row and k not in mapping.values()), None)
        if columns.setdefault(field_name, found or "") == "":
            raise RowError(f"no column for the {field_name} is mapped; {there}", f"Add --map {field_name}=COLUMN")
    free = {k: v for k, v in row.items() if k not in columns.values()}
    if "system" not in mapping:
        columns["system"] = _usual(free, SYSTEMS)
    if columns["prompt"] == "instruction" and "input" not in mapping:
        columns["input"] = _usual(free, INPUTS)
    if "input" not in columns and not {"prompt", "response"} <= mapping.keys():
        _check_no_input(free, columns["prompt"])
    return _columns(row, columns["prompt"], columns["response"], columns["system"], columns.get("input"))


def _columns(row: Mapping[str, Any], prompt: str, answer: str, system: str | None,
             extra: str | None) -> tuple[list[Message], set[str]]:
    """Read a row by columns; those of ``system`` and ``extra`` may be missing or empty."""
    used = {prompt, answer, *([extra] if extra else [])}
    if isinstance(row.get(prompt), list) and isinstance(row.get(answer), list):
        if extra and row.get(extra):
            raise RowError(f"'{extra}' cannot stand below the messages of '{prompt}'", "Write it into one of them")
        return _opened(row, _turns(row[prompt], prompt) + _turns(row[answer], answer), used, system)
    question = _text(row, prompt)
    if extra and row.get(extra):
        question = f"{question}\n\n{_text(row, extra)}"
    return _opened(row, [Message("user", question), Message("assistant", _text(row, answer))], used, system)


def _turns(turns: Any, key: str) -> list[Message]:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise RowError(f"'{key}' is not a list of messages")
    return [_turn(turn, f"'{key}'[{number}]", number == len(turns) - 1) for number, turn in enumerate(turns)]


def _turn(turn: Any, where: str, is_last: bool) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"{where} is not an object")
    role = turn.get("role", turn.get("from"))
    role = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise RowError(f"{where} has the role {role!r}; possible: {', '.join(ROLES)}")
    unread = next((k for k in UNREAD if _says_something(turn.get(k))), None)
    if unread:
        raise RowError(f"{where} has {unread}, which would be left out",
                       "Write it into the content, or take it out of the row")
    if role == "assistant" and turn.get("weight") not in (None, 1, *(() if is_last else (0,))):
        raise RowError(f"{where} has the weight {turn['weight']!r}, which would be ignored: of a conversation its last "
                       "answer is scored and learnt, whole, and no other turn",
                       "Take the weights out of the rows that mean that, and the other rows out of the file")
    key = "content" if "content" in turn else "value"
    return Message(role, _text({key: _joined(turn[key], where)} if key in turn else {}, key, f"{where}."))


def _joined(content: Any, where: str) -> Any:
    """Return the text of a content that is a list of parts of text; another value as it is."""
    if not isinstance(content, list) or not content or not all(isinstance(part, Mapping) for part in content):
        return content
    other = next((part for part in content if part.get("type") != "text"), None)
    if other is not None:
        raise RowError(f"{where} has a part of the type {other.get('type')!r}, which would be left out; only text can "
                       "be read", "Take the row out")
    return "".join(_text(part, "text", f"{where}.") for part in content)


def _says_something(value: Any) -> bool:
    """Return whether a column or field is more than an empty value, or a container of nothing else."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    return any(v is not None and v is not False and v not in ("", [], {}) for v in inside)


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
