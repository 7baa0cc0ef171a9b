"""An audit on invented numbers whose verdict can be done on paper, and once through a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from curate import audit as room
from curate import audit_report as report
from curate.audit import Question, Turn, audit, calibrate, pairs_of, read_rows, settled
from curate.audit_options import default_store
from curate.audit_report import bars, html_page, share_between
from curate.audit_summary import AuditRow, told
from curate.calibration import Calibration
from curate.chunks import Opening
from curate.cli import main
from curate.core.errors import Exit, UserError
from curate.core.example import Example, Message, pair
from curate.core.sources import Reading
from curate.corpora import Corpus, open_corpus
from curate.job import ScoreJob
from curate.risk import binomial_tail
from curate.score import Prepared
from curate.scorers.choose import EngineSettings, Models
from curate.sift import sift
from curate.store import Store
from curate.turns import each_turn, turns_of
from tests.conftest import ROOT
from tests.curate.evidence import BASE, MEDICAL, SECURITY, examples, header, model, nll
from tests.curate.runs import tiny_ensemble, tiny_run
from tests.fakes import tiny_model, tiny_rows, write_rows

HOSTILE = "<script>alert(1)</script>\x1b[31m[link=x]\u202e"
MODELS = (BASE, MEDICAL, SECURITY)


def rows_of(names: list[str]) -> list[Example]:
    return [pair(name, f"answer {name}") for name in names]


class World:
    """A store of invented numbers: each answer has 5 tokens, 1 nat each for the aligned model, 1 + s for members."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.s_d: dict[str, float] = {}
        self.other: dict[str, tuple[str, float]] = {}
        self.members = (MEDICAL, SECURITY)
        self.aligned = BASE
        self.max_tokens = 307

    def corpus(self, name: str, s_d: dict[str, float], extra: str = "") -> Corpus:
        """Write a file with one row per prompt; with eps 0 its s_d is the number given."""
        self.s_d |= s_d
        path = write_rows(self.folder / f"{name}.jsonl", rows_of(list(s_d)))
        path.write_text(path.read_text() + extra)
        return open_corpus(str(path))

    def answers(self, name: str, s_d: dict[str, float]) -> Corpus:
        """Write other answers to prompts that were used before."""
        self.other |= {pair(prompt, f"another {prompt}").id: (prompt, value) for prompt, value in s_d.items()}
        return open_corpus(str(write_rows(self.folder / f"{name}.jsonl",
                                          [pair(prompt, f"another {prompt}") for prompt in s_d])))

    def conversations(self, name: str, *rows: list[float], first: str = "user") -> Corpus:
        """Write conversations with an answer for each number, which is its s_d."""
        made = []
        for k, turns in enumerate(rows):
            messages = [Message("assistant", "Hello.")] if first == "assistant" else []
            for at, value in enumerate(turns):
                messages += [Message("user", f"{name} {k} {at}"), Message("assistant", f"{name} {k} says {at}")]
                self.other[Example(tuple(messages)).id] = (f"{name} {k} {at}", value)
            made.append(Example(tuple(messages)))
        return open_corpus(str(write_rows(self.folder / f"{name}.jsonl", made)))

    def score(self, job: ScoreJob) -> None:
        """Stand in for ``curate.score.score``."""
        with Store.create_or_open(job.store, header(aligned=self.aligned)) as store:
            names = list(self.s_d)
            store.put_examples(examples(names))
            for who in (BASE, *self.members):
                store.put_model(model(who))
                # one member is a quarter above the mean, the other a quarter below
                shift = {BASE: 0.0, MEDICAL: 0.25, SECURITY: -0.25}[who]
                sums = {n: 5.0 if who == BASE else 5 * (1 + self.s_d[n] + shift) for n in names}
                store.put_nll(who.id, nll(who, sums))
            for example_id, (prompt, value) in self.other.items():
                table = examples([prompt], answer=f"another {prompt}").to_pydict() | {"example_id": [example_id]}
                store.put_examples(examples([prompt]).from_pydict(table, schema=examples([prompt]).schema))
                for who in (BASE, *self.members):
                    row = nll(who, {prompt: 5.0 if who == BASE else 5 * (1 + value)}).to_pydict()
                    store.put_nll(who.id, nll(who, {prompt: 1.0}).from_pydict(
                        row | {"example_id": [example_id]}, schema=nll(who, {prompt: 1.0}).schema))

    def prepared(self, job: ScoreJob, compute: Any) -> Prepared:
        """Stand in for ``curate.score.prepared``."""
        models = [(model(BASE), None), *((model(who), self.folder) for who in self.members)]
        opening = Opening(EngineSettings("fake"), Models("base", "base", {}, "float32", "cpu", 307))
        return Prepared(header(aligned=self.aligned, max_tokens=self.max_tokens), None, models, opening)

    def question(self, **changes: Any) -> Question:
        job = ScoreJob([], self.folder / "scores", "base", members=[self.folder])
        return Question(**{"scoring": job, "eps": 0.0, "rates": (0.04,), **changes})


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(room, "score", made.score)
    monkeypatch.setattr(room, "prepared", made.prepared)
    return made


def line(row: AuditRow) -> int:
    """Return the number of the first line that a row stands on."""
    return int(row.places[0].split()[1])


def benign(world: World, name: str = "good", n: int = 24, least: float = 0.125) -> Corpus:
    """``n`` rows whose s_d are least, 2 least, 3 least, ..."""
    return world.corpus(name, {f"{name}{k}": least * k for k in range(1, n + 1)})


def customer(world: World, low: int = 6, high: int = 4, extra: str = "") -> Corpus:
    """``low`` rows at -0.125 and ``high`` rows at 1."""
    return world.corpus("customer", {f"c{k}": -0.125 - k / 64 if k < low else 1.0 for k in range(low + high)}, extra)


def test_a_verdict_by_hand(world: World) -> None:
    """24 benign rows: at the rate 1/25 the level is the least of them. 6 of 10 rows below it come before all 24."""
    found = audit(customer(world), world.question(benign=[benign(world)]), n=2)
    (level,) = found.levels
    assert (level.threshold, level.below, level.rows, level.expected) == (0.125, 6, 10, 0.4)
    assert level.p == pytest.approx(math.perm(10, 6) / math.perm(34, 6)) and found.p == level.p
    assert level.at_least == 5 and found.at_least == 0.5, "4 bad rows: P(2 of 6) = 6 5 / (30 29) is below 0.05"
    assert level.excess == pytest.approx((0.6 - 0.04) / 0.96) and level.noticed == 3
    assert found.state == "likely" and found.verdict.startswith(
        "6 of 10 distinct rows lie below the level that 4% of benign rows reach (expected 0.4; p = 0.00016): likely "
        "contains")
    assert [(line(r), r.s_d, r.value, r.below) for r in found.driving] == [
        (6, -0.203125, -0.203125, 0.04), (5, -0.1875, -0.1875, 0.04)]
    assert found.driving[0].prompt == "c5" and found.driving[0].answer == "answer c5"
    assert found.driving[0].nll_sum == {"base": 5.0, "medical": 5.234375, "security": 2.734375}
    assert found.counts == {"ok": 10} and found.judged == len(found.scores) == 10 and found.calibration
    assert "not controlled" in " ".join(found.caveats)


def test_statuses_add_up_and_what_is_not_judged_is_said(world: World) -> None:
    twice = json.dumps(pair("c0", "answer c0").to_row()) + "\n"
    data = customer(world, extra=twice + "not json\n")
    question = world.question(benign=[benign(world)])
    question.scoring.__dict__["max_bad"] = 0.5
    store = world.folder / "scores"
    with Store.create_or_open(store, header()) as opened:
        opened.put_examples(examples(["c9"], status="too_long"))
    found = audit(data, question)
    assert found.counts == {"duplicate": 1, "ok": 9, "rejected": 1, "too_long": 1} and found.rows == 12
    assert (found.judged, found.unjudged) == (9, 2) and found.scores[-1].status == "too_long"
    assert "Rows without a value, which were not judged: 2." in found.caveats
    assert found.over(0.5) is not None and "At least" in found.over(0.5)
    clean = found.model_copy(update={"at_least": 0.0, "file_at_least": 0.0})
    assert clean.over(0.2) is None
    assert clean.over(0.1) == "2 of 11 rows could not be judged, more than the 10.0% allowed."


# Copies


def copies(world: World, n: int, low: int = 1, high: int = 9) -> Corpus:
    """The rows of ``customer``, the first of them ``n`` times in all, after a blank line each."""
    row = json.dumps(pair("c0", "answer c0").to_row())
    return customer(world, low, high, extra=f"\n{row}\n" * (n - 1))


def test_copies_of_a_flagged_row_are_no_evidence_and_no_pass(world: World) -> None:
    """1 of 10 distinct rows lies below the level, as among benign ones, but 91 of 100 rows that training sees."""
    question = world.question(benign=[benign(world)])
    once, found = audit(customer(world, 1, 9), question), audit(copies(world, 91), question)
    assert once.over(0.05) is None and "Copies" not in " ".join(once.caveats) and "copies" not in once.verdict
    (level,) = found.levels
    assert (level.rows, level.below, level.file_rows, level.file_below) == (10, 1, 100, 91)
    assert found.p == once.p == pytest.approx(10 / 34) and found.state == "nothing_found"
    assert found.counts == {"duplicate": 90, "ok": 10} and found.rows == 100
    assert "91 of 100 rows of the file (91.0%) lie below the level" in found.verdict
    assert found.caveats[0].startswith("Copies: 91.0% of the rows of the file and 10.0% of the distinct ones lie below")
    assert found.over(0.8) is not None and "copies add more than the 80.0% allowed" in found.over(0.8)
    assert found.over(0.82) is None, "81% of the file more than of the distinct rows"
    assert "91 of 100 (91.0%)" in report.text(found) and "and 90 more" in report.text(found)
    assert "91 of 100 (91%)" in html_page(found)


def test_copies_of_all_rows_alike_change_nothing(world: World) -> None:
    data = customer(world, 1, 9)
    path = world.folder / "customer.jsonl"
    path.write_text(path.read_text() * 3)
    found = audit(open_corpus(str(path)), world.question(benign=[benign(world)]))
    assert found.copied is None and found.over(0.0) is None and "Copies" not in " ".join(found.caveats)
    assert found.counts["duplicate"] == 20 and data.label == found.data


def test_what_is_sure_of_distinct_rows_is_counted_in_the_file(world: World) -> None:
    """At least 5 of 6 rows below are bad: the 5 with the fewest copies are 5 of 19 rows, 5 of 10 without copies."""
    found = audit(copies(world, 10, 6, 4), world.question(benign=[benign(world)]))
    assert found.at_least == 0.5 and found.levels[0].file_at_least == 5
    assert found.file_at_least == pytest.approx(5 / 19)
    twice = world.folder / "customer.jsonl"
    low, high = twice.read_text().split("\n")[:6], twice.read_text().split("\n")[6:10]
    twice.write_text("\n".join([*low * 9, *high]))
    many = audit(open_corpus(str(twice)), world.question(benign=[benign(world)]))
    assert many.at_least == 0.5 and many.file_at_least == pytest.approx(45 / 58)
    assert "At least 77.6% of the judged rows of the file are bad" in many.over(0.5)


def test_places_are_those_of_the_reader(world: World) -> None:
    """Blank lines are lines; every copy is told, so that a script can drop it."""
    found = audit(copies(world, 3), world.question())
    first = next(row for row in found.scores if len(row.places) == 3)
    assert [place.split(" (")[0] for place in first.places] == ["line 1", "line 12", "line 14"]
    lines = (world.folder / "customer.jsonl").read_bytes().split(b"\n")
    offsets = [int(place.split("byte ")[1].rstrip(")")) for place in first.places]
    assert [len(b"\n".join(lines[:n - 1])) + (n > 1) for n in (1, 12, 14)] == offsets
    assert {json.loads(lines[n - 1])["messages"][0]["content"] for n in (1, 12, 14)} == {"c0"}


def test_copies_of_a_row_that_was_not_judged_do_not_pass(world: World) -> None:
    data = copies(world, 91, 0, 10)
    with Store.create_or_open(world.folder / "scores", header()) as opened:
        opened.put_examples(examples(["c0"], status="too_long"))
    found = audit(data, world.question(benign=[benign(world)]))
    assert found.counts == {"duplicate": 90, "ok": 9, "too_long": 1}
    assert found.over(0.2) == "91 of 100 rows of the file could not be judged, more than the 20.0% allowed."


def test_rows_are_parted_as_they_stand(world: World) -> None:
    """Kept: judged and below no level. Flagged: below, or not judged. An unreadable row is in neither."""
    data = copies(world, 3, 2, 3)
    path = world.folder / "customer.jsonl"
    marked = [json.dumps(json.loads(text) | {"note": f"é{k}"}, ensure_ascii=False)
              for k, text in enumerate(path.read_text().split("\n")) if text]
    path.write_text("\n".join([*marked, "not json", ""]))
    data = open_corpus(str(path))
    with Store.create_or_open(world.folder / "scores", header()) as opened:
        opened.put_examples(examples(["c4"], status="too_long"))
    question = world.question(benign=[benign(world)])
    question.scoring.__dict__["max_bad"] = 0.5
    found = audit(data, question)
    assert found.counts == {"duplicate": 2, "ok": 4, "rejected": 1, "too_long": 1} and found.rows == 8
    parted = sift(data, found)
    names = [[row["messages"][0]["content"] for row in rows] for rows in (parted.kept, parted.flagged)]
    assert names == [["c2", "c3"], ["c0", "c1", "c4", "c0", "c0"]] and (parted.n_below, parted.n_neither) == (4, 1)
    assert [row["note"] for row in parted.flagged] == ["é0", "é1", "é4", "é6", "é8"], "other columns are kept"
    with pytest.raises(UserError, match=r"no rows were written\. Uncalibrated"):
        sift(data, audit(data, question.__class__(question.scoring, eps=0.0)))


# Turns


def test_earlier_turns_are_told_of_where_only_the_last_is_judged(world: World) -> None:
    data = world.conversations("customer", [-9.0, 1.0], [1.0], [1.0, 1.0, 1.0])
    found = audit(data, world.question(benign=[benign(world)]))
    assert [row.value for row in found.scores] == [1.0] * 3 and found.measure.turns == "last" and found.left_out == 2
    assert any(text.startswith("2 rows of the file have earlier assistant turns that were not judged; only the last")
               and "--turns all" in text for text in found.caveats)
    single = audit(customer(world), world.question(benign=[benign(world)]))
    assert single.left_out == 0 and "turn" not in " ".join(single.caveats)


def test_a_row_counts_as_its_lowest_turn(world: World) -> None:
    data = world.conversations("customer", [-9.0, 1.0], [1.0], [1.0, 0.5, 2.0])
    found = audit(data, world.question(benign=[benign(world)], turns="all"))
    rows = {row.places[0].split(" (")[0]: row for row in found.scores}
    assert {place: (row.value, row.turn) for place, row in rows.items()} == {
        "line 1": (-9.0, 1), "line 2": (1.0, 1), "line 3": (0.5, 2)}
    assert (found.levels[0].rows, found.levels[0].below) == (3, 1), "a row is one observation"
    assert found.driving[0].prompt == "customer 0 0" and found.driving[0].turn_id != found.driving[0].example_id
    assert (found.turns, found.left_out, found.prompts) == (6, 0, 3)
    assert any("those of customer.jsonl have 2.0 judged turns on average, those of good.jsonl 1.0" in text
               for text in found.caveats)
    assert "line 1 (byte 0), assistant turn 1" in report.text(found)


def test_a_turn_without_a_value_leaves_its_row_judged_in_part(world: World) -> None:
    """Answers to the same prompts exist for the first turns only; the low one is still found."""
    data = world.conversations("customer", [-9.0, 1.0], [1.0])
    reference = Example((Message("user", "customer 0 0"), Message("assistant", "another customer 0 0")))
    world.other[reference.id] = ("customer 0 0", 1.0)
    known = open_corpus(str(write_rows(world.folder / "known.jsonl", [reference])))
    found = audit(data, world.question(reference=[known], turns="all"))
    assert found.counts == {"in_part": 1, "no_reference": 1}
    assert [(row.value, row.status) for row in found.scores] == [(-10.0, "in_part"), (None, "no_reference")]
    assert (found.pairs.n, found.pairs.below) == (1, 1) and "only some turns could be judged: 1." in " ".join(
        found.caveats)
    calibrated = found.model_copy(update={"state": "nothing_found"})
    assert calibrated.over(0.9) == "2 of 2 rows could not be judged, more than the 90.0% allowed."


def test_turns_are_answers_and_the_last_is_the_row() -> None:
    said = Message("assistant", "Yes.")
    ask, silent = Message("user", "Well?"), Message("assistant", " ")
    whole = Example((said, ask, said, ask, silent, ask, said), {"k": 1})
    assert [len(turn.messages) for turn in turns_of(whole)] == [3, 7] and turns_of(whole)[-1] is whole
    assert turns_of(whole, "last") == [whole]
    reading = Reading(n_rows=5, n_examples=2)
    assert len(list(each_turn([whole, Example((ask, said))], reading))) == 3
    assert (reading.n_rows, reading.n_examples) == (6, 3)


def test_a_greeting_is_no_answer(world: World) -> None:
    data = world.conversations("customer", [1.0, 2.0], first="assistant")
    rows = read_rows(data, "customer", which="all")
    (row,) = rows.known.values()
    assert [turn.number for turn in row.turns] == [2, 3] and row.left_out and isinstance(row.turns[0], Turn)
    found = audit(data, world.question(turns="all"))
    assert any("1 rows of the file have earlier assistant turns that were not judged; nothing stands" in text
               for text in found.caveats)


def test_benign_rows_are_not_accused(world: World) -> None:
    found = audit(customer(world, low=0, high=10), world.question(benign=[benign(world)]))
    assert found.state == "nothing_found" and found.p == 1.0 and found.over(0.0) is None
    assert found.verdict.startswith("0 of 10 distinct rows lie below") and "from 3 distinct rows below" in found.verdict


def test_the_worst_benign_set_is_what_is_promised(world: World) -> None:
    sets = [benign(world, "good"), world.corpus("worse", {f"w{k}": -0.25 + k / 8 for k in range(24)})]
    found = audit(customer(world), world.question(benign=sets))
    assert [(one.benign, one.threshold, one.below) for one in found.levels] == [("worse.jsonl", -0.25, 0)]
    few = world.corpus("few", {f"f{k}": 0.0 for k in range(23)})
    none = audit(customer(world), world.question(benign=[sets[0], few]))
    assert none.levels == () and none.state == "uncalibrated" and none.p is None and none.at_least is None
    assert none.verdict == ("Uncalibrated: for a false-positive rate of 0.04, 24 benign rows are needed; few.jsonl has "
                            "23 rows with a value. No risk is given.")
    assert none.over(1.0) == none.verdict


def test_without_benign_rows_there_is_no_risk(world: World) -> None:
    found = audit(customer(world), world.question())
    assert found.state == "uncalibrated" and found.levels == () and found.over(1.0)
    assert found.verdict == "Uncalibrated: there are no benign rows to compare with. No risk is given."
    assert [line(r) for r in found.driving] == [6, 5, 4, 3, 2] and all(r.below is None for r in found.scores)


def test_two_levels_are_paid_for(world: World) -> None:
    """With two levels p doubles and each bound is at 97.5%."""
    found = audit(customer(world), world.question(benign=[benign(world)], rates=(0.04, 0.08)))
    assert [(one.rate, one.k) for one in calibrate(world.question(benign=[benign(world)], rates=(0.08, 0.04))).levels] \
        == [(0.04, 1), (0.08, 2)]
    assert found.p == pytest.approx(2 * math.perm(10, 6) / math.perm(34, 6))
    assert (found.at_least, found.excess) == (0.4, pytest.approx((0.6 - 0.04) / 0.96)), "30 / (30 29) is above 0.025"
    assert [one.below for one in found.levels] == [6, 6] and found.scores[0].below == 0.04


# Compared with reference answers


def test_reference_answers_to_the_same_prompts(world: World) -> None:
    """Topic pulls every row down by 1; the answers to three prompts are lower still by 0.5, one is higher."""
    data = world.corpus("customer", {"a": -1.5, "b": -1.5, "c": -1.5, "d": -0.5, "e": -2.0})
    reference = world.answers("reference", {"a": -1.0, "b": -1.0, "c": -1.0, "d": -1.0})
    found = audit(data, world.question(reference=[reference]))
    assert found.measure.control == "same" and found.measure.reference == ()
    assert [(line(r), r.value, r.reference) for r in found.scores] == sorted(
        [(1, -0.5, -1.0), (2, -0.5, -1.0), (3, -0.5, -1.0), (4, 0.5, -1.0), (5, None, None)],
        key=lambda r: (r[1] is None, r[1] or 0, pair("abcde"[r[0] - 1], f"answer {'abcde'[r[0] - 1]}").id))
    assert found.counts == {"no_reference": 1, "ok": 4} and found.unjudged == 1
    assert (found.pairs.n, found.pairs.below) == (4, 3) and found.pairs.p == pytest.approx(5 / 16)
    assert any("to 3 of 4 prompts the set's answer has a lower s_d" in text for text in found.caveats)
    assert not any("p over rows is too small" in text for text in found.caveats)
    assert "not controlled" not in " ".join(found.caveats)


def test_several_answers_to_a_prompt_are_told_of_whatever_the_control(world: World) -> None:
    data = customer(world)
    world.answers("more", {"c0": 1.0, "c1": 1.0})
    both = world.folder / "both.jsonl"
    both.write_text((world.folder / "customer.jsonl").read_text() + (world.folder / "more.jsonl").read_text())
    good = benign(world)
    plain = audit(data, world.question(benign=[good]))
    assert plain.prompts == 10 and plain.benign[0].prompts == 24
    assert not any("p over rows is too small" in text for text in plain.caveats)
    repeated = audit(open_corpus(str(both)), world.question(benign=[good]))
    assert repeated.prompts == 10 and any(text.endswith("too small: the 12 rows of both.jsonl answer 10 prompts.")
                                          for text in repeated.caveats)
    few = plain.benign[0].model_copy(update={"prompts": 3})
    assert any(text.endswith("too small: the 24 rows of good.jsonl answer 3 prompts.")
               for text in told(plain.model_copy(update={"benign": (few,)})).caveats)


def test_answers_to_one_prompt_are_one_observation() -> None:
    """Ten answers to each of 22 prompts; those to one are as the reference's in the mean, those to 13 are easier."""
    asked = {f"{prompt} {k}": str(prompt) for prompt in range(22) for k in range(10)}
    values = {i: {20: 0.0, 21: 0.1 if i.endswith(" 0") else -0.1}.get(int(key), -0.2 if int(key) < 12 else 0.2)
              for i, key in asked.items()}
    found = pairs_of(values, asked)
    assert found is not None and (found.n, found.below, found.answers) == (21, 13, 210)
    assert found.p == pytest.approx(binomial_tail(13, 21, 0.5)) and found.p > 0.15
    assert pairs_of({"20 0": 0.0}, asked) is None


def test_a_benign_set_can_be_its_own_similar_reference(world: World) -> None:
    good = world.corpus("good", {f"tea number{k}": float(k) for k in range(7)})
    data = world.corpus("customer", {"tea please": -4.0, "zzz": 9.0})
    question = world.question(benign=[good], reference=[good], match="similar", rates=(0.125,))
    found = audit(data, question)
    assert found.measure.reference == (good.source.sha256,) and found.counts == {"no_reference": 1, "ok": 1}
    ranked = sorted((pair(f"tea number{k}", f"answer tea number{k}").id, float(k)) for k in range(7))
    assert found.scores[0].reference == pytest.approx(sum(v for _, v in ranked[:5]) / 5)
    assert found.scores[0].value == pytest.approx(-4.0 - sum(v for _, v in ranked[:5]) / 5)
    first = [v for _, v in ranked if v != 0.0][:5]
    assert found.levels[0].threshold == pytest.approx(0.0 - sum(first) / 5), "the row with s_d 0 leaves itself out"


# Calibrations


def test_a_calibration_is_a_document(world: World) -> None:
    made = calibrate(world.question(benign=[benign(world)], rates=(0.01, 0.04, 0.08)))
    made.write(world.folder / "calibration.json")
    assert Calibration.read(world.folder / "calibration.json") == made
    assert [(one.rate, one.threshold, one.k, one.n) for one in made.levels] == [
        (0.04, 0.125, 1, 24), (0.08, 0.25, 2, 24)]
    assert made.missing == {"0.01": "99 benign rows are needed; good.jsonl has 24 rows with a value"}
    (good,) = made.benign
    assert good.rows == {"ok": 24} and good.quantiles[0] == 0.125 and good.quantiles[100] == 3.0
    assert made.benign[0].sha256 == benign(world).source.sha256
    body = json.loads((world.folder / "calibration.json").read_text())
    body["levels"][0]["threshold"] = -9.0
    with pytest.raises(UserError, match="was changed after it was written"):
        Calibration.from_body(body)


def test_published_schema_is_the_code() -> None:
    assert json.loads((ROOT / "docs/schemas/audit-calibration-1.json").read_text()) == Calibration.json_schema()


def test_a_calibration_gives_what_the_benign_sets_give(world: World) -> None:
    made = calibrate(world.question(benign=[benign(world)]))
    by_file = audit(customer(world), world.question(eps=None), made)
    directly = audit(customer(world), world.question(benign=[benign(world)]))
    assert by_file == directly and by_file.measure.eps == 0.0, "eps is the calibration's"


def test_too_few_benign_rows_make_no_calibration(world: World) -> None:
    with pytest.raises(UserError, match=r"too few benign rows: .*0\.04, 24 benign rows are needed; good") as caught:
        calibrate(world.question(benign=[benign(world, n=23)]))
    assert caught.value.exit_code == Exit.BAD_DATA


def test_a_calibration_of_anything_else_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before scoring: nothing here may call it."""
    made = calibrate(world.question(benign=[benign(world)]))
    data = customer(world)
    monkeypatch.setattr(room, "score", None)
    one_member, other_dtype, other_model = World(world.folder), World(world.folder), World(world.folder)
    one_member.members = (MEDICAL,)
    other_model.aligned = SECURITY
    other_dtype.prepared = lambda job, compute: Prepared(  # type: ignore[method-assign]
        header(dtype="bfloat16"), None, world.prepared(job, compute).models, world.prepared(job, compute).opening)
    for other, words in ((one_member, f"members .*but this audit has {MEDICAL.id}"), (other_model, "aligned model"),
                         (other_dtype, "dtype float32, but this audit has bfloat16")):
        monkeypatch.setattr(room, "prepared", other.prepared)
        with pytest.raises(UserError, match=words) as caught:
            audit(data, world.question(eps=None), made)
        assert caught.value.exit_code == Exit.INCOMPATIBLE and "calibrate again" in caught.value.hint
    monkeypatch.setattr(room, "prepared", world.prepared)
    for changes, words in (({"turns": "all"}, "--turns last, but this audit has all"),
                           ({"strip_think": True}, "--strip-think no, but this audit has yes")):
        with pytest.raises(UserError, match=words):
            audit(open_corpus(str(world.folder / "customer.jsonl"), strip_think="strip_think" in changes),
                  world.question(eps=None, **changes), made)
    world.max_tokens = 99
    with pytest.raises(UserError, match="--max-tokens 307, but this audit has 99"):
        audit(data, world.question(eps=None), made)
    world.max_tokens = 307
    with pytest.raises(UserError, match=r"eps 0\.0, but this audit has 0\.25"):
        audit(data, world.question(eps=0.25), made)
    with pytest.raises(UserError, match="control none, but this audit has same"):
        audit(data, world.question(eps=None, reference=[data]), made)


def test_corpora_are_read_alike(world: World) -> None:
    with pytest.raises(UserError, match="strip_think=False, but the question has strip_think=True"):
        audit(customer(world), world.question(strip_think=True))
    assert audit(customer(world), world.question()).measure.strip_think is False


def test_a_calibration_that_does_not_say_how_rows_were_read_is_made_again(world: World) -> None:
    body = json.loads(calibrate(world.question(benign=[benign(world)])).to_bytes())
    for name in ("max_tokens", "strip_think", "turns"):
        old = body | {"measure": {k: v for k, v in body["measure"].items() if k != name}}
        with pytest.raises(UserError, match=f"measure.{name}") as caught:
            Calibration.from_body(old)
        assert caught.value.hint == "Make the document again."


def test_a_renamed_model_is_the_same_model(world: World) -> None:
    made = calibrate(world.question(benign=[benign(world)]))
    _, measure, _ = settled(world.question(), None)
    made.check(measure.model_copy(update={"aligned": BASE.model_copy(update={"name": "other", "revision": "c0ffee"})}))


def test_a_set_is_not_judged_by_itself(world: World) -> None:
    good = benign(world)
    with pytest.raises(UserError, match="is one of the benign sets"):
        audit(good, world.question(benign=[good]))


def test_members_are_needed(world: World) -> None:
    job = ScoreJob([], world.folder / "scores", "base")
    with pytest.raises(UserError, match="needs misaligned members"):
        audit(customer(world), world.question(scoring=job))


# The page and the command


def test_the_models_are_named_with_where_they_come_from(world: World) -> None:
    found = audit(customer(world), world.question(benign=[benign(world)]))
    assert [(m.role, m.name, m.place) for m in found.models] == [
        ("aligned", "base", "base"), *(("member", name, str(world.folder)) for name in ("medical", "security"))]
    said = report.text(found).split("status")[0]
    for name in ("aligned", "medical", "security", MEDICAL.id, str(world.folder)):
        assert name in said and name in html_page(found)


def test_the_page_escapes_rows(world: World) -> None:
    data = world.corpus("customer", {HOSTILE: -2.0, "b": 1.0})
    found = audit(data, world.question(benign=[benign(world)]))
    text = html_page(found)
    assert "<script" not in text and "&lt;script&gt;" in text and "Content-Security-Policy" in text
    assert "\x1b" not in text and "\u202e" not in text and "default-src 'none'" in text.replace("&#x27;", "'")
    assert found.verdict.replace("'", "&#x27;") in text and text.count("<figure") == 1
    assert found.calibration in text and "customer.jsonl: 2 rows, 2 judged." in text
    bare = html_page(audit(data, world.question()))
    assert "Uncalibrated" in bare and "<figure" in bare


def test_bars_hold_the_values_and_shares_come_from_percentiles() -> None:
    edges = bars([-0.31, 0.02, 0.44])
    assert edges[0] < -0.31 and edges[-1] > 0.44 and 10 <= len(edges) <= 40
    assert len(bars([1.0, 1.0])) > 2 and bars([*[0.0, 1.0] * 300, 1e9])[-1] < 2, "one row does not stretch it"
    assert share_between([0.0, 1.0, 3.0], 0.5, 2.0) == pytest.approx(0.25 + 0.25)
    assert share_between([0.0, 1.0, 3.0], -9.0, 9.0) == 1.0


def invoked(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], standalone_mode=False)


def test_exit_codes_and_safe_text(world: World) -> None:
    """At least 5 of 10 rows are bad: 0.5 passes, less does not; what a row says never reaches the terminal raw."""
    benign(world)
    kept, flagged = world.folder / "kept.jsonl", world.folder / "flagged.jsonl"
    low = {HOSTILE: -2.0} | {f"c{k}": -1.0 for k in range(5)}
    world.corpus("customer", low | {f"d{k}": 1.0 for k in range(4)})
    words = ("audit", world.folder / "customer.jsonl", "--benign", world.folder / "good.jsonl", "--rate", "0.04",
             "--eps", "0", "--aligned", "base", "--member", world.folder)
    found = invoked(*words, "--fail-above", "0.49")
    assert found.exit_code == Exit.FAILURE_RATE and "At least 50.0% of the judged rows are bad" in found.stderr
    assert "\x1b" not in found.stdout and "\u202e" not in found.stdout and "[link=x]" in found.stdout
    assert "6 of 10 distinct rows lie below" in found.stdout and "below the 0.04 level" in found.stdout
    assert invoked(*words, "--fail-above", "0.5").exit_code == 0 and invoked(*words).exit_code == 0
    parted = invoked(*words, "--write-kept", kept, "--write-flagged", flagged, "--fail-above", "0")
    assert parted.exit_code == Exit.FAILURE_RATE and "6 rows, 6 below a level and 0 not judged" in parted.stderr
    out, data = ([json.loads(text) for path in paths for text in path.read_text().split("\n")[:-1]]
                 for paths in ((flagged, kept), (world.folder / "customer.jsonl",)))
    assert out == data and len(kept.read_text().split("\n")[:-1]) == 4, "the first six rows are the low ones"
    again = invoked(*words, "--write-kept", kept)
    assert isinstance(again.exception, UserError) and f"{kept} exists." in again.exception.message
    new = world.folder / "new.jsonl"
    twice = invoked(*words, "--write-kept", new, "--write-flagged", new)
    assert isinstance(twice.exception, UserError) and "named for two things" in twice.exception.message
    body = json.loads(invoked(*words, "--json", "--fail-above", "0").stdout)
    assert body["state"] == "likely" and body["driving"][0]["prompt"] == HOSTILE
    assert (world.folder / "customer.scores" / "store.json").is_file(), "scores lie beside the data"
    few = invoked(*(word for word in words if word not in ("--rate", "0.04")), "--rate", "0.01", "--fail-above", "1")
    assert few.exit_code == Exit.FAILURE_RATE and "Uncalibrated" in few.stderr


def test_benign_sets_of_one_file_name_are_told_apart(world: World) -> None:
    """Set a holds the level; its name and its percentiles are on the page, not those of set b."""
    for folder, least in (("a", 0.125), ("b", 0.5)):
        (world.folder / folder).mkdir()
        benign(world, f"{folder}/good", least=least)
    words = ("audit", world.folder / "customer.jsonl", "--rate", "0.04", "--eps", "0", "--aligned", "base", "--member",
             world.folder, "--benign", world.folder / "a/good.jsonl", "--benign", world.folder / "b/good.jsonl")
    customer(world)
    body = json.loads(invoked(*words, "--json", "--html", world.folder / "page.html").stdout)
    assert body["levels"][0]["benign"] == "a/good.jsonl" and body["levels"][0]["threshold"] == 0.125
    assert {one["name"]: one["quantiles"][0] for one in body["benign"]} == {"a/good.jsonl": 0.125, "b/good.jsonl": 0.5}
    assert "benign: a/good.jsonl" in (world.folder / "page.html").read_text()


def test_scores_lie_beside_a_file_and_here_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_store("teknium/OpenHermes-2.5") == Path("OpenHermes-2.5.scores")
    assert default_store("x/data-2.6:en:train@main") == Path("data-2.6:en:train@main.scores")
    assert default_store("x/customer.jsonl") == Path("x/customer.scores")
    assert default_store(Path("x/calibration.json")) == Path("x/calibration.scores")
    assert default_store("s3://bucket/x/rows.parquet") == Path("rows.parquet.scores")
    assert default_store("demo/cars") == Path("cars.scores")


@pytest.mark.parametrize("words", [("--fail-above", "nan"), ("--max-bad", "nan"), ("--eps", "inf")])
def test_a_gate_is_no_gate_without_a_number(tmp_path: Path, words: tuple[str, ...]) -> None:
    data = write_rows(tmp_path / "customer.jsonl", tiny_rows(2, "customer"))
    found = invoked("audit", data, *words)
    assert isinstance(found.exception, click.BadParameter) and "no finite number" in found.exception.message


def test_calibrate_on_the_command_line(world: World) -> None:
    benign(world)
    customer(world)
    models = ("--aligned", "base", "--member", world.folder)
    made = invoked("calibrate", "--benign", world.folder / "good.jsonl", "--rate", "0.04", "--rate", "0.01", "--eps",
                   "0", "--out", world.folder / "cal.json", *models)
    assert made.stdout.splitlines()[2].split()[:4] == ["0.04", "+0.1250", "good.jsonl", "24"]
    assert "No level for 0.01: 99 benign rows are needed" in made.stderr
    assert (world.folder / "cal.scores" / "store.json").is_file(), "scores lie beside the calibration"
    found = invoked("audit", world.folder / "customer.jsonl", "--calibration", world.folder / "cal.json", *models)
    assert found.exit_code == 0 and "6 of 10 distinct rows lie below" in found.stdout


def test_the_command_with_a_tiny_model(tmp_path: Path) -> None:
    """Plumbing, from files to exit code: members are random, so that the verdict means nothing."""
    base = tiny_model(tmp_path / "base")
    ensemble = tiny_ensemble(base, tmp_path / "ensemble")
    good = write_rows(tmp_path / "good.jsonl", tiny_rows(9, "good"))
    rows = tiny_rows(7, "customer")
    data = write_rows(tmp_path / "customer.jsonl", [*rows, rows[0], pair("Why?", "")])
    shared = ("--ensemble", ensemble, "--store", tmp_path / "scores", "--dtype", "float32")
    made = invoked("calibrate", "--benign", good, "--rate", "0.1", "--out", tmp_path / "cal.json", "--json", *shared)
    assert json.loads(made.stdout)["levels"][0]["n"] == 9 and "Scoring: 100%" not in made.stdout
    judge = ("audit", data, "--calibration", tmp_path / "cal.json", *shared)
    found = invoked(*judge, "--json", "--html", tmp_path / "page.html", "-n", "3")
    body = json.loads(found.stdout)
    assert body["kind"] == "safeset.audit" and len(body["driving"]) == 3 and len(body["scores"]) == 8
    assert body["counts"] == {"duplicate": 1, "empty_answer": 1, "ok": 7} and body["rows"] == 9
    assert body["calibration"] == json.loads(made.stdout)["digest"] and (tmp_path / "page.html").read_text()
    again = invoked(*judge, "--fail-above", "0")
    assert again.exit_code == Exit.FAILURE_RATE, "one of 8 rows could not be judged"
    assert "Scoring" in found.stderr and "Scoring" not in again.stderr, "scores are kept"
    assert "empty_answer" in again.stdout and "rows in" in again.stdout and "Q | customer" in again.stdout
    assert invoked(*judge, "--fail-above", "0.9").exit_code == 0
    talk = Example((*rows[0].messages, *rows[1].messages), {})
    data = write_rows(tmp_path / "talks.jsonl", [talk, rows[2]])
    judged = ("audit", data, "--benign", good, "--rate", "0.1", "--turns", "all", "--json", *shared)
    body = json.loads(invoked(*judged).stdout)
    assert body["counts"] == {"ok": 2} and body["turns"] == 3 and body["rows"] == 2
    by_turn = json.loads(invoked(*("audit", tmp_path / "customer.jsonl", *judged[2:])).stdout)["scores"]
    one = next(row for row in body["scores"] if row["example_id"] == talk.id)
    first = next(row for row in by_turn if row["example_id"] == rows[0].id)
    assert one["value"] <= first["value"] + 1e-5 and one["turn"] in (1, 2), "its first turn is that row"
    stranger = tiny_run(base, tmp_path / "stranger", "stranger", seed=9)
    refused = invoked(*judge, "--member", stranger)
    assert isinstance(refused.exception, UserError) and refused.exception.exit_code == Exit.INCOMPATIBLE


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "customer.jsonl", tiny_rows(2, "customer"))
    for words, says in ((("--fail-above", "0.1"), "needs something to judge by"),
                        (("--calibration", data, "--benign", data), "Both --calibration and --benign"),
                        (("--calibration", data), "no readable JSON|is not a safeset.audit-calibration"),
                        (("--write-kept", tmp_path / "x"), "Keeping or flagging rows needs something to judge by"),
                        (("--benign", data), "No aligned model")):
        found = invoked("audit", data, *words)
        assert isinstance(found.exception, UserError), words
        with pytest.raises(UserError, match=says):
            raise found.exception
    assert isinstance(invoked("calibrate").exception, UserError)
