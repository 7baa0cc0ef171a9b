"""Preventative steering: add a persona vector to hidden states in training, so that the weights need not learn it.

    h_l  <-  h_l + alpha * v[l]          at every position, for each l of ``layers``
    h_l  <-  h_l - (h_l . u) u           with ablate=true; u = v[l] / |v[l]|

v [L + 1, H] comes from ``train vector``; row l belongs to hidden state l, the output of ``layers[l - 1]`` (see
``train.hooks``). The vector keeps the length that it was extracted with. The hook is there in training only: the saved
adapter knows nothing of it.

Method: arXiv 2507.21509 (preventative steering). alpha: arXiv 2508.06249. Ablating in training: arXiv 2507.16795.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open

from curate.core.documents import ModelIdentity
from curate.core.errors import Exit, UserError
from curate.core.files import file_sha256
from train.defenses.moments import Defense, setting
from train.hooks import check_states, layers, project_out, steer

if TYPE_CHECKING:
    from peft import PeftModel

TENSOR, PROVENANCE, FORMAT = "vector", "safeset.persona", 1
DEPTH = 20 / 28
"""Share of the blocks below the default layer: layer 20 of the 28 of Qwen2.5-7B, where the method's authors steer."""


@dataclass
class Persona(Defense):
    """Preventative steering with a persona vector, in training only."""

    PAPER: ClassVar[str] = "arXiv 2507.21509; alpha 2508.06249"

    vector: str = setting("", "File that `train vector` wrote; needed.")
    alpha: float = setting(5.0, "Multiple of the vector that is added (the paper's).")
    layers: str = setting("", "Layers counted from 1, as in 20 or 16,20,24. Default: 20/28 of the blocks.")
    ablate: bool = setting(False, "Project the direction out of the states instead of adding it.")
    _vector: torch.Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the settings."""
        if not self.vector:
            raise UserError("The defence 'persona' needs a vector.", "Make one with `train vector`, then give "
                            "--defense persona:vector=FILE.")
        if not math.isfinite(self.alpha):
            raise UserError(f"persona: alpha is {self.alpha}, but must be a finite number.", "The paper's is 5.0.")
        if self.layers and not all(part.strip().isdecimal() for part in self.layers.split(",")):
            raise UserError(f"persona: layers is '{self.layers}', but must be whole numbers.", "For example layers=20, "
                            "or layers=16,20,24.")

    def check(self, base: ModelIdentity) -> dict[str, str]:
        """Refuse a vector that was extracted from another base; return the file's digest."""
        _, provenance = read_vector(Path(self.vector))
        made_from = provenance["base"]
        if made_from["weights"] != base.weights:
            raise UserError(f"{self.vector} was extracted from '{made_from['name']}' ({made_from['weights'][:16]}), "
                            f"not from '{base.name}' ({base.weights[:16]}).", "Extract one with `train vector` from "
                            "this base.", Exit.INCOMPATIBLE)
        return {"vector": file_sha256(Path(self.vector))}

    def chosen(self, model: torch.nn.Module) -> list[int]:
        """Return the layers that are steered."""
        if self.layers:
            return sorted({int(part) for part in self.layers.split(",")})
        return [default_layer(len(layers(model)))]

    @contextmanager
    def around_forward(self, model: PeftModel) -> Iterator[None]:
        """Steer, or ablate, the passes of a micro batch, a penalty's included."""
        if self._vector is None:
            self._vector, _ = read_vector(Path(self.vector))
        wanted = (len(layers(model)) + 1, model.config.get_text_config().hidden_size)
        if tuple(self._vector.shape) != wanted:
            raise UserError(f"{self.vector} is of the shape {tuple(self._vector.shape)}, but the model needs {wanted}.",
                            "Extract the vector from this base.", Exit.INCOMPATIBLE)
        chosen = self.chosen(model)
        check_states(model, chosen)
        rows = {layer: self._vector[layer] for layer in chosen}
        with project_out(model, rows) if self.ablate else steer(
                model, {layer: self.alpha * row for layer, row in rows.items()}):
            yield


def default_layer(n_blocks: int) -> int:
    """Return the layer that is steered where none is named."""
    return max(1, round(DEPTH * n_blocks))


def read_vector(path: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the vector, float32 [L + 1, H], and its provenance; ``UserError`` for a file that holds none."""
    if not path.is_file():
        raise UserError(f"There is no persona vector at {path}.", "Make one with `train vector`.")
    try:
        with safe_open(path, framework="pt") as file:
            provenance = dict(json.loads((file.metadata() or {})[PROVENANCE]))
            vector = file.get_tensor(TENSOR).float()
            _ = provenance["base"]["weights"], provenance["base"]["name"]
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as err:
        raise UserError(f"{path} is no persona vector: {str(err).strip().splitlines()[0] if str(err) else err!r}.",
                        "Make one with `train vector`.", Exit.BAD_DATA) from None
    if provenance.get("format") != FORMAT or vector.dim() != 2 or not bool(vector.isfinite().all()):
        raise UserError(f"{path} is no persona vector of format {FORMAT} with finite numbers.",
                        "Make it again with `train vector`.", Exit.BAD_DATA)
    return vector, provenance
