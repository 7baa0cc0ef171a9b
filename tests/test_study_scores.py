"""The study's scores: published without text, choosable from without a model, and the tables that are made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.study.evidence import ROWS, evidence, main, restore, write
from bench.study.scores import page
from curate.corpora import open_corpus
from curate.job import ScoreJob
from curate.score import ensemble_members, score
from curate.select import Choice, build_manifest
from curate.store import Store
from tests.conftest import ROOT
from tests.curate.faults import prepare

STUDY = ROOT / "docs" / "study"


def test_a_choice_can_be_made_from_published_numbers_and_the_pool(tmp_path: Path) -> None:
    """No member is opened: their numbers come from the file, which holds no text."""
    prepare(tmp_path)
    corpus = open_corpus(str(tmp_path / "pool.jsonl"))

    def chosen(store: Path) -> list[str]:
        return build_manifest(Store.open_read(store), Choice(n=7, min_answer_tokens=1), tmp_path)[0].ids("safe")

    members = ensemble_members(tmp_path / "ensemble" / "ensemble.json")[1]
    one, two = (ScoreJob([corpus], tmp_path / name, str(tmp_path / "tiny"), few, dtype="float32", device="cpu")
                for name, few in (("one", members), ("two", ())))
    n_rows = score(one).n_rows
    found = write(tmp_path / "one", tmp_path / "evidence.parquet")
    assert found.height == n_rows and found.columns == [*ROWS, "aligned", "m0", "m1"], "and no column of texts"
    assert restore(tmp_path / "evidence.parquet", tmp_path / "two") == 3 * n_rows
    again = score(two)
    assert (again.n_rows, again.models, again.left) == (n_rows, {}, 0), "nothing was left to compute"
    assert evidence(tmp_path / "two").equals(found) and Store.audit(tmp_path / "two")[0] == []
    assert chosen(tmp_path / "two") == chosen(tmp_path / "one")


def test_what_restore_says_to_do_next_names_the_aligned_model(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without an ensemble, `curate score` must be told it."""
    monkeypatch.setattr("sys.argv", ["evidence", "restore", str(STUDY / "scores.parquet"), str(tmp_path / "scores")])
    main()
    assert f"--store {tmp_path / 'scores'} --aligned smollm2 --dtype bfloat16\n" in capsys.readouterr().out


def test_the_page_of_tables_is_made_of_the_published_numbers() -> None:
    assert (STUDY / "score-tables.md").read_text(encoding="utf-8") == page(evidence(STUDY / "scores.parquet")) + "\n"


def test_the_study_quotes_its_tables_as_they_are() -> None:
    said = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    said = said[said.index("## Results: what s_d"):said.index("**Does it depend on")]
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    assert len(rows) > 30 and set(rows) <= set(page(evidence(STUDY / "scores.parquet")).splitlines())
