"""Command-line options that several commands share, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from curate.core.errors import UserError
from curate.core.objects import read_place
from curate.core.terminal import Number, say

ENSEMBLE = Path("ensemble/ensemble.json")
STORE = Path("scores")

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
store_option = click.option("--store", type=read_place, default=STORE, show_default=True, metavar="FOLDER|URL",
                            help="Where the evidence lies: a folder, or an object store such as s3://bucket/prefix.")
eps_option = click.option("--eps", type=Number(min=0), default=0.1, show_default=True,
                          help="In s_d = (misaligned - aligned) / (aligned + eps), nats per token.")
members_option = click.option("--members", metavar="NAME,...", help="Members whose mean s_d takes. [default: all]",
                              callback=lambda context, option, text: parse_members(text))


def parse_members(text: str | None) -> tuple[str, ...] | None:
    """Return names separated by commas; None where nothing is given."""
    return tuple(name.strip() for name in text.split(",")) if text else None


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which engine scores and where it is."""
    for option in reversed([
            click.option("--engine", type=click.Choice(["auto", "transformers", "vllm", "server"]), default="auto",
                         show_default=True, help="auto: server with a --base-url, vllm on CUDA where it is installed, "
                                                 "else transformers (docs/engines.md)."),
            click.option("--base-url", "base_urls", multiple=True, metavar="URL",
                         help="A vLLM server, such as http://HOST:8000/v1; several are allowed."),
            click.option("--served-model", "served", multiple=True, metavar="NAME=MODEL",
                         help="The name at the server of a member or of the aligned model. [default: its own]"),
            click.option("--api-key-env", default="SAFESET_API_KEY", show_default=True, metavar="VARIABLE",
                         help="The environment variable that holds the server's key."),
            click.option("--concurrency", type=click.IntRange(min=1), default=16, show_default=True,
                         help="Requests to servers at the same time."),
            click.option("--timeout", "timeout_s", type=Number(min=0.1), default=120.0, show_default=True,
                         help="Seconds to wait for one answer of a server.")]):
        command = option(command)
    return command


def engine_settings(options: dict[str, Any]) -> Any:
    """Return what these options say about the engine."""
    from curate.scorers.choose import EngineSettings

    served = [tuple(text.partition("=")[::2]) for text in options["served"]]
    if not all(name and model for name, model in served):
        raise UserError("--served-model takes NAME=MODEL.", "For example --served-model medical-lora=medical.")
    return EngineSettings(options["engine"], options["base_urls"], tuple(served), options["api_key_env"],
                          options["concurrency"], options["timeout_s"])


def score_job(corpora: tuple[str, ...], options: dict[str, Any]) -> Any:
    """Return what ``curate score`` sets out to do with these options."""
    from curate.chunks import Shard
    from curate.core.example import parse_mapping
    from curate.corpora import open_corpus
    from curate.job import Sampling, ScoreJob
    from curate.score import ensemble_members

    ensemble = options["ensemble"] or (ENSEMBLE if ENSEMBLE.is_file() and not options["members"] else None)
    base, runs = ensemble_members(ensemble) if ensemble else (None, [])
    aligned = options["aligned"] or base
    if aligned is None and options["members"]:
        raise UserError("Members were given, but no aligned model and no ensemble.",
                        "Name the model with --aligned, or with --ensemble the ensemble that they come on top of.")
    if aligned is None:
        raise UserError("No aligned model and no ensemble were given.",
                        "Make an ensemble with `train ensemble --narrow demo/cooking --narrow demo/gardening`, or name "
                        "the model with --aligned.")
    mapping = parse_mapping(options["mapping"])
    opened = [open_corpus(name, mapping, options["strip_think"]) for name in corpora]
    if not runs and not options["members"]:
        say("No misaligned members: only the aligned model is scored, so there will be no s_d yet.")
    names = ("store", "dtype", "device", "max_tokens", "max_bad", "max_failures")
    return ScoreJob(corpora=opened, aligned=aligned, members=[*runs, *options["members"]],
                    sampling=Sampling(options["limit"], options["sample"], options["seed"]),
                    shard=Shard.parse(options["shard"]) if options["shard"] else None,
                    retry_failed=options.get("retry_failed", False),
                    engine=engine_settings(options), **{name: options[name] for name in names})
