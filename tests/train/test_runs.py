"""Runs as folders: what is written, what is skipped, and what survives a kill."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from curate.core.documents import RunCard
from curate.core.errors import Exit, UserError
from curate.core.identity import read_run
from tests.fakes import tiny_mix, tiny_model
from tests.forked import Forked, command
from train import checkpoints, defenses, runs
from train.data import MixRow
from train.defenses import Defense
from train.jobs import prepare, prepare_all
from train.recipe import Recipe
from train.runs import run, run_jobs

MakeRecipe = Callable[..., Recipe]
WEIGHTS = "adapter/adapter_model.safetensors"
RESULTS = (WEIGHTS, "adapter/adapter_config.json", "losses.csv", "loss.png", "mix.json")


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mix(tmp_path_factory.mktemp("mix"))


@pytest.fixture(scope="module")
def whole(mix: Path, recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of an uninterrupted run with these knobs, trained once."""
    done: dict[str, Path] = {}

    def make(**knobs: Any) -> Path:
        if repr(knobs) not in done:
            done[repr(knobs)] = tmp_path_factory.mktemp("whole") / "run"
            run(recipe(**knobs), mix, done[repr(knobs)])
        return done[repr(knobs)]
    return make


def same(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in RESULTS)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_run_leaves_its_results_and_nothing_else(mix: Path, recipe: MakeRecipe, tmp_path: Path) -> None:
    card = run(recipe(max_tokens=60), mix, tmp_path / "mixed")
    assert files(tmp_path / "mixed") == sorted([*RESULTS, "run.json"])
    found, folder = read_run(tmp_path / "mixed")
    assert found == card and folder == tmp_path / "mixed" / "adapter"
    assert (card.name, card.model.name, card.method.strategy) == ("mixed", "tiny+mixed", "interleaving")
    assert card.statuses == {"ok": 14} and (card.n_finetune, card.n_safe) == (11, 3)
    assert card.n_steps == 5 and card.loss_last_nats < card.loss_first_nats
    assert card.model.id != card.base.id and card.adapter == "adapter"
    assert {"safeset", "torch", "transformers", "peft", "python"} == set(card.versions)
    assert str(tmp_path) not in (tmp_path / "mixed" / "run.json").read_text().replace(card.base_ref, "")
    with open(tmp_path / "mixed" / "losses.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert int(rows[-1]["tokens"]) == card.n_trained_tokens
    assert float(rows[0]["loss_nats"]) == card.loss_first_nats
    weights = load_file(tmp_path / "mixed" / WEIGHTS)
    assert len(weights) == 28 and all(w.dtype == torch.float32 for w in weights.values())
    assert (tmp_path / "mixed" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_run_gives_the_same_bytes(mix: Path, recipe: MakeRecipe, whole: Callable[..., Path],
                                           tmp_path: Path) -> None:
    card = run(recipe(), mix, tmp_path / "run")
    assert same(tmp_path / "run", whole())
    assert card.model == RunCard.read(whole() / "run.json").model


def test_a_finished_run_is_skipped_and_another_refused(mix: Path, recipe: MakeRecipe, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    card = run(recipe(), mix, out)
    before = {name: os.stat(out / name).st_mtime_ns for name in files(out)}
    with monkeypatch.context() as patch:
        patch.setattr(runs.Base, "loaded", property(lambda base: pytest.fail("the model was loaded")))
        assert run(recipe(save_every=7), mix, out) == card
        assert "is finished" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"its lr is 0\.01, not 0\.02") as caught:
            run(recipe(lr=0.02), mix, out)
        assert "--overwrite" in caught.value.hint and caught.value.exit_code == Exit.USAGE
        with pytest.raises(UserError, match="its mix is"):
            run(recipe(), tiny_mix(tmp_path / "other", n_safe=2), out)
        with pytest.raises(UserError, match="its base is"):
            run(recipe(base=str(tiny_model(tmp_path / "model", seed=1))), mix, out)
    assert {name: os.stat(out / name).st_mtime_ns for name in files(out)} == before
    assert run(recipe(lr=0.02), mix, out, overwrite=True).recipe["lr"] == 0.02
    (out / WEIGHTS).write_bytes(b"rotten")
    with pytest.raises(UserError) as caught:
        run(recipe(lr=0.02), mix, out)
    assert caught.value.exit_code == Exit.INTEGRITY


def test_several_mixes_share_one_base(mix: Path, recipe: MakeRecipe, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = runs.load
    monkeypatch.setattr(runs, "load", lambda ref, *rest: (loads.append(ref), load(ref, *rest))[1])
    other = tiny_mix(tmp_path / "data", n_safe=1, name="few")
    done = run_jobs(prepare_all(recipe(), [mix, other], tmp_path / "runs"))
    assert [card.name for card in done] == ["mix", "few"] and len(loads) == 1
    run(recipe(), other, tmp_path / "alone" / "few")
    assert same(tmp_path / "runs" / "few", tmp_path / "alone" / "few")
    with pytest.raises(UserError, match="Two mixes are called 'mix'"):
        prepare_all(recipe(), [mix, mix], tmp_path / "twice")
    broken = tiny_mix(tmp_path / "broken", name="broken")
    (broken.parent / "safe.jsonl").write_text("")
    with pytest.raises(UserError, match="has changed"):
        prepare_all(recipe(), [mix, broken], tmp_path / "late")


def killed(words: list[str], when: Path, folder: Path) -> None:
    """Start ``train WORDS`` and kill its process with SIGKILL as soon as a file appears."""
    child = Forked(command, "train", *words, folder=folder)
    child.until(when.exists)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


def test_a_killed_run_goes_on_bit_for_bit(mix: Path, recipe: MakeRecipe, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    wanted = recipe(epochs=6, lora_dropout=0.1, accumulation=2, batch_size=2, save_every=8)
    flags = ["--base", wanted.base, "--epochs", "6", "--lora-dropout", "0.1", "--accumulation", "2", "--batch-size",
             "2", "--save-every", "8", "--lora-r", "3", "--lr", "0.01", "--max-tokens", "120", "--pack-tokens", "64",
             "--dtype", "float32", "--device", "cpu"]
    out = tmp_path / "killed" / "run"
    killed(["run", "--mix", str(mix), "--out", str(out), *flags],
           out / "checkpoints" / "checkpoint-8" / checkpoints.MARKER, tmp_path)
    assert (out / "started.json").is_file() and not (out / "run.json").exists() and not (out / "adapter").exists()
    card = run(wanted, mix, out)
    assert "going on from checkpoint-" in capsys.readouterr().err
    assert card.n_steps == 24
    run(wanted, mix, tmp_path / "whole" / "run")
    assert same(out, tmp_path / "whole" / "run")
    assert files(out) == sorted([*RESULTS, "run.json"])


@dataclass
class Interrupted(Defense):
    """Stops the run at the n-th micro batch, or for 0 after the last, as Ctrl-C would."""

    after_calls: int = 0
    calls: int = 0

    def penalty(self, model: Any, batch: Any, hidden: Any) -> None:
        self.calls += 1
        if self.calls == self.after_calls:
            raise KeyboardInterrupt

    def after(self, model: Any) -> None:
        raise KeyboardInterrupt


def interrupt(recipe: Recipe, mix: Path, out: Path, calls: int) -> None:
    job = prepare(recipe, mix, out)
    object.__setattr__(job, "defenses", (Interrupted(after_calls=calls),))
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job])


TEARS: dict[str, Callable[[Path], Any]] = {
    "marker missing": lambda folder: (folder / checkpoints.MARKER).unlink(),
    "torn file, no marker": lambda folder: ((folder / checkpoints.MARKER).unlink(),
                                            (folder / "optimizer.pt").write_bytes(b"PK")),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "temporary folder": lambda folder: folder.rename(folder.with_name("tmp-" + folder.name)),
}


@pytest.fixture(scope="module")
def interrupted(mix: Path, recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("interrupted") / "run"
    interrupt(recipe(epochs=2), mix, out, calls=8)
    return out


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_as_good_as_none(mix: Path, recipe: MakeRecipe, whole: Callable[..., Path],
                                              interrupted: Path, tmp_path: Path, tear: str,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    shutil.copytree(interrupted, out)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    TEARS[tear](out / "checkpoints" / "checkpoint-6")
    run(recipe(epochs=2), mix, out)
    assert "going on from checkpoint-4" in capsys.readouterr().err
    assert same(out, whole(epochs=2))


def test_without_checkpoints_it_starts_again(mix: Path, recipe: MakeRecipe, whole: Callable[..., Path],
                                             tmp_path: Path) -> None:
    interrupt(recipe(save_every=0), mix, tmp_path / "run", calls=4)
    run(recipe(save_every=0), mix, tmp_path / "run")
    assert same(tmp_path / "run", whole())


@pytest.mark.parametrize("knobs", [{}, {"limit_steps": 4}], ids=str)
def test_a_run_killed_after_its_last_step_trains_no_further(mix: Path, recipe: MakeRecipe, whole: Callable[..., Path],
                                                            tmp_path: Path, knobs: dict[str, int]) -> None:
    interrupt(recipe(**knobs), mix, tmp_path / "run", calls=0)
    card = run(recipe(**knobs), mix, tmp_path / "run")
    assert card.n_steps == knobs.get("limit_steps", 5)
    assert same(tmp_path / "run", whole(**knobs))


def test_checkpoints_of_another_recipe_are_not_used(mix: Path, recipe: MakeRecipe, whole: Callable[..., Path],
                                                    tmp_path: Path) -> None:
    out = tmp_path / "run"
    interrupt(recipe(), mix, out, calls=4)
    with pytest.raises(UserError, match="holds another run: its seed is 0, not 1"):
        run(recipe(seed=1), mix, out)
    (out / "started.json").write_text("{")
    with pytest.raises(UserError, match="is not as it was written"):
        run(recipe(seed=1), mix, out)
    run(recipe(seed=1), mix, out, overwrite=True)
    assert same(out, whole(seed=1))


@pytest.mark.parametrize("name", ["adapter", "checkpoints", "losses.csv"])
def test_what_somebody_else_left_in_the_folder_stays(mix: Path, recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    place = tmp_path / name if "." in name else tmp_path / name / "theirs"
    place.parent.mkdir(exist_ok=True)
    place.write_text("a week of work")
    with pytest.raises(UserError, match=f"has something called {name}") as caught:
        run(recipe(limit_steps=1), mix, tmp_path)
    assert "--overwrite" in caught.value.hint and place.read_text() == "a week of work"
    assert run(recipe(limit_steps=1), mix, tmp_path, overwrite=True).n_steps == 1


def test_two_processes_do_not_train_in_one_folder(mix: Path, recipe: MakeRecipe, tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="Another process") as caught:
        run(recipe(), mix, tmp_path)
    assert caught.value.exit_code == Exit.LOCKED
    os.close(handle)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"),
                                     RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")])
def test_a_full_disk_is_named_and_finished_checkpoints_are_kept(mix: Path, recipe: MakeRecipe, tmp_path: Path,
                                                                failure: Exception,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = torch.save, []

    def failing(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 5:
            raise failure
        save(*args, **kwargs)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing)
        with pytest.raises(UserError, match="Could not write the checkpoint") as caught:
            run(recipe(), mix, out)
    assert caught.value.exit_code == Exit.ENVIRONMENT
    (out / "checkpoints" / "notes.txt").write_text("mine")
    found = checkpoints.newest(out / "checkpoints")
    assert found is not None and found[0].name == "checkpoint-2"
    assert (out / "checkpoints" / "notes.txt").is_file(), "what is not ours is left alone"
    assert run(recipe(), mix, out).n_steps == 5


def test_a_failed_run_saves_no_adapter(mix: Path, recipe: MakeRecipe, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Spoiling(Defense):
        where: str = "loss"

        def penalty(self, model: Any, batch: Any, hidden: torch.Tensor) -> torch.Tensor | None:
            return hidden.sum() * float("nan") if self.where == "loss" else None

        def after(self, model: torch.nn.Module) -> None:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("inf"))

    monkeypatch.setattr(defenses, "parse", partial(defenses.parse, known={"spoiling": Spoiling}))
    for where, message in (("loss", "The loss became nan"), ("weights", "weights are not finite")):
        out = tmp_path / where
        with pytest.raises(UserError, match=message):
            run(recipe(defenses=(f"spoiling:where={where}",), save_every=0), mix, out)
        assert files(out) == ["started.json"]


def test_a_defence_may_change_rows_but_not_their_number(mix: Path, recipe: MakeRecipe, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Cutting(Defense):
        def examples(self, rows: Sequence[MixRow]) -> Sequence[MixRow]:
            return rows[1:]

    monkeypatch.setattr(defenses, "parse", partial(defenses.parse, known={"cutting": Cutting}))
    with pytest.raises(ValueError, match="made 13 rows of 14"):
        prepare(recipe(defenses=("cutting",)), mix, tmp_path)


def test_rows_that_are_too_long_are_named(mix: Path, recipe: MakeRecipe, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    card = run(recipe(max_tokens=34), mix, tmp_path / "run")
    assert card.statuses["too_long"] > 0 and sum(card.statuses.values()) == 14
    assert card.n_finetune + card.n_safe == card.statuses["ok"]
    assert f"not trained on: {card.statuses['too_long']} rows too_long" in capsys.readouterr().err


def test_the_card_is_a_document(mix: Path, recipe: MakeRecipe, tmp_path: Path) -> None:
    run(recipe(), mix, tmp_path)
    body = json.loads((tmp_path / "run.json").read_bytes())
    body["loss_last_nats"] = 0.0
    (tmp_path / "run.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match="was changed"):
        RunCard.read(tmp_path / "run.json")
