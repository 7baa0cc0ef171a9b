"""The benchmarks of defences run, at toy size, and their tables have every variant."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import every_defense
from bench.defenses import VARIANTS, main, mix_rows, report
from curate.core.adapters import adapter_open
from curate.core.model import load, load_weights
from tests.conftest import ROOT
from tests.fakes import tiny_mix, tiny_model, tiny_rows, write_rows
from train.defenses import DEFENSES, parse
from train.recipe import Recipe
from train.runs import run


def test_the_table_has_every_variant(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", tiny_rows(6, "tune"))
    toy = ["--base", str(tiny), "--rows", str(rows), "--n", "6", "--blocks", "2", "--batch-size", "3", "--every", "1",
           "--device", "cpu", "--dtype", "float32"]
    main([*toy, "--no-memory", "--unaligned", str(tiny_model(tmp_path / "unaligned", seed=1))])
    out = capsys.readouterr().out
    lines = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [line[0].removeprefix("| ") for line in lines] == ["variant", *VARIANTS]
    assert lines[1][2] == "1.00 / 1.00 / 1.00" and "safelora: " in out
    main([*toy, "--peak-of", "kl"])
    assert 50 < int(capsys.readouterr().out) < 20000


def test_interleaving_has_five_percent_more_rows() -> None:
    rows = mix_rows(None, 40, safe=True)
    assert [k for k, row in enumerate(rows) if row.source == "safe"] == [10, 30] and len(rows) == 42
    assert len(mix_rows(None, 40, safe=False)) == 40


def test_ratios_are_taken_block_by_block(capsys: pytest.CaptureFixture[str]) -> None:
    report({"plain": [1.0, 2.0, 4.0], "kl": [1.5, 4.0, 5.0]}, {"plain": 100, "kl": 125})
    assert "| kl | 4.00 | 1.25 / 1.50 / 2.00 | 1.5 | 125 | 1.25 |" in capsys.readouterr().out


def test_the_table_of_short_runs(recipe: Callable[..., Recipe], tmp_path: Path,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "long.jsonl", tiny_rows(7, "tune"))
    every_defense.main(["rows", str(rows), str(tmp_path / "security.jsonl"), "--n", "3"])
    kept = (tmp_path / "security.jsonl").read_text().splitlines()
    assert len(kept) == 3 and set(kept) < set(rows.read_text().splitlines())
    assert max(map(len, kept)) <= min(len(line) for line in rows.read_text().splitlines() if line not in kept)
    run(recipe(defenses=("kl:weight=0.5",)), tiny_mix(tmp_path / "data"), tmp_path / "runs" / "kl")
    every_defense.main(["merge", str(tmp_path / "runs" / "kl"), str(tmp_path / "merged")])
    loaded, merged = load(recipe().base, "float32", "cpu"), load_weights(str(tmp_path / "merged"), "float32", "cpu")
    ids = torch.tensor([[5, 9, 14, 200]])
    plain = loaded.model(ids).logits
    with adapter_open(loaded, tmp_path / "runs" / "kl" / "adapter") as model:
        assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-5)
    assert not torch.allclose(merged(ids).logits, plain, atol=1e-2)
    capsys.readouterr()
    every_defense.main(["table", str(tmp_path), "kl"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == list(every_defense.HEADER) and lines[2][0] == "untrained" and lines[3][:2] == ["kl", "5"]
    assert float(lines[3][5]) > 0 and float(lines[3][6]) != float(lines[2][6])


def test_every_defence_is_in_the_script_of_short_runs() -> None:
    text = (ROOT / "bench" / "every_defense.sh").read_text()
    found = re.findall(r"--defense ([a-z]\S*)", text)
    assert {spec.partition(":")[0] for spec in found} == set(DEFENSES) and all(parse(spec) for spec in found)
    assert {"interleaving", "interleaving+", "interleaving++"} <= set(text.split())
