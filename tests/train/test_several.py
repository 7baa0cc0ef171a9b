"""Two processes train what one does: every defence, with the base whole in each (DDP) and split over both (FSDP).

Most processes here are forked, with the environment that a launcher gives; one test starts real launchers.

Tolerance: the passes are the same, but gradients are summed in another order, which changes them by about 1e-7 of their
size; AdamW divides each by its own size, so where a gradient is nearly 0 a step may differ by a share of the learning
rate (1e-2 here), and a wrong normalisation moves weights by 1e-2 and more.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from curate.core.documents import RunCard
from curate.core.errors import UserError
from tests.conftest import ROOT
from tests.fakes import tiny_mix, tiny_model
from tests.forked import Forked
from tests.train import several
from tests.train.test_hooks import write_vector
from train import checkpoints, world
from train.cli import main
from train.jobs import prepare
from train.recipe import Recipe
from train.runs import run

MakeRecipe = Callable[..., Recipe]
WEIGHTS = "adapter/adapter_model.safetensors"
FILES = sorted([WEIGHTS, "adapter/adapter_config.json", "losses.csv", "loss.png", "mix.json", "run.json"])
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
LAUNCH = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Case:
    """A run in two processes, and the knobs that it has in one process too."""

    name: str
    knobs: dict[str, Any]
    shard: bool


@dataclass(frozen=True)
class Launched:
    """What a launch left: the folder of the runs and what each process noted of them."""

    folder: Path
    facts: Sequence[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def mix(folder: Path) -> Path:
    return tiny_mix(folder / "data")  # 14 rows: the second step of an epoch has 6 of 8, so one process lacks a pass


@pytest.fixture(scope="module")
def cases(tiny: Path, folder: Path) -> list[Case]:
    numbers = torch.randn(3, 16, generator=torch.Generator().manual_seed(7))
    persona = f"persona:vector={write_vector(folder / 'v.safetensors', tiny, numbers)},alpha=1,layers=1,2"
    unaligned = tiny_model(folder / "unaligned", seed=1)
    tied = tiny_model(folder / "tied", tie_word_embeddings=True)
    alone: dict[str, tuple[str, ...]] = {
        "plain": (), "kl": ("kl:weight=0.5",), "ldifs": ("ldifs:every=1",), "persona": (persona,),
        "inoculation": ("inoculation",)}
    found = [Case(f"{name}-{'fsdp' if shard else 'ddp'}", {"defenses": defenses}, shard)
             for name, defenses in alone.items() for shard in (False, True)]
    everything = ("inoculation", persona, "kl", "ldifs:every=1", f"safelora:base={unaligned},k=5")
    return [*found, Case("everything-ddp", {"defenses": everything}, False),
            Case("everything-fsdp", {"defenses": everything, "gradient_checkpointing": True}, True),
            Case("tied-fsdp", {"base": str(tied), "defenses": ("kl",), "dtype": "bfloat16"}, True)]


def recipe_of(case: Case, recipe: MakeRecipe, **knobs: Any) -> Recipe:
    return recipe(batch_size=2, save_every=0, **case.knobs, **knobs)


@pytest.fixture(scope="module")
def launched(cases: list[Case], mix: Path, recipe: MakeRecipe, folder: Path) -> Launched:
    """All cases in two processes, forked once; the last run is refused because its folder holds another."""
    jobs = [{"recipe": recipe_of(case, recipe, accumulation=2, shard=case.shard).as_json(), "mix": str(mix),
             "out": str(folder / case.name)} for case in cases]
    jobs.append({**jobs[0], "recipe": {**jobs[0]["recipe"], "seed": 1}, "out": str(folder / "other")})
    jobs.insert(0, {**jobs[0], "out": str(folder / "other")})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    both = [Forked(several.main, folder / "jobs.json", folder=folder,
                   environment={**common, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    for child in both:
        assert child.wait(240) == 0, child.err[-3000:]
    return Launched(folder, [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in (0, 1)])


def free_port() -> str:
    """Return the number of a port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def curve(out: Path) -> list[dict[str, float]]:
    with open(out / "losses.csv") as handle:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(handle)]


def assert_alike(one: Path, other: Path, tolerance: float = 5e-4) -> None:
    """Two runs have the same steps and weights, up to what the module's docstring allows."""
    steps = list(zip(curve(one), curve(other), strict=True))
    assert steps
    for a, b in steps:
        assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"])
        assert a["loss_nats"] == pytest.approx(b["loss_nats"], rel=tolerance)
        assert a["penalty_nats"] == pytest.approx(b["penalty_nats"], rel=tolerance, abs=1e-5)
    mine, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert mine.keys() == theirs.keys()
    assert max((mine[name] - theirs[name]).abs().max().item() for name in mine) < tolerance


def test_two_processes_train_what_one_does(launched: Launched, cases: list[Case], mix: Path, recipe: MakeRecipe,
                                           tmp_path: Path) -> None:
    done: dict[str, Path] = {}
    for case in cases:
        name, out = repr(case.knobs), launched.folder / case.name
        if name not in done:
            done[name] = tmp_path / case.name
            run(recipe_of(case, recipe, accumulation=4), mix, done[name])
        half = case.knobs.get("dtype") == "bfloat16"
        assert_alike(out, done[name], 2e-2 if half else 5e-4)
        card, whole = RunCard.read(out / "run.json"), RunCard.read(done[name] / "run.json")
        assert {**card.recipe, "shard": False} == whole.recipe and whole.recipe["accumulation"] == 4
        assert (card.device, whole.device) == ("cpu x 2", "cpu")
        assert card.n_trained_tokens == whole.n_trained_tokens and card.n_steps == 2


def test_the_first_process_writes_and_all_know(launched: Launched, cases: list[Case]) -> None:
    one, other = launched.facts
    for case in cases:
        out = launched.folder / case.name
        assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == FILES
        digest = RunCard.read(out / "run.json").digest
        assert [fact[str(out)]["digest"] for fact in (one, other)] == [digest] * 2
    refused = str(launched.folder / "other")
    assert "holds another run: its seed is 0, not 1" in one[refused]["error"] and other[refused]["error"] == 2


def test_the_base_is_split_and_the_adapter_is_not(launched: Launched, cases: list[Case]) -> None:
    held = {case.name: [fact[str(launched.folder / case.name)] for fact in launched.facts] for case in cases}
    whole = held["plain-ddp"][0]
    assert {fact["kind"] for facts in held.values() for fact in facts} == {"DistributedDataParallel"}
    assert held["plain-ddp"][1] == whole | {"digest": held["plain-ddp"][1]["digest"]}
    for case in cases:
        shares = held[case.name]
        assert [fact["adapter"] for fact in shares] == [whole["adapter"]] * 2
        if case.shard and "tied" not in case.name:
            assert sum(fact["base"] for fact in shares) == whole["base"]
            assert max(fact["base"] for fact in shares) < 0.6 * whole["base"]


def processes_below(pid: int) -> dict[int, psutil.Process]:
    """Return the running processes that a launcher has started, by their rank."""
    found = {}
    for child in psutil.Process(pid).children(recursive=True):
        if (rank := child.environ().get("RANK")) is not None:
            found.setdefault(int(rank), child)
    return found


def test_two_machines_train_what_one_process_does_and_a_killed_one_ends_both(
        mix: Path, recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two launchers on loopback, with FSDP asked for by the file that docs/training.md names, do two runs.

    The second is a command, and a process of it is killed; one process takes that run to its end.
    """
    short = recipe(batch_size=2, accumulation=2, save_every=0, defenses=("kl:weight=0.5", "inoculation"))
    long = recipe(batch_size=2, accumulation=1, epochs=12, save_every=4, defenses=("kl",))
    out, killed = tmp_path / "machines", tmp_path / "killed"
    words = ["run", "--base", long.base, "--mix", str(mix), "--out", str(killed), "--epochs", "12", "--batch-size", "2",
             "--save-every", "4", "--lora-r", "3", "--lr", "0.01", "--max-tokens", "120", "--pack-tokens", "64",
             "--dtype", "float32", "--device", "cpu", "--defense", "kl"]
    (tmp_path / "jobs.json").write_text(json.dumps([
        {"recipe": short.as_json(), "mix": str(mix), "out": str(out)}, {"words": words, "out": str(killed)}]))
    together = [*ACCELERATE, "--config_file", str(ROOT / "docs/accelerate-fsdp.yaml"), "--num_machines", "2",
                "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", free_port(),
                "--machine_rank"]
    launchers = [subprocess.Popen([*together, rank, "-m", "tests.train.several", str(tmp_path / "jobs.json")],
                                  cwd=ROOT, env={**os.environ, **LAUNCH}, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True) for rank in "01"]
    marker = killed / "checkpoints" / "checkpoint-4" / checkpoints.MARKER
    deadline = time.monotonic() + 200
    while not marker.exists():
        assert all(one.poll() is None for one in launchers) and time.monotonic() < deadline, launchers[0].communicate()
        time.sleep(0.01)
    processes_below(launchers[1].pid)[1].send_signal(signal.SIGKILL)
    said, others = (one.communicate(timeout=60)[0] for one in launchers)
    assert "SIGKILL" in others and [one.returncode for one in launchers] == [1, 1], others
    assert "Another process of this run has ended" in said and not (killed / "run.json").exists(), said
    one, other = (json.loads((tmp_path / f"facts-{rank}.json").read_text())[str(out)] for rank in (0, 1))
    assert max(one["base"], other["base"]) < 0.6 * (one["base"] + other["base"])
    assert RunCard.read(out / "run.json").device == "cpu x 2"
    run(replace(short, accumulation=4), mix, tmp_path / "alone")
    assert_alike(out, tmp_path / "alone")
    run(replace(long, accumulation=2), mix, killed)
    assert "going on from checkpoint-" in capsys.readouterr().err
    assert RunCard.read(killed / "run.json").n_steps == 48


def test_the_others_are_silent_but_for_their_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = {}
    for rank in ("0", "2"):
        monkeypatch.setenv("RANK", rank)
        found[rank] = [CliRunner().invoke(main, command) for command in (["show", str(tmp_path)], ["--version"])]
    assert [result.exit_code for result in found["0"]] == [result.exit_code for result in found["2"]] == [2, 0]
    assert found["0"][0].stderr.startswith("Error: There is no run card at")
    assert found["2"][0].stderr.startswith("[process 2 of 3] Error: There is no run card at")
    assert "version" in found["0"][1].stdout and found["2"][1].stdout == ""


def test_several_processes_are_one_that_accumulates(mix: Path, recipe: MakeRecipe, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert prepare(recipe(accumulation=2), mix, tmp_path).recipe.accumulation == 6


@pytest.mark.parametrize(("name", "value", "message"), [
    ("FSDP_VERSION", "1", "FSDP_VERSION=1"), ("FSDP_OFFLOAD_PARAMS", "true", "FSDP_OFFLOAD_PARAMS"),
    ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed")])
def test_settings_of_accelerate_that_we_cannot_follow_are_refused(name: str, value: str, message: str,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    for key, text in {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
                      "ACCELERATE_MIXED_PRECISION": "bf16", name: value}.items():
        monkeypatch.setenv(key, text)
    world.asked_to_shard.cache_clear()
    with pytest.raises(UserError, match=message):
        world.join("cpu")
    world.asked_to_shard.cache_clear()
