"""What a micro batch costs, as one module; and that module in several processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from curate.core.decoder import head, hidden_states
from curate.core.model import plain_products
from curate.core.nll import HEAD_ROWS, rows_nll
from curate.core.pack import Packed
from train.defenses.moments import Defense, RowPenalty
from train.hooks import layers, share_reference
from train.world import World


class Objective(torch.nn.Module):
    """What the targets of a micro batch cost: the sum of NLL and penalties, in nats.

    All passes of a micro batch (the model's, the reference's, the head's) run inside this module's one forward pass,
    because what wraps a model for several processes acts when its forward pass begins and ends.
    """

    def __init__(self, model: PeftModel, defenses: Sequence[Defense] = ()) -> None:
        super().__init__()
        self.model = model
        self.defenses = tuple(defenses)
        share_reference(self.defenses)

    def forward(self, batch: Packed, only_penalties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what to minimise for ``batch``, and its two parts, NLL and penalties [2], without a gradient.

        With ``only_penalties`` the NLL is no part of what to minimise.
        """
        hidden = hidden_states(self.model, batch)
        loss, parts = head_losses(head(self.model), hidden, batch.targets, [
            add for d in self.defenses if (add := d.row_penalty(self.model, batch)) is not None], only_penalties)
        more = [p for d in self.defenses if (p := d.penalty(self.model, batch, hidden)) is not None]
        if more:
            extra = torch.stack(more).sum()
            loss, parts = loss + extra, parts + torch.stack([torch.zeros_like(extra), extra]).detach()
        return loss, parts


def head_losses(project: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor,
                penalties: Sequence[RowPenalty], only_penalties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum over N targets of NLL and ``penalties``, and both [2], from ``project(hidden)`` [N, V] in pieces.

    As in ``rows_nll``, a head that does not learn has its gradient worked out with the loss, so that the logits of the
    model, and of a reference in a penalty, are computed once; otherwise they are again in the backward pass.
    """
    if not penalties and not only_penalties:
        nll = rows_nll(project, hidden, targets).sum()
        return nll, torch.stack([nll.detach(), torch.zeros_like(nll)])

    def piece(h: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = project(h).float().log_softmax(-1)
        nll = torch.nn.functional.nll_loss(log_p, targets[rows], reduction="sum")
        penalty = torch.stack([add(log_p, rows) for add in penalties]).sum() if penalties else 0 * nll
        return (penalty if only_penalties else nll + penalty), torch.stack([nll, penalty]).detach()

    if hidden.requires_grad and not any(p.requires_grad for p in project.parameters()):
        return _AtOnce.apply(hidden, piece)
    losses, parts = zip(*(checkpoint(piece, hidden[rows], rows, use_reentrant=False) for rows in _slices(hidden)),
                        strict=True)
    return torch.stack(losses).sum(), torch.stack(parts).sum(0)


def _slices(hidden: torch.Tensor) -> list[slice]:
    return [slice(start, start + HEAD_ROWS) for start in range(0, max(1, len(hidden)), HEAD_ROWS)]


class _AtOnce(torch.autograd.Function):
    """The sum of what ``piece`` returns for pieces of ``hidden`` [N, H], its gradient kept as [N, H]."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor,
                piece: Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        """Return the sum of the losses, and of their parts, which have no gradient."""
        losses, parts, slopes = [], [], []
        for rows in _slices(hidden):
            with torch.enable_grad():
                h = hidden[rows].detach().requires_grad_()
                loss, part = piece(h, rows)
                slopes += torch.autograd.grad(loss, h)
            losses.append(loss.detach())
            parts.append(part)
        ctx.save_for_backward(torch.cat(slopes))
        both = torch.stack(losses).sum(), torch.stack(parts).sum(0)
        ctx.mark_non_differentiable(both[1])
        return both

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Scale the gradient by what the sum counts in the loss."""
        slopes, = ctx.saved_tensors
        return (slopes * grad).to(slopes.dtype), None


def in_parallel(objective: Objective, world: World, device: torch.device) -> torch.nn.Module:
    """Return what to call in each of several processes: it averages the adapter's gradients over them.

    The base is the same in all of them, so nothing of it is sent; with ``world.shards`` it is split first.
    """
    if world.size == 1:
        return objective
    if world.shards:
        _split(objective, world, device)
    objective._ddp_params_and_buffers_to_ignore = [
        *(name for name, p in objective.named_parameters() if not p.requires_grad),
        *(name for name, _ in objective.named_buffers())]
    return DistributedDataParallel(objective)


def _split(objective: Objective, world: World, device: torch.device) -> None:
    """Split the frozen weights over the processes and put them on ``device``, block by block; the adapter stays whole.

    A block is put together for its forward pass and again for its backward pass; what is in no block (embeddings, last
    norm, head) for the length of both.
    """
    plain_products(objective.model, device)
    adapter = {parameter for parameter in objective.parameters() if parameter.requires_grad}
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (world.size,))
    for module in (*layers(objective.model), objective):
        fully_shard(module, mesh=mesh, ignored_params=adapter)
