"""The adapter: put beside a base's weights, taken off again, written to disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import set_seed

from curate.core.decoder import causal_lm
from curate.core.errors import UserError, unknown
from curate.core.model import Loaded
from train.recipe import Recipe


@contextmanager
def adapter(loaded: Loaded, recipe: Recipe) -> Iterator[PeftModel]:
    """Give the base with a fresh adapter (float32, its first values decided by the seed); take it off afterwards."""
    set_seed(recipe.seed)
    names = recipe.target_modules
    config = LoraConfig(r=recipe.lora_r, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout,
                        use_rslora=recipe.rslora, task_type="CAUSAL_LM",
                        target_modules=names if names == "all-linear" else _layers(loaded.model, names),
                        exclude_modules=(_unread(loaded.model) or None) if names == "all-linear" else None)
    try:
        model = get_peft_model(loaded.model, config)
    except ValueError as err:
        raise UserError(f"No adapter for '{names}': {str(err).strip().splitlines()[0]}",
                        "Give --target-modules all-linear, or names of the base's layers.") from err
    model.peft_config["default"].base_model_name_or_path = recipe.base
    _recompute(causal_lm(model), recipe.gradient_checkpointing)
    try:
        yield model
    finally:
        _recompute(causal_lm(model), False)
        loaded.model = model.unload().eval()


def _unread(model: torch.nn.Module) -> list[str]:
    """Return the linear layers that text does not pass through, such as those of a vision tower: they learn nothing."""
    read = {id(module) for module in causal_lm(model).get_decoder().modules()}
    read.add(id(causal_lm(model).get_output_embeddings()))
    return [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and id(part) not in read]


def _layers(model: torch.nn.Module, names: str) -> list[str]:
    """Return names separated by commas; ``UserError`` for one that no layer has, which the library would pass over."""
    wanted = [name.strip() for name in names.split(",")]
    there = [name for name, _ in model.named_modules()]
    for name in wanted:
        if not name or not any(path == name or path.endswith(f".{name}") for path in there):
            raise unknown("layer of the base in --target-modules", name, sorted(
                {path.rpartition(".")[2] for path, part in model.named_modules() if isinstance(part, torch.nn.Linear)}))
    return wanted


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter's two files into ``folder``: the same adapter, the same bytes.

    The library's own ``save_pretrained`` adds a model card, and writes sets in an order that changes by process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = folder / "adapter_config.json"
    model.peft_config["default"].save_pretrained(folder)
    settings = {key: sorted(value) if key.endswith(("_modules", "_parameters")) and isinstance(value, list) else value
                for key, value in json.loads(config.read_bytes()).items()}
    config.write_text(json.dumps(settings | {"inference_mode": True}, indent=1, sort_keys=True) + "\n")


def _recompute(model: torch.nn.Module, on: bool) -> None:
    """Switch on or off that layers are computed again in the backward pass (named differently before 5.23)."""
    verb = "enable" if on else "disable"
    method = getattr(model, f"activation_checkpointing_{verb}", None)
    (method or getattr(model, f"gradient_checkpointing_{verb}"))()
