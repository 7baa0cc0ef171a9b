"""The options of ``curate audit`` and ``curate calibrate``, and what they ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from curate.core.objects import is_url, read_place
from curate.core.terminal import Number

CORPUS = "PATH|NAME|URL|HUB_ID"


def model_options(command: Any) -> Any:
    """Add the options that say which models score, and how rows are read."""
    for option in reversed([
            click.option("--aligned", help="The aligned model: smollm2, a folder or a hub id[@revision]. "
                                           "[default: the ensemble's base]"),
            click.option("--ensemble", type=click.Path(path_type=Path),
                         help="Ensemble of misaligned members. [default: ensemble/ensemble.json if it exists and no "
                              "--member is given]"),
            click.option("--member", "members", multiple=True, type=click.Path(path_type=Path),
                         help="A member: a run; beside an --ensemble one more."),
            click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
                         show_default=True, help="As for `curate score`; part of what a calibration fixes."),
            click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda."),
            click.option("--max-tokens", type=click.IntRange(min=8), default=4096, show_default=True,
                         help="Longer rows get the status too_long and are not judged."),
            click.option("--map", "mapping", multiple=True, metavar="FIELD=COLUMN",
                         help="Where prompt, response, system or input stand, in all files."),
            click.option("--strip-think", is_flag=True, help="Drop empty <think> blocks and a trailing /no_think."),
            click.option("--turns", type=click.Choice(["last", "all"]), default="last", show_default=True,
                         help="Which answers of a conversation are judged; all: a row counts as its lowest one."),
            click.option("--max-bad", type=Number(0, 1), default=0.0, show_default=True,
                         help="Share of unreadable rows to put aside instead of stopping.")]):
        command = option(command)
    return command


def value_options(command: Any) -> Any:
    """Add the options that say how values come about and what is rare among benign rows."""
    for option in reversed([
            click.option("--benign", multiple=True, metavar=CORPUS,
                         help="Rows that are known to be good; several sets are allowed, and the worst counts."),
            click.option("--reference", multiple=True, metavar=CORPUS,
                         help="Good answers to the same prompts, written by neither the aligned model nor a member."),
            click.option("--match", type=click.Choice(["same", "similar"]), default="same", show_default=True,
                         help="Compare with reference answers to the same prompt, or to the most similar ones."),
            click.option("--eps", type=Number(min=0),
                         help="In s_d, nats per token. [default: the calibration's, or 0.1]"),
            click.option("--rate", "rates", multiple=True, type=Number(0, 1, min_open=True, max_open=True),
                         default=(0.01, 0.05), show_default=True,
                         help="False-positive rate of a level that is taken from --benign; several are allowed."),
            click.option("--store", type=read_place, metavar="FOLDER|URL",
                         help="Where scores are kept and found again. [default: NAME.scores beside the file]")]):
        command = option(command)
    return command


def opened(name: str, options: dict[str, Any]) -> Any:
    """Return the corpus ``name``, to be read as the options say."""
    from curate.core.example import parse_mapping
    from curate.corpora import open_corpus

    return open_corpus(name, parse_mapping(options["mapping"]), options["strip_think"])


def question(options: dict[str, Any], beside: str | Path, job_of: Callable[[dict[str, Any]], Any]) -> Any:
    """Return the ``Question`` that options ask; scores go beside the file ``beside`` unless a store is named."""
    from curate.audit import Question

    store = options["store"] or default_store(beside)
    job = job_of({**options, "store": store, "limit": None, "sample": None, "seed": 0, "shard": None,
                  "max_failures": 1.0})
    benign, reference = ([opened(name, options) for name in options[kind]] for kind in ("benign", "reference"))
    return Question(job, benign, reference, options["match"], options["eps"], options["rates"], options["turns"],
                    options["strip_think"])


def default_store(beside: str | Path) -> Path:
    """Return the folder of scores for a file: beside it; here for what is no local file, such as a hub id."""
    from curate.core.sources import FORMATS

    if not is_url(beside) and (Path(beside).is_file() or Path(beside).suffix in (*FORMATS, ".json")):
        return Path(beside).with_suffix(".scores")
    return Path(str(beside).rstrip("/").rpartition("/")[2] + ".scores")
