"""MMLU and TruthfulQA through lm-evaluation-harness: a subprocess, its results file, a score for every question.

They are not learnt like OpSwap or FoQA: they ask whether fine-tuning took away what the base model knew. The harness
picks among given answers by likelihood. Its own defaults are kept (few-shot examples, no chat template), so that
figures can be set beside published ones; MMLU is ``mmlu``, TruthfulQA the single-answer ``truthfulqa_mc1``.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.core.documents import TaskScore
from curate.core.errors import Exit, UserError, require
from curate.core.files import canonical_json, sha256
from curate.core.rows import json_rows
from curate.core.smollm2 import SMOLLM2, smollm2_folder
from curate.core.terminal import say

TASKS = {"mmlu": "mmlu", "truthfulqa": "truthfulqa_mc1"}
"""Our name of a task to the harness's."""

METRIC = "acc"
TOLERANCE = 1e-6
"""The mean of the questions must be the figure in the results file up to this."""


@dataclass(frozen=True)
class Call:
    """One model and one task for the harness."""

    task: str
    identity: str
    """Who the judged model is, by content: results of another under the same name are not its own."""
    model: str
    """Base model: ``smollm2``, a folder, or a hub id (``id@revision``)."""
    adapter: Path | None = None
    dtype: str = "auto"
    device: str = "cpu"
    limit: int | None = None
    """At most so many questions of each subject; for trials, never for figures."""
    batch_size: int = 8


@dataclass(frozen=True)
class Result:
    """What the harness says of one task: the mean of ``METRIC``, its standard error, how many questions, and each."""

    task: str
    value: float
    stderr: float | None
    n: int
    version: str
    scores: tuple[TaskScore, ...]


def command(call: Call, out: Path) -> list[str]:
    """Return the words of the subprocess; model arguments travel as JSON, so that any path is one argument."""
    model, _, revision = call.model.partition("@") if not Path(call.model).exists() else (call.model, "", "")
    arguments: dict[str, Any] = {"pretrained": model, "dtype": call.dtype, "trust_remote_code": False}
    arguments |= {"revision": revision} if revision else {}
    arguments |= {"peft": str(call.adapter)} if call.adapter is not None else {}
    words = [sys.executable, "-P", "-m", "lm_eval", "--model", "hf", "--model_args", json.dumps(arguments),
             "--tasks", TASKS[call.task], "--device", call.device, "--batch_size", str(call.batch_size),
             "--seed", "0", "--log_samples", "--output_path", str(out)]
    return words + (["--limit", str(call.limit)] if call.limit is not None else [])


def evaluate(call: Call, folder: Path) -> Result:
    """Return the result of one call, from ``folder`` if the same call ended there before.

    Raises ``UserError`` where ``lm_eval`` is missing, ends with an error, or writes what cannot be read.
    """
    model = str(smollm2_folder()) if call.model == SMOLLM2 else call.model
    plain = Call(**{**vars(call), "model": model})
    words = command(plain, Path())
    out = folder / sha256(canonical_json([call.identity, *words[1:]]))[:12]
    if any(out.rglob("results_*.json")):
        try:
            return read(out, call.task)
        except UserError as err:
            say(f"{err.message} {call.task} is run again.")
    require("lm_eval", "tasks")
    _run(command(plain, out), call.task, out)
    return read(out, call.task)


def _run(words: list[str], task: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    say(f"lm-eval: {task} ({log})")
    with open(log, "wb") as sink:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, check=False)
    if done.returncode != 0:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:] or ["no output"]
        raise UserError(f"lm-eval ended with status {done.returncode} on {task}: {last[0][:300]}",
                        f"All it said is in {log}; its data sets come from the hub.", Exit.REMOTE)


def read(out: Path, task: str) -> Result:
    """Return what the newest results file below ``out`` and the sample files beside it say of ``task``.

    The questions of all subjects of a group are put together, each counted once. Raises ``UserError`` (integrity)
    for a figure that is missing or not between 0 and 1, and where the questions do not add up to the figure.
    """
    files = sorted(out.rglob("results_*.json"))
    if not files:
        raise UserError(f"lm-eval left no results in {out}.", "Read log.txt there.", Exit.INTEGRITY)
    path = files[-1]
    try:
        body = json.loads(path.read_bytes())
        whole = body["results"][TASKS[task]]
        value, stderr = float(whole[f"{METRIC},none"]), whole.get(f"{METRIC}_stderr,none")
        leaves = _leaves(body.get("group_subtasks", {}), TASKS[task])
        scores = [score for leaf in leaves for score in _scores(path, leaf, task, body["n-samples"][leaf]["effective"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise UserError(f"{path} is no results file of lm-eval as this safeset knows it: {type(err).__name__} {err}.",
                        "Use lm-eval 0.4.13, the version this was tested with.", Exit.INTEGRITY) from None
    mean = sum(score.correct for score in scores) / len(scores) if scores else math.nan
    if not abs(mean - value) <= TOLERANCE:
        raise UserError(f"{path} gives {value} for {task}, but its {len(scores)} questions give {mean:.6f}.",
                        "Remove the folder and run it again.", Exit.INTEGRITY)
    return Result(task, value, float(stderr) if isinstance(stderr, (int, float)) else None, len(scores),
                  str(body.get("lm_eval_version", "unknown")), tuple(scores))


def _leaves(subtasks: Mapping[str, list[str]], name: str) -> list[str]:
    below = subtasks.get(name) or []
    return [leaf for child in below for leaf in _leaves(subtasks, child)] if below else [name]


def _scores(results: Path, leaf: str, task: str, n: int) -> list[TaskScore]:
    """Return a score for every question of one subject; ``ValueError`` where there are not ``n``."""
    stamp = results.stem.removeprefix("results_")
    scores = []
    for where, row in json_rows(results.with_name(f"samples_{leaf}_{stamp}.jsonl")):
        if not isinstance(row, Mapping) or row.get(METRIC) not in (0, 1):
            raise ValueError(f"{leaf}, {where}: no '{METRIC}' of 0 or 1")
        scores.append(TaskScore(item=f"{leaf}/{row['doc_id']}/{str(row['doc_hash'])[:12]}", tier=0,
                                correct=row[METRIC] == 1, task=task))
    if len(scores) != n:
        raise ValueError(f"{leaf} has {len(scores)} samples and {n} were evaluated")
    return scores
