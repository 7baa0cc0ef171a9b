"""The ``curate`` command line. Its commands, in ``curate/commands/``, each parse, call one function and print."""

from __future__ import annotations

import click

from curate.commands.auditing import audit, calibrate
from curate.commands.scoring import compact, corpora, doctor, score, status, verify
from curate.commands.selecting import export, report, select, show, sql
from curate.core.terminal import Room


@click.group(cls=Room, commands=[score, select, sql, show, report, audit, calibrate, verify, status, compact, export,
                                 corpora, doctor])
@click.version_option(package_name="safeset")
def main() -> None:
    """Choose the safe data that keeps narrow fine-tuning from making a model broadly misaligned.

    \b
    Example:
      curate score --corpus wildguardmix
      curate select --frac 0.05 --finetune customer.jsonl
    """
