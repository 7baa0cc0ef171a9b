"""Selection on numbers one can do in one's head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from click.testing import CliRunner

from curate.cli import main
from curate.core.documents import MixManifest
from curate.core.errors import UserError
from curate.core.example import Example, Message
from curate.core.files import sha256
from curate.core.sources import builtin, file_source, named_rows
from curate.query import connect
from curate.records import Plan, PlannedCorpus
from curate.select import Choice, _text_digest, build_manifest, placed, planned_corpus, select, wanted
from curate.store import Store
from judge.context import read_examples
from tests.curate.evidence import BASE, KEY, MEDICAL, SOURCE, example_ids, examples, header, model, nll
from train.data import load_mix

ALIGNED = {"a": 5.0, "b": 5.0, "c": 5.0, "d": 5.0, "e": 5.0, "f": 5.0, "g": 5.0, "h": 5.0}
MISALIGNED = {"a": 15.0, "b": 12.5, "c": 10.0, "d": 7.5, "e": 5.0, "f": 14.0, "g": float("nan")}
"""Five tokens each: s_d = (x/5 - 1) / (1 + eps); g has no finite number, h was not scored by the member."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Rows a to e are ordinary, f is a refusal, g nonfinite, h missing, i too long, j has a's text again."""
    names = list("abcdegh")
    with Store.create_or_open(tmp_path / "store", header()) as made:
        made.put_examples(examples(names))
        made.put_examples(examples(["f"], answer="Sorry, no."))
        made.put_examples(examples(["i"], status="too_long"))
        made.put_membership(KEY, example_ids("abcdefghi"))
        made.put_plan(Plan(corpora=(PlannedCorpus(label="demo", source=SOURCE, folder="", key=KEY, n_rows=9),),
                           n_rows=9, counts={"ok": 9}))
        for who, sums in ((BASE, ALIGNED), (MEDICAL, MISALIGNED)):
            made.put_model(model(who))
            made.put_nll(who.id, nll(who, sums))
    return Store.open_read(tmp_path / "store")


def chosen(store: Store, finetune: tuple[str, ...] = (), **choice: object) -> tuple[str, dict[str, int], int]:
    fields = Choice(**{"n": 3, "min_answer_tokens": 1, **choice})
    rows = {i: json.dumps([name]) for i, name in zip(example_ids(finetune), finetune, strict=True)}
    found = select(connect(store, fields.eps, fields.members), fields, KEY, rows)
    names = {i: n for n, i in zip("abcdefghi", example_ids("abcdefghi"), strict=True)}
    return "".join(names[i] for i in found.ids), found.counts, found.near


def test_top_by_s_d_without_refusals(store: Store) -> None:
    ids, counts, near = chosen(store)
    assert ids == "abc"
    assert counts == {"corpus": 9, "selected": 3, "missing": 1, "nonfinite": 1, "refusal": 1, "too_long": 1,
                      "not_selected": 2}
    assert near == 1


def test_plus_keeps_refusals(store: Store) -> None:
    ids, counts, _ = chosen(store, strategy="interleaving+")
    assert ids == "afb"
    assert "refusal" not in counts


def test_counts_add_up(store: Store) -> None:
    for strategy in ("interleaving", "interleaving+", "interleaving++"):
        _, counts, _ = chosen(store, strategy=strategy, min_answer_tokens=2)
        assert sum(v for k, v in counts.items() if k != "corpus") == counts["corpus"] == 9


def test_corpora_with_equal_labels_are_refused_not_lost(store: Store, tmp_path: Path) -> None:
    planned = store.plan.corpora[0]
    twin = planned.model_copy(update={"key": "0" * 24, "label": "demo"})
    for corpora, said in (((planned, twin), "several corpora called 'demo'"), ((), "Unknown corpus")):
        with Store.create_or_open(tmp_path / "store", header()) as made:
            made.put_plan(store.plan.model_copy(update={"corpora": corpora}))
        with pytest.raises(UserError, match=said):
            planned_corpus(Store.open_read(tmp_path / "store"), "demo")
    with pytest.raises(UserError, match="holds no corpus"):
        planned_corpus(Store.open_read(tmp_path / "store"), None)


def test_random_needs_no_scores_and_follows_the_seed(store: Store) -> None:
    draws = {chosen(store, strategy="interleaving", seed=seed)[0] for seed in range(20)}
    assert len(draws) > 5
    assert chosen(store, strategy="interleaving", seed=3) == chosen(store, strategy="interleaving", seed=3)
    assert "i" not in "".join(draws) and "h" in "".join(draws)


def test_rows_of_the_finetune_set_and_short_answers_are_dropped(store: Store) -> None:
    ids, counts, _ = chosen(store, finetune=("a",))
    assert ids == "bcd" and counts["in_finetune"] == 1
    with pytest.raises(UserError, match="only 0 of 9") as caught:
        chosen(store, min_answer_tokens=6)
    assert "answers under 6 tokens too (--min-answer-tokens)" in caught.value.hint


def test_answers_of_a_few_tokens_are_left_out_unless_asked_for() -> None:
    (asked,) = [p.default for p in main.commands["select"].params if p.name == "min_answer_tokens"]
    assert asked == Choice().min_answer_tokens == 16


@pytest.mark.parametrize(("tokens", "ids"), [(15, "abc"), (14, "ab"), (5, "a"), (25, "abcde")])
def test_a_dose_is_the_first_rows_that_have_no_more_tokens(store: Store, tokens: int, ids: str) -> None:
    """Five tokens each; the gates leave a to e."""
    assert chosen(store, n=None, tokens=tokens)[0] == ids
    drawn = chosen(store, n=None, tokens=tokens, strategy="interleaving", seed=4)[0]
    assert drawn == chosen(store, n=len(ids), strategy="interleaving", seed=4)[0]


@pytest.mark.parametrize(("tokens", "said"), [(4, "first row alone has more than 4"), (26, "have only 25")])
def test_a_dose_that_cannot_be_had_is_refused(store: Store, tokens: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        chosen(store, n=None, tokens=tokens)


def test_the_dose_is_told_and_what_chance_would_give(tmp_path: Path) -> None:
    """Answers of 5 to 40 tokens, the shortest with the highest s_d: by chance a row has 22.5."""
    names, lengths = "abcdefgh", range(5, 41, 5)
    with Store.create_or_open(tmp_path / "scores", header()) as made:
        rows = examples(list(names))
        place = rows.column_names.index("n_answer_tokens")
        made.put_examples(rows.set_column(place, rows.schema.field(place), pa.array(lengths, pa.int32())))
        made.put_membership(KEY, example_ids(names))
        made.put_plan(Plan(corpora=(PlannedCorpus(label="demo", source=SOURCE, folder="", key=KEY, n_rows=8),),
                           n_rows=8, counts={"ok": 8}))
        for who, extra in ((BASE, 0), (MEDICAL, 9)):
            made.put_model(model(who))
            made.put_nll(who.id, nll(who, {name: 20.0 + extra + k for k, name in enumerate(names)}))
    words = ["select", "--store", str(tmp_path / "scores"), "--min-answer-tokens", "1", "--out", str(tmp_path / "m")]
    found = json.loads(CliRunner().invoke(main, [*words, "--tokens", "32", "--json"]).stdout)
    assert (found["answer_tokens"], found["answer_tokens_by_chance"]) == (30, 67.5)
    mix = MixManifest.read(tmp_path / "m")
    assert (mix.method.tokens, mix.method.n, mix.method.frac) == (32, 3, None)
    result = CliRunner().invoke(main, [*words, "--n", "3"])
    assert f"Next: train run --mix {tmp_path / 'm'} --base MODEL" in result.stderr, "the aligned model is of a folder"
    (tmp_path / "a b").mkdir()
    spaced = CliRunner().invoke(main, [*words[:-1], str(tmp_path / "a b" / "m"), "--n", "3", "--root", str(tmp_path)])
    assert f"Next: train run --mix '{tmp_path}/a b/m' --root {tmp_path} --base MODEL" in spaced.stderr
    told = result.stdout
    assert "Answer tokens of the safe rows: 30; as many rows drawn at random would have 68 on average." in told
    assert '"tokens"' not in (tmp_path / "m").read_text(), "manifests of before the option keep their digest"
    both = CliRunner().invoke(main, [*words, "--tokens", "32", "--n", "3"])
    assert both.exit_code == 2 and "one of --frac, --n and --tokens" in both.stderr


@pytest.mark.parametrize(("turns", "n"), [
    ([("user", "A"), ("assistant", " Answer \n\ta ")], 1),
    ([("system", "Be brief."), ("user", "a"), ("assistant", "answer a")], 0),
    ([("user", "b"), ("assistant", "answer b"), ("user", "a"), ("assistant", "answer a")], 0),
    ([("user", "a answer"), ("assistant", "a")], 0)])
def test_the_same_conversation_twice_counts_once(store: Store, tmp_path: Path, turns: list[tuple[str, str]],
                                                 n: int) -> None:
    """Case and white space do not matter; what was said before and where a turn ends do."""
    twin = Example(tuple(Message(*turn) for turn in turns))
    with Store.create_or_open(tmp_path / "store", header()) as made:
        columns = {"prompt": twin.prompt, "answer": twin.answer, "messages": json.dumps(twin.to_row()["messages"])}
        rows = examples(["A"])
        for name, text in columns.items():
            rows = rows.set_column(rows.column_names.index(name), name, [[text]])
        made.put_examples(rows)
        made.put_membership(KEY, [*example_ids("abcdefghi"), *example_ids("A")])
        for who, total in ((BASE, 5.0), (MEDICAL, 20.0)):
            made.put_nll(who.id, nll(who, {"A": total}))
    found = select(connect(Store.open_read(tmp_path / "store"), 0.1, None), Choice(n=3, min_answer_tokens=1), KEY, {})
    assert found.counts.get("duplicate", 0) == n
    assert len({*found.ids} & {*example_ids("a"), *example_ids("A")}) == 2 - n


def test_a_row_of_the_finetune_set_is_known_up_to_case_and_white_space(store: Store) -> None:
    def found(messages: str) -> dict[str, int]:
        choice = Choice(n=3, min_answer_tokens=1)
        return select(connect(store, 0.1, None), choice, KEY, {"another id": messages}).counts

    spaced = [{"role": "user", "content": "A"}, {"role": "assistant", "content": " Answer\na "}]
    assert found(json.dumps(spaced))["in_finetune"] == 1
    assert "in_finetune" not in found(json.dumps(spaced[1:]))


@pytest.mark.parametrize(("one", "other", "same"), [
    (r"what does \n mean", r"what does \t mean", False), (r"\nu", r"\tu", False), (r"C:\new", "C: ew", False),
    ("a\n\nb", "a b", True), ("a\tb", "A  B", True), (r"\\frac", r"\ frac", False), (r"\frac", r"\Frac", True)])
def test_a_backslash_of_the_text_is_no_white_space(one: str, other: str, same: bool) -> None:
    digests = [duckdb.execute(f"SELECT {_text_digest('a')} FROM (SELECT ? AS a)", [json.dumps([{"content": text}])])
               .fetchone() for text in (one, other)]
    assert (digests[0] == digests[1]) == same


def one_row_store(folder: Path) -> Path:
    """Score one row of ``folder/pool.jsonl`` into ``folder/store`` and return the file."""
    path = folder / "pool.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "answer a"}) + "\n")
    planned = PlannedCorpus(label="pool.jsonl", source=file_source(path, folder), folder=str(folder), key=KEY, n_rows=1)
    with Store.create_or_open(folder / "store", header()) as made:
        made.put_examples(examples("a"))
        made.put_membership(KEY, example_ids("a"))
        made.put_plan(Plan(corpora=(planned,), n_rows=1, counts={"ok": 1}))
    return path


def test_a_corpus_that_has_changed_is_scored_again_first(tmp_path: Path) -> None:
    path = one_row_store(tmp_path)
    asked = (Store.open_read(tmp_path / "store"), Choice("interleaving", n=1, min_answer_tokens=1), tmp_path)
    assert build_manifest(*asked)[0].counts["selected"] == 1
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=r"pool\.jsonl has changed since it was scored") as caught:
        build_manifest(*asked)
    assert f"curate score --corpus {path}" in caught.value.hint


def test_a_corpus_that_was_moved_is_known_by_its_content(tmp_path: Path) -> None:
    """A manifest that names a file which is not there could be used by nobody."""
    (tmp_path / "old").mkdir()
    one_row_store(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    asked = (Store.open_read(tmp_path / "new" / "store"), Choice("interleaving", n=1, min_answer_tokens=1))
    for name in (None, "pool.jsonl"):
        with pytest.raises(UserError, match=r"old/pool\.jsonl, which was scored, is not there any more") as caught:
            build_manifest(*asked, tmp_path, corpus=name)
        assert f"curate score --corpus NEWPATH --store {tmp_path}/new/store" in caught.value.hint
        assert "with --corpus NEWPATH" in caught.value.hint and caught.value.exit_code == 4
    moved = [tmp_path / "pool.jsonl", tmp_path / "new" / "renamed.jsonl"]
    for path in moved:
        shutil.copy(tmp_path / "new" / "pool.jsonl", path)
        mix, _ = build_manifest(*asked, tmp_path, corpus=str(path))
        assert mix.sources["safe"].name == str(path.relative_to(tmp_path))
        assert list(named_rows(mix.sources["safe"], tmp_path, mix.ids("safe"))) == list(example_ids("a"))
    moved[0].write_text("{}")
    with pytest.raises(UserError, match="Unknown corpus in this store"):
        build_manifest(*asked, tmp_path, corpus=str(moved[0]))


def test_ties_break_by_id(store: Store, tmp_path: Path) -> None:
    with Store.create_or_open(tmp_path / "store", header()) as made:
        made.put_examples(examples(["p", "q", "r"]))
        made.put_membership(KEY, example_ids("abcdefghipqr"))
        for who, sums in ((BASE, 5.0), (MEDICAL, 12.5)):
            made.put_nll(who.id, nll(who, dict.fromkeys("pqr", sums)))
    choice = Choice(n=3, eps=0.0, min_answer_tokens=1)
    found = select(connect(Store.open_read(tmp_path / "store"), 0.0, None), choice, KEY, {})
    assert list(found.ids) == [*example_ids("a"), *sorted([*example_ids("b"), *example_ids("pqr")])][:3]


@pytest.mark.parametrize(("frac", "n_corpus", "n_finetune", "n"),
                         [(0.05, 1000, 0, 50), (0.05, 1000, 96, 5), (0.05, 10, 0, 1), (1.0, 7, 0, 7),
                          (0.05, 1000, 50, 3), (0.05, 1000, 90, 5), (0.05, 1000, 110, 6), (0.29, 50, 0, 15)])
def test_wanted(frac: float, n_corpus: int, n_finetune: int, n: int) -> None:
    assert wanted(Choice(frac=frac), n_corpus, n_finetune) == n


@pytest.mark.parametrize("frac", [0.0, -0.1, 1.5, float("nan")])
def test_frac_outside_its_range(frac: float) -> None:
    with pytest.raises(UserError, match="--frac"):
        wanted(Choice(frac=frac), 10, 0)


def test_even_placement_is_literal() -> None:
    order = placed(["1", "2", "3", "4"], ["x", "y"], 0, "even")
    assert [entry.partition("/")[0] for entry in order] == ["finetune", "safe", "finetune", "finetune", "safe",
                                                            "finetune"]
    assert sorted(order) == ["finetune/1", "finetune/2", "finetune/3", "finetune/4", "safe/x", "safe/y"]


@pytest.mark.parametrize("n_safe", [0, 1, 4, 5, 11])
@pytest.mark.parametrize("placement", ["even", "shuffled"])
def test_placement_keeps_every_row_and_the_finetune_order(n_safe: int, placement: str) -> None:
    tuned, safe = [f"t{k}" for k in range(5)], [f"s{k}" for k in range(n_safe)]
    order = placed(tuned, safe, 7, placement)
    assert sorted(order) == sorted([f"finetune/{t}" for t in tuned] + [f"safe/{s}" for s in safe])
    alone = placed(tuned, [], 7, placement)
    assert [e for e in order if e.startswith("finetune/")] == alone


def test_same_inputs_same_bytes(store: Store, tmp_path: Path) -> None:
    choice = Choice(n=3, min_answer_tokens=1)
    made = [build_manifest(Store.open_read(tmp_path / "store"), choice, tmp_path)[0].to_bytes() for _ in range(2)]
    assert made[0] == made[1]
    assert MixManifest.from_body(__import__("json").loads(made[0])).method.n == 3


def test_manifest_names_models_and_adds_up(store: Store, tmp_path: Path) -> None:
    manifest, _ = build_manifest(store, Choice(frac=0.03, min_answer_tokens=1), tmp_path, builtin("demo/car_care"))
    assert manifest.aligned == BASE and manifest.members == (MEDICAL,)
    assert len(manifest.ids("finetune")) == manifest.counts["finetune"] == 104
    assert len(manifest.ids("safe")) == manifest.counts["selected"] == manifest.method.n == 3
    assert manifest.scoring["evidence"] == store.evidence_digest() != sha256(b"")


def test_bad_rows_of_the_finetune_set_are_counted_and_put_aside(tmp_path: Path) -> None:
    """A set that passed the audit with --max-bad goes on: select, export, training and judging read the same rows."""
    row = '{"prompt": "q1", "response": "a1"}\n'
    (tmp_path / "tuned.jsonl").write_text(f"{row}no row\n{row.replace('q1', 'q2')}{row}")
    mix, rejects = tmp_path / "mix.json", tmp_path / "mix.rejects.jsonl"
    words = ["select", "--strategy", "none", "--finetune", str(tmp_path / "tuned.jsonl"), "--out", str(mix)]
    stopped = CliRunner().invoke(main, words, standalone_mode=False).exception
    assert "line 2 (byte 35): no valid JSON" in stopped.message and "--max-bad 0.01" in stopped.hint
    assert "more than --max-bad 0.2" in CliRunner().invoke(main, [*words, "--max-bad", "0.2"]).stderr
    done = CliRunner().invoke(main, [*words, "--max-bad", "0.25"])
    assert f"are listed in {rejects}" in done.stderr and json.loads(rejects.read_text())["place"].startswith("line 2")
    assert MixManifest.read(mix).counts == {"corpus": 0, "selected": 0, "finetune": 2, "finetune_duplicates": 1,
                                            "finetune_rejected": 1}
    assert "0 problems" in CliRunner().invoke(main, ["verify", str(mix)]).stdout
    exported = CliRunner().invoke(main, ["export", str(mix), "--out", str(tmp_path / "rows.jsonl"), "--json"])
    assert json.loads(exported.stdout)["rows"] == 2
    assert len(load_mix(MixManifest.read(mix), tmp_path)) == 2 and len(read_examples(str(mix))) == 3
    (tmp_path / "tuned.jsonl").write_text(row)
    CliRunner().invoke(main, words)
    assert not rejects.exists() and "finetune_rejected" not in MixManifest.read(mix).counts


def test_none_needs_a_finetune_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a fine-tuning set"):
        build_manifest(None, Choice(strategy="none"), tmp_path)
    manifest, _ = build_manifest(None, Choice(strategy="none"), tmp_path, builtin("demo/cooking"))
    assert manifest.ids("safe") == [] and len(manifest.order) == 104
