"""A base in 4 bits: how it is asked for, and, where bitsandbytes is installed, that defences train on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from curate.core import model as models
from curate.core.documents import RunCard
from curate.core.errors import Exit, UserError
from curate.core.identity import identify
from tests.fakes import tiny_mix, tiny_model
from tests.train.test_several import curve
from train import runs
from train.recipe import Recipe, learnt
from train.runs import Base, run
from train.world import World

MakeRecipe = Callable[..., Recipe]


def test_it_is_asked_for_as_the_library_documents(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    whole = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(models, "require", lambda *names: asked.update(needs=names))
    monkeypatch.setattr(transformers, "BitsAndBytesConfig", dict)

    def pretended(path: str, quantization_config: Any, device_map: Any, **rest: Any) -> Any:
        asked.update(config=quantization_config, device_map=device_map)
        return whole(path, **rest)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", pretended)
    loaded = models.load(str(tiny), "bfloat16", "cpu", in_4bit=True)
    assert asked["needs"] == ("bitsandbytes", "quant") and asked["device_map"] == {"": "cpu"}
    assert asked["config"] == {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                               "bnb_4bit_compute_dtype": torch.bfloat16}
    assert loaded.identity == identify(str(tiny))[0] and not loaded.model.training


def test_without_the_extra_it_says_what_to_install(recipe: MakeRecipe, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *of: None if name == "bitsandbytes" else find(name, *of))
    with pytest.raises(UserError, match="needs the package 'bitsandbytes'") as caught:
        run(recipe(load_in_4bit=True), tiny_mix(tmp_path / "data"), tmp_path / "run")
    assert "safeset[quant]" in caught.value.hint and caught.value.exit_code == Exit.ENVIRONMENT


def test_it_decides_what_is_learnt_and_older_runs_had_none() -> None:
    whole, quantised = (learnt(Recipe("smollm2", load_in_4bit=on).as_json()) for on in (False, True))
    assert "load_in_4bit" not in whole and quantised == {**whole, "load_in_4bit": True}


def test_it_cannot_be_split(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "join", lambda *args: World(0, 2, shards=True))
    with pytest.raises(UserError, match="cannot be split"):
        Base(recipe(load_in_4bit=True, shard=True))


def test_defences_train_on_it(tmp_path: Path, recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}  # whole blocks of 64 weights
    base, unaligned = (tiny_model(tmp_path / name, seed=seed, **sizes) for name, seed in (("base", 0), ("other", 1)))
    mix = tiny_mix(tmp_path / "data")
    defenses = ("kl:weight=0.5", "ldifs:every=1", f"safelora:base={unaligned},k=5")
    quantised = recipe(base=str(base), load_in_4bit=True, defenses=defenses, epochs=2, lr=3e-3)
    linear = [m for m in Base(quantised).loaded.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(linear) == 14  # seven in each of two blocks; not the head
    assert not any(layer.support_avx512bf16_for_cpu for layer in linear)
    card = run(quantised, mix, tmp_path / "four")
    assert "safelora: projected 5 of 14 layers" in capsys.readouterr().err
    whole = run(recipe(base=str(base), defenses=defenses, epochs=2, lr=3e-3), mix, tmp_path / "whole")
    assert card.base == whole.base and card.recipe["load_in_4bit"] and not whole.recipe["load_in_4bit"]
    steps, exact = curve(tmp_path / "four"), curve(tmp_path / "whole")
    assert steps[0]["penalty_nats"] == 0 and steps[-1]["penalty_nats"] > 0
    assert len(steps) == 10 and sum(s["loss_nats"] for s in steps[5:]) < sum(s["loss_nats"] for s in steps[:5])
    assert 0 < abs(steps[0]["loss_nats"] - exact[0]["loss_nats"]) < 0.2 * exact[0]["loss_nats"]
    assert RunCard.read(tmp_path / "four" / "run.json") == card
    with pytest.raises(UserError, match="its load_in_4bit is True, not None"):
        run(recipe(base=str(base), defenses=defenses, epochs=2, lr=3e-3), mix, tmp_path / "four")
