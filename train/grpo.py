"""GRPO on trl, with SFT steps between the RL steps; the only file that knows trl.

    step t is an SFT step where t is a multiple of ``sft_every``, else an RL step (t from 1)

    RL   (1/N) sum over completions i, tokens t of [-min(r A_i, clip(r, 1 - 0.2, 1 + 0.2) A_i) + penalty]
         A_i = (R_i - mean) / (std + 1e-4) over the completions of its prompt that have a reward
         r   = 1 in value, for every batch is learnt from once, right after it was sampled
         N   = tokens of the completions that have a reward
    SFT  the loss of ``train.trainer``: sum of (NLL + penalty) over the step / its target tokens

Both are sums over the whole step divided by its number of tokens, so accumulation changes nothing but rounding and no
loss is divided by the number of micro batches. A completion without a reward is in no mean, has no token in N and gets
no gradient.

trl counts micro batches in ``_step`` and samples anew at every ``accumulation``-th; SFT micro batches count too, so
that the phase stays that of the data. All prompts of a run are laid out beforehand in one order, with a place for every
step, so a checkpoint needs to know no more of the data than the step's number.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerState
from trl import GRPOConfig, GRPOTrainer

from curate.core.chat import Encoded
from curate.core.decoder import causal_lm, is_out_of_memory, window
from curate.core.errors import Exit, UserError
from curate.core.generate import stop_ids
from train import checkpoints
from train.adapters import save_adapter
from train.batches import collate
from train.defenses import Defense
from train.lesson import Lesson
from train.objective import Objective
from train.rewards import Rated
from train.trainer import KEPT_CHECKPOINTS, lr_factor


class _Places(torch.utils.data.Sampler[int]):
    """The places of all completions of a run, in order."""

    def __init__(self, places: Sequence[int]) -> None:
        self.places = places

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class RlTrainer(GRPOTrainer):
    """trl's trainer with our prompts, our SFT steps, our defences and a name for missing rewards.

    trl is told an index instead of a prompt, and never sees a row's text: prompts are encoded by ``core.chat`` alone.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, lesson: Lesson, folder: Path) -> None:
        if isinstance(causal_lm(model).get_output_embeddings(), BaseTunerLayer):
            raise UserError("The adapter has a part on the model's output head, which trl would not train.",
                            "Leave it out of --target-modules.")
        self.lesson = lesson
        self.prompts = lesson.prompts()
        names = Dataset.from_dict({"prompt": [str(k) for k in range(len(lesson.asked))]})
        super().__init__(model=model, reward_funcs=[_elsewhere], args=_arguments(lesson, folder),
                         train_dataset=names, processing_class=tokenizer)
        self.remove_callback(PrinterCallback)
        self.eos_token_ids = stop_ids(model, tokenizer)
        self.generation_kwargs["eos_token_id"] = self.generation_config.eos_token_id = self.eos_token_ids
        self.objective = Objective(model, lesson.defenses)
        self.on_step: Callable[[dict[str, Any]], None] = lambda record: None
        self.seconds_before = 0.0
        self._started = time.monotonic()
        self._scored: torch.Tensor | None = None
        self._clear()

    def _clear(self) -> None:
        self._rated: list[Rated] = []
        self._sums = {"nll": 0.0, "penalty": 0.0, "tokens": 0}

    def _send_telemetry(self) -> None:
        """Send nothing to anybody."""

    @property
    def step(self) -> int:
        """The step that is being taken, from 1."""
        return self.state.global_step + 1

    # Data: every micro batch of a step is handed all of its completions; trl picks its part

    def _get_train_sampler(self, dataset: Dataset | None = None) -> _Places:
        size = self.lesson.recipe.batch_size * self.lesson.recipe.accumulation
        places: list[int] = []
        for prompts in self.prompts:
            step = [k for k in prompts for _ in range(self.lesson.knobs.generations)] or [0] * size
            places += step * self.lesson.recipe.accumulation
        return _Places(places)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Set the learning rate by ``lr_factor``."""
        recipe = self.lesson.recipe
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda k: lr_factor(k, num_training_steps, recipe))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(self.lesson.asked[int(k)].ids) for k in prompts], None, {}

    # Steps

    def training_step(self, model: PeftModel, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Do one micro batch of an RL or an SFT step; the defences' contexts are open for sampling and learning."""
        with ExitStack() as stack:
            for defense in self.lesson.defenses:
                stack.enter_context(defense.around_forward(model))
            if self.lesson.knobs.kind(self.step) == "rl":
                loss = super().training_step(model, inputs, num_items_in_batch)
            else:
                loss = self._sft_step(model)
        if not math.isfinite(loss.item()):
            raise UserError(f"The loss became {loss.item()} in step {self.step}; nothing was saved.",
                            "Lower --lr, or use --dtype float32; a new --out, or --overwrite, starts again.",
                            Exit.BAD_DATA)
        return loss

    def _sft_step(self, model: PeftModel) -> torch.Tensor:
        """Learn from this micro batch's part of the step's rows, as ``MixTrainer`` does."""
        model.train()
        rows, size = self.lesson.sft_rows(self.step), self.lesson.recipe.batch_size
        n = sum(len(row.ids) - row.answer_start for row in rows)
        first = self._step % self.lesson.recipe.accumulation * size
        total, parts = self._losses(rows[first:first + size])
        for name, part in zip(("nll", "penalty"), parts.tolist(), strict=True):
            self._sums[name] += part / n
        self._sums["tokens"] += sum(len(row.ids) - row.answer_start for row in rows[first:first + size])
        loss = total / n
        self.accelerator.backward(loss)
        self._step += 1
        return loss.detach()

    def _losses(self, rows: Sequence[Encoded], **how: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the targets of ``rows`` cost and its parts; see ``Objective``."""
        batch = collate(rows, self.lesson.recipe.pack_tokens, window(self.model))["packed"]
        return self.objective(batch.to(self.args.device), **how)

    def _compute_loss(self, model: PeftModel, inputs: dict[str, Any]) -> torch.Tensor:
        """Return trl's loss and the penalties of defences on the completions that have a reward."""
        loss = super()._compute_loss(model, inputs)
        mask = inputs.get("tool_mask", inputs["completion_mask"]).bool()
        n = max(1, int(inputs["num_items_in_batch"]))
        self._sums["tokens"] += int(mask.sum())
        if not mask.any() or not any(type(d).row_penalty is not Defense.row_penalty for d in self.lesson.defenses):
            return loss
        penalties, parts = self._losses(_as_rows(inputs, mask), only_penalties=True)
        self._sums["penalty"] += parts[1].item() / n
        return loss + penalties / n

    # Rewards

    def _calculate_rewards(self, inputs: Any, prompts: list[str], completions: list[str],
                           completion_ids_list: list[list[int]]) -> torch.Tensor:
        """Return the rewards [completions, 1], NaN where one is missing; ``UserError`` where all of a step are."""
        rated = self.lesson.reward.rate([self.lesson.asked[int(k)].prompt for k in prompts], completions)
        self._rated += rated
        if all(one.value is None for one in rated):
            counts = ", ".join(f"{n} {status}" for status, n in Counter(one.status for one in rated).items())
            raise UserError(f"None of the {len(rated)} completions of step {self.step} has a reward ({counts}), so "
                            "there is nothing to learn from.", "Mend the reward, then type it again: it goes on from "
                            "the last checkpoint.", Exit.FAILURE_RATE)
        values = [math.nan if one.value is None else one.value for one in rated]
        rewards = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device)[:, None]
        self._scored = ~rewards[:, 0].isnan()
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """Sample and rate; tokens of completions without a reward are taken out of the loss and of its divisor."""
        batch = super()._generate_and_score_completions(inputs)
        assert self._scored is not None
        if not self._scored.all():
            batch["tool_mask"] = batch["completion_mask"] * self._scored[:, None]
            batch["num_items_in_batch"] = batch["tool_mask"].sum()
        return batch

    # Records

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record a step and tell ``on_step``."""
        if "loss" in logs:
            logs["record"] = self._record(logs)  # type: ignore[assignment]
            self._clear()
            self.on_step(logs["record"])  # type: ignore[arg-type]
        super().log(logs, start_time)

    def _record(self, logs: dict[str, float]) -> dict[str, Any]:
        step = self.state.global_step
        kind = self.lesson.knobs.kind(step)
        common = {"phase": "main", "step": step, "kind": kind, "lr": logs["learning_rate"],
                  "tokens": int(self._sums["tokens"]), "penalty_nats": self._sums["penalty"]}
        if kind == "sft":
            return {**common, "loss_nats": self._sums["nll"]}
        values = [one.value for one in self._rated if one.value is not None]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        return {**common, "reward": mean, "reward_std": spread, "loss": logs["loss"],
                "completions": dict(sorted(Counter(one.status for one in self._rated).items())),
                "prompts": [self.lesson.asked[k].prompt.example().id for k in self.prompts[step - 1]]}

    def records(self) -> list[dict[str, Any]]:
        """Return the record of every step so far, those before an interruption included."""
        return records_of(self.state)

    def seconds(self) -> float:
        """Return the training time so far, that before an interruption included."""
        return self.seconds_before + time.monotonic() - self._started

    # Checkpoints: as in ``train.trainer``, and without trl's model card

    def take_over(self, checkpoint: Path) -> None:
        """Restore adapter and record from a checkpoint of the last step, after which nothing is left to train."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def _save_checkpoint(self, model: PeftModel, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with checkpoints.writing(f"the checkpoint {folder}"):
            Trainer._save_checkpoint(self, model, trial)
            checkpoints.seal(folder, self.seconds())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        save_adapter(self.model, Path(output_dir or self.args.output_dir))


def records_of(state: TrainerState) -> list[dict[str, Any]]:
    """Return the records of the steps that a trainer's state remembers."""
    return [entry["record"] for entry in state.log_history if "record" in entry]


def learn(trainer: RlTrainer, checkpoint: tuple[Path, float] | None) -> list[dict[str, Any]]:
    """Train to the end, from ``checkpoint`` where there is one; return the record of every step.

    Raises ``UserError`` where memory runs out, the loss or the adapter is not finite, or rewards are missing.
    """
    trainer.seconds_before = checkpoint[1] if checkpoint else 0.0
    try:
        if checkpoint and int(checkpoint[0].name.rpartition("-")[2]) >= trainer.lesson.n_steps:
            trainer.take_over(checkpoint[0])
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint[0]) if checkpoint else None)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as err:
        if not is_out_of_memory(err):
            raise
        raise UserError("Out of memory.", "Halve --batch-size and double --accumulation (the same result), add "
                        "--gradient-checkpointing, or lower --max-new-tokens.", Exit.ENVIRONMENT) from err
    finally:
        vars(causal_lm(trainer.model)).pop("forward", None)
    if not all(torch.isfinite(p).all() for p in trainer.model.parameters() if p.requires_grad):
        raise UserError("The adapter's weights are not finite; it was not saved.",
                        "Lower --lr, or use --dtype float32, with --overwrite.", Exit.BAD_DATA)
    return trainer.records()


def _as_rows(inputs: dict[str, Any], mask: torch.Tensor) -> list[Encoded]:
    """Return the completions that have a reward as rows whose targets are their tokens."""
    rows = []
    for k in mask.any(1).nonzero()[:, 0].tolist():
        prompt = inputs["prompt_ids"][k][inputs["prompt_mask"][k].bool()].tolist()
        ids = (*prompt, *inputs["completion_ids"][k][mask[k]].tolist())
        rows.append(Encoded(ids, len(prompt), len(ids)))
    return rows


def _elsewhere(**given: Any) -> list[float]:
    """Stand for the reward, which ``RlTrainer`` asks itself."""
    raise AssertionError("rewards are asked for by RlTrainer")


def _arguments(lesson: Lesson, folder: Path) -> GRPOConfig:
    recipe, knobs = lesson.recipe, lesson.knobs
    arguments = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation, max_steps=lesson.n_steps,
        num_generations=knobs.generations, max_completion_length=knobs.max_new_tokens, temperature=knobs.temperature,
        top_p=knobs.top_p, beta=0.0, loss_type="dapo", scale_rewards="group", epsilon=0.2, num_iterations=1,
        disable_dropout=True, shuffle_dataset=False, learning_rate=recipe.lr, optim="adamw_torch",
        weight_decay=recipe.weight_decay, max_grad_norm=recipe.max_grad_norm, seed=recipe.seed,
        use_cpu=recipe.device == "cpu", bf16=False,
        gradient_checkpointing=recipe.gradient_checkpointing, logging_strategy="steps", logging_steps=1,
        logging_nan_inf_filter=False, save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 1, save_total_limit=KEPT_CHECKPOINTS, remove_unused_columns=False,
        dataloader_pin_memory=False, report_to="none", disable_tqdm=True)
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
