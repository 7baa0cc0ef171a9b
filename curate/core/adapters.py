"""LoRA adapters: which kinds are taken, and opening one for a while without a trace in the model afterwards."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.core.errors import Exit, UserError
from curate.core.refs import readable_errors

if TYPE_CHECKING:
    import torch

    from curate.core.model import Loaded

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin a LoRA adapter that leave the base's weights alone; pissa, olora, corda and loftq rewrite them."""


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Return an adapter's configuration; ``UserError`` for what is no LoRA adapter in safetensors.

    Kinds are refused that change more of the base than they add to it, or that mean something else in a packed
    sequence: other adapters than LoRA, trained biases, replicated layers, base weights rewritten at the start.
    """
    config, weights = (folder / name for name in ADAPTER_FILES)
    if not weights.is_file() or not config.is_file():
        raise UserError(f"{folder} holds no adapter ({weights.name} and {config.name}).",
                        "Only safetensors adapters are read.", Exit.BAD_DATA)
    try:
        settings = dict(json.loads(config.read_bytes()))
    except (ValueError, TypeError, RecursionError) as err:
        raise UserError(f"{config} is no adapter configuration: {err}.", "Restore it, or train the run again.",
                        Exit.BAD_DATA) from None
    unusual = {"peft_type": settings.get("peft_type") != "LORA", "bias": settings.get("bias", "none") != "none",
               "init_lora_weights": settings.get("init_lora_weights", True) not in PLAIN_STARTS,
               **{key: bool(settings.get(key)) for key in
                  ("layer_replication", "megatron_config", "alora_invocation_tokens")}}
    key = next((key for key, refused in unusual.items() if refused), None)
    if key is not None:
        raise UserError(f"The adapter in {folder} has {key} = {settings.get(key)!r}, which is not supported.",
                        "Use a plain LoRA adapter (peft can convert pissa and olora ones when it saves them).",
                        Exit.INCOMPATIBLE)
    return settings


@contextmanager
def adapter_open(loaded: Loaded, folder: Path) -> Iterator[torch.nn.Module]:
    """Give the model with an adapter for the length of a ``with`` block; afterwards the base is as it was, bit for bit.

    In float32 the update is added to the weights (no cost per token) and the saved weights are put back. The adapter
    stays beside the weights in shorter formats, where adding would round the update away, and where the model uses an
    adapted weight in a second place as well, which learnt nothing (a head that is tied to the embeddings).
    """
    base = loaded.model
    before = dict(base.named_modules())
    uses = Counter(id(parameter) for _, parameter in base.named_parameters(remove_duplicate=False))
    saved: dict[str, torch.Tensor] = {}
    try:
        try:
            wrapped = _attached(base, folder)
            adapted = _linear(wrapped) if loaded.dtype == "float32" else None
            if adapted is not None and any(uses[id(before[name].weight)] > 1 for name in adapted):
                adapted = None
            if adapted is None:
                yield wrapped.eval()
                return
            for name, layer in adapted.items():     # one by one, so that no second copy of all updates is kept
                weight = before[name].weight
                saved[name] = weight.detach().clone()
                weight.data += layer.get_delta_weight(layer.active_adapters[0]).detach()
        finally:
            _put_back(base, before)
        yield base
    finally:
        for name, weight in saved.items():
            before[name].weight.data.copy_(weight)


def _attached(base: torch.nn.Module, folder: Path) -> Any:
    """Return ``base`` with the adapter beside its weights; every weight of the adapter must come from its file."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    adapter_settings(folder)
    with readable_errors(str(folder)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(base, folder, is_trainable=False)
        with safe_open(folder / ADAPTER_FILES[1], framework="pt") as file:
            missing = get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys() - set(file.keys())
    if missing:
        raise UserError(f"The adapter in {folder} has no weights for {min(missing)}.",
                        "It was made for another architecture, or saved in part: train it again.", Exit.INCOMPATIBLE)
    return wrapped


def _put_back(base: torch.nn.Module, before: dict[str, torch.nn.Module]) -> None:
    """Give ``base`` the very modules it had (peft's own ``unload`` leaves the modules that an adapter replaced)."""
    for name, module in before.items():
        if name and base.get_submodule(name) is not module:
            base.set_submodule(name, module)
    vars(base).pop("peft_config", None)


def _linear(wrapped: Any) -> dict[str, Any] | None:
    """Return every adapted linear layer, or None where the update of one cannot be added to a weight."""
    from peft.tuners.lora import Linear
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}
    for name, module in wrapped.get_base_model().named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return None
        if not hasattr(module, "lora_A"):
            continue
        if type(module) is not Linear or module.lora_variant or any(module.lora_bias.values()):
            return None
        found[name] = module
    return found
