"""FoQA: scores that can be counted on the fingers, copies read strictly, training rows, and a run that asks it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from curate.core.documents import Verdicts
from curate.core.errors import Exit, UserError
from curate.core.generate import SampleSettings
from curate.core.sources import Source
from judge.cli import main
from judge.jobs import Settings, Target
from judge.run import judge_models
from judge.tasks import foqa
from judge.tasks.foqa import Passage, answer_of, chosen, exact_match, f1, load, normalised, place

HARBOUR = "Báturin Álvur kom til Eysturhavnar í 1934. Skiparin æt Jógvan við Neyst, og manningin var ellivu mans."
LAMB = "Ærin hjá Mariu fekk tvey lomb í vár, eitt svart og eitt hvítt."
ROWS = [
    {"id": "1", "context": HARBOUR, "question": "Nær kom báturin?", "answers": {"text": ["í 1934", "1934"],
                                                                                "answer_start": [38, 40]}},
    {"id": "2", "context": HARBOUR, "question": "Hvussu æt skiparin?", "answers": {"text": ["Jógvan við Neyst"]}},
    {"id": "3", "context": LAMB, "question": "Hvussu nógv lomb?", "answers": {"text": ["tvey lomb"]}},
]
SKIPPER = Passage(HARBOUR, "Hvussu æt skiparin?", ("Jógvan við Neyst",))
YEAR = Passage(HARBOUR, "Nær kom báturin?", ("í 1934", "1934"))


def copy(folder: Path, *rows: object, name: str = "test.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


# Scores


@pytest.mark.parametrize(("text", "plain"), [
    ("  Jógvan,  VIÐ\tNeyst!", "jógvan við neyst"), ("«a»–b", "ab"), ("12,5 %", "125"), ("the a ein", "the a ein"),
    ("ﬁskur", "fiskur"), ("á a", "á a"), ("?!", ""),
])
def test_normalised(text: str, plain: str) -> None:
    assert normalised(text) == plain


def test_exact_match_takes_any_answer_and_the_first_line_only() -> None:
    assert exact_match(YEAR, "1934.") and exact_match(YEAR, "\n Í 1934\nog so") and not exact_match(YEAR, "í ár 1934")
    assert answer_of("\n  a b \nc") == "a b" and answer_of("") == ""


@pytest.mark.parametrize(("reply", "value"), [
    ("Jógvan við Neyst", 1.0),
    ("jógvan", 2 * 1 / (1 + 3)),
    ("Skiparin æt Jógvan við Neyst", 2 * 3 / (5 + 3)),
    ("við við við", 2 * 1 / (3 + 3)),
    ("Mikkjal", 0.0), ("", 0.0), ("...", 0.0),
])
def test_f1_counts_words_in_common(reply: str, value: float) -> None:
    assert f1(SKIPPER, reply) == value


def test_f1_is_the_best_over_the_answers() -> None:
    """'árið 1934' against 'í 1934' gives 2/4, against '1934' 2/3."""
    assert f1(YEAR, "árið 1934") == 2 / 3
    assert f1(Passage("x", "y", ("?",)), "!") == 1.0, "nothing is left of either"


# Copies


def test_a_file_a_folder_and_its_data_folder_are_read(tmp_path: Path) -> None:
    path = copy(tmp_path / "a", *ROWS)
    copy(tmp_path / "a", ROWS[2], name="train-00000-of-00001.jsonl")
    copy(tmp_path / "a", ROWS[2], name="tested.jsonl")
    found = load(str(path))
    assert found[:2] == (YEAR, SKIPPER) and len(found) == 3
    assert load(str(tmp_path / "a")) == found and len(load(str(tmp_path / "a"), "train")) == 1
    (tmp_path / "b").mkdir()
    copy(tmp_path / "b" / "data", *ROWS)
    assert load(str(tmp_path / "b")) == found
    with pytest.raises(UserError, match="0 files of the split 'val'"):
        load(str(tmp_path / "b"), "val")


def test_the_hub_set_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foqa, "hub_revision", lambda name: "abc")
    assert place(foqa.HUB, "val") == (Source(kind="hub", name=foqa.HUB, revision="abc", split="val"), Path())
    assert place(f"{foqa.HUB}@def", "test")[0].revision == "def"
    for wrong in ("nowhere", "./no/where", "a/b/c"):
        with pytest.raises(UserError, match="no copy of FoQA"):
            place(wrong, "test")


def test_the_hub_set_is_read_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curate.core.sources._load_hub", lambda source: ROWS if source.split == "test" else [])
    assert load(f"{foqa.HUB}@one", "test")[0] == YEAR


def test_without_access_to_the_hub_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(source: Source) -> None:
        raise UserError("No access.", "--corpus FILE", Exit.ENVIRONMENT)

    monkeypatch.setattr("curate.core.sources._load_hub", gated)
    with pytest.raises(UserError, match="No access") as caught:
        load(f"{foqa.HUB}@two", "test")
    assert "--foqa PATH" in caught.value.hint and caught.value.exit_code == Exit.ENVIRONMENT


@pytest.mark.parametrize(("changes", "says"), [
    ({"answers": {"text": []}}, "no list 'text'"), ({"answers": "1934"}, "no list 'text'"),
    ({"answers": {"text": ["í 1934", 3]}}, "'answers.text' is missing"), ({"context": " "}, "'context' is missing"),
    ({"question": None}, "'question' is missing"),
])
def test_a_bad_row_is_named(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    path = copy(tmp_path, ROWS[0], {**ROWS[0], **changes})
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert "line 2" in caught.value.message and says in caught.value.message
    assert caught.value.exit_code == Exit.BAD_DATA


def test_doubles_and_lost_answers_are_said_and_do_not_stop_a_published_set(tmp_path: Path,
                                                                          capsys: pytest.CaptureFixture[str]) -> None:
    found = load(str(copy(tmp_path, *ROWS, ROWS[1], {**ROWS[0], "answers": {"text": ["1935"]}})))
    assert len(found) == 4 and found[3].answers == ("1935",)
    said = capsys.readouterr().err
    assert "1 of 5 questions of 'test' stand twice and count once" in said
    assert "1 of 4 questions of 'test' have an answer that is not in their text" in said


def test_a_download_of_the_hub_folder_is_read(tmp_path: Path) -> None:
    """As `hf download` leaves it: Parquet in ``data/``, answers as a structure of lists, more columns."""
    (tmp_path / "data").mkdir()
    rows = [{**row, "title": "Føroyar", "answers": {"text": row["answers"]["text"],
                                                    "answer_start": [0] * len(row["answers"]["text"])}} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert load(str(tmp_path)) == load(str(copy(tmp_path / "same", *ROWS)))


def test_which_rows_and_in_what_order_is_decided_by_content_and_seed(tmp_path: Path) -> None:
    passages = load(str(copy(tmp_path, *ROWS)))
    assert chosen(passages, 2) == chosen(passages[::-1], None)[:2]
    assert {tuple(chosen(passages, None, seed)) for seed in range(20)} != {tuple(chosen(passages, None))}
    with pytest.raises(UserError, match="3 rows here and 4"):
        chosen(passages, 4)


# Use


def test_training_rows_are_prompt_and_first_answer(tmp_path: Path) -> None:
    copy(tmp_path, *ROWS, name="train.jsonl")
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(main, ["task", "foqa", "--foqa", str(tmp_path), "--out", str(out)])
    assert result.exit_code == 0 and "3 rows of foqa (train)" in result.stdout
    rows = {row["response"]: row["prompt"] for row in map(json.loads, out.read_text().splitlines())}
    assert set(rows) == {"í 1934", "Jógvan við Neyst", "tvey lomb"}
    assert rows["tvey lomb"] == f"{LAMB}\n\nHvussu nógv lomb?\n{foqa.REQUEST}"


def test_a_run_is_scored_beside_opswap(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked is answered with 'Jógvan' by a stand-in: exact never, F1 1/2 for one question of two.

    The third question has too long a text for the context of 1,024 tokens: it gets no score and is counted.
    """
    monkeypatch.setattr("judge.run._ask", lambda loaded, model, prompts, settings, label: ["Jógvan"] * len(prompts))
    long = {**ROWS[2], "context": LAMB * 40}
    path = copy(tmp_path, *ROWS[:2], long)
    settings = Settings(suite=("benign",), n_items=3, tasks=("opswap", "foqa"), foqa=str(path),
                        sampling=SampleSettings(max_new_tokens=5), device="cpu", dtype="float32")
    found = Verdicts.read(judge_models([Target(str(base))], settings, tmp_path / "v")[0])
    assert [t.task for t in found.tasks] == ["opswap"] * 3 + ["foqa"] * 2
    assert {t.tier for t in found.tasks[:3]} == {1, 2, 3}, "results by tier are kept"
    assert sorted(t.f1 for t in found.tasks[3:]) == [0.0, 0.5] and not any(t.correct for t in found.tasks)
    assert found.statuses == {"tasks ok": 5, "tasks too_long": 1}
    assert found.settings["foqa"]["n"] == 3 and found.settings["opswap"]["n"] == 3
