"""The ensemble: one member per narrow data set, in a document that scoring can read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from curate.core.documents import EnsembleSpec, MixManifest
from curate.core.errors import Exit, UserError
from curate.core.identity import read_run
from curate.core.sources import file_source
from curate.select import placed
from tests.fakes import tiny_rows, write_rows
from train.ensemble import train_ensemble
from train.jobs import narrow_source
from train.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


def test_members_are_trained_named_and_skipped(recipe: MakeRecipe, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny_rows(5, "bad")
    one = write_rows(tmp_path / "one.jsonl", [*rows, *rows[:2]])
    other = write_rows(tmp_path / "other.jsonl", tiny_rows(4, "worse"))
    narrow = dict(narrow_source(str(path), tmp_path) for path in (one, other))
    spec = train_ensemble(recipe(), narrow, tmp_path / "ens", tmp_path)
    assert "one: 2 exact duplicates dropped, 5 rows left." in capsys.readouterr().err
    assert EnsembleSpec.read(tmp_path / "ens" / "ensemble.json") == spec
    assert [(m.name, m.run) for m in spec.members] == [("one", "one/run.json"), ("other", "other/run.json")]
    for member in spec.members:
        card, _ = read_run(tmp_path / "ens" / member.run)
        assert card.digest == member.digest and card.method.strategy == "none" and card.n_safe == 0
    manifest = MixManifest.read(tmp_path / "ens" / "one" / "mix.json")
    assert manifest.counts == {"corpus": 0, "selected": 0, "finetune": 5, "finetune_duplicates": 2}
    assert list(manifest.order) == placed([row.id for row in rows], [], 0, "even"), "as `curate select` would"
    assert manifest.sources["finetune"].name == "one.jsonl"
    assert train_ensemble(recipe(), narrow, tmp_path / "ens", tmp_path) == spec
    assert capsys.readouterr().err.count("is finished") == 2
    write_rows(one, rows)
    with pytest.raises(UserError, match="was made from other rows") as caught:
        train_ensemble(recipe(), {"one": file_source(one, tmp_path)}, tmp_path / "ens", tmp_path)
    assert "--overwrite" in caught.value.hint
    assert read_run(tmp_path / "ens" / "one")[0].digest == spec.members[0].digest


def test_everything_is_checked_before_the_first_member_is_trained(recipe: MakeRecipe, tmp_path: Path) -> None:
    good = file_source(write_rows(tmp_path / "good.jsonl", tiny_rows(2, "bad")), tmp_path)
    bad = write_rows(tmp_path / "bad.jsonl", tiny_rows(2, "bad"))
    bad.write_text(bad.read_text() + "{}\n")
    with pytest.raises(UserError, match=r"bad.jsonl, line 3") as caught:
        train_ensemble(recipe(), {"good": good, "bad": file_source(bad, tmp_path)}, tmp_path / "ens", tmp_path)
    assert caught.value.exit_code == Exit.BAD_DATA
    assert not (tmp_path / "ens").exists()


def test_narrow_names(tmp_path: Path) -> None:
    assert narrow_source("demo/cooking", tmp_path)[0] == "cooking"
    for text, message in (("demo/coking", "Unknown narrow data set 'demo/coking'"), ("demo", "Unknown narrow"),
                          (str(tmp_path / "none.jsonl"), "There is no file")):
        with pytest.raises(UserError, match=message):
            narrow_source(text, tmp_path)
    outside = write_rows(tmp_path / "x.jsonl", tiny_rows(1, "bad"))
    with pytest.raises(UserError, match="is not below") as caught:
        narrow_source(str(outside), tmp_path / "elsewhere")
    assert "--root" in caught.value.hint
