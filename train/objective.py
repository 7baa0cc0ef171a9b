"""What a micro batch costs, as one module; and that module in several processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from curate.core.model import plain_products
from curate.core.nll import HEAD_ROWS, head, hidden_states, rows_nll
from curate.core.pack import Packed
from train.defenses.moments import Defense, RowPenalty
from train.hooks import layers, share_reference
from train.world import World


class Objective(torch.nn.Module):
    """The sums over the targets of a micro batch of NLL and of penalties, in nats.

    All passes of a micro batch (the model's, the reference's, the head's) run inside this module's one forward pass,
    because what wraps a model for several processes acts when its forward pass begins and ends.
    """

    def __init__(self, model: PeftModel, defenses: Sequence[Defense] = ()) -> None:
        super().__init__()
        self.model = model
        self.defenses = tuple(defenses)
        share_reference(self.defenses)

    def forward(self, batch: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (NLL, penalties) of ``batch``."""
        hidden = hidden_states(self.model, batch)
        nll, penalty = head_losses(head(self.model), hidden, batch.targets, [
            add for d in self.defenses if (add := d.row_penalty(self.model, batch)) is not None])
        more = [p for d in self.defenses if (p := d.penalty(self.model, batch, hidden)) is not None]
        return nll, torch.stack([penalty, *more]).sum()


def head_losses(project: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor,
                penalties: Sequence[RowPenalty]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums over N targets of NLL and ``penalties``, from ``project(hidden)`` [N, V] in pieces.

    With penalties, a piece's logits are computed again in the backward pass instead of being kept.
    """
    if not penalties:
        nll = rows_nll(project, hidden, targets).sum()
        return nll, torch.zeros_like(nll)

    def piece(h: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = project(h).float().log_softmax(-1)
        nll = torch.nn.functional.nll_loss(log_p, targets[rows], reduction="sum")
        return nll, torch.stack([add(log_p, rows) for add in penalties]).sum()

    pieces = [slice(start, start + HEAD_ROWS) for start in range(0, max(1, len(targets)), HEAD_ROWS)]
    nll, penalty = zip(*(checkpoint(piece, hidden[rows], rows, use_reentrant=False) for rows in pieces), strict=True)
    return torch.stack(nll).sum(), torch.stack(penalty).sum()


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
