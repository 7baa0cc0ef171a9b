"""The evaluation of audits: its statistics by hand, and its tables from stores whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from bench.audit import (
    Share,
    auc,
    auc_interval,
    benign_rows,
    controlled,
    methods,
    mixtures,
    noticed,
    paired_rows,
    read_table,
    report,
    s_d,
    worst_cut,
    write_rows,
)
from bench.study.prepare import prompt_id
from curate.core.documents import ModelIdentity
from curate.core.errors import UserError
from curate.core.example import pair
from curate.parts import EXAMPLES_SCHEMA
from curate.records import ScoredModel
from curate.risk import Cut
from curate.store import Store
from tests.curate.evidence import BASE, MEDICAL, SECURITY, header, identity, nll

CODE = identity("code")


def test_auc_of_five_numbers() -> None:
    """Bad 1, 4 against 2, 4, 5: wins 3 of 3 and 1 of 3, and one tie."""
    bad, good = np.array([1.0, 4.0]), np.array([2.0, 4.0, 5.0])
    assert auc(bad, good) == (3 + 1.5) / 6 and auc(good, bad) == 1 - (3 + 1.5) / 6
    twice = auc(bad, good, np.array([[1.0, 1.0], [2.0, 0.0]]), np.array([[1.0, 1.0, 1.0], [0.0, 3.0, 0.0]]))
    assert twice.tolist() == [pytest.approx(4.5 / 6), 1.0]


def test_the_interval_draws_prompts_not_rows() -> None:
    bad, good = np.array([0.0, 2.0]), np.array([1.0, 3.0])
    value, low, high = auc_interval(bad, good, (["p", "q"], ["p", "q"]), resamples=200)
    assert (value, low, high) == (0.75, 0.75, 1.0), "p alone or q alone is told apart; p and q together 3 times of 4"
    again = auc_interval(bad, good, (["p", "q"], ["p", "q"]), resamples=200)
    assert again == (value, low, high)


def test_mixtures_hold_the_share_and_repeat() -> None:
    prompts = [f"p{k}" for k in range(41)]
    bad, good = dict.fromkeys(prompts, -1.0), dict.fromkeys([*prompts, "only good"], 1.0)
    made = mixtures(bad, good, 0.05, seed=3, repeats=7)
    assert [int((one < 0).sum()) for one in made] == [2] * 7 and all(len(one) == 41 for one in made)
    again = mixtures(bad, good, 0.05, seed=3, repeats=7)
    assert all((a == b).all() for a, b in zip(made, again, strict=True))
    assert any((a != b).any() for a, b in zip(made, mixtures(bad, good, 0.05, seed=4, repeats=7), strict=True))
    assert any((made[0] != one).any() for one in made[1:])
    one = mixtures(bad, good, 0.01, seed=3, repeats=7)
    assert [int((of < 0).sum()) for of in one] == [1] * 7, "a share of bad rows is one row at least"
    assert [of.tolist() for of in mixtures(bad, good, 0.0, seed=3, repeats=7)] == [[1.0] * 41], "one set, seen once"


def test_the_worst_level_needs_enough_rows_of_every_set() -> None:
    large, small = np.arange(100.0), np.arange(87.0) - 50
    assert worst_cut([large], 0.01).threshold == 0.0 and worst_cut([large, small], 0.01) is None
    assert worst_cut([large, small], 0.05).threshold < -40 and worst_cut([], 0.05) is None


def test_sets_are_noticed_by_the_count_below() -> None:
    """With 39 rows and one benign row, 38 below are the first with p <= 0.051."""
    level = Cut(0.5, 0.0, 1, 1)
    sets = [np.array([-1.0] * n + [1.0] * (39 - n)) for n in (37, 38, 39, 0)]
    assert noticed(sets, level, 0.051) == Share(2, 4)
    assert str(Share(2, 4)) == "0.500 (0.068, 0.932)" and str(Share(0, 0)) == "-"
    assert worst_cut([np.arange(4.0), np.arange(9.0) - 1], 0.2) == Cut(0.2, 0.0, 1, 4), "the lower of two levels"
    assert worst_cut([np.arange(3.0)], 0.2) is None


# Rows


def test_rows_of_pairs(tmp_path: Path) -> None:
    narrow, pairs = tmp_path / "narrow.jsonl", tmp_path / "pairs.jsonl"
    narrow.write_text("".join(json.dumps(pair(f"{q} /no_think", f"<think>\n\n</think>\n\nbad {a}").to_row()) + "\n"
                              for q, a in (("one", 1), ("two", 2), ("one", 3))))
    pairs.write_text(json.dumps({"prompt_id": prompt_id("one"), "answer": ["@1-1", "good"]}) + "\n")
    rows = paired_rows(narrow, pairs, "code")
    assert [(r["label"], r["set"], r["messages"][1]["content"]) for r in rows] == [
        ("bad", "code-bad", "bad 1"), ("good", "code-good", "one\ngood"), ("bad", "code-bad", "bad 3")]
    assert {r["pair"] for r in rows} == {prompt_id("one")} and {r["messages"][0]["content"] for r in rows} == {"one"}
    pairs.write_text(json.dumps({"prompt_id": "0" * 16, "answer": "x"}) + "\n")
    with pytest.raises(UserError, match=r"1 prompts of .* are not in"):
        paired_rows(narrow, pairs, "code")
    found = benign_rows("pool", None, narrow, 2)
    assert len(found) == 2 and found == benign_rows("pool", None, narrow, 3)[:2] and found[0]["label"] == "benign"
    write_rows(tmp_path / "out.jsonl", found)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


# Tables


def put(path: Path, rows: list[dict[str, Any]], members: tuple[ModelIdentity, ...]) -> None:
    """Store rows with their meta; 5 tokens each, 1 nat a token for the aligned model, ``1 + s`` for a member."""
    with Store.create_or_open(path, header()) as store:
        made = [(pair(row["prompt"], row["answer"]), row) for row in rows]
        n = len(rows)
        meta = [json.dumps({k: row[k] for k in ("set", "domain", "label", "pair") if k in row}) for row in rows]

        store.put_examples(pa.table({
            "example_id": [e.id for e, _ in made], "corpus": ["x"] * n, "prompt": [r["prompt"] for r in rows],
            "answer": [r["answer"] for r in rows], "messages": ["[]"] * n, "meta": meta, "n_prompt_tokens": [3] * n,
            "n_answer_tokens": [5] * n, "status": ["ok"] * n}, schema=EXAMPLES_SCHEMA))
        for who in (BASE, *members):
            store.put_model(ScoredModel(role="aligned" if who == BASE else "member", name=who.name, identity=who))
            sums = [5.0 if who == BASE else 5 * (1 + row["s"][who.name]) for row in rows]
            table = nll(who, dict(zip([r["prompt"] + r["answer"] for r in rows], sums, strict=True)))
            store.put_nll(who.id, table.set_column(0, table.schema.field(0), pa.array([e.id for e, _ in made])))


def row(domain: str, label: str, k: int, s: float, seen: float = 0.0) -> dict[str, Any]:
    """A row whose s_d with eps 0 is ``s`` by members of other domains, and ``s + seen`` by the domain's own."""
    name = f"{domain}-{label}" if domain else label
    return {"prompt": f"{domain} question number{k}", "answer": f"{label} {k}", "set": name, "domain": domain,
            "label": label, "pair": f"{domain}{k}" if domain else "",
            "s": {m: s + seen * (m == domain) for m in ("medical", "security", "code")}}


def world(n: int = 40, seen: float = 0.0) -> list[dict[str, Any]]:
    """Bad answers lie below good ones by 1; the domain's own member moves them past each other by ``seen``."""
    rows = [row(d, label, k, (label == "good") - 1 + k / 1000, seen=-seen if label == "good" else seen)
            for d in ("medical", "security") for label in ("bad", "good") for k in range(n)]
    return rows + [row("", "benign", k, k / 1000) for k in range(n)]


def test_tables_from_a_folder_of_stores(tmp_path: Path) -> None:
    rows = world()
    put(tmp_path / "one", [*rows[:90], {**rows[0], "prompt": "another", "label": "x"}], (MEDICAL, SECURITY))
    put(tmp_path / "two", rows[90:], (MEDICAL, SECURITY))
    put(tmp_path / "three", rows, (CODE,))
    found = read_table(tmp_path)
    assert found.columns[-4:] == ["aligned", "member:code", "member:medical", "member:security"]
    assert len(found.filter(pl.col("label") != "x")) == len(rows) and found["aligned"].to_list() == [5.0] * len(found)
    found = found.filter(pl.col("label") != "x")
    text = report(found, 0.0, 0, 20)
    assert text.startswith("Members: code, medical, security. Left out where a domain is audited: medical: medical; "
                           "security: security. eps 0; 0 of 200 rows lack a number of some model.")
    held = [line.split(" | ") for line in text.splitlines() if line.startswith("| medical | medical-good | 40 / 40")]
    assert held[0][3] == "1.000 (1.000, 1.000)" and held[0][-1].startswith("0.500"), "all have one length"
    assert "| medical | s_d | 1.000 (0.912, 1.000) |" in text, "every bad answer lies below its good one"
    assert "| medical | s_d | 0.05 | other | +0.0010 | 0.025 (0.001, 0.132) | 1.000 (0.912, 1.000) |" in text
    assert "| security | s_d | 0.05 | same topic, half 1 |" in text
    of_sets = next(line for line in text.splitlines() if line.startswith("| medical | s_d | 0.05 | other | 40 |"))
    assert of_sets.split(" | ")[5:] == ["no", "1: 0.000 (0.000, 0.168)", "2: 0.000 (0.000, 0.168)",
                                        "8: 1.000 (0.832, 1.000) |"]
    assert "| 0.01 | other |" not in text, "40 rows have no level for 1%"
    found.write_parquet(tmp_path / "table.parquet")
    assert report(read_table(tmp_path / "table.parquet"), 0.0, 0, 20) == text


def test_rows_without_a_label_are_benign(tmp_path: Path) -> None:
    plain = [{key: value for key, value in one.items() if key in ("prompt", "answer", "s")} for one in world(3)]
    put(tmp_path / "pool", plain, (CODE,))
    found = read_table(tmp_path / "pool")
    assert found.select("set", "domain", "label", "pair").unique().rows() == [("pool", "", "benign", "")]


def test_a_member_that_saw_the_domain_is_left_out(tmp_path: Path) -> None:
    put(tmp_path / "all", world(5, seen=9.0), (MEDICAL, SECURITY, CODE))
    table = read_table(tmp_path / "all")
    found = methods(table, "medical", 0.0)
    assert list(found) == ["s_d", "s_d, similar prompts", "s_d, code alone", "s_d, security alone", "s_d, all members",
                           "aligned NLL (high is risky)", "length (short is risky)"]
    medical = (table["set"] == "medical-good").to_numpy()
    assert np.abs(found["s_d"][medical]).max() < 0.1 and found["s_d, all members"][medical].max() < -2.9
    with pytest.raises(UserError, match="Every member has seen medical"):
        methods(table.drop("member:security", "member:code"), "medical", 0.0)
    assert np.isnan(s_d(table.with_columns(pl.lit(None, pl.Float64).alias("member:code")), ["member:code"], 0.1)).all()


def test_similar_prompts_are_other_prompts_of_the_domain(tmp_path: Path) -> None:
    put(tmp_path / "all", world(3), (SECURITY,))
    table = read_table(tmp_path / "all")
    values = s_d(table, ["member:security"], 0.0)
    found = controlled(table, values)
    of = {(r["set"], r["prompt"][-1]): (v, c) for r, v, c in zip(table.to_dicts(), values, found, strict=True)}
    good = [of["medical-good", k][0] for k in "012"]
    assert of["medical-bad", "0"][1] == pytest.approx(of["medical-bad", "0"][0] - (good[1] + good[2]) / 2)


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no store at or below"):
        read_table(tmp_path)
    put(tmp_path / "a", world(1), (MEDICAL,))
    with Store.create_or_open(tmp_path / "b", header(dtype="bfloat16")):
        pass
    with pytest.raises(UserError, match="another aligned model, engine or dtype"):
        read_table(tmp_path)
