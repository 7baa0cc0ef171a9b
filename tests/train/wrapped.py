"""A tiny model with an adapter, batches laid out in different ways, and the float64 formula to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from curate.core.chat import Encoded, encode
from curate.core.decoder import head, hidden_states
from curate.core.pack import Packed, pack
from tests.fakes import tiny_rows, tiny_tokenizer
from train.defenses import Defense
from train.objective import head_losses


def encoded(n: int = 3) -> list[Encoded]:
    """Return B rows of different lengths."""
    return encode(tiny_tokenizer(), tiny_rows(n, "tune"), 120)


def wrapped(folder: Path, scale: float = 0.2, dtype: torch.dtype = torch.float32, **lora: Any) -> PeftModel:
    """Return a model with an adapter whose update is 0 (``scale`` 0) or far from it; the same one each time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    settings = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**{**settings, **lora})).train()
    generator = torch.Generator().manual_seed(4)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name or ("lora_B" in name and scale):
            parameter.data = (torch.randn(parameter.shape, generator=generator) * (scale or 0.2)).to(dtype)
    return adapted


def layouts(rows: Sequence[Encoded]) -> dict[str, Packed]:
    """Return the same rows in one sequence, and in a sequence each with padding to the right."""
    return {"packed": pack(rows, [list(range(len(rows)))]), "padded": pack(rows, [[k] for k in range(len(rows))])}


def penalised(defense: Defense, model: PeftModel, batch: Packed) -> torch.Tensor:
    """Return a defence's penalty on a batch, as the trainer asks for it."""
    with defense.around_forward(model):
        hidden = hidden_states(model, batch)
        row_penalty = defense.row_penalty(model, batch)
        found = [defense.penalty(model, batch, hidden),
                 row_penalty and head_losses(head(model), hidden, batch.targets, [row_penalty], True)[0]]
    return sum(value for value in found if value is not None)


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the gradients by parameter name, and forget them."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plain_states(model: PeftModel, rows: Sequence[Encoded]) -> list[dict[str, list[torch.Tensor]]]:
    """Return, for model and reference, logits [t, V] and states [t, H] that predict each row's t targets.

    From one plain pass of the library over a batch that is padded to the *left*: nothing here is packed.
    """
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[0] * (width - len(row.ids)) + list(row.ids) for row in rows])
    mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
              "output_hidden_states": True, "use_cache": False}
    found = []
    for out in (model(**inputs), _without_adapter(model, inputs)):
        spans = [(b, slice(width - len(row.ids) + row.answer_start - 1, width - 1)) for b, row in enumerate(rows)]
        found.append({"logits": [out.logits[b, span] for b, span in spans],
                      **{f"state {k}": [h[b, span] for b, span in spans] for k, h in enumerate(out.hidden_states)}})
    return found


def _without_adapter(model: PeftModel, inputs: dict[str, Any]) -> Any:
    with model.disable_adapter(), torch.no_grad():
        return model(**inputs)
