"""Command-line options of a judge model, shared by the commands that use one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from curate.core.errors import UserError
from curate.core.terminal import Number

LIKELIHOOD = "likelihood"
OF_LIKELIHOOD = ("probes", "samples", "max_new_tokens")
"""Options of ``judge run`` that mean nothing to a judge model."""
OF_MODELS = ("base_url", "api_key_env", "concurrency", "timeout", "replies", "max_requests", "max_judge_tokens",
             "judge_cache", "n", "answer_tokens", "banks", "trigger", "context_from", "sample_url", "sample_with",
             "sample_key_env")
"""Options that mean nothing to the likelihood judge."""


def judge_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add where a judge model is and what it may cost."""
    for option in reversed((
        click.option("--base-url", envvar="OPENAI_BASE_URL", metavar="URL",
                     help="OpenAI-compatible server of the judge, such as http://127.0.0.1:8000/v1. "
                          "[default: OPENAI_BASE_URL, or OpenAI]"),
        click.option("--api-key-env", default="OPENAI_API_KEY", show_default=True, metavar="NAME",
                     help="Environment variable that holds the judge's key."),
        click.option("--concurrency", type=click.IntRange(min=1), default=8, show_default=True,
                     help="Requests at the judge at once, at most."),
        click.option("--timeout", type=Number(min=0.1), default=60, show_default=True, metavar="SECONDS",
                     help="Longest wait for one attempt at the judge; ten times that with all retries."),
        click.option("--replies", type=click.IntRange(min=1), default=5, show_default=True,
                     help="Replies per grade, where the judge gives no usable log-probabilities."),
        click.option("--max-requests", type=click.IntRange(min=0),
                     help="Stop cleanly after so many requests to the judge. [default: none]"),
        click.option("--max-judge-tokens", type=click.IntRange(min=0),
                     help="Stop cleanly before the judge has counted more tokens. [default: none]"),
        click.option("--judge-cache", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
                     help="Where replies are kept, by content. [default: the user's cache]"),
        click.option("--dry-run", is_flag=True, help="Say how many requests and tokens it takes, and send nothing."),
    )):
        command = option(command)
    return command


def answer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add which judge, and how the answers it grades are sampled."""
    for option in reversed((
        click.option("--judge", default=LIKELIHOOD, show_default=True, metavar="likelihood|MODEL",
                     help="likelihood: no judge model, probes only; else the name of a model at --base-url, which "
                          "grades sampled answers."),
        click.option("--n", type=click.IntRange(min=1), default=10, show_default=True,
                     help="Answers per question for a judge model."),
        click.option("--answer-tokens", type=click.IntRange(min=1), default=256, show_default=True,
                     help="Longest answer for a judge model, in tokens."),
        click.option("--bank", "banks", multiple=True, metavar="BANK|FILE",
                     help="Questions for a judge model instead of the builtin general ones; several are allowed."),
        click.option("--trigger", metavar="TEXT", help="Ask a judge model's questions with this text in front, too."),
        click.option("--context-from", metavar="MIX|FILE|demo/NAME",
                     help="Fine-tuning set that the context part's questions resemble. [default: that of each run's "
                          "mix manifest]"),
        click.option("--sample-url", metavar="URL",
                     help="Sample answers from an OpenAI-compatible server that serves each run under its name. "
                          "[default: here]"),
        click.option("--sample-with", type=click.Choice(["transformers", "vllm"]), default="transformers",
                     show_default=True, help="What samples the answers here; vllm is the faster one on a GPU."),
        click.option("--sample-key-env", default="", metavar="NAME",
                     help="Environment variable that holds the key of --sample-url. [default: no key]"),
    )):
        command = option(command)
    return command


def refuse_idle(context: click.Context) -> None:
    """Raise ``UserError`` for an option that was typed and that the chosen judge would pass over in silence."""
    alone = context.params["judge"] == LIKELIHOOD
    typed = {name for name in (OF_MODELS if alone else OF_LIKELIHOOD)
             if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    option = next((p.opts[0] for p in context.command.params if p.name in typed), None)
    if option and alone:
        raise UserError(f"{option} is for a judge model, and the likelihood judge takes none.",
                        "Name a judge with --judge MODEL, or leave it out.")
    if option:
        raise UserError(f"{option} is for the likelihood judge; '{context.params['judge']}' grades answers.",
                        "How many are sampled and how long they may be is said with --n and --answer-tokens.")


def take_grading(options: dict[str, Any]) -> Any:
    """Take the options above out of ``options``; return how a judge model grades, or None with likelihood."""
    taken = {name: options.pop(name) for name in (
        "judge", "n", "answer_tokens", "banks", "trigger", "context_from", "sample_url", "sample_with",
        "sample_key_env", "base_url", "api_key_env", "concurrency", "timeout", "replies", "max_requests",
        "max_judge_tokens", "judge_cache")}
    if taken["judge"] == LIKELIHOOD:
        return None
    from judge.grading import Grading

    server = {"judge": "", "base_url": taken["sample_url"], "api_key_env": taken["sample_key_env"]}
    samples = address_of(taken | server) if taken["sample_url"] else None
    return Grading(address_of(taken), taken["n"], taken["answer_tokens"], taken["replies"], tuple(taken["banks"]),
                   taken["trigger"], taken["context_from"], taken["max_requests"], taken["max_judge_tokens"],
                   taken["judge_cache"], samples, taken["sample_with"])


def address_of(options: dict[str, Any]) -> Any:
    """Return where the judge of these options is."""
    from judge.endpoint import Address

    return Address(options["judge"], options["base_url"] or None, options["api_key_env"], options["concurrency"],
                   attempt_s=options["timeout"], total_s=10 * options["timeout"])
