"""Several processes that train one adapter together: who they are, who writes, what is split.

    adapter       whole in every process; gradients are averaged (``DistributedDataParallel``)
    base          whole in every process, or with ``shard`` split over them (FSDP 2): it is frozen, so it has neither
                  gradients nor optimiser states, and checkpoints and results are those of one process
    rows          each process works on its share of every step's rows (``train.batches``)
    files         are written by the first process, in a folder that all of them see
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from curate.core import processes
from curate.core.errors import Exit, UserError

T = TypeVar("T")

REFUSED = {"FSDP_VERSION": ("1", "fsdp_version: 2"), "FSDP_OFFLOAD_PARAMS": ("true", "fsdp_offload_params: false"),
           "FSDP_ACTIVATION_CHECKPOINTING": ("true", "fsdp_activation_checkpointing: false, and `train run "
                                             "--gradient-checkpointing`")}
"""Settings of accelerate's that would change how we split the base: the value we cannot follow, and what to give."""


@dataclass(frozen=True)
class World:
    """This process's place among those that train together."""

    rank: int = 0
    size: int = 1
    shards: bool = False
    """Whether the base's weights are split over the processes."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``value`` (in main memory) over all processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def once(self, work: Callable[[], T]) -> T:
        """Return, in every process, what ``work`` returns in the first; its ``UserError`` ends all of them."""
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        failure = None
        if self.first:
            try:
                told[0] = work()
            except UserError as err:
                failure, told[1] = err, int(err.exit_code)
        dist.broadcast_object_list(told)
        if failure is not None:
            raise failure
        if told[1] is not None:
            raise SystemExit(told[1])
        return told[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Turn the loss of another process into a ``UserError`` (environment)."""
        try:
            yield
        except RuntimeError as err:
            if self.size == 1 or not (isinstance(err, dist.DistError) or "gloo" in str(err).lower()):
                raise
            raise UserError("Another process of this run has ended.", "Its own error is above; the same launch goes on "
                            "from the last checkpoint.", Exit.ENVIRONMENT) from err


def join(device: str, shard: bool = False) -> World:
    """Take this process's place among those that were started with it; may be called again.

    On GPUs each process takes the one with its local number. Raises ``UserError`` for settings of accelerate's that
    cannot be followed.
    """
    shards = asked_to_shard() or shard
    if processes.count() == 1:
        return World()
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return World(processes.rank(), processes.count(), shards)


@cache
def asked_to_shard() -> bool:
    """Return whether accelerate was asked for FSDP, and take the request from it.

    The splitting is our own because accelerate's would also split the adapter, write the whole base into every
    checkpoint, and not run on CPUs, where it is tested. Formats are a matter of ``--dtype``.
    """
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError("Training with DeepSpeed is not supported.", "Launch with DDP or FSDP, see docs/training.md.")
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    for name, (value, instead) in REFUSED.items():
        if os.environ.get(name, "").lower() == value:
            raise UserError(f"{name}={value} of accelerate's configuration is not supported.", f"Give {instead}; "
                            "docs/accelerate-fsdp.yaml is a configuration that works.")
    return True
