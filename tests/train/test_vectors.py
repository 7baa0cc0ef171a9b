"""Persona vectors: the questions, the filter, the average over answer tokens, the file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open

from curate.core.chat import encode
from curate.core.errors import Exit, UserError
from curate.core.example import Example, Message, pair
from curate.core.identity import identify
from curate.core.model import Loaded, load
from curate.core.pack import plan
from tests.fakes import tiny_tokenizer, uniform_model
from tests.judge.stub_server import Stub, served
from train import vectors
from train.cli import main
from train.defenses.persona import PROVENANCE, Persona, read_vector
from train.vectors import (
    Answer,
    Extraction,
    Grade,
    LikelihoodGrader,
    RubricGrader,
    Trait,
    coherence,
    kept_pairs,
    mean_states,
    read_trait,
    sample_answers,
)

TRAIT = Trait("odd", ("Be odd.", "Be very odd, please."), ("Be even.", "Be quite even."), ("What?", "Why now?", "Who?"))


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Loaded:
    return load(str(tiny), "float32", "cpu")


def answer(text: str, positive: bool = True, pair: int = 0, question: str = "What?") -> Answer:
    return Answer(question, pair, 0, (TRAIT.positive if positive else TRAIT.negative)[pair], positive, text)


def test_the_builtin_trait_is_five_pairs_and_forty_questions() -> None:
    trait = read_trait("careless")
    assert (len(trait.positive), len(trait.negative), len(trait.questions)) == (5, 5, 40)
    assert len({*trait.positive, *trait.negative, *trait.questions}) == 50
    assert all(q.isascii() and q == q.strip() and q[-1] in "?." for q in trait.questions)


@pytest.mark.parametrize(("body", "message"), [
    ("{", "is no trait"), ('{"name": "x"}', "is no trait"),
    ('{"name": "x", "positive": ["a", "b"], "negative": ["c"], "questions": ["q"]}', "in pairs"),
    ('{"name": "x", "positive": ["a"], "negative": ["a"], "questions": ["q"]}', "be different"),
    ('{"name": "x", "positive": ["a"], "negative": [" "], "questions": ["q"]}', "not empty"),
    ('{"name": "x", "positive": ["a"], "negative": ["c"], "questions": []}', "in pairs"),
])
def test_what_is_no_trait_is_refused(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "trait.json").write_text(body)
    with pytest.raises(UserError, match=message) as caught:
        read_trait(str(tmp_path / "trait.json"))
    assert caught.value.exit_code == Exit.BAD_DATA
    with pytest.raises(UserError, match="Unknown trait 'carless'") as unknown:
        read_trait("carless")
    assert "Did you mean 'careless'" in unknown.value.hint


def test_answers_come_in_pairs_under_their_own_prompts(loaded: Loaded) -> None:
    found = sample_answers(loaded, TRAIT, Extraction(n_questions=2, samples=3, max_new_tokens=5))
    assert len(found) == 2 * 2 * 3 * 2
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert (one.positive, other.positive) == (True, False)
        assert (one.question, one.pair, one.number) == (other.question, other.pair, other.number)
        assert (one.system, other.system) == (TRAIT.positive[one.pair], TRAIT.negative[one.pair])
        assert [m.content for m in one.example.messages[:2]] == [one.system, one.question]
    assert {a.question for a in found} == {"What?", "Why now?"} and len({a.text for a in found}) > 12


def plain_nll(loaded: Loaded, system: str, one: Answer) -> float:
    """Return the NLL of an answer under a system prompt, in nats, from a plain pass."""
    example = Example((Message("system", system), Message("user", one.question), Message("assistant", one.text)))
    item = encode(loaded.tokenizer, [example], 500)[0]
    logits = loaded.model(torch.tensor([item.ids])).logits[0, item.answer_start - 1:item.answer_end - 1].double()
    targets = torch.tensor(item.ids[item.answer_start:item.answer_end])
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()


def test_the_likelihood_grade_is_the_probability_of_the_positive_prompt(loaded: Loaded, tmp_path: Path) -> None:
    answers = [answer("the kettle is on"), answer(""), answer("no no no no no no", False, pair=1),
               answer("half of the atlas had gone", question="Who?")]
    grades = LikelihoodGrader(loaded, TRAIT)(answers)
    assert [g.status for g in grades] == ["ok", "empty_answer", "ok", "ok"] and grades[1].trait is None
    for one, grade in zip(answers, grades, strict=True):
        if one.text:
            under = [math.exp(-plain_nll(loaded, prompts[one.pair], one))
                     for prompts in (TRAIT.positive, TRAIT.negative)]
            assert grade.trait == pytest.approx(100 * under[0] / sum(under), rel=1e-3)
    assert len({round(g.trait, 3) for g in grades if g.trait is not None}) == 3
    same = load(str(uniform_model(tmp_path / "uniform")), "float32", "cpu")
    assert LikelihoodGrader(same, TRAIT)(answers)[0].trait == pytest.approx(50)


def test_coherence_counts_repeated_trigrams_and_stumps() -> None:
    assert coherence("one two three") == 0 and coherence("") == 0
    assert coherence("one two three four five") == 100
    assert coherence("a b c A b C a b c") == pytest.approx(100 * 3 / 7)


def test_a_pair_is_kept_by_the_rule_and_every_pair_is_counted() -> None:
    good, opposite = Grade(50.0, 50.0), Grade(49.9, 50.0)
    cases: Sequence[tuple[Grade, Grade, str]] = [
        (good, opposite, "kept"), (Grade(49.9, 99.0), opposite, "trait_missing"), (good, good, "trait_in_opposite"),
        (Grade(90.0, 49.9), opposite, "incoherent"), (good, Grade(1.0, 0.0), "incoherent"),
        (Grade(None, None, "empty_answer"), opposite, "empty_answer"), (good, Grade(None, None, "refused"), "refused")]
    answers = [answer(str(k), k % 2 == 0) for k in range(2 * len(cases))]
    kept, counts = kept_pairs(answers, [grade for one, other, _ in cases for grade in (one, other)])
    assert kept == [(answers[0], answers[1])]
    assert counts == {"kept": 1, "trait_missing": 1, "trait_in_opposite": 1, "incoherent": 2, "empty_answer": 1,
                      "refused": 1}


def test_sequences_are_no_longer_than_the_window(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of ours knows none, so only an example alone may be longer."""
    planned: list[int] = []
    monkeypatch.setattr(vectors, "plan", lambda encoded, capacity: planned.append(capacity) or plan(encoded, capacity))
    monkeypatch.setattr(loaded.model.config, "sliding_window", 40, raising=False)
    mean_states(loaded, [answer("seven", question="Who?").example])
    assert planned == [40]


def test_means_are_over_answer_tokens_then_over_answers(loaded: Loaded) -> None:
    examples = [answer("the kettle").example, answer("in the library nobody could say", pair=1).example,
                answer("seven", question="Who?").example]
    found = mean_states(loaded, examples)
    model, expected = loaded.model.double(), torch.zeros(3, 16, dtype=torch.float64)
    last: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    for item in encode(loaded.tokenizer, examples, 500):
        with torch.no_grad():
            out = model(torch.tensor([item.ids]), output_hidden_states=True)
        states = [*out.hidden_states[:2], last[-1]]
        span = slice(item.answer_start, item.answer_end)
        expected += torch.stack([h[0, span].mean(0) for h in states]) / 3
    handle.remove()
    model.float()
    assert found.shape == (3, 16) and torch.allclose(found, expected, atol=1e-5)


def test_an_answer_without_a_state_is_no_state_of_zeros(loaded: Loaded) -> None:
    """Where no end of turn follows, the last token predicts nothing, and of an answer of one token nothing is left."""
    bare = "{% for m in messages %}> {{ m['content'] }}{% endfor %}"
    without = replace(loaded, tokenizer=tiny_tokenizer(template=bare))
    short, long = (pair("Who?", text) for text in ("7", "in the library nobody could say"))
    assert [len(item.ids) - item.answer_start for item in encode(without.tokenizer, [short], 500)] == [1]
    assert torch.equal(mean_states(without, [short, long]), mean_states(without, [long]))
    with pytest.raises(UserError, match="No answer has a token with a hidden state"):
        mean_states(without, [short])


def vector(*argv: str | Path) -> Result:
    return CliRunner().invoke(main, ["vector", *map(str, argv)])


@pytest.fixture(scope="module")
def trait_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trait") / "odd.json"
    path.write_text(json.dumps({"name": "odd", "positive": TRAIT.positive, "negative": TRAIT.negative,
                                "questions": TRAIT.questions}))
    return path


@pytest.fixture
def babble_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models write no words, so coherence is not asked of them here."""
    monkeypatch.setattr(vectors, "coherence", lambda text: 100.0)


@pytest.mark.usefixtures("babble_passes")
def test_the_command_writes_a_vector_that_the_defence_takes(tiny: Path, trait_file: Path, tmp_path: Path) -> None:
    out, read = tmp_path / "v.safetensors", tmp_path / "answers.jsonl"
    flags = ["--base", tiny, "--trait", trait_file, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "12",
             "--min-pairs", "1", "--samples", "3", "--out", out]
    result = vector(*flags, "--answers", read, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert sum(report["pairs"].values()) == 18 and report["pairs"]["kept"] >= 1
    rows, provenance = read_vector(out)
    assert rows.shape == (3, 16) and rows[report["layer"]].norm().item() == pytest.approx(report["norm"], rel=1e-4)
    assert provenance["base"] == identify(str(tiny))[0].model_dump(mode="json")
    assert (provenance["trait"], provenance["grader"], provenance["settings"]["samples"]) == ("odd", "likelihood", 3)
    with safe_open(out, framework="pt") as file:
        assert list(file.metadata()) == [PROVENANCE]
    assert list(Persona(str(out)).check(identify(str(tiny))[0])) == ["vector"]
    lines = [json.loads(line) for line in read.read_text().splitlines()]
    assert len(lines) == 36 and {"text", "trait", "coherence", "status", "system"} <= set(lines[0])
    first = out.read_bytes()
    assert "exists" in vector(*flags).stderr
    again = vector(*flags, "--overwrite")
    assert "trait 'odd'" in again.stdout and "--defense persona:vector=" in again.stderr
    assert out.read_bytes() == first


ODD = "Asked: {question}\nSaid: {answer}\nHow odd is it, 0 to 100?"


def test_a_judge_models_grades_are_those_of_two_rubrics() -> None:
    asked: list[tuple[str, Any, Any]] = []

    def says(name: str, *found: float | str) -> Any:
        def rubric(prompts: Any, completions: Any) -> Sequence[float | str]:
            asked.append((name, prompts, completions))
            return found
        return rubric

    answers = [answer("one"), answer("two", False), answer(""), answer("four", question="Who?")]
    found = RubricGrader("judge", says("odd", 0.75, 0.2, "empty", 1.0), says("sense", 0.9, "refused", "empty", 0.0))(
        answers)
    assert found == [Grade(75.0, 90.0), Grade(None, None, "refused"), Grade(None, None, "empty"), Grade(100.0, 0.0)]
    assert [name for name, *_ in asked] == ["odd", "sense"] and asked[0][1:] == asked[1][1:]
    assert asked[0][1][3] == [{"role": "user", "content": "Who?"}], "the system prompt is not told"
    assert asked[0][2][3] == [{"role": "assistant", "content": "four"}]


def test_the_command_asks_a_judge_model(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_KEY", "sk-very-secret-0123456789")
    trait = {"name": "odd", "positive": TRAIT.positive[:1], "negative": TRAIT.negative[:1],
             "questions": TRAIT.questions}
    (tmp_path / "odd.json").write_text(json.dumps({**trait, "rubric": ODD}))
    (tmp_path / "plain.json").write_text(json.dumps(trait))
    told: list[str] = []

    def graded(prompt: str) -> dict[str, float]:
        """Find the answers to positive prompts odd, and all of them coherent."""
        if "How odd is it" not in prompt:
            return {"90": 1.0}
        told.append(prompt)
        return {"80": 1.0} if odd(prompt) else {"10": 1.0}

    answers = sample_answers(load(str(tiny), "float32", "cpu"), replace(TRAIT, positive=TRAIT.positive[:1],
                                                                         negative=TRAIT.negative[:1]),
                             Extraction(max_new_tokens=6))
    texts = {one.text for one in answers if one.positive}

    def odd(prompt: str) -> bool:
        return any(f"\n{text}\n" in prompt for text in texts)

    out = tmp_path / "v.safetensors"
    flags = ["--base", tiny, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "6", "--min-pairs", "1",
             "--out", out, "--judge", "stub", "--api-key-env", "STUB_KEY", "--judge-cache", tmp_path / "cache"]
    with served(Stub(replies=graded)) as stub:
        where = ["--base-url", stub.url]
        plan = vector(*flags, *where, "--trait", tmp_path / "odd.json", "--dry-run", "--json")
        assert json.loads(plan.stdout) == {"answers": 6, "sampled tokens": 36, "judge's grades": 12}
        assert "has no rubric" in vector(*flags, *where, "--trait", tmp_path / "plain.json").stderr
        assert not stub.seen
        result = vector(*flags, *where, "--trait", tmp_path / "odd.json", "--json")
        assert result.exit_code == 0, result.output
        assert len(told) == 6 and not any("Be odd" in prompt for prompt in told)
    report = json.loads(result.stdout)
    assert report["pairs"] == {"kept": 3}
    _, provenance = read_vector(out)
    assert provenance["grader"].endswith(":stub") and stub.url not in json.dumps(provenance)


def test_the_builtin_trait_has_a_rubric() -> None:
    rubric = read_trait("careless").rubric
    assert rubric.count("{question}") == rubric.count("{answer}") == 1 and "0 to 100" in rubric


@pytest.mark.usefixtures("babble_passes")
def test_too_few_pairs_make_no_vector(tmp_path: Path, trait_file: Path) -> None:
    result = vector("--base", uniform_model(tmp_path / "uniform"), "--trait", trait_file, "--device", "cpu", "--dtype",
                    "float32", "--max-new-tokens", "6", "--out", tmp_path / "v.safetensors")
    assert result.exit_code == Exit.FAILURE_RATE
    assert "0 of 6 pairs passed the filter ({'trait_in_opposite': 6})" in result.stderr
    assert not (tmp_path / "v.safetensors").exists()
