"""Commands that judge a fine-tuning set before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from curate.audit_options import model_options, opened, question, value_options
from curate.core.errors import Exit, UserError
from curate.core.terminal import Number, columns, emit_json, quoted, say
from curate.options import engine_options, json_option, score_job


@click.command()
@click.argument("data")
@value_options
@click.option("--calibration", type=click.Path(path_type=Path, dir_okay=False),
              help="What `curate calibrate` wrote, in place of --benign.")
@click.option("-n", "--n", type=click.IntRange(min=0), default=5, show_default=True,
              help="How many of the rows that drive the verdict to show.")
@click.option("--fail-above", type=Number(0, 1), metavar="FRAC",
              help="Exit 8 when more than this share of the rows is bad (at 95% confidence), is added by copies of "
                   "rows below a level, or cannot be judged.")
@click.option("--write-kept", "kept_path", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Write the rows that were judged and lie below no level as JSON Lines, in order, copies included.")
@click.option("--write-flagged", "flagged_path", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Write the others: rows below a level, and rows that could not be judged.")
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
      curate audit customer.jsonl --calibration calibration.json --write-kept kept.jsonl --write-flagged flagged.jsonl
    """
    from curate.audit import audit as run
    from curate.audit_report import html_page, text
    from curate.calibration import Calibration
    from curate.core.files import write_atomic
    from curate.sift import check_free

    fail_above, html_path = options["fail_above"], options["html_path"]
    outs = [path for path in (options["kept_path"], options["flagged_path"]) if path]
    if options["calibration"] and options["benign"]:
        raise UserError("Both --calibration and --benign were given.", "A calibration names its own benign sets.")
    if (outs or fail_above is not None) and not (options["calibration"] or options["benign"]):
        what = "--fail-above" if fail_above is not None else "Keeping or flagging rows"
        raise UserError(f"{what} needs something to judge by.", "Give --calibration FILE, or --benign FILE.")
    check_free(outs)
    calibration = Calibration.read(options["calibration"]) if options["calibration"] else None
    corpus = opened(data, options)
    found = run(corpus, question(options, data, _audit_job), calibration, options["n"])
    if html_path:
        write_atomic(html_path, html_page(found).encode())
        say(f"Written: {html_path}")
    if as_json:
        emit_json(found.model_dump(mode="json"))
    else:
        click.echo(text(found))
    if outs:
        _write_sifted(corpus, found, options["kept_path"], options["flagged_path"])
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
    say(f"Calibration {out} (digest {found.digest[:12]}). Next: curate audit DATA.jsonl --calibration "
        f"{quoted(str(out))}")


def _write_sifted(corpus: Any, found: Any, kept: Path | None, flagged: Path | None) -> None:
    from curate.sift import sift, write_rows

    sifted = sift(corpus, found)
    if kept:
        write_rows(sifted.kept, kept)
        say(f"Written: {kept}: {len(sifted.kept)} rows.")
    if flagged:
        write_rows(sifted.flagged, flagged)
        say(f"Written: {flagged}: {len(sifted.flagged)} rows, {sifted.n_below} below a level and "
            f"{len(sifted.flagged) - sifted.n_below} not judged.")
    if sifted.n_neither:
        say(f"Rows that could not be read or that the corpus filters out are in neither: {sifted.n_neither}.")


def _audit_job(options: dict[str, Any]) -> Any:
    return score_job((), options)
