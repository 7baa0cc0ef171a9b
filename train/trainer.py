"""The training loop: packed batches through the shared forward pass, loss per target token, defences called.

loss of a step = sum over its target tokens of (NLL + penalties) / number of its target tokens

where a step is ``accumulation`` micro batches, in one process or shared by several, and a target is a token of an
answer or its end of turn. So how rows are cut into micro batches and processes changes nothing but rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments

from curate.core.attend import along, apart
from curate.core.chat import Encoded
from curate.core.decoder import body, check_length, is_out_of_memory, turn, window
from curate.core.errors import Exit, UserError
from curate.core.terminal import progress
from train import checkpoints
from train.adapters import save_adapter
from train.batches import Batch, Shares, collate, schedule, without_targets
from train.defenses.moments import Defense
from train.objective import Objective, in_parallel
from train.recipe import Recipe
from train.world import World

KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Step:
    """One optimiser step as it was taken: losses in nats per target token, ``tokens`` trained on so far."""

    step: int
    tokens: int
    loss_nats: float
    penalty_nats: float
    lr: float


def lr_factor(step: int, n_steps: int, recipe: Recipe) -> float:
    """Return the share of ``lr`` that step ``step`` of ``n_steps`` (from 0) is taken with; above 0 in every step.

    It rises in equal parts over w = ceil(warmup_frac * n_steps) steps, is 1 at step w, and then falls towards 0 at
    ``n_steps`` (linear, cosine) or stays (constant). The libraries' own warm-up begins at 0: a step for nothing.
    """
    warmup = min(math.ceil(recipe.warmup_frac * n_steps), n_steps - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    rest = max(0.0, (n_steps - step) / (n_steps - warmup))
    return {"constant": 1.0, "linear": rest, "cosine": (1 - math.cos(math.pi * rest)) / 2}[recipe.schedule]


class MixTrainer(Trainer):
    """A ``transformers.Trainer`` over packed rows, in their order, that calls the moments of defences."""

    loss_is_scaled_for_ga = True

    def __init__(self, model: PeftModel, rows: Sequence[Encoded], recipe: Recipe, folder: Path,
                 defenses: Sequence[Defense] = (), world: World = World()) -> None:
        self.plan = schedule(rows, recipe)
        self.recipe, self.defenses, self.world = recipe, defenses, world
        shortest, room = min(rows, key=lambda row: len(row.ids)), (recipe.pack_tokens, window(model))
        longest = max(len(row.ids) for row in rows)
        check_length(model, longest)
        if recipe.batch_size > 1 and len(shortest.ids) <= turn(model) < longest:
            raise UserError(f"Rows of up to {turn(model)} tokens and longer ones change each other's positions in this "
                            "model when they share a pass.", f"Use --batch-size 1, or --max-tokens {turn(model)}.",
                            Exit.INCOMPATIBLE)
        super().__init__(
            model=model, args=_arguments(recipe, folder, self.plan.n_steps, world), train_dataset=list(rows),
            data_collator=lambda some: collate(some, *room, self.along_paths) if some else without_targets(shortest))
        self.along_paths = self.args.device.type == "cpu" and apart(body(model))
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        self.objective = Objective(model, defenses)
        self.on_step: Callable[[Step], None] = lambda step: None
        self.seconds_before = 0.0
        self._started = time.monotonic()
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        if world.rank:
            torch.manual_seed(recipe.seed + world.rank)

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's micro batches."""
        return DataLoader(self.train_dataset, batch_sampler=Shares(len(self.train_dataset), self.recipe, self.world),
                          collate_fn=self.data_collator)

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        if not self.world.shards:
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return in_parallel(self.objective, self.world, self.args.device) if model is self.model else model

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Set the learning rate by ``lr_factor``."""
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer,
                                     lambda step: lr_factor(step, num_training_steps, self.recipe))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int,
                          device: torch.device) -> tuple[list[Batch], int]:
        """Return this process's micro batches of one step, and how many targets the step has in all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        n_targets = torch.tensor(sum(len(batch["packed"].targets) for batch in batches))
        return batches, int(self.world.sum(n_targets))

    def training_step(self, model: torch.nn.Module, inputs: Batch,
                      num_items_in_batch: int | None = None) -> torch.Tensor:
        """Do one micro batch, with the defences' contexts open, and attention as it is in case blocks run again."""
        with ExitStack() as stack:
            stack.enter_context(along(body(self.model), inputs["packed"].paths))
            for defense in self.defenses:
                stack.enter_context(defense.around_forward(self.model))
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: torch.nn.Module, inputs: Batch, return_outputs: bool = False,
                     num_items_in_batch: int | None = None) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
        """Return (sum of NLL + penalties) / ``num_items_in_batch``, the targets of the whole step in all processes.

        ``model`` is ``self.objective``, or what averages its gradients over n processes: hence the factor n.
        """
        batch = inputs["packed"].to(self.args.device)
        total, parts = model(batch)
        n = len(batch.targets) if num_items_in_batch is None else num_items_in_batch
        self._sums += parts.double() / n
        loss = self.world.size * total / n
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record a step's loss per token, without and with penalties; ``UserError`` for one that is not finite.

        The loop calls this after every step, before a checkpoint is written.
        """
        if "loss" in logs:
            loss, penalty = self.world.sum(self._sums.cpu()).tolist()
            self._sums.zero_()
            if not math.isfinite(loss + penalty):
                raise UserError(f"The loss became {loss + penalty} in step {self.state.global_step}; nothing was "
                                "saved.", "Lower --lr, raise --warmup-frac, or use --dtype float32; a new --out, or "
                                "--overwrite, starts again.", Exit.BAD_DATA)
            logs |= {"loss_nats": loss, "penalty_nats": penalty}
            self.on_step(self._step(self.state.global_step, logs))
        super().log(logs, start_time)

    def take_over(self, checkpoint: Path) -> None:
        """Restore adapter and record from a checkpoint of the last step, after which nothing is left to train."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def steps(self) -> list[Step]:
        """Return every step so far, those before an interruption included."""
        return [self._step(entry["step"], entry) for entry in self.state.log_history if "loss_nats" in entry]

    def seconds(self) -> float:
        """Return the training time so far, that before an interruption included."""
        return self.seconds_before + time.monotonic() - self._started

    def _step(self, step: int, logs: dict[str, float]) -> Step:
        return Step(step, self.plan.upto(self.plan.targets, step), logs["loss_nats"], logs["penalty_nats"],
                    logs["learning_rate"])

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with checkpoints.writing(f"the checkpoint {folder}"):
            super()._save_checkpoint(model, trial)
            self.world.wait()
            if self.world.first:
                checkpoints.seal(folder, self.seconds())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.world.first:
            save_adapter(self.model, Path(output_dir or self.args.output_dir))


def train(trainer: MixTrainer, label: str, checkpoint: tuple[Path, float] | None) -> list[Step]:
    """Train to the end, from ``checkpoint`` where there is one, with progress on the terminal; return every step.

    Raises ``UserError`` where memory runs out or the loss is not finite.
    """
    steps = trainer.plan
    before = int(checkpoint[0].name.rpartition("-")[2]) if checkpoint else 0
    trainer.seconds_before = checkpoint[1] if checkpoint else 0.0
    if checkpoint and before >= steps.n_steps:
        trainer.take_over(checkpoint[0])
    else:
        done = [steps.upto(steps.tokens, step) for step in range(steps.n_steps + 1)]
        with progress(label, done[-1] - done[before], "tokens") as state:
            trainer.on_step = lambda step: state.advance(
                done[step.step] - done[step.step - 1], f"step {step.step}/{steps.n_steps} loss {step.loss_nats:.3f}")
            _train(trainer, str(checkpoint[0]) if checkpoint else None)
    return trainer.steps()


def finish(model: PeftModel, defenses: Sequence[Defense]) -> None:
    """Let the defences change the trained adapter; ``UserError`` where it is not finite then."""
    for defense in defenses:
        defense.after(model)
    if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
        raise UserError("The adapter's weights are not finite; it was not saved.",
                        "Lower --lr, or use --dtype float32, with --overwrite.", Exit.BAD_DATA)


def _train(trainer: MixTrainer, checkpoint: str | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as err:
        if not is_out_of_memory(err):
            raise
        raise UserError("Out of memory.", "Halve --batch-size and double --accumulation (the same result), add "
                        "--gradient-checkpointing, or lower --max-tokens.", Exit.ENVIRONMENT) from err


def _arguments(recipe: Recipe, folder: Path, n_steps: int, world: World) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation // world.size, num_train_epochs=recipe.epochs,
        max_steps=n_steps, learning_rate=recipe.lr, optim="adamw_torch", weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm, seed=recipe.seed, use_cpu=recipe.device == "cpu",
        logging_strategy="steps", logging_steps=1, logging_nan_inf_filter=False,
        save_strategy="steps" if recipe.save_every else "no", save_steps=recipe.save_every or 1,
        save_total_limit=KEPT_CHECKPOINTS, remove_unused_columns=False, dataloader_pin_memory=False,
        report_to="none", disable_tqdm=True)
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
