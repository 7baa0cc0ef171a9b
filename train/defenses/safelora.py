"""SafeLoRA: after training, project the least aligned updates onto the subspace from unaligned to aligned model.

For a linear layer with update s B A (s the adapter's scale, B [out, r]) and V = W_aligned - W_unaligned [out, in]:

    P = V V^T / |V|_F                                            projection=paper
    P = U U^T, U the fewest left singular vectors of V that      projection=orthogonal
        hold the share ``energy`` of |V|_F^2

    c = <P B A, B A> / (|P B A| |B A|)                           how aligned the update is, 0 to 1
    B <- P B      for the k layers with the lowest c, or where c <= tau

P [out, out] never exists: P B = V (V^T B) / |V|, and <X A, Y A> = sum((X^T Y) * (A A^T)), r x r. Nothing depends on s.

The scale caveat: the paper's P is no projector. Its eigenvalues are sigma_i^2 / |V|_F, so it also multiplies the update
by a number of the size of |V|_F, usually well below 1. ``orthogonal`` keeps what lies in the subspace as it is; with
energy=1 the subspace is V's whole column space, which for a V of full rank is everything, and nothing changes.

Method: arXiv 2405.16833. Code: https://github.com/IBM/SafeLoRA (model.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from curate.core.decoder import causal_lm
from curate.core.documents import ModelIdentity
from curate.core.errors import Exit, UserError, unknown
from curate.core.identity import weights_digest
from curate.core.model import load_weights
from curate.core.terminal import say
from train.defenses.moments import Defense, setting

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import Linear

PROJECTIONS = ("paper", "orthogonal")
TAU, ENERGY = 0.5, 0.9


@dataclass
class SafeLora(Defense):
    """After training, project the least aligned updates onto the aligned-minus-unaligned subspace."""

    PAPER: ClassVar[str] = "arXiv 2405.16833"

    base: str = setting("", "The unaligned model that the base was made from: a folder or hub id; needed.")
    k: int = setting(0, "Project the k least aligned layers; 0 decides by tau.")
    tau: float = setting(TAU, "Project layers whose update's cosine with its projection is at most this.")
    projection: str = setting("paper", "paper: V V^T / |V|, which also scales; orthogonal: a true projector.")
    energy: float = setting(ENERGY, "With projection=orthogonal: share of |V|^2 that the subspace holds.")

    def __post_init__(self) -> None:
        """Check the settings."""
        if not self.base:
            raise UserError("The defence 'safelora' needs the unaligned model that the base was made from.",
                            "For example --defense safelora:base=Qwen/Qwen2.5-7B.")
        if self.projection not in PROJECTIONS:
            raise unknown("projection of the defence 'safelora'", self.projection, PROJECTIONS)
        if self.k < 0 or (self.k and self.tau != TAU):
            raise UserError(f"safelora: k={self.k} and tau={self.tau} do not go together.",
                            "Give k=N of at least 1, or tau, not both.")
        if not -1 <= self.tau <= 1 or not 0 < self.energy <= 1:
            raise UserError(f"safelora: tau={self.tau} and energy={self.energy} are out of range.",
                            "tau is a cosine from -1 to 1, energy a share above 0 and up to 1.")
        if self.energy != ENERGY and self.projection != "orthogonal":
            raise UserError("safelora: energy has no effect on the paper's projection.", "Add projection=orthogonal.")

    def check(self, base: ModelIdentity) -> dict[str, str]:
        """Refuse the aligned model itself as the unaligned one; return the digest of its weights."""
        weights = weights_digest(self.base)
        if weights == base.weights:
            raise UserError(f"safelora: '{self.base}' is the very model that is trained, so there is no direction of "
                            "alignment.", "Give the model before alignment, such as Qwen/Qwen2.5-7B for "
                            "Qwen2.5-7B-Instruct.", Exit.INCOMPATIBLE)
        return {"base": weights}

    def after(self, model: PeftModel) -> None:
        """Load the unaligned model (in main memory, for as long as this takes) and project; say what was done."""
        adapted = list(adapted_layers(model))
        dtype = str(adapted[0][1].weight.dtype).removeprefix("torch.") if adapted else "float32"
        unaligned = load_weights(self.base, dtype, "cpu")
        cosines: dict[str, float] = {}
        projections: dict[str, torch.Tensor] = {}
        for name, layer in adapted:
            a, b = factors(layer)
            projections[name] = project(b, difference(name, layer, unaligned),
                                        self.energy if self.projection == "orthogonal" else None)
            if (cosine := alignment(projections[name], b, a)) is not None:
                cosines[name] = cosine
        chosen = select(cosines, self.k, self.tau)
        for name, layer in adapted:
            if name in chosen:
                layer.lora_B[layer.active_adapters[0]].weight.data.copy_(projections[name])
        _report(len(adapted), cosines, chosen)
        if others := sum(bool(getattr(m, "lora_A", None)) for m in causal_lm(model).modules()) - len(adapted):
            say(f"safelora: {others} adapted weights of experts are no layers of their own and stay as they are.")


def adapted_layers(model: PeftModel) -> Iterator[tuple[str, Linear]]:
    """Yield the adapted linear layers with their names in the bare model.

    Embeddings with an adapter are left out, and so are weights that are no layer's (of experts in one tensor).
    """
    from peft.tuners.lora.layer import ParamWrapper

    for name, module in causal_lm(model).named_modules():
        if getattr(module, "lora_A", None) and not isinstance(module, ParamWrapper):
            yield name, module


def factors(layer: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [r, in] and B [out, r] of a layer, float32."""
    name = layer.active_adapters[0]
    return layer.lora_A[name].weight.data.float(), layer.lora_B[name].weight.data.float()


def difference(name: str, layer: Linear, unaligned: torch.nn.Module) -> torch.Tensor:
    """Return V = W_aligned - W_unaligned of a layer, float32 [out, in] on the layer's device; biases play no part."""
    aligned = layer.get_base_layer().weight.data
    try:
        other = unaligned.get_submodule(name).weight.data
    except AttributeError:
        other = None
    if other is None or other.shape != aligned.shape:
        raise UserError(f"safelora: the unaligned model has no layer {name} of the shape {tuple(aligned.shape)}.",
                        "Give the very model that the base was made from; the trained adapter is in the last "
                        "checkpoint, so a rerun only repeats this step.", Exit.INCOMPATIBLE)
    v = aligned.float() - other.to(aligned.device).float()
    return v.T if layer.fan_in_fan_out else v


def project(b: torch.Tensor, v: torch.Tensor, energy: float | None = None) -> torch.Tensor:
    """Return P B [out, r] for B [out, r] and V [out, in]: the paper's P, or with ``energy`` the orthogonal one.

    For V = 0, where no direction is aligned, that is 0.
    """
    if energy is None:
        norm = v.norm()
        return v @ (v.T @ b) / norm if norm > 0 else torch.zeros_like(b)
    u, sigma, _ = torch.linalg.svd(v, full_matrices=False)
    shares = sigma.double().square().cumsum(0) / sigma.double().square().sum()
    rank = int((shares < energy * (1 - 1e-12)).sum()) + 1 if sigma[0] > 0 else 0
    u = u[:, :min(rank, int((sigma > sigma[0] * max(v.shape) * torch.finfo(sigma.dtype).eps).sum()))]
    return u @ (u.T @ b)


def alignment(projected: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> float | None:
    """Return the cosine between P B A and B A, from r x r products; None where one of them is 0."""
    gram = (a @ a.T).double()

    def inner(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x.T @ y).double() * gram).sum()

    squares = inner(projected, projected) * inner(b, b)
    return (inner(projected, b) / squares.sqrt()).item() if squares > 0 else None


def select(cosines: dict[str, float], k: int, tau: float) -> set[str]:
    """Return the layers to project: the ``k`` lowest cosines (ties by name), or for k = 0 those of at most ``tau``."""
    if k:
        return set(sorted(cosines, key=lambda name: (cosines[name], name))[:k])
    return {name for name, cosine in cosines.items() if cosine <= tau}


def _report(n_layers: int, cosines: dict[str, float], chosen: set[str]) -> None:
    if not cosines:
        say(f"safelora: none of {n_layers} layers has both an update and a direction of alignment; nothing changed.")
        return
    low, high = min(cosines.values()), max(cosines.values())
    without = f", {n_layers - len(cosines)} without a cosine" if len(cosines) < n_layers else ""
    say(f"safelora: projected {len(chosen)} of {n_layers} layers (cosines {low:.3f} to {high:.3f}{without}).")
