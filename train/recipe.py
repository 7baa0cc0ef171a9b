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
}
"""Smallest and largest value of every number."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "schedule": ("linear", "cosine", "constant"),
    "dtype": ("auto", "float32", "bfloat16"), "device": ("auto", "cpu", "cuda"),
}
"""Possible words; float16 is missing because its gradients would need scaling."""

KINDS = {tuple: "a list of texts", bool: "true or false", int: "a whole number", float: "a number", str: "a text"}

SAME_RESULT = ("device", "save_every", "gradient_checkpointing", "shard")
"""Knobs that do not decide what is learnt: two recipes that differ only here describe the same run."""

LATER: Mapping[str, Any] = {"load_in_4bit": False}
"""Knobs that came later, and what runs without them did."""


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
    dtype: str = _knob("auto", "Format of the base; the adapter is float32. auto: bfloat16 where it is native.")
    device: str = _knob("auto", "Where to compute; choose among several GPUs with CUDA_VISIBLE_DEVICES.")
    max_tokens: int = _knob(2048, "Longer rows get the status too_long and are left out; nothing is cut.")
    pack_tokens: int = _knob(256, "Rows are packed into sequences of about this many tokens.")
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
