"""Training-time defences: small dataclasses whose fields are their settings, and the dict that names them.

Mixing safe rows in (interleaving) is not here: it is data, so it lives in the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from curate.core.errors import UserError, unknown
from train.data import MixRow

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from curate.core.pack import Packed


@dataclass
class Defense:
    """A defence overrides some of four moments of a run; here, each of them does nothing."""

    def examples(self, rows: Sequence[MixRow]) -> Sequence[MixRow]:
        """Return the rows to train on, one for each of ``rows`` and in their order; called before encoding."""
        return rows

    def around_forward(self, model: PeftModel) -> AbstractContextManager[None]:
        """Return a context that is open during a micro batch, from before its forward pass to after its backward pass.

        The backward pass is inside because with gradient checkpointing it runs the layers again. ``penalty`` runs
        inside too: hooks set here see the passes that a penalty makes of its own.
        """
        return nullcontext()

    def penalty(self, model: PeftModel, batch: Packed, hidden: torch.Tensor) -> torch.Tensor | None:
        """Return what to add to the loss: a scalar, the *sum* over the N target tokens of ``batch``, weight included.

        ``hidden`` [N, H] are the last hidden states that predict the targets, with their gradient; intermediate
        layers, captured in ``around_forward`` as [S, T, H], are picked by ``flatten(0, 1)[batch.rows]``. The reference
        is ``with model.disable_adapter()``. A sum, because the trainer divides it, like the loss, by the number of
        target tokens of the whole step.
        """
        return None

    def after(self, model: PeftModel) -> None:
        """Change the trained adapter in place, before it is saved."""


DEFENSES: Mapping[str, type[Defense]] = {}
"""What ``--defense NAME`` may name. Interleaving is missing on purpose: it is data, chosen with ``curate select``."""

PARSERS: Mapping[str, Any] = {"int": int, "float": float, "str": str,
                              "bool": lambda text: {"true": True, "false": False}[text.lower()]}


def parse(spec: str, known: Mapping[str, type[Defense]] = DEFENSES) -> Defense:
    """Return the defence of ``NAME[:KEY=VALUE,...]``; ``UserError`` for an unknown name or key, or a wrong value."""
    name, _, settings = spec.partition(":")
    if not known:
        raise UserError(f"Unknown defence '{name}': none is implemented yet.",
                        "Leave --defense out; safe rows are mixed in with `curate select`.")
    if name not in known:
        raise unknown("defence", name, known)
    kinds = {s.name: str(getattr(s.type, "__name__", s.type)) for s in fields(known[name]) if s.init}
    values: dict[str, Any] = {}
    for pair in filter(None, settings.split(",")):
        key, found, text = pair.partition("=")
        if key not in kinds:
            raise unknown(f"setting of the defence '{name}'", key, kinds)
        try:
            values[key] = PARSERS[kinds[key]](text)
        except (ValueError, KeyError):
            raise UserError(f"--defense {spec}: '{key}{found}{text}' is no {kinds[key]}.",
                            f"For example --defense {name}:{key}=VALUE.") from None
    return known[name](**values)
