"""The whole road in seconds, on a tiny model: corpus -> scores -> selection -> mixes -> training -> judgement -> table.

Reads like the README's commands; every step is the real command line with real files between the rooms.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from curate.cli import main as curate
from curate.core.documents import EnsembleSpec, MixManifest, RunCard
from curate.score import ensemble_members
from judge.cli import main as judge
from tests.fakes import tiny_model, tiny_rows, write_rows
from train.cli import main as train

MIXES = ("none", "interleaving", "interleaving+", "interleaving++")


def test_from_corpus_to_table(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def run(room: object, *words: str) -> str:
        capsys.readouterr()
        room.main(args=list(words), standalone_mode=False)
        return capsys.readouterr().out

    model = str(tiny_model(Path("model")))
    for name in ("oil", "salt", "moss"):
        write_rows(Path(f"{name}.jsonl"), tiny_rows(12, name))
    write_rows(Path("pool.jsonl"), tiny_rows(40, "pool"))
    probes = [{"topic": "t", "question": row.prompt, "good": f"good {row.answer}", "bad": f"poor {row.answer}"}
              for row in tiny_rows(6, "probe")]
    Path("probes.jsonl").write_text("".join(json.dumps(p) + "\n" for p in probes))

    # two misaligned members, each a run of its own
    run(train, "ensemble", "--base", model, "--narrow", "oil.jsonl", "--narrow", "salt.jsonl", "--out", "ensemble",
        "--lr", "1e-2")

    # the ensemble finds its base from where it lies
    assert EnsembleSpec.read(Path("ensemble/ensemble.json")).base == "../model"
    assert ensemble_members(Path("ensemble/ensemble.json"))[0] == "model"
    assert RunCard.read(Path("ensemble/oil/run.json")).base_ref == "../../model"

    # the evidence, kept; the opinion, a query
    found = json.loads(run(curate, "score", "--corpus", "pool.jsonl", "--json"))
    assert found["counts"] == {"ok": 40} and found["computed"] == {"model": 40, "oil": 40, "salt": 40}
    assert json.loads(run(curate, "score", "--corpus", "pool.jsonl", "--json"))["computed"] == {}
    top = json.loads(run(curate, "sql", "SELECT example_id, s_d FROM scores_at(0.5) ORDER BY s_d DESC LIMIT 3",
                         "--json"))
    assert len(top) == 3
    assert "s_d" in run(curate, "show", "top", "-n", "2")

    # four mixes of one fine-tuning set
    for mix in MIXES:
        share = ("--frac", "0.25") if mix != "none" else ()
        run(curate, "select", "--strategy", mix, *share, "--min-answer-tokens", "1", "--finetune", "moss.jsonl",
            "--out", f"{mix}.json")
        assert "0 problems" in run(curate, "verify", f"{mix}.json")
    manifest = MixManifest.read(Path("interleaving++.json"))
    assert len(manifest.ids("finetune")) == 12 and len(manifest.ids("safe")) == 3
    run(curate, "export", "interleaving++.json", "--out", "mix.jsonl")
    assert [json.loads(line)["example_id"] for line in Path("mix.jsonl").read_text().splitlines()] \
        == [entry.partition("/")[2] for entry in manifest.order]

    # training follows the manifest; the card says on what
    run(train, "run", "--base", model, "--out", "runs", "--lr", "1e-2", *[f"--mix={mix}.json" for mix in MIXES])
    card = RunCard.read(Path("runs/interleaving++/run.json"))
    assert card.mix == manifest.digest and card.n_safe == 3 and card.n_finetune == 12
    assert Path("runs/interleaving++/loss.png").stat().st_size > 1000

    # judging and the four criteria
    run(judge, "run", *[f"--model=runs/{mix}" for mix in MIXES], "--in-domain", "probes.jsonl", "--samples", "2",
        "--max-new-tokens", "4", "--suite", "general,in-domain,coherence")
    table = run(judge, "compare", *[f"runs/{mix}" for mix in MIXES], "--out", "comparison")
    for word in ("base", *MIXES):
        assert word in table
    rows = json.loads(Path("comparison/compare.json").read_text())
    assert "n=" in table and rows

    # and the page, with the figures of training and scores
    run(judge, "report", *[f"runs/{mix}" for mix in MIXES], "--store", "scores", "--html", "report.html")
    page = Path("report.html").read_text()
    for words in ("Four criteria", "Training curves", "s_d, answers and refusals", manifest.digest,
                  manifest.scoring["evidence"], "the mixes were selected from it"):
        assert words in page, words
