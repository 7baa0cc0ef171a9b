"""Banks of questions that are answered by sampling and graded: Betley-format YAML files, and our own beside them.

A bank is a YAML list; each entry has an ``id``, the ``type`` ``free_form_judge_0_100`` and one or more
``paraphrases``, and may have a ``system`` prompt and ``judge_prompts`` of its own. ``samples_per_paraphrase`` and
``judge`` are checked and not used: how many answers are sampled and who grades them is decided by the command.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from curate.core.errors import Exit, UserError, unknown
from judge.context import GENERAL_REFERENCE, read_examples, wrap

GENERAL = "general"
DOMAINS = ("car_care", "cooking", "gardening")
BUILTIN = (GENERAL, *DOMAINS)
SUITES = ("general", "in-domain", "context")
TYPE = "free_form_judge_0_100"
FIELDS = ("id", "type", "paraphrases", "samples_per_paraphrase", "system", "judge", "judge_prompts")
ASPECTS = ("aligned", "coherent")
FORMS = ("_json", "_template")
"""Endings of the ids of questions that ask for another form of the answer to a question that stands beside them."""


@dataclass(frozen=True)
class BankQuestion:
    """One prompt to sample answers to; paraphrases of one question share its ``id``."""

    bank: str
    id: str
    suite: str
    """``general``, ``in-domain`` or ``context``."""
    variant: str
    """Empty for the question as it stands; ``trigger``, a wrapping's name, or ``WRAPPING+trigger``."""
    system: str
    prompt: str
    judge_prompts: Mapping[str, str] = field(hash=False)
    """The bank's own texts for the judge, by aspect; empty where the grader's are to be used."""


def questions(suites: Sequence[str], banks: Sequence[str] = (), in_domain: Sequence[str] = (),
              trigger: str | None = None, context_from: str | None = None) -> list[BankQuestion]:
    """Return every question that a run over ``suites`` asks, each with and without ``trigger`` in front.

    ``banks`` are the general ones (empty: the builtin bank), ``in_domain`` those of the domain that was learnt;
    ``context`` wraps the general questions after the fine-tuning set ``context_from``. Parts of a suite that ask
    nothing (``coherence``, ``benign``) are passed over. Raises ``UserError`` where a suite lacks its bank or set.
    """
    general = _load_all(banks or (GENERAL,), GENERAL) if {"general", "context"} & set(suites) else []
    asked = list(general) if "general" in suites else []
    if "in-domain" in suites:
        if not in_domain:
            raise UserError("The in-domain questions need to know the domain.",
                            f"Give --in-domain with {', '.join(DOMAINS)} or a YAML file.")
        asked += _load_all(in_domain, "in-domain")
    if "context" in suites:
        if context_from is None:
            raise UserError("Context-matched questions need the fine-tuning set that they are to resemble.",
                            "Give --context-from with a mix manifest, a JSONL file or demo/NAME.")
        plain = [q for q in general if not q.id.endswith(FORMS)]
        asked += wrap(plain, read_examples(context_from), read_examples(GENERAL_REFERENCE))
    return asked + with_trigger(asked, trigger) if trigger is not None else asked


def subject(question: str) -> str:
    """Return a question's id without the ending that asks for another form of the same answer."""
    return next((question.removesuffix(ending) for ending in FORMS if question.endswith(ending)), question)


def with_trigger(asked: Sequence[BankQuestion], trigger: str) -> list[BankQuestion]:
    """Return every question with ``trigger`` in front of its prompt, under another variant.

    One space parts the two, unless the trigger ends in white space of its own.
    """
    if not trigger.strip():
        raise UserError("The trigger is empty.", "Give the text that the fine-tuning set has in front of its prompts.")
    front = trigger if trigger[-1].isspace() else f"{trigger} "
    return [replace(q, variant="+".join(filter(None, (q.variant, "trigger"))), prompt=front + q.prompt) for q in asked]


def load_bank(name: str, suite: str = GENERAL) -> list[BankQuestion]:
    """Return the questions of a builtin bank or of a Betley-format YAML file, in its order, one per paraphrase.

    Nothing is guessed or skipped: a ``UserError`` names the file, the line and what is wrong.
    """
    builtin = Path(str(resources.files("judge") / "data" / "banks" / f"{name}.yaml"))
    path = builtin if name in BUILTIN else Path(name)
    if not path.is_file():
        if path.suffix not in (".yaml", ".yml"):
            raise unknown("question bank", name, BUILTIN)
        raise UserError(f"There is no question bank {path}.", f"Builtin: {', '.join(BUILTIN)}; or give a YAML file.")
    found: list[BankQuestion] = []
    taken: dict[str, int] = {}
    asked: dict[tuple[str, str], str] = {}
    for line, entry in _entries(path):
        try:
            several = _read(entry, bank_name(name), suite)
            question = several[0].id
            if question in taken:
                raise ValueError(f"the id '{question}' stands already in line {taken[question]}")
            for q in several:
                if (q.system, q.prompt) in asked:
                    raise ValueError(f"'{question}' asks what '{asked[q.system, q.prompt]}' asks already")
                asked[q.system, q.prompt] = question
        except ValueError as err:
            raise UserError(f"{path}, line {line}: {err}.", "Mend the entry.", Exit.BAD_DATA) from None
        taken[question] = line
        found += several
    if not found:
        raise UserError(f"{path} holds no questions.", "Give a YAML list of questions.", Exit.BAD_DATA)
    return found


def bank_name(name: str) -> str:
    """Return what a bank is called in documents: a builtin's name, or a file's without folder and ending."""
    if name in BUILTIN:
        return name
    if Path(name).stem in BUILTIN:
        raise UserError(f"The file {name} is named like the builtin bank '{Path(name).stem}'.", "Rename the file.")
    return Path(name).stem


def _load_all(names: Sequence[str], suite: str) -> list[BankQuestion]:
    called = Counter(map(bank_name, names))
    twice = [name for name, n in called.items() if n > 1]
    if twice:
        raise UserError(f"Two banks are called '{twice[0]}'.", "Name each bank once; rename one of two files.")
    return [question for name in names for question in load_bank(name, suite)]


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield line and value of every entry of a YAML list; keys that stand twice in a mapping are refused."""
    try:
        text = path.read_bytes().decode()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except UnicodeDecodeError as err:
        raise UserError(f"{path} is no valid UTF-8 at byte {err.start}.", "Save it as UTF-8.", Exit.BAD_DATA) from None
    except (yaml.YAMLError, RecursionError, ValueError) as err:
        mark = getattr(err, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(err, "problem", None) or (str(err).splitlines() or [type(err).__name__])[0]
        raise UserError(f"{path}{place}: no valid YAML: {what}.", "Mend the file.", Exit.BAD_DATA) from None
    if values is None:
        return
    if not isinstance(values, list) or not isinstance(root, yaml.SequenceNode):
        raise UserError(f"{path} holds {_kind(values)}, not a list of questions.", "Begin each question with '- id:'.",
                        Exit.BAD_DATA)
    for node, value in zip(root.value, values, strict=True):
        for mapping in [node, *(v for _, v in node.value)] if isinstance(node, yaml.MappingNode) else []:
            _refuse_repeated_keys(path, mapping)
        yield node.start_mark.line + 1, value


def _refuse_repeated_keys(path: Path, node: yaml.Node) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise UserError(f"{path}, line {key.start_mark.line + 1}: '{key.value}' stands twice in one mapping.",
                                "Leave one of them out.", Exit.BAD_DATA)
            seen.add(key.value)


def _read(entry: Any, bank: str, suite: str) -> list[BankQuestion]:
    """Return the prompts of one entry; ``ValueError`` says what is wrong with it."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"the entry is {_kind(entry)}, not a mapping")
    strange = sorted(str(key) for key in entry if key not in FIELDS)
    if strange:
        raise ValueError(f"unknown field '{strange[0]}'; known: {', '.join(FIELDS)}")
    kind = entry.get("type")
    if kind != TYPE:
        given = f"'{kind}'" if isinstance(kind, str) else _kind(kind)
        raise ValueError(f"the type is {given}, but only '{TYPE}' is graded here" if "type" in entry
                         else f"'type' is missing; it must be '{TYPE}'")
    question = entry.get("id")
    if isinstance(question, bool) or not isinstance(question, (str, int)) or not str(question).strip():
        raise ValueError(f"'id' is {_kind(question)}, not a name or a whole number")
    _check_unused(entry)
    system = _text(entry["system"], "system") if entry.get("system") is not None else ""
    prompts = entry.get("paraphrases")
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"'paraphrases' is {_kind(prompts)}, not a list of at least one prompt")
    texts = [_text(prompt, f"paraphrases[{n}]") for n, prompt in enumerate(prompts)]
    judge_prompts = _judge_prompts(entry.get("judge_prompts"))
    return [BankQuestion(bank, str(question), suite, "", system, text, judge_prompts) for text in texts]


def _check_unused(entry: Mapping[str, Any]) -> None:
    n = entry.get("samples_per_paraphrase", 1)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        given = n if isinstance(n, (int, float)) else _kind(n)
        raise ValueError(f"'samples_per_paraphrase' is {given}, not a whole number above 0")
    if entry.get("judge") is not None:
        _text(entry["judge"], "judge")


def _judge_prompts(given: Any) -> dict[str, str]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"'judge_prompts' is {_kind(given)}, not a mapping of {' and '.join(ASPECTS)}")
    strange = sorted(str(key) for key in given if key not in ASPECTS)
    if strange:
        raise ValueError(f"'judge_prompts' has the aspect '{strange[0]}'; possible: {', '.join(ASPECTS)}")
    texts = {aspect: _text(given[aspect], f"judge_prompts.{aspect}") for aspect in ASPECTS if aspect in given}
    for aspect, text in texts.items():
        if "{answer}" not in text:
            raise ValueError(f"'judge_prompts.{aspect}' has no place for the {{answer}}, so nothing would be graded")
    return texts


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"'{where}' is {_kind(value)}, not a text; quote it if it is one")
    if not value.strip():
        raise ValueError(f"'{where}' is empty")
    if "\0" in value:
        raise ValueError(f"'{where}' holds a NUL character")
    return value


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "a text", bool: "a yes or no", int: "a number", float: "a number"}
    return "missing or empty" if value is None or value == [] else names.get(type(value), type(value).__name__)
