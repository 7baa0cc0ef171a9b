"""A manifest, read back: by `curate verify`, by `curate export` and as training reads it, all of them the same way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from curate.cli import main
from curate.core.documents import MixManifest
from curate.core.errors import Exit, UserError
from curate.export import rows as exported
from curate.verify import verify_manifest
from tests.fakes import tiny_mix, tiny_model, tiny_rows, write_rows
from train.data import load_mix


def changed(manifest: MixManifest, **fields: object) -> MixManifest:
    source = manifest.sources["safe"].model_copy(update=fields)
    return manifest.model_copy(update={"sources": {**manifest.sources, "safe": source}})


def test_a_pool_with_a_bad_row_goes_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> dict[str, object]:
        main(args=[*words, "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    pool = write_rows(Path("pool.jsonl"), tiny_rows(9, "pool"))
    pool.write_text("no JSON\n" + pool.read_text())
    run("score", "--corpus", "pool.jsonl", "--aligned", str(tiny_model(Path("model"))), "--max-bad", "0.2")
    selected = run("select", "--strategy", "interleaving", "--n", "3", "--min-answer-tokens", "1")
    assert run("verify", "manifest.json")["ok"]
    assert run("export", "manifest.json", "--out", "mix.jsonl") == {
        "out": "mix.jsonl", "rows": 3, "manifest": "manifest.json", "digest": selected["digest"]}
    manifest = MixManifest.read(Path("manifest.json"))
    ids = [row.example.id for row in load_mix(manifest, Path())]
    assert [json.loads(line)["example_id"] for line in Path("mix.jsonl").read_text().splitlines()] == ids
    assert manifest.ids("safe") == ids


def test_a_row_that_is_in_no_source_is_noticed(tmp_path: Path) -> None:
    path = tiny_mix(tmp_path, n_finetune=2, n_safe=1)
    manifest = MixManifest.read(path)
    manifest.model_copy(update={"order": (*manifest.order, "safe/" + "f" * 32)}).write(path)
    assert verify_manifest(path, tmp_path).problems == (f"safe/{'f' * 32} is in no row of safe.jsonl",)
    with pytest.raises(UserError, match="in none of its sources") as caught:
        list(exported(MixManifest.read(path), tmp_path))
    assert caught.value.exit_code == Exit.INTEGRITY


def test_a_source_that_is_not_pinned_is_a_problem_before_training(tmp_path: Path) -> None:
    path = tiny_mix(tmp_path, n_finetune=2, n_safe=1)
    manifest = changed(MixManifest.read(path), kind="hub", name="a/b", sha256=None)
    manifest.write(path)
    (problem,) = verify_manifest(path, tmp_path).problems
    assert problem.startswith("safe: ") and "has no revision" in problem
    with pytest.raises(UserError, match="has no revision") as caught:
        load_mix(manifest, tmp_path)
    assert caught.value.hint.startswith("Score it again, online")
