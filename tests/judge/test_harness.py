"""MMLU and TruthfulQA through lm-eval: the command, its results as 0.4.13 writes them, what cannot be trusted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from curate.core.documents import Verdicts
from curate.core.errors import Exit, UserError
from judge.cli import main
from judge.jobs import Settings, Target, plan
from judge.run import judge_models
from judge.tasks import harness
from judge.tasks.harness import Call, command, evaluate, read

STAMP = "2026-01-02T03-04-05.678901"
SUBJECTS = {"mmlu_knots": [1.0, 0.0, 1.0], "mmlu_boats": [1.0, 1.0]}
"""Four of five are right, so the accuracy is 0.8, and the standard error sqrt(0.8 * 0.2 / 4) = 0.2."""


def sample(leaf: str, k: int, acc: object) -> dict[str, object]:
    return {"doc_id": k, "doc": {"question": f"{leaf} {k}?"}, "target": "0", "arguments": {}, "resps": [],
            "filtered_resps": [], "filter": "none", "metrics": ["acc"], "doc_hash": f"{k}" * 64, "prompt_hash": "p",
            "target_hash": "t", "acc": acc}


def write(out: Path, value: float = 0.8, change: Callable[[dict], None] = lambda body: None, missing: str = "") -> Path:
    """Write what lm-eval 0.4.13 leaves: a results file and a sample file a subject, in a folder named by the model."""
    folder = out / "__models__tiny"
    folder.mkdir(parents=True)
    entry = {"alias": "x", "name": "x", "acc,none": 0.5, "acc_stderr,none": 0.3}
    body = {"results": {"mmlu": {**entry, "acc,none": value, "acc_stderr,none": 0.2, "sample_count": {"acc,none": 5}},
                        "mmlu_stem": entry, "mmlu_other": entry, **{leaf: entry for leaf in SUBJECTS}},
            "groups": {}, "group_subtasks": {"mmlu": ["mmlu_stem", "mmlu_other"], "mmlu_stem": ["mmlu_knots"],
                                             "mmlu_other": ["mmlu_boats"]},
            "n-samples": {leaf: {"original": 100, "effective": len(accs)} for leaf, accs in SUBJECTS.items()},
            "lm_eval_version": "0.4.13"}
    change(body)
    (folder / f"results_{STAMP}.json").write_text(json.dumps(body))
    for leaf, accs in SUBJECTS.items():
        if leaf != missing:
            lines = [json.dumps(sample(leaf, k, acc)) for k, acc in enumerate(accs)]
            (folder / f"samples_{leaf}_{STAMP}.jsonl").write_text("\n".join(lines) + "\n")
    return out


def test_the_command_carries_everything_as_single_words() -> None:
    call = Call("truthfulqa", "id", "some/model@rev", Path("a,b=c/adapter"), "bfloat16", "cuda", 7, 4)
    words = command(call, Path("out"))
    assert words[:4] == [sys.executable, "-P", "-m", "lm_eval"]
    assert "--log_samples" in words
    options = {w: words[k + 1] for k, w in enumerate(words) if w.startswith("--") and w != "--log_samples"}
    assert json.loads(options.pop("--model_args")) == {"pretrained": "some/model", "revision": "rev",
                                                       "peft": "a,b=c/adapter", "dtype": "bfloat16",
                                                       "trust_remote_code": False}
    assert options == {"--model": "hf", "--tasks": "truthfulqa_mc1", "--device": "cuda", "--batch_size": "4",
                       "--seed": "0", "--output_path": "out", "--limit": "7"}


def test_a_folder_with_an_at_sign_is_no_revision(tmp_path: Path) -> None:
    (tmp_path / "m@1").mkdir()
    words = command(Call("mmlu", "id", str(tmp_path / "m@1")), Path("out"))
    assert json.loads(words[words.index("--model_args") + 1]) == {"pretrained": str(tmp_path / "m@1"), "dtype": "auto",
                                                                  "trust_remote_code": False}
    assert "--limit" not in words


def test_results_of_a_group_are_its_questions(tmp_path: Path) -> None:
    found = read(write(tmp_path), "mmlu")
    assert (found.value, found.stderr, found.n, found.version) == (0.8, 0.2, 5, "0.4.13")
    assert [(s.item, s.correct) for s in found.scores[:3]] == [
        (f"mmlu_knots/{k}/{str(k) * 12}", right) for k, right in enumerate((True, False, True))]
    assert {(s.task, s.tier, s.f1) for s in found.scores} == {("mmlu", 0, None)}
    assert len({s.item for s in found.scores}) == 5


def test_a_task_without_subjects_is_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / f"results_{STAMP}.json").write_text(json.dumps({
        "results": {"truthfulqa_mc1": {"acc,none": 1 / 3, "acc_stderr,none": "N/A"}}, "group_subtasks": {},
        "n-samples": {"truthfulqa_mc1": {"original": 817, "effective": 3}}}))
    lines = [json.dumps(sample("t", k, acc)) for k, acc in enumerate((0.0, 1.0, 0.0))]
    (folder / f"samples_truthfulqa_mc1_{STAMP}.jsonl").write_text("\n".join(lines))
    found = read(tmp_path, "truthfulqa")
    assert (found.n, found.stderr, found.version) == (3, None, "unknown")
    assert [s.correct for s in found.scores] == [False, True, False]


def drop(*keys: str) -> Callable[[dict], None]:
    def change(body: dict) -> None:
        for key in keys[:-1]:
            body = body[key]
        del body[keys[-1]]
    return change


@pytest.mark.parametrize(("how", "says"), [
    ({"value": 0.7}, "gives 0.7 for mmlu, but its 5 questions give 0.8"),
    ({"value": float("nan")}, "gives nan"),
    ({"change": drop("results", "mmlu")}, "KeyError 'mmlu'"),
    ({"change": drop("results", "mmlu", "acc,none")}, "KeyError 'acc,none'"),
    ({"change": drop("n-samples", "mmlu_knots")}, "KeyError 'mmlu_knots'"),
    ({"change": lambda body: body["n-samples"]["mmlu_knots"].update(effective=4)}, "3 samples and 4 were evaluated"),
    ({"change": lambda body: body.update(results=[])}, "no results file of lm-eval"),
    ({"missing": "mmlu_boats"}, "no results file of lm-eval"),
])
def test_what_does_not_add_up_is_refused(tmp_path: Path, how: dict[str, object], says: str) -> None:
    with pytest.raises(UserError) as caught:
        read(write(tmp_path, **how), "mmlu")
    assert says in caught.value.message and caught.value.exit_code == Exit.INTEGRITY


def test_a_question_without_a_score_is_no_zero(tmp_path: Path) -> None:
    path = write(tmp_path) / "__models__tiny" / f"samples_mmlu_knots_{STAMP}.jsonl"
    path.write_text(path.read_text().replace('"acc": 0.0', '"acc": null'))
    with pytest.raises(UserError, match=r"mmlu_knots, line 2 .*: no 'acc' of 0 or 1"):
        read(tmp_path, "mmlu")


def test_nothing_left_behind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="left no results"):
        read(tmp_path, "mmlu")


# The subprocess


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curate.core.errors.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="'lm_eval', which is not installed") as caught:
        evaluate(Call("mmlu", "id", "m"), tmp_path)
    assert "safeset[tasks]" in caught.value.hint and caught.value.exit_code == Exit.ENVIRONMENT


def test_a_finished_call_is_not_repeated_and_a_damaged_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def stand_in(words: list[str], task: str, out: Path) -> None:
        calls.append(task)
        write(out / f"{len(calls)}")

    monkeypatch.setattr(harness, "require", lambda module, extra: None)
    monkeypatch.setattr(harness, "_run", stand_in)
    first = evaluate(Call("mmlu", "id", "m"), tmp_path)
    assert evaluate(Call("mmlu", "id", "m"), tmp_path) == first and calls == ["mmlu"]
    evaluate(Call("mmlu", "id", "m", limit=3), tmp_path)
    assert calls == ["mmlu"] * 2, "another call, another folder"
    evaluate(Call("mmlu", "trained again", "m"), tmp_path)
    assert calls == ["mmlu"] * 3, "another model under the same path"
    for path in tmp_path.rglob("samples_mmlu_boats*"):
        path.unlink()
    assert evaluate(Call("mmlu", "id", "m"), tmp_path) == first and calls == ["mmlu"] * 4


def test_a_failed_subprocess_says_its_last_line_and_where_the_rest_is(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import sys; print('data set not found\\n'); sys.exit(3)"]
    with pytest.raises(UserError, match="status 3 on mmlu: data set not found") as caught:
        harness._run(words, "mmlu", tmp_path / "x")
    assert "log.txt" in caught.value.hint and caught.value.exit_code == Exit.REMOTE


def test_a_run_asks_the_judged_model_itself(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Call, Path]] = []

    def stand_in(call: Call, folder: Path) -> harness.Result:
        asked.append((call, folder))
        return read(write(tmp_path / f"{len(asked)}"), "mmlu")

    monkeypatch.setattr(harness, "evaluate", stand_in)
    settings = Settings(suite=("benign",), tasks=("mmlu",), device="cpu", dtype="float32", lm_eval_limit=9)
    found = Verdicts.read(judge_models([Target(str(base))], settings, tmp_path / "v")[0])
    assert asked == [(Call("mmlu", found.model.id, str(base), None, "float32", "cpu", 9),
                      tmp_path / "v" / "base.verdicts.lm-eval")]
    assert found.statuses == {"tasks ok": 5} and sum(t.correct for t in found.tasks) == 4
    assert found.settings["lm_eval"] == {"tasks": ["mmlu"], "limit": 9} and found.settings["opswap"] is None


def test_tasks_are_checked_before_any_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Unknown benign task 'mmul'") as caught:
        plan([Target("m")], Settings(tasks=("mmul",)), tmp_path)
    assert "mmlu" in caught.value.hint
    result = CliRunner().invoke(main, ["run", "--model", "m", "--task", "opswap,x"], standalone_mode=False)
    assert isinstance(result.exception, UserError) and "'x'" in result.exception.message
    words = ["run", "--model", "m", "--task", "foqa", "--suite", "general"]
    result = CliRunner().invoke(main, words, standalone_mode=False)
    assert isinstance(result.exception, UserError) and "--task was given" in result.exception.message
