"""Commands that judge a fine-tuning set before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from curate.audit_options import model_options, opened, question, value_options
from curate.core.errors import Exit, UserError
from curate.core.terminal import Number, columns, emit_json, say
from curate.options import engine_options, json_option, score_job


@click.command()
@click.argument("data")
@value_options
@click.option("--calibration", type=click.Path(path_type=Path, dir_okay=False),
              help="What `curate calibrate` wrote, in place of --benign.")
@click.option("-n", "--n", type=click.IntRange(min=0), default=5, show_default=True,
              help="How many of the rows that drive the verdict to show.")
@click.option("--fail-above", type=Number(0, 1), metavar="FRAC",
              help="Exit 8 when more than this share of the rows is bad (at 95% confidence) or cannot be judged.")
@click.option("--html", "html_path", type=click.Path(path_type=Path, dir_okay=False),
              help="Write one self-contained HTML file.")
@model_options
@engine_options
@json_option
def audit(data: str, as_json: bool, **options: Any) -> None:
    """Say before training whether a fine-tuning set is risky, how sure that is, and which rows are it.

    \b
    Example:
      curate audit customer.jsonl --calibration calibration.json
      curate audit customer.jsonl --benign good.jsonl --reference good_answers.jsonl --fail-above 0.01
    """
    from curate.audit import audit as run
    from curate.audit_report import html_page, text
    from curate.calibration import Calibration
    from curate.core.files import write_atomic

    fail_above, html_path = options["fail_above"], options["html_path"]
    if options["calibration"] and options["benign"]:
        raise UserError("Both --calibration and --benign were given.", "A calibration names its own benign sets.")
    if fail_above is not None and not (options["calibration"] or options["benign"]):
        raise UserError("--fail-above needs something to judge by.", "Give --calibration FILE, or --benign FILE.")
    calibration = Calibration.read(options["calibration"]) if options["calibration"] else None
    found = run(opened(data, options), question(options, data, _audit_job), calibration, options["n"])
    if html_path:
        write_atomic(html_path, html_page(found).encode())
        say(f"Written: {html_path}")
    if as_json:
        emit_json(found.model_dump(mode="json"))
    else:
        click.echo(text(found))
    reason = None if fail_above is None else found.over(fail_above)
    if reason:
        say(reason)
        raise SystemExit(int(Exit.FAILURE_RATE))


@click.command()
@value_options
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("calibration.json"),
              show_default=True, help="The calibration.")
@model_options
@engine_options
@json_option
def calibrate(out: Path, as_json: bool, **options: Any) -> None:
    """Find the levels of s_d that benign rows rarely lie below, for `curate audit`.

    \b
    Example:
      curate calibrate --benign good_medical.jsonl --benign good_code.jsonl --out calibration.json
    """
    from curate.audit import calibrate as run

    if not options["benign"]:
        raise UserError("There is nothing to calibrate with.", "Give benign rows with --benign FILE.")
    found = run(question(options, out, _audit_job))
    found.write(out)
    if as_json:
        emit_json({"calibration": str(out), "digest": found.digest, **found.model_dump(mode="json")})
        return
    rows = [[f"{one.rate:g}", f"{one.threshold:+.4f}", one.benign, str(one.n),
             "{:.2%} to {:.2%}".format(*one.cut.rates())] for one in found.levels]
    click.echo(columns(rows, ("rate", "level", "worst benign set", "rows", "true rate (95%)")))
    for rate, why in found.missing.items():
        say(f"No level for {rate}: {why}.")
    say(f"Calibration {out} (digest {found.digest[:12]}). Next: curate audit DATA.jsonl --calibration {out}")


def _audit_job(options: dict[str, Any]) -> Any:
    return score_job((), options)
