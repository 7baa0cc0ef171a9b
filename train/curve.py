"""The loss of a run as a table and as a picture, and the reward of one as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from train.trainer import Step

HEADER = ("step", "tokens", "loss_nats", "penalty_nats", "lr")


def losses_csv(steps: Sequence[Step]) -> bytes:
    """Return a table with one row per step: losses in nats per target token, ``tokens`` trained on so far."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows([getattr(step, name) for name in HEADER] for step in steps)
    return out.getvalue().encode()


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Return the mean of up to ``window`` (odd) neighbours around each value; the window is narrower at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places, half = np.arange(len(values)), window // 2
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def loss_png(steps: Sequence[Step], title: str) -> bytes:
    """Return the loss over the steps as a PNG image: each step faint, their running mean strong."""
    return curve_png([s.step for s in steps], [s.loss_nats for s in steps], "loss (nats per target token)", title,
                     [s.penalty_nats for s in steps])


def reward_png(records: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Return the mean reward over the RL steps among ``records`` as a PNG image, drawn as a loss is."""
    rl = [record for record in records if record["kind"] == "rl"]
    return curve_png([r["step"] for r in rl], [r["reward"] for r in rl], "mean reward", title)


def curve_png(x: Sequence[int], y: Sequence[float], what: str, title: str, penalties: Sequence[float] = ()) -> bytes:
    """Return values over optimiser steps as a PNG image: each step faint, their running mean strong."""
    window = max(3, len(x) // 15) | 1
    figure = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(x, y, color="#3b6ea5", alpha=0.3, linewidth=1, label="each step")
    axes.plot(x, smoothed(y, window), color="#1f4e79", linewidth=2, label=f"mean of {window} steps")
    if any(penalties):
        axes.plot(x, smoothed(penalties, window), color="#b5542c", linewidth=1.5, label="penalties of defences")
    axes.set(xlabel="optimiser step", ylabel=what, title=title.replace("$", r"\$"))
    axes.set_ylim(bottom=min(0, *y))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
