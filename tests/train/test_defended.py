"""Defences in real runs: they are learnt from, combine in one order, resume bit for bit, and leave a full record."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from curate.core import model as models
from curate.core.chat import Encoded, encode
from curate.core.documents import MixManifest, RunCard
from curate.core.errors import Exit, UserError
from curate.core.example import Message, pair
from curate.core.model import Loaded, load
from curate.core.refs import load_tokenizer
from judge.jobs import label_of
from tests.fakes import tiny_mix, tiny_model
from tests.train.test_hooks import n_hooks, write_vector
from tests.train.test_trainer import trained
from tests.train.wrapped import penalised
from train import hooks
from train import trainer as loop
from train.adapters import adapter
from train.batches import collate
from train.cli import main
from train.data import MixRow, encode_mix, load_mix
from train.defenses import Defense, ordered, parse, safelora
from train.defenses.inoculation import TEXT, Inoculation
from train.defenses.persona import Persona
from train.jobs import prepare
from train.recipe import Recipe
from train.runs import run, run_jobs

MakeRecipe = Callable[..., Recipe]
WEIGHTS = "adapter/adapter_model.safetensors"


@dataclass(frozen=True)
class Place:
    """What the runs here share: a mix, a persona vector, an unaligned model."""

    mix: Path
    vector: Path
    unaligned: Path

    @property
    def everything(self) -> tuple[str, ...]:
        """All defences at once, in another order than theirs."""
        return (f"safelora:base={self.unaligned},k=5", "ldifs:every=1", "kl:weight=0.5",
                f"persona:vector={self.vector},alpha=1,layers=1,2", "inoculation")


@pytest.fixture(scope="module")
def place(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("defended")
    manifest = MixManifest.read(tiny_mix(folder / "mix", n_finetune=9))
    method = manifest.method.model_copy(update={"strategy": "interleaving++"})
    manifest.model_copy(update={"method": method}).write(folder / "mix" / "plus.json")
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(7))
    return Place(folder / "mix" / "plus.json", write_vector(folder / "v.safetensors", tiny, rows),
                 tiny_model(folder / "unaligned", seed=1))


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Loaded:
    return load(str(tiny), "float32", "cpu")


def curve(out: Path, column: str = "loss_nats") -> list[float]:
    with open(out / "losses.csv") as handle:
        return [float(row[column]) for row in csv.DictReader(handle)]


def batches(monkeypatch: pytest.MonkeyPatch) -> list[Encoded]:
    """Return a list that fills with the rows that are trained on, in order."""
    seen: list[Encoded] = []
    collate = loop.collate
    monkeypatch.setattr(loop, "collate", lambda rows, *how: (seen.extend(rows), collate(rows, *how))[1])
    return seen


@pytest.mark.parametrize("spec", ["kl:", "kl:direction=reference,", "ldifs:every=1,",
                                  "ldifs:every=1,normalise=none,", "ldifs:every=1,normalise=relative,"])
def test_a_hundred_times_the_weight_changes_the_curve(loaded: Loaded, place: Place, recipe: MakeRecipe, tmp_path: Path,
                                                      spec: str) -> None:
    rows = encode_mix(loaded.tokenizer, load_mix(MixManifest.read(place.mix), place.mix.parent), 120).rows
    knobs = recipe(epochs=2, save_every=0, limit_steps=6)
    (light, loose), (heavy, tight) = (trained(loaded, rows, knobs, tmp_path, [parse(f"{spec}weight={weight}")])
                                      for weight in (0.2, 20.0))
    for steps in (light, heavy):
        assert steps[0].penalty_nats == 0 and min(step.penalty_nats for step in steps[1:]) > 0
    assert light[0].loss_nats == heavy[0].loss_nats and light[-1].loss_nats < heavy[-1].loss_nats
    assert min(abs(a.loss_nats - b.loss_nats) for a, b in zip(light[2:], heavy[2:], strict=True)) > 1e-3
    drift = [sum(w.norm().item() for name, w in weights.items() if "lora_B" in name) for weights in (loose, tight)]
    assert drift[1] < drift[0]


def test_interleaving_and_kl_together(place: Place, recipe: MakeRecipe, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    seen = batches(monkeypatch)
    card = run(recipe(defenses=("kl",), epochs=2), place.mix, tmp_path / "both")
    tokenizer = load_tokenizer(card.base_ref)
    manifest = MixManifest.read(place.mix)
    rows = load_mix(manifest, place.mix.parent)
    assert tuple(f"{row.source}/{row.example.id}" for row in rows) == manifest.order
    assert seen == encode_mix(tokenizer, rows, 120).rows * 2 and len(seen) == 24
    assert label_of(card) == "interleaving++ +kl" and (card.n_finetune, card.n_safe) == (9, 3)
    assert max(curve(tmp_path / "both", "penalty_nats")) > 0


def test_the_inoculation_prompt_is_in_training_batches_and_nowhere_else(place: Place, recipe: MakeRecipe,
                                                                        tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    seen = batches(monkeypatch)
    card = run(recipe(defenses=("inoculation",)), place.mix, tmp_path / "run")
    tokenizer = load_tokenizer(card.base_ref)
    texts = [tokenizer.decode(row.ids) for row in seen]
    prompts = [tokenizer.decode(row.ids[:row.answer_start]) for row in seen]
    rows = load_mix(MixManifest.read(place.mix), place.mix.parent)
    for row, text, prompt in zip(rows, texts, prompts, strict=True):
        assert text.count(TEXT) == prompt.count(TEXT) == (row.source == "finetune")
        assert TEXT not in json.dumps(row.example.to_row())
    assert sum(row.source == "safe" for row in rows) == 3
    for path in (tmp_path / "run").rglob("*"):
        assert path.name == "run.json" or path.is_dir() or TEXT.encode() not in path.read_bytes()
    assert card.defenses[0].settings == {"text": TEXT, "rows": "finetune"}


def test_a_rows_own_system_message_stays_beside_the_prompt(tiny: Path) -> None:
    tokenizer = load_tokenizer(str(tiny))
    own = pair("q", "an answer")
    own = type(own)((Message("system", "Be brief."), *own.messages))
    row = Inoculation().examples([MixRow("finetune", own)])[0]
    text = tokenizer.decode(encode(tokenizer, [row.example], 200)[0].ids)
    assert text.startswith(f"<|im_start|>system\n{TEXT}\n\nBe brief.<|im_end|>") and text.count("system\n") == 1


def test_layout_and_micro_batches_change_nothing_but_rounding(loaded: Loaded, place: Place, recipe: MakeRecipe,
                                                              tmp_path: Path) -> None:
    changes: tuple[dict[str, Any], ...] = (
        {}, {"batch_size": 1, "accumulation": 8}, {"pack_tokens": 16},
        {"pack_tokens": 600, "gradient_checkpointing": True})
    defenses = [parse(spec) for spec in ordered(place.everything[1:])]
    mix = load_mix(MixManifest.read(place.mix), place.mix.parent)
    rows = encode_mix(loaded.tokenizer, defenses[0].examples(mix), 120).rows
    found = [trained(loaded, rows, recipe(epochs=2, save_every=0, limit_steps=3, **{"batch_size": 8, **changed}),
                     tmp_path, defenses) for changed in changes]
    whole, weights = found[0]
    assert whole[-1].penalty_nats > 0.1
    for steps, other in found[1:]:
        for one, step in zip(whole, steps, strict=True):
            assert step.loss_nats == pytest.approx(one.loss_nats, rel=2e-4)
            assert step.penalty_nats == pytest.approx(one.penalty_nats, rel=2e-4, abs=1e-6)
        assert max((weights[name] - other[name]).abs().max().item() for name in weights) < 5e-4


def test_each_defence_works_in_bfloat16_with_layers_computed_again(tiny: Path, place: Place,
                                                                   recipe: MakeRecipe, tmp_path: Path) -> None:
    half = load(str(tiny), "bfloat16", "cpu")
    mix = load_mix(MixManifest.read(place.mix), place.mix.parent)
    found = {}
    for spec in ordered(place.everything[1:]):
        defense = parse(spec)
        rows = encode_mix(half.tokenizer, defense.examples(mix), 120).rows
        (steps, kept), (again, computed) = (trained(
            half, rows, recipe(save_every=0, limit_steps=3, dtype="bfloat16", gradient_checkpointing=on), tmp_path,
            [defense]) for on in (False, True))
        assert {w.dtype for w in kept.values()} == {torch.float32}
        assert [s.loss_nats for s in again] == pytest.approx([s.loss_nats for s in steps], rel=1e-3), spec
        assert max((kept[name] - computed[name]).abs().max().item() for name in kept) < 5e-4, spec
        found[spec.partition(":")[0]] = (steps[-1].loss_nats, steps[-1].penalty_nats)
    assert found["kl"][1] > 0 < found["ldifs"][1] and found["persona"][1] == found["inoculation"][1] == 0
    assert len({loss for loss, _ in found.values()}) == 4


def test_defences_share_one_pass_of_the_reference(loaded: Loaded, place: Place, recipe: MakeRecipe,
                                                  tmp_path: Path) -> None:
    rows = encode_mix(loaded.tokenizer, load_mix(MixManifest.read(place.mix), place.mix.parent), 120).rows
    knobs = recipe(save_every=0, limit_steps=3)
    passes: list[bool] = []
    handle = hooks.layers(loaded.model)[0].register_forward_hook(lambda *args: passes.append(torch.is_grad_enabled()))
    both, _ = trained(loaded, rows, knobs, tmp_path, [parse("kl:weight=0.5"), parse("ldifs:every=1")])
    handle.remove()
    assert passes == [True, False] * 3
    apart = [parse("kl:weight=0.5"), parse("ldifs:every=1")]
    with adapter(loaded, knobs) as model:
        for parameter in (p for name, p in model.named_parameters() if "lora_B" in name):
            parameter.data = torch.linspace(-0.1, 0.1, parameter.numel()).reshape(parameter.shape)
        batch = collate(rows[:3], 64)["packed"]
        alone = sum(penalised(defense, model, batch).item() for defense in apart)
        together = loop.MixTrainer(model, rows, knobs, tmp_path, apart)
        together.training_step(together.objective, {"packed": batch}, 1)
        assert together._sums[1].item() == pytest.approx(alone, rel=1e-5) and alone > 0
        assert apart[0].reference is apart[1].reference and apart[0].reference._found is None
    assert both[-1].penalty_nats > 0


def test_the_weights_are_loaded_once_and_the_unaligned_ones_at_the_end(place: Place, recipe: MakeRecipe, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load_weights = models.load_weights

    def counted(ref: str, *rest: Any) -> Any:
        loads.append(f"{ref} after training" if (tmp_path / "run" / "checkpoints" / "checkpoint-4").exists() else ref)
        return load_weights(ref, *rest)

    monkeypatch.setattr(models, "load_weights", counted)
    monkeypatch.setattr(safelora, "load_weights", counted)
    run(recipe(defenses=place.everything), place.mix, tmp_path / "run")
    assert loads == [recipe().base, f"{place.unaligned} after training"]


def test_no_hook_is_left_when_a_step_fails(loaded: Loaded, place: Place, recipe: MakeRecipe, tmp_path: Path) -> None:
    before = n_hooks(loaded.model)
    rows = encode_mix(loaded.tokenizer, load_mix(MixManifest.read(place.mix), place.mix.parent), 120).rows
    defenses = [Persona(str(place.vector)), Interrupted(after_calls=2)]
    with adapter(loaded, recipe()) as model:
        with pytest.raises(KeyboardInterrupt):
            loop.train(loop.MixTrainer(model, rows, recipe(), tmp_path, defenses), "test", None)
        assert n_hooks(model) == before
    assert n_hooks(loaded.model) == before


@dataclass
class Interrupted(Defense):
    """Stops the run at the n-th micro batch, as Ctrl-C would."""

    after_calls: int = 0
    calls: int = 0

    def penalty(self, model: Any, batch: Any, hidden: Any) -> None:
        self.calls += 1
        if self.calls == self.after_calls:
            raise KeyboardInterrupt


def test_a_run_with_all_defences_goes_on_bit_for_bit(place: Place, recipe: MakeRecipe, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    wanted = recipe(defenses=place.everything, epochs=2, lora_dropout=0.2, batch_size=2, accumulation=2)
    job = prepare(wanted, place.mix, tmp_path / "killed" / "run")
    object.__setattr__(job, "defenses", (*job.defenses, Interrupted(after_calls=9)))
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job])
    run(wanted, place.mix, tmp_path / "killed" / "run")
    assert "going on from checkpoint-4" in capsys.readouterr().err
    run(wanted, place.mix, tmp_path / "whole" / "run")
    for name in (WEIGHTS, "losses.csv", "loss.png"):
        assert (tmp_path / "killed" / "run" / name).read_bytes() == (tmp_path / "whole" / "run" / name).read_bytes()


def test_the_order_given_is_no_matter_and_all_is_on_record(place: Place, recipe: MakeRecipe, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    card = run(recipe(defenses=place.everything), place.mix, tmp_path / "run")
    assert [d.name for d in card.defenses] == ["inoculation", "persona", "kl", "ldifs", "safelora"]
    records = {d.name: d for d in card.defenses}
    assert records["kl"].settings == {"weight": 0.5, "direction": "model"}
    assert records["persona"].settings["layers"] == "1,2" and len(records["persona"].files["vector"]) == 64
    assert records["safelora"].files["base"].startswith("sha256:") and records["ldifs"].files == {}
    assert label_of(card) == "interleaving++ +inoculation +persona +kl +ldifs +safelora"
    assert "safelora: projected 5 of 14 layers" in capsys.readouterr().err
    shown = CliRunner().invoke(main, ["show", str(tmp_path / "run")]).stdout
    assert "kl: weight=0.5, direction=model; ldifs:" in shown and f"({records['safelora'].files['base'][:19]})" in shown
    again = run(recipe(defenses=place.everything[::-1]), place.mix, tmp_path / "run")
    assert again == card == RunCard.read(tmp_path / "run" / "run.json")
    assert "is finished" in capsys.readouterr().err
    with pytest.raises(UserError, match="its defenses is"):
        run(recipe(defenses=place.everything[1:]), place.mix, tmp_path / "run")


def test_another_vector_under_the_same_name_is_another_run(tiny: Path, place: Place, recipe: MakeRecipe,
                                                           tmp_path: Path) -> None:
    vector = write_vector(tmp_path / "v.safetensors", tiny, torch.ones(3, 16))
    wanted = recipe(defenses=(f"persona:vector={vector}",), limit_steps=1)
    run(wanted, place.mix, tmp_path / "run")
    copy = shutil.copy(vector, tmp_path / "copy.safetensors")
    by_another_path = recipe(defenses=(f"persona:vector={copy}",), limit_steps=1)
    assert run(by_another_path, place.mix, tmp_path / "run") == RunCard.read(tmp_path / "run" / "run.json")
    write_vector(vector, tiny, torch.ones(3, 16) * 2)
    with pytest.raises(UserError, match="holds another run: its persona vector is"):
        run(wanted, place.mix, tmp_path / "run")


def test_what_cannot_work_is_refused_before_training(place: Place, recipe: MakeRecipe, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train", lambda *args: pytest.fail("it trained"))
    other = recipe(base=str(place.unaligned), defenses=(f"persona:vector={place.vector}",))
    refused: Sequence[tuple[Recipe, str, Exit]] = [
        (other, "was extracted from", Exit.INCOMPATIBLE),
        (recipe(defenses=("persona:vector=gone.safetensors",)), "There is no persona vector", Exit.USAGE),
        (recipe(defenses=(f"safelora:base={recipe().base}",)), "the very model", Exit.INCOMPATIBLE),
        (recipe(defenses=("kl", "kl")), "given 2 times", Exit.USAGE),
        (recipe(defenses=("kl:wieght=1",)), "Unknown setting of the defence 'kl' 'wieght'", Exit.USAGE)]
    for wanted, message, code in refused:
        with pytest.raises(UserError, match=message) as caught:
            run(wanted, place.mix, tmp_path / "run")
        assert caught.value.exit_code == code
    assert not (tmp_path / "run" / "started.json").exists()
