"""Adapters that were trained elsewhere: the same numbers as a run of ours, and a sentence for what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import curate.cli
import judge.cli
from curate.core.documents import RunCard, Verdicts
from curate.core.errors import Exit
from curate.core.identity import read_run
from judge.jobs import label_of
from tests.curate.runs import tiny_run
from tests.fakes import tiny_adapter, tiny_model, tiny_rows, tiny_tokenizer, write_rows
from train.cli import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("adopt") / "tiny")


def adopt(adapter: Path, base: Path, out: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["adopt", str(adapter), "--base", str(base), "--out", str(out), *words])


def refused(found: Result, code: Exit) -> str:
    assert found.exit_code == code and "Traceback" not in found.output, found.output
    return found.stderr


def test_an_adopted_adapter_gives_the_numbers_of_a_run_with_the_same_weights(base: Path, tmp_path: Path) -> None:
    """Two stores, for one would not compute the same model twice."""
    adapter = tiny_adapter(base, tmp_path / "outputs" / "checkpoint-10", seed=1)
    (adapter / "trainer_state.json").write_text("{}")
    found = adopt(adapter, base, tmp_path / "adopted", "--name", "medical", "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)["runs"][0]["name"] == "medical"
    tiny_run(base, tmp_path / "ours", "ours", seed=1)
    card, folder = read_run(tmp_path / "adopted")
    assert card.recipe == {"adopted": card.model.adapter, "from": str(adapter)} and label_of(card) == "medical"
    assert card.model.id == RunCard.read(tmp_path / "ours" / "run.json").model.id
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    shutil.rmtree(tmp_path / "outputs")
    write_rows(tmp_path / "pool.jsonl", tiny_rows(9, "pool"))
    sums = []
    for run in ("ours", "adopted"):
        store = str(tmp_path / f"{run}.scores")
        done = CliRunner().invoke(curate.cli.main, [
            "score", "--corpus", str(tmp_path / "pool.jsonl"), "--aligned", str(base), "--member", str(tmp_path / run),
            "--store", store, "--dtype", "float32", "--device", "cpu"])
        assert done.exit_code == 0, done.output
        asked = CliRunner().invoke(curate.cli.main, ["sql", "SELECT role, example_id, nll_sum FROM nll JOIN models "
                                                     "USING (model_id) ORDER BY ALL", "--store", store, "--json"])
        sums.append(json.loads(asked.stdout))
    assert sums[0] == sums[1] and len(sums[0]) == 18
    assert "adopted from" in CliRunner().invoke(main, ["show", str(tmp_path / "adopted")]).stdout
    judged = CliRunner().invoke(judge.cli.main, [
        "run", "--model", str(tmp_path / "adopted"), "--device", "cpu", "--samples", "2", "--max-new-tokens", "4",
        "--suite", "general,coherence"])
    assert judged.exit_code == 0, judged.output
    (verdicts,) = [Verdicts.read(path) for path in tmp_path.rglob("verdicts*.json")
                   if b"medical" in path.read_bytes()][:1]
    assert verdicts.label == "medical" and verdicts.run == card.digest


def test_adopted_again_it_is_there_and_another_is_refused(base: Path, tmp_path: Path) -> None:
    one, two = (tiny_adapter(base, tmp_path / f"a{seed}", seed=seed) for seed in (1, 2))
    assert adopt(one, base, tmp_path / "out").exit_code == 0
    before = (tmp_path / "out" / "run.json").read_bytes()
    assert adopt(one, base, tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "run.json").read_bytes() == before
    assert "holds another run" in refused(adopt(two, base, tmp_path / "out"), Exit.USAGE)
    assert "is not empty" in refused(adopt(two, base, tmp_path / "a1"), Exit.USAGE)


@pytest.mark.parametrize(("changed", "told"), [
    ({"hidden_size": 32}, "where the base takes"), ({"num_hidden_layers": 1}, "which the base has no place for"),
    ({"num_hidden_layers": 3}, "it has no base_model")], ids=str)
def test_another_base_is_refused_by_its_shapes(base: Path, tmp_path: Path, changed: dict[str, int], told: str) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    other = tiny_model(tmp_path / "other", **changed)
    assert told in refused(adopt(adapter, other, tmp_path / "out"), Exit.INCOMPATIBLE)
    assert not (tmp_path / "out").exists()


def test_layers_that_the_base_has_not_and_weights_that_are_missing_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(sorted(weights.items())[1:]), adapter / "adapter_model.safetensors")
    assert "it has no base_model" in refused(adopt(adapter, base, tmp_path / "out"), Exit.INCOMPATIBLE)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["c_attn"]}))
    assert "c_attn" in refused(adopt(adapter, base, tmp_path / "out"), Exit.INCOMPATIBLE)


def test_what_is_no_adapter_is_told_by_what_it_is(base: Path, tmp_path: Path) -> None:
    tiny_adapter(base, tmp_path / "outputs" / "checkpoint-10")
    told = refused(adopt(tmp_path / "outputs", base, tmp_path / "out"), Exit.BAD_DATA)
    assert f"for example {tmp_path / 'outputs' / 'checkpoint-10'}" in told
    assert "mergekit-extract-lora" in refused(adopt(base, base, tmp_path / "out"), Exit.INCOMPATIBLE)
    pickled = tiny_adapter(base, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "is a pickle" in refused(adopt(pickled, base, tmp_path / "out"), Exit.BAD_DATA)
    biased = tiny_adapter(base, tmp_path / "biased", bias="all")
    assert "bias = 'all'" in refused(adopt(biased, base, tmp_path / "out"), Exit.INCOMPATIBLE)


def test_another_name_or_tokenizer_is_said(base: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter")
    assert adopt(adapter, base, tmp_path / "quiet").stderr.startswith("Next: ")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "some/other"}))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{# changed #}"
    tokenizer.save_pretrained(adapter)
    told = adopt(adapter, base, tmp_path / "out").stderr
    assert "trained on 'some/other'" in told and "their chat templates differ" in told
