"""What completions are worth: a function of prompts and completions, and a name for every reward that is missing.

A reward function is called as trl calls its own for conversations, by keyword:

    function(prompts=[[{"role": ..., "content": ...}, ...], ...], completions=[[{"role": "assistant", ...}], ...],
             answer=[...], COLUMN=[...], ...) -> [float | None | str, ...]

``answer`` is the rows' reference answer (None where there is none), ``COLUMN`` every other column of the rows. A
function that does not take ``**`` keywords is given those that it names. None, or a text that says why, stands for a
missing reward: such a completion moves nothing (see ``train.grpo``) and is counted.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curate.core.errors import Exit, UserError, unknown
from curate.core.files import file_sha256
from train.prompts import Prompt

BUILTIN = ("opswap", "judge")


@dataclass(frozen=True)
class Rated:
    """The reward of one completion; None with the reason as ``status``."""

    value: float | None
    status: str = "ok"


@dataclass(frozen=True)
class Reward:
    """A reward function with its name and all else that decides its numbers, for the run card."""

    name: str
    function: Callable[..., Sequence[Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs_answer: bool = False

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ``UserError`` (bad data) where the reward needs reference answers that are not there."""
        missing = sum(prompt.answer is None for prompt in prompts) if self.needs_answer else 0
        if missing:
            raise UserError(f"{missing} of {len(prompts)} prompts have no reference answer, which the reward "
                            f"'{self.name}' compares with.", "Give rows with `response`, or messages that end with "
                            "the assistant.", Exit.BAD_DATA)

    def rate(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Rated]:
        """Return the reward of each completion; ``UserError`` (bad data) where the function returns no such list."""
        names = sorted({name for prompt in prompts for name in prompt.columns})
        given: dict[str, Any] = {
            **{name: [prompt.columns.get(name) for prompt in prompts] for name in names},
            "prompts": [[{"role": m.role, "content": m.content} for m in prompt.messages] for prompt in prompts],
            "completions": [[{"role": "assistant", "content": text}] for text in completions],
            "answer": [prompt.answer for prompt in prompts]}
        found = self.function(**_taken(self.function, given))
        if not isinstance(found, (list, tuple)) or len(found) != len(completions):
            what = f"{len(found)} rewards" if isinstance(found, (list, tuple)) else f"a {type(found).__name__}"
            raise UserError(f"The reward '{self.name}' returned {what} for {len(completions)} completions.",
                            "It must return a list with a number, or None, for each.", Exit.BAD_DATA)
        return [self._rated(value) for value in found]

    def _rated(self, value: Any) -> Rated:
        if value is None or isinstance(value, str):
            return Rated(None, "missing" if value in (None, "", "ok") else value)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UserError(f"The reward '{self.name}' returned a {type(value).__name__} for a completion.",
                            "It must return a number, or None, for each.", Exit.BAD_DATA) from None
        return Rated(number) if math.isfinite(number) else Rated(None, "nonfinite")


def _taken(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a function takes of ``given``."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(given)
    return {p.name: given[p.name] for p in parameters if p.name in given}


def by_path(text: str) -> Reward:
    """Return the reward ``MODULE:FUNCTION``, looked for from the current folder on; ``UserError`` if it is not there.

    This runs the module: it is the user's own code, never named by a document.
    """
    module_name, found, function_name = text.partition(":")
    if not found:
        raise unknown("reward", text, [*BUILTIN, "MODULE:FUNCTION"])
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as err:
        if err.name is None or not f"{module_name}.".startswith(f"{err.name}."):
            raise
        raise UserError(f"There is no module '{module_name}' for the reward '{text}'.",
                        "Name it as Python would import it from here, for example rewards:brevity.") from None
    finally:
        sys.path.remove(str(Path.cwd()))
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
        raise unknown(f"function of '{module_name}'", function_name, names)
    path = getattr(module, "__file__", None)
    return Reward(text, function, {"module": file_sha256(Path(path))} if path else {})
