"""The benchmarks of scoring at scale run, at toy size, and count what they say they count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bench import stages
from bench.gpu import MEMBERS, build, needed
from curate.core.chat import Encoded
from curate.core.documents import MixManifest
from tests.conftest import ROOT
from tests.fakes import tiny_model

ALONE = """
import sys
sys.modules.update(dict.fromkeys(["polars", "duckdb", "openai", "pydantic", "click", "datasets"]))
from bench.gpu import main
main(sys.argv[1:])
"""


def test_the_gpu_benchmark_needs_four_packages_only(tmp_path: Path) -> None:
    words = [f"row {k} " + "and " * (k % 5) for k in range(40)]
    table = pa.table({"prompt": words, "response": words[::-1], "source": ["x"] * 40})
    pq.write_table(table, tmp_path / "rows.parquet")
    toy = ["--rows", str(tmp_path / "rows.parquet"), "--n", "13", "--shape", "toy", "--device", "cpu", "--dtype",
           "float32", "--ceiling-size", "64", "--capacity", "64", "--vocabularies", "31", "97"]
    done = subprocess.run([sys.executable, "-c", ALONE, *toy], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("\n")[0])
    assert found["rows"] == 13 and found["tokens"] > found["positions"] > 13
    assert [one["name"] for one in found["passes"]] == ["aligned", *MEMBERS]
    assert all(one["mfu"] > 0 and one["peak_bytes"] is None for one in found["passes"])
    assert [one["vocabulary"] for one in found["vocabularies"]] == [31, 97]
    assert found["vocabularies"][1]["weights_bytes"] - found["vocabularies"][0]["weights_bytes"] == 66 * 2 * 16 * 4


def test_operations_are_counted_by_hand() -> None:
    model = build("toy", None, "cpu", torch.float32)
    q_o, k_v, mlp = 2 * 16 * 16, 2 * 16 * 8, 3 * 16 * 24
    weights = 2 * (q_o + k_v + mlp)
    row = Encoded((1, 2, 3, 4, 5), 2, 4)  # two, two, and an end of turn: four positions are computed
    operations, positions = needed(model, [row], 64)
    assert positions == 4
    assert operations == 2 * weights * 4 + 4 * 16 * 2 * (1 + 2 + 3 + 4) + 2 * 16 * 307 * 3


def test_the_stages_from_rows_to_a_selection_run_at_toy_size(tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_model(tmp_path / "tiny"))
    stages.make(tmp_path, 300)
    for _, stage in stages.STAGES.values():
        stage(tmp_path, model)
        assert all(reading > 0 for reading in json.loads(capsys.readouterr().out))
    manifest = MixManifest.read(tmp_path / "manifest.json")
    assert (manifest.counts["corpus"], manifest.counts["selected"]) == (300, 15)
    assert len((tmp_path / "mix.jsonl").read_text().splitlines()) == 15


def test_the_slope_is_that_of_processor_time_over_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    readings = ([5.0, 1.0, 1.0], [6.0, 3.0, 1.0], [9.0, 9.0, 1.0])
    stages.report((10, 100, 300), [dict.fromkeys(stages.STAGES, one) for one in readings])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(stages.STAGES) and all(line.count("|") == 6 for line in table)
    assert all(line.endswith("| 9.0 s (9.0 s), 1.00 GiB | 1.00 |") for line in table[2:])
