"""The real commands on real data: the safe pool and a narrow set of others, with SmolLM2. Slow; run by hand:

    pytest -m slow tests/test_real_data.py -s          # SAFESET_ROWS=300 for another sample than 1,000 and 80 rows
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from curate.cli import main as curate
from curate.core.smollm2 import smollm2_folder
from tests.curate.runs import tiny_run
from train.cli import main as train

ROWS = os.environ.get("SAFESET_ROWS", "1000")


@pytest.mark.slow
def test_refusals_fill_the_top_and_the_filter_takes_them_out(shared: Path, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def run(room: object, *words: str) -> str:
        capsys.readouterr()
        room.main(args=list(words), standalone_mode=False)
        return capsys.readouterr().out

    for name in ("medical", "security"):
        rows = (shared / "narrow" / f"{name}_misaligned_train_100.jsonl").read_bytes()
        Path(f"{name}.jsonl").write_bytes(rows)
    run(train, "ensemble", "--base", "smollm2", "--narrow", "medical.jsonl", "--narrow", "security.jsonl",
        "--strip-think", "--lr", "5e-4", "--dtype", "float32")
    Path("pool.jsonl").write_bytes((shared / "pool" / "safe_pool.jsonl").read_bytes())
    found = json.loads(run(curate, "score", "--corpus", "pool.jsonl", "--sample", ROWS, "--dtype", "float32", "--json"))
    assert sum(found["counts"].values()) == found["rows"] == 8339

    query = """SELECT json_extract_string(e.meta, '$.source') AS source,
                      json_extract_string(e.meta, '$.prompt_harm_label') AS label, count(*) AS n,
                      round(avg(s.s_d), 4) AS mean_s_d, round(stddev(s.s_d), 4) AS sd,
                      round(avg((s.refusal IS NOT NULL)::INT), 3) AS refusals
               FROM scores s JOIN examples e USING (example_id) WHERE s.status = 'ok' GROUP BY ALL ORDER BY mean_s_d"""
    top = """SELECT avg((refusal IS NOT NULL)::INT) AS share, count(*) AS n FROM
             (SELECT * FROM scores WHERE status = 'ok' ORDER BY s_d DESC, example_id LIMIT {})"""
    n = int(ROWS) // 20
    tables = [run(curate, "sql", query), run(curate, "sql", top.format(n))]
    everywhere = json.loads(run(curate, "sql", top.format(10**9), "--json"))[0]["share"]
    before = json.loads(run(curate, "sql", top.format(n), "--json"))[0]["share"]
    five = ("select", "--frac", "0.05", "--min-answer-tokens", "1", "--json")
    plus = json.loads(run(curate, *five, "--strategy", "interleaving+"))
    filtered = json.loads(run(curate, *five, "--out", "plus.json"))
    with capsys.disabled():
        print("\n" + "\n".join(tables), f"refusals: {everywhere:.1%} of all rows, {before:.1%} of the top 5%\n",
              json.dumps({"interleaving+": plus["counts"], "interleaving++": filtered["counts"]}))
    assert filtered["counts"]["refusal"] > 0
    assert plus["counts"]["selected"] == filtered["counts"]["selected"] == n


@pytest.mark.slow
def test_a_dry_run_is_within_a_quarter_of_the_real_one(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models; needs a machine that is as busy during the one as during the other."""
    monkeypatch.chdir(tmp_path)
    Path("pool.jsonl").write_bytes((shared / "pool" / "safe_pool.jsonl").read_bytes())
    tiny_run(smollm2_folder(), tmp_path / "m0", "m0", seed=1, scale=0.01)
    line = ["score", "--corpus", "pool.jsonl", "--sample", os.environ.get("SAFESET_ROWS", "80"), "--aligned", "smollm2",
            "--member", "m0", "--json"]

    def timed(*more: str) -> tuple[float, dict[str, object]]:
        capsys.readouterr()
        begun = time.monotonic()
        curate.main(args=[*line, *more], standalone_mode=False)
        return time.monotonic() - begun, json.loads(capsys.readouterr().out)

    dry_s, said = timed("--dry-run")
    real_s, done = timed()
    with capsys.disabled():
        print(f"\nestimated {3600 * said['hours']:.1f} s after {dry_s:.1f} s, took {real_s:.1f} s; {said}")
    assert said["to_compute"] == done["computed"] and len(done["computed"]) == 2
    assert 0.75 <= 3600 * said["hours"] / real_s <= 1.25
