"""Models of experts, and of several kinds of input: what an adapter, a hook and SafeLoRA find in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as library

from curate.core.model import Loaded, load
from tests.fakes import tiny_tokenizer
from train.adapters import adapter, save_adapter
from train.defenses.safelora import SafeLora, adapted_layers
from train.hooks import layers
from train.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 8}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("mixtral"), tiny_tokenizer()
    model = library.MixtralForCausalLM(library.MixtralConfig(
        **SIZES, vocab_size=len(tokenizer), num_local_experts=2, num_experts_per_tok=1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(mixtral: Path) -> Loaded:
    return load(str(mixtral), "float32", "cpu")


def test_the_settings_of_an_adapter_do_not_depend_on_the_order_of_a_set(loaded: Loaded, recipe: MakeRecipe,
                                                                        tmp_path: Path) -> None:
    with adapter(loaded, recipe()) as model:
        config = model.peft_config["default"]
        assert config.target_parameters, "the experts have adapters too"
        config.target_parameters = ["b", "a", *sorted(config.target_parameters, reverse=True)]
        save_adapter(model, tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found["target_parameters"] == sorted(found["target_parameters"]) and len(found["target_parameters"]) > 2


def test_safelora_leaves_experts_as_they_are_and_says_so(loaded: Loaded, mixtral: Path, recipe: MakeRecipe,
                                                         tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unaligned = tmp_path / "unaligned"
    other = library.MixtralForCausalLM.from_pretrained(mixtral)
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    other.save_pretrained(unaligned)
    tiny_tokenizer().save_pretrained(unaligned)
    with adapter(loaded, recipe()) as model:
        names = [name for name, _ in adapted_layers(model)]
        assert names and not any(name.endswith("experts") for name in names)
        SafeLora(base=str(unaligned)).after(model)
    assert "adapted weights of experts are no layers of their own" in capsys.readouterr().err


@pytest.fixture
def seeing() -> torch.nn.Module:
    """A model that takes pictures, too."""
    text = {**SIZES, "vocab_size": 300, "sliding_window": 24}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    return library.Gemma3ForConditionalGeneration(library.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=299))


def test_the_blocks_of_a_model_that_sees_too_are_those_of_its_text(seeing: torch.nn.Module) -> None:
    assert layers(seeing) is seeing.get_decoder().layers and len(layers(seeing)) == 2


def test_what_text_does_not_pass_through_has_no_adapter(loaded: Loaded, seeing: torch.nn.Module,
                                                        recipe: MakeRecipe) -> None:
    names = [name for name, part in seeing.named_modules() if isinstance(part, torch.nn.Linear)]
    assert any("vision" in name for name in names)
    with adapter(replace(loaded, model=seeing), recipe()) as model:
        adapted = [name for name, _ in adapted_layers(model)]
    assert adapted == [name for name in names if "language_model.layers" in name]
    with adapter(loaded, recipe()) as model:
        assert model.peft_config["default"].exclude_modules is None, "a text model's settings stay as they were"
