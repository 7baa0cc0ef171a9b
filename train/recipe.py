"""What one run is, apart from its data: base model, adapter, optimiser, defences.

The paper's values are rank-stabilised LoRA with r = 32 and alpha = 64, and a learning rate of 1e-4; all others are
ours (the paper's are not in our sources), kept close to what the model libraries do by default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from curate.core.errors import Exit, UserError, unknown

LIMITS: Mapping[str, tuple[float, float]] = {
    "lora_r": (1, 4096), "lora_alpha": (1e-9, 1e9), "lora_dropout": (0, 0.99), "lr": (1e-12, 1e3),
    "epochs": (1, 10**6), "batch_size": (1, 10**6), "accumulation": (1, 10**6), "warmup_frac": (0, 1),
    "weight_decay": (0, 1e3), "max_grad_norm": (0, 1e9), "seed": (0, 2**32 - 1), "max_tokens": (8, 2**24),
    "pack_tokens": (8, 2**24), "save_every": (0, 10**9), "limit_steps": (0, 10**9),
    "steps": (0, 10**9), "generations": (2, 10**4), "temperature": (1e-3, 1e3), "top_p": (1e-6, 1),
    "max_new_tokens": (1, 2**20), "warmup_rows": (0, 10**9), "warmup_lr": (1e-12, 1e3), "warmup_epochs": (1, 10**6),
    "sft_every": (0, 10**9),
}
"""Smallest and largest value of every number."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "schedule": ("linear", "cosine", "constant"),
    "dtype": ("auto", "float32", "bfloat16"), "device": ("auto", "cpu", "cuda"),
    "sft_rows": ("safe", "finetune", "all"),
}
"""Possible words; float16 is missing because its gradients would need scaling."""

KINDS = {tuple: "a list of texts", bool: "true or false", int: "a whole number", float: "a number", str: "a text"}

SAME_RESULT = ("device", "save_every", "gradient_checkpointing", "shard")
"""Knobs that do not decide what is learnt: two recipes that differ only here describe the same run."""


def _knob(default: Any, about: str) -> Any:
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run but its rows. Checked when made: ``UserError`` names the knob and what it takes.

    From the paper: ``lora_r``, ``lora_alpha``, ``rslora``, ``lr``. Ours: all others.
    """

    base: str = _knob("", "Model to train: smollm2, a folder, or a hub id[@revision].")
    lora_r: int = _knob(32, "Rank of the adapter (the paper's).")
    lora_alpha: float = _knob(64.0, "Scale of the adapter (the paper's).")
    lora_dropout: float = _knob(0.0, "Dropout before the adapter, 0 to 1.")
    rslora: bool = _knob(True, "Scale by alpha / sqrt(r) instead of alpha / r (the paper's).")
    target_modules: str = _knob("all-linear", "Layers with an adapter: all-linear, or names like q_proj,v_proj.")
    lr: float = _knob(1e-4, "Highest learning rate (the paper's).")
    epochs: int = _knob(1, "Passes over the mix, each in the manifest's order.")
    batch_size: int = _knob(8, "Rows in one forward and backward pass of one process.")
    accumulation: int = _knob(1, "Passes of each process per optimiser step; the loss is per token over all of them.")
    warmup_frac: float = _knob(0.05, "Share of the steps in which the learning rate rises.")
    schedule: str = _knob("linear", "Learning rate after the warm-up.")
    weight_decay: float = _knob(0.01, "AdamW's weight decay.")
    max_grad_norm: float = _knob(1.0, "Gradients are clipped to this norm; 0 does not clip.")
    seed: int = _knob(0, "Decides the adapter's first values and dropout.")
    dtype: str = _knob("auto", "Format of the base; the adapter is float32. auto: as in curate score.")
    device: str = _knob("auto", "Where to compute; choose among several GPUs with CUDA_VISIBLE_DEVICES.")
    max_tokens: int = _knob(2048, "Longer rows get the status too_long and are left out; nothing is cut.")
    pack_tokens: int = _knob(256, "Rows are packed into sequences of about this many tokens; on a CPU all into one.")
    save_every: int = _knob(50, "Steps between checkpoints; 0 keeps none, so an interrupted run starts again.")
    limit_steps: int = _knob(0, "Stop after so many steps, the schedule shortened to them; 0 does not.")
    gradient_checkpointing: bool = _knob(False, "Compute activations twice to save memory.")
    shard: bool = _knob(False, "With several processes, split the base over them (FSDP); the same result.")
    load_in_4bit: bool = _knob(False, "Keep the base in 4 bits (NF4; needs the extra quant); the adapter is float32.")
    defenses: tuple[str, ...] = _knob((), "Training-time defences, NAME[:KEY=VALUE,...].")

    def __post_init__(self) -> None:
        """Check types and ranges; whole numbers are taken for floats, lists for tuples."""
        for knob in fields(self):
            object.__setattr__(self, knob.name, _checked(knob.name, getattr(self, knob.name), type(knob.default)))
        if not self.base:
            raise UserError("The recipe names no base model.", "Give one with --base, for example --base smollm2.")

    def as_json(self) -> dict[str, Any]:
        """Return all knobs, for the run card."""
        return {**asdict(self), "defenses": list(self.defenses)}


RL_DEFAULTS: Mapping[str, Any] = {"lr": 5e-6, "accumulation": 4}
"""What ``train rl`` has other defaults for: the paper's learning rate, and ours for 32 completions a step."""

RL_UNUSED = {"epochs": "Give --steps.", "limit_steps": "Give --steps.",
             "lora_dropout": "Completions are to be sampled from the very model that learns from them."}
"""Knobs of a recipe that ``train rl`` does not have, and what to do instead or why."""


@dataclass(frozen=True)
class RlKnobs:
    """What a reinforcement-learning run has besides a recipe. Checked when made, like a ``Recipe``.

    From the paper: ``generations``, ``temperature``, ``top_p``, ``warmup_rows``, and ``warmup_lr`` as that of its
    fine-tuning. Ours: all others.
    """

    steps: int = _knob(0, "Optimiser steps after the warm-up, SFT steps included; 0: one pass over the prompts.")
    generations: int = _knob(4, "Completions of each prompt, compared with one another (the paper's).")
    temperature: float = _knob(0.8, "Of sampling (the paper's).")
    top_p: float = _knob(0.9, "Probability of the nucleus that completions are sampled from (the paper's).")
    max_new_tokens: int = _knob(256, "Longer completions are cut there.")
    warmup_rows: int = _knob(100, "Fine-tuning rows of the mix that are learnt first; 0 none (the paper's).")
    warmup_lr: float = _knob(1e-4, "Highest learning rate of the warm-up (the paper's of fine-tuning).")
    warmup_epochs: int = _knob(1, "Passes over the rows of the warm-up.")
    sft_every: int = _knob(0, "Every so many steps is an SFT step on rows of the mix; 2 alternates, 0 has none.")
    sft_rows: str = _knob("safe", "Rows of SFT steps, in the mix's order.")

    def __post_init__(self) -> None:
        """Check types and ranges."""
        for knob in fields(self):
            object.__setattr__(self, knob.name, _checked(knob.name, getattr(self, knob.name), type(knob.default)))
        if self.sft_every == 1:
            raise UserError("With --sft-every 1 every step would be an SFT step, and none would learn from rewards.",
                            "2 alternates: RL, SFT, RL, SFT; 0 has no SFT steps.")

    def kind(self, step: int) -> str:
        """Return the kind of a step, counted from 1: ``sft`` for every ``sft_every``-th, else ``rl``."""
        return "sft" if self.sft_every and step % self.sft_every == 0 else "rl"

    def sft_before(self, step: int) -> int:
        """Return how many SFT steps come before a step, counted from 1."""
        return (step - 1) // self.sft_every if self.sft_every else 0


def rl_from_values(values: Mapping[str, Any]) -> tuple[Recipe, RlKnobs]:
    """Return recipe and knobs of ``train rl``; ``UserError`` for a name that is none, or one that it has no use for."""
    own = [knob.name for knob in fields(RlKnobs)]
    names = [knob.name for knob in fields(Recipe) if knob.name not in RL_UNUSED]
    unused = {knob.name: knob.default for knob in fields(Recipe) if knob.name in RL_UNUSED}
    for name, value in values.items():
        if name in unused and value != unused[name]:
            raise UserError(f"'{name}' is no knob of `train rl`.", RL_UNUSED[name])
        if name not in unused and name not in (*names, *own):
            raise unknown("recipe knob", name, [*names, *own])
    mine = {name: value for name, value in values.items() if name in own}
    others = {name: value for name, value in values.items() if name not in own and name not in unused}
    return Recipe(**{**RL_DEFAULTS, **others}), RlKnobs(**mine)


def from_values(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe of these knobs, the others at their defaults; ``UserError`` for a name that is none."""
    names = [knob.name for knob in fields(Recipe)]
    for name in values:
        if name not in names:
            raise unknown("recipe knob", name, names)
    return Recipe(**values)


def read_values(path: Path) -> dict[str, Any]:
    """Return the knobs in a TOML file; ``UserError`` where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no recipe at {path}.", "`train list` prints one to start from.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as err:
        raise UserError(f"{path} is no readable TOML file: {err}.", "`train list` prints one to start from.",
                        Exit.BAD_DATA) from None


def learnt(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the knobs that decide what is learnt (all but ``SAME_RESULT``, and ``LATER`` ones in use)."""
    from curate.core.documents import LATER

    return {name: value for name, value in values.items()
            if name not in SAME_RESULT and not (name in LATER and value == LATER[name])}


def _checked(name: str, value: Any, kind: type) -> Any:
    """Return ``value`` as ``kind``, or raise a ``UserError`` that names the knob and what it takes."""
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not kind or (kind is tuple and not all(isinstance(v, str) for v in value)):
        raise UserError(f"Recipe: {name} is {value!r}, but must be {KINDS[kind]}.", "`train list` shows every knob.")
    low, high = LIMITS.get(name, (0, 0))
    if name in LIMITS and not low <= value <= high:
        raise UserError(f"Recipe: {name} is {value!r}, but must lie between {low:g} and {high:g}.",
                        "`train list` shows every knob.")
    if value not in CHOICES.get(name, (value,)):
        raise unknown(name, str(value), CHOICES[name])
    return value
