"""What is inside a causal language model, whatever its family: its body and head, and what may share a sequence.

Whether examples in one sequence are kept apart is not believed but tried, with two made-up ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch

from curate.core.attend import along, apart
from curate.core.chat import Encoded
from curate.core.errors import Exit, UserError
from curate.core.pack import Packed, pack

DYNAMIC = ("dynamic",)
"""The type of RoPE whose positions follow the longest row so far."""


def causal_lm(model: torch.nn.Module) -> torch.nn.Module:
    """Return the transformers model inside an adapter's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body(model: torch.nn.Module) -> torch.nn.Module:
    """Return the decoder: ids -> last hidden state."""
    lm = causal_lm(model)
    return lm.base_model if lm.base_model is not lm else lm.model


class FinishedHead(torch.nn.Module):
    """A head and what some models do to its logits, each by itself."""

    def __init__(self, layer: torch.nn.Module, finish: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.finish = layer, finish

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states."""
        return self.finish(self.layer(hidden))


def head(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module that turns hidden states into logits, scaled and capped as the model does it."""
    lm = causal_lm(model)
    settings, layer = lm.config.get_text_config(), lm.get_output_embeddings()
    family = str(getattr(settings, "model_type", ""))
    scale = 1.0
    if family.startswith("granite"):
        scale = 1 / settings.logits_scaling
    elif family.startswith("cohere"):
        scale = settings.logit_scale
    cap = getattr(settings, "final_logit_softcapping", None)
    if cap:
        return FinishedHead(layer, lambda logits: cap * torch.tanh(logits * (scale / cap)))
    return layer if scale == 1 else FinishedHead(layer, lambda logits: logits * scale)


def without_adapter(project: torch.nn.Module) -> torch.nn.Module:
    """Return what ``head`` returned as it was before an adapter wrapped its layer."""
    if isinstance(project, FinishedHead):
        return FinishedHead(without_adapter(project.layer), project.finish)
    return getattr(project, "base_layer", project)


def hidden_states(model: torch.nn.Module, batch: Packed) -> torch.Tensor:
    """Return the last hidden states that predict the targets: [N, H]."""
    decoder = body(model)
    if turn(model, DYNAMIC) < sys.maxsize:
        check_length(model, int(batch.position_ids.max()) + 2)   # the last token predicts nothing
    with along(decoder, batch.paths):
        out = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids,
                      attention_mask=_mask_for(decoder, batch.attention_mask), use_cache=False).last_hidden_state
    return out.reshape(-1, out.shape[-1])[batch.rows]


def _mask_for(decoder: torch.nn.Module, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return a mask as the attention of a decoder takes it: that called eager adds it, all others read it."""
    if mask is None or decoder.config.get_text_config()._attn_implementation != "eager":
        return mask
    dtype = decoder.get_input_embeddings().weight.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def window(model: torch.nn.Module) -> int:
    """Return how long a sequence may be that examples share: how many tokens back every layer can look at least.

    A mask of ours knows no windows, so sequences that need one are no longer than this; a longer example is alone in
    its sequence, where the model's own masks hold. Nor is it beyond ``turn``. 0 if the model cannot keep examples in
    one sequence apart.
    """
    if not keeps_apart(model):
        return 0
    settings = causal_lm(model).config.get_text_config()
    sizes = [getattr(settings, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min(turn(model), *(size for size in sizes if size), sys.maxsize)


def turn(model: torch.nn.Module, kinds: Sequence[str] = ("longrope", *DYNAMIC)) -> int:
    """Return the length beyond which a pass turns the positions of *all* its rows otherwise."""
    settings = causal_lm(model).config.get_text_config()
    rope = getattr(settings, "rope_parameters", None) or {}
    name = "original_max_position_embeddings"
    lengths = [one.get(name) or getattr(settings, name, None) or settings.max_position_embeddings
               for one in (rope, *rope.values()) if isinstance(one, dict) and one.get("rope_type") in kinds]
    return min(lengths, default=sys.maxsize)


def check_length(model: torch.nn.Module, longest: int) -> None:
    """Raise ``UserError`` (incompatible) where numbers of a row of ``longest`` tokens would depend on rows before it.

    A model with RoPE of the type ``dynamic`` remembers the longest row beyond its context, and positions follow it.
    """
    limit = turn(model, DYNAMIC)
    if longest > limit:
        raise UserError(f"A row has {longest} tokens. In this model (RoPE type 'dynamic') the numbers of rows beyond "
                        f"{limit} tokens depend on which rows came before.",
                        f"Leave them out with --max-tokens {limit}.", Exit.INCOMPATIBLE)


_KEEPS_APART: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def keeps_apart(model: torch.nn.Module) -> bool:
    """Whether a model computes two examples in one sequence as it does each alone; found out once, with two made up.

    Not so where states are handed on along the sequence (mamba, convolutions, linear attention), whatever the mask,
    nor where attention takes no mask of ours.
    """
    lm = causal_lm(model)
    if lm not in _KEEPS_APART:
        _KEEPS_APART[lm] = not any(isinstance(m, torch.nn.Conv1d) for m in body(lm).modules()) and _same_together(lm)
    return _KEEPS_APART[lm]


def _same_together(model: torch.nn.Module) -> bool:
    ids = [(7 * k * k + 3 * k + 5) % min(model.config.get_text_config().vocab_size, 512) for k in range(24)]
    two = [Encoded(tuple(ids[:14]), 6, 13, "ok"), Encoded(tuple(ids[14:]), 4, 9, "ok")]
    device, learning = next(model.parameters()).device, model.training
    if learning:
        model.eval()
    try:
        with torch.no_grad():
            alone = hidden_states(model, pack(two, [[0], [1]], device=device).to(device)).float()
            for along_paths in {False, apart(body(model))}:
                together = hidden_states(model, pack(two, [[0, 1]], device=device, along_paths=along_paths).to(device))
                far = (together.float() - alone).norm(dim=-1) / alone.norm(dim=-1).clamp_min(1e-9)
                if not far.mean() <= (1e-3 if together.dtype == torch.float32 else 0.1):
                    return False
    except Exception as err:
        if is_out_of_memory(err):
            raise
        return False
    finally:
        if learning:
            model.train()
    return True


def is_out_of_memory(err: BaseException) -> bool:
    """Whether an error says that there is no more memory, on whatever device."""
    if isinstance(err, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "not enough memory" in str(err) or "can't allocate memory" in str(err)
