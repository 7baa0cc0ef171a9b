"""Adapters: which are refused, and that an open one counts and leaves no trace when it is closed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from curate.core.adapters import adapter_open
from curate.core.chat import encode
from curate.core.errors import UserError
from curate.core.example import pair
from curate.core.model import Loaded, load
from curate.core.nll import answer_nll
from tests.core.changed import CONFIG, WEIGHTS, as_pickle, copied, edit
from tests.fakes import tiny_adapter, tiny_model

KINDS = {"linear": {}, "head": {"target_modules": ["lm_head", "q_proj"]}, "dora": {"use_dora": True},
         "modules_to_save": {"modules_to_save": ["lm_head"]}, "tokens": {"trainable_token_indices": [3, 5]},
         "embedding": {"target_modules": ["embed_tokens", "v_proj"]}, "lora_bias": {"lora_bias": True},
         "gaussian": {"init_lora_weights": "gaussian"}}
MERGED = {"linear", "head", "gaussian"}


def score(loaded: Loaded, model: torch.nn.Module) -> float:
    """Return the NLL of one answer, nats."""
    (item,) = encode(loaded.tokenizer, [pair("Why?", "Because of the rain.")], 512)
    return next(answer_nll(model, [item]))[0][1].nll_sum


def snapshot(model: torch.nn.Module) -> tuple[list[tuple[str, type]], dict[str, torch.Tensor]]:
    """Return the names and types of all modules and a copy of all weights."""
    return ([(name, type(module)) for name, module in model.named_modules()],
            {name: tensor.clone() for name, tensor in model.state_dict().items()})


def assert_untouched(model: torch.nn.Module, before: tuple[list[tuple[str, type]], dict[str, torch.Tensor]]) -> None:
    modules, weights = snapshot(model)
    assert modules == before[0] and weights.keys() == before[1].keys()
    assert all(torch.equal(weights[name], before[1][name]) for name in weights) and not hasattr(model, "peft_config")


@pytest.fixture(scope="module")
def kinds(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    made = {kind: tiny_adapter(model_folder, root / kind, **settings) for kind, settings in KINDS.items()}
    tokens = load_file(made["tokens"] / WEIGHTS)
    save_file({k: torch.randn_like(v) if "token_adapter" in k else v for k, v in tokens.items()},
              made["tokens"] / WEIGHTS)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_open_adapter_counts_and_a_closed_one_leaves_no_trace(model_folder: Path, kinds: dict[str, Path], kind: str,
                                                                 dtype: str) -> None:
    loaded = load(str(model_folder), dtype, "cpu")
    base, before, bare = loaded.model, snapshot(loaded.model), score(loaded, loaded.model)
    apart = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
    attached = PeftModel.from_pretrained(apart, kinds[kind]).eval()
    warnings.simplefilter("error", UserWarning)
    for _ in range(2):
        with adapter_open(loaded, kinds[kind]) as model:
            assert isinstance(model, PeftModel) == (kind not in MERGED or dtype != "float32")
            assert not model.training
            assert score(loaded, model) == pytest.approx(score(loaded, attached), abs=1e-5 * 20)
            assert abs(score(loaded, model) - bare) > 0.1
        assert loaded.model is base and score(loaded, base) == bare
        assert_untouched(base, before)


def test_the_update_of_a_tied_head_does_not_reach_the_embeddings(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    loaded, adapter = load(str(folder), "float32", "cpu"), tiny_adapter(folder, tmp_path / "head", **KINDS["head"])
    before, bare = snapshot(loaded.model), score(loaded, loaded.model)
    attached = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
    with adapter_open(loaded, adapter) as model:
        assert score(loaded, model) == pytest.approx(score(loaded, attached), abs=1e-4)
        assert abs(score(loaded, model) - bare) > 0.1
    assert_untouched(loaded.model, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["linear", "modules_to_save"])
def test_an_exception_leaves_no_trace_either(model_folder: Path, kinds: dict[str, Path], kind: str, dtype: str) -> None:
    loaded = load(str(model_folder), dtype, "cpu")
    before = snapshot(loaded.model)
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error), adapter_open(loaded, kinds[kind]):
            raise error
        assert_untouched(loaded.model, before)


@pytest.mark.parametrize(("change", "reason"), [
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:700]), "could not be loaded"),
    (lambda f: save_file({"nonsense": torch.ones(3)}, f / WEIGHTS), "has no weights for base_model"),
    (as_pickle(WEIGHTS, "adapter_model.bin"), "holds no adapter"),
    (lambda f: (f / CONFIG).unlink(), "holds no adapter"),
    (lambda f: (f / CONFIG).write_text("{"), "is no adapter configuration"),
    (lambda f: (f / CONFIG).write_text("3"), "is no adapter configuration"),
    (edit(CONFIG, r="many"), "could not be loaded"), (edit(CONFIG, target_modules=["nope"]), "could not be loaded"),
    (edit(CONFIG, peft_type="IA3"), "peft_type = 'IA3'"), (edit(CONFIG, bias="all"), "bias = 'all'"),
    (edit(CONFIG, init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    (edit(CONFIG, init_lora_weights="olora"), "init_lora_weights = 'olora'"),
    (edit(CONFIG, layer_replication=[[0, 2], [0, 2]]), "layer_replication"),
    (edit(CONFIG, alora_invocation_tokens=[1]), "alora_invocation_tokens")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_adapters_that_would_give_wrong_numbers_are_refused(loaded: Loaded, adapter_folder: Path, tmp_path: Path,
                                                            change: Callable[[Path], object], reason: str) -> None:
    before = snapshot(loaded.model)
    folder = copied(adapter_folder, tmp_path / "damaged", change)
    with pytest.raises(UserError, match=reason), adapter_open(loaded, folder):
        pass
    assert_untouched(loaded.model, before)


def test_an_adapter_of_another_shape_is_refused_and_leaves_no_trace(loaded: Loaded, tmp_path: Path) -> None:
    before = snapshot(loaded.model)
    other = tiny_adapter(tiny_model(tmp_path / "wide", hidden_size=24), tmp_path / "adapter")
    with pytest.raises(UserError, match="loading state_dict"), adapter_open(loaded, other):
        pass
    assert_untouched(loaded.model, before)
