"""The ``curate`` command line: each command parses, calls one function and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from curate.audit_options import model_options, opened, question, value_options
from curate.core.errors import Exit, UserError
from curate.core.objects import is_url, read_place
from curate.core.terminal import Room, columns, emit_json, safe, say
from curate.options import ENSEMBLE, engine_options, score_job

STORE = Path("scores")

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
store_option = click.option("--store", type=read_place, default=STORE, show_default=True, metavar="FOLDER|URL",
                            help="Where the evidence lies: a folder, or an object store such as s3://bucket/prefix.")


@click.group(cls=Room)
@click.version_option(package_name="safeset")
def main() -> None:
    """Choose the safe data that keeps narrow fine-tuning from making a model broadly misaligned.

    \b
    Example:
      curate score --corpus wildguardmix
      curate select --frac 0.05 --finetune customer.jsonl
    """


@main.command()
@click.option("--corpus", "corpora", multiple=True, required=True, metavar="NAME|PATH|URL|HUB_ID",
              help="What to score; several are allowed. `curate corpora` lists names.")
@click.option("--aligned", help="The aligned model: smollm2, a folder or a hub id[@revision]. "
                                "[default: the ensemble's base]")
@click.option("--ensemble", type=click.Path(path_type=Path),
              help=f"Ensemble of misaligned members, from `train ensemble`. [default: {ENSEMBLE} if it exists]")
@click.option("--member", "members", multiple=True, type=click.Path(path_type=Path), help="One more member: a run.")
@store_option
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True, help="auto: bfloat16 where the hardware multiplies it natively, else float32.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--max-tokens", type=click.IntRange(min=8), default=4096, show_default=True,
              help="Longer examples get the status too_long; nothing is cut.")
@click.option("--map", "mapping", multiple=True, metavar="FIELD=COLUMN",
              help="Where prompt, response, system or input stand, for unusual columns.")
@click.option("--strip-think", is_flag=True, help="Drop empty <think> blocks and a trailing /no_think.")
@click.option("--max-bad", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="Share of unreadable rows to put aside instead of stopping.")
@click.option("--max-failures", type=click.FloatRange(0, 1), default=0.01, show_default=True,
              help="Share of rows without a finite score above which the exit code is 8.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first rows.")
@click.option("--sample", type=click.IntRange(min=1), help="A random sample of so many rows, decided by content.")
@click.option("--seed", default=0, show_default=True, help="Seed of the sample.")
@engine_options
@click.option("--shard", metavar="I/N", help="Only the I-th of N shares of the work, I from 1: for schedulers. The "
                                            "shares together give what one run gives.")
@click.option("--ray", metavar="auto|ADDRESS", help="Compute on the Ray cluster at this address; auto: the one that "
                                                   "runs here. The store is still read and written here.")
@click.option("--ray-cpus", type=click.IntRange(min=1), default=1, show_default=True,
              help="Cores of one Ray worker; each worker holds one model.")
@click.option("--dry-run", is_flag=True, help="Do not score: say what it would take, after a short calibration.")
@click.option("--gpu-hour", type=click.FloatRange(min=0), metavar="PRICE", help="Price of an hour, for --dry-run.")
@json_option
def score(corpora: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Score a corpus under the aligned model and every misaligned member.

    Typed again, it computes only what is missing: new rows, new members, what an interruption left out.

    \b
    Example:
      curate score --corpus wildguardmix --ensemble ensemble/ensemble.json
      curate score --corpus pool.jsonl --aligned Qwen/Qwen2.5-7B-Instruct --member runs/medical
      curate score --corpus pool.jsonl --base-url http://gpu-box:8000/v1
      curate score --corpus s3://bucket/pool.parquet --store s3://bucket/scores --shard 1/4
    """
    from curate.score import score as run

    job = score_job(corpora, options)
    if options["dry_run"]:
        _dry_run(job, options["gpu_hour"], as_json)
        return
    compute = None
    if options["ray"]:
        from curate.cluster import OnRay

        compute = OnRay(options["ray"], options["ray_cpus"])
    summary = run(job, compute)
    if as_json:
        emit_json(summary.as_json())
        return
    click.echo(columns([[k, str(v)] for k, v in sorted(summary.counts.items())] + [["rows in", str(summary.n_rows)]],
                       ("status", "rows")))
    if summary.left:
        say(f"This shard is done; {summary.left} rows of other shards (counted once for each model) are not scored "
            f"yet. Look with: curate status {options['store']}")
    else:
        say(f"Evidence in {options['store']}. Next: curate select --store {options['store']} --frac 0.05")


def _dry_run(job: Any, price: float | None, as_json: bool) -> None:
    from curate.estimate import estimate, lines

    found = estimate(job, price)
    if as_json:
        emit_json(found.as_json())
        return
    click.echo(columns(lines(found), ("what", "how much")))
    say("Nothing was scored. Hours and cost are those of one machine like this one.")


@main.command()
@store_option
@click.option("--frac", type=float, help="Share of the fine-tuning set (or of the corpus) to add as safe rows.")
@click.option("--n", type=click.IntRange(min=0), help="Number of safe rows, instead of --frac.")
@click.option("--finetune", metavar="PATH|demo/NAME", help="The fine-tuning set that the safe rows are mixed into.")
@click.option("--strategy", type=click.Choice(["none", "interleaving", "interleaving+", "interleaving++"]),
              default="interleaving++", show_default=True,
              help="none: the fine-tuning set alone; random; top by s_d; top by s_d without refusals.")
@click.option("--corpus", help="Which corpus of the store, where there are several.")
@click.option("--eps", type=click.FloatRange(min=0), default=0.1, show_default=True,
              help="In s_d = (misaligned - aligned) / (aligned + eps), nats per token.")
@click.option("--members", help="Comma-separated members to use. [default: all]")
@click.option("--min-answer-tokens", type=click.IntRange(min=1), default=1, show_default=True,
              help="Shorter answers are not taken.")
@click.option("--placement", type=click.Choice(["even", "shuffled"]), default="even", show_default=True,
              help="Where safe rows stand in the training order.")
@click.option("--seed", default=0, show_default=True, help="Decides the random strategy and the order.")
@click.option("--map", "mapping", multiple=True, metavar="FIELD=COLUMN", help="Columns of the fine-tuning set.")
@click.option("--strip-think", is_flag=True, help="Clean the fine-tuning set of empty <think> blocks and /no_think.")
@click.option("--root", type=click.Path(path_type=Path, file_okay=False, exists=True),
              help="Folder that paths in the manifest are relative to. [default: the manifest's own]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("manifest.json"), show_default=True,
              help="The manifest.")
@json_option
def select(store: Path | str, finetune: str | None, out: Path, root: Path | None, as_json: bool,
           **options: Any) -> None:
    """Choose safe rows and write a mix manifest.

    \b
    Example:
      curate select --frac 0.05
      curate select --frac 0.05 --finetune customer.jsonl --strategy interleaving++ --out manifest.json
    """
    from curate.core.example import parse_mapping
    from curate.corpora import open_corpus
    from curate.records import PlannedCorpus
    from curate.select import Choice, build_manifest, rerooted
    from curate.store import Store

    if options["strategy"] != "none" and (options["frac"] is None) == (options["n"] is None):
        raise UserError("Say how many safe rows: either --frac or --n.", "For example --frac 0.05.")
    root = root or out.parent
    tuned = None
    if finetune:
        found = open_corpus(finetune, parse_mapping(options["mapping"]), options["strip_think"])
        tuned = rerooted(PlannedCorpus(label=found.label, source=found.source, folder=str(found.folder), key="",
                                       n_rows=0), root)
    names = ("strategy", "frac", "n", "eps", "seed", "min_answer_tokens", "placement")
    members = tuple(m.strip() for m in options["members"].split(",")) if options["members"] else None
    choice = Choice(**{name: options[name] for name in names}, members=members)
    opened = None if choice.strategy == "none" else Store.open_read(store)
    manifest, selection = build_manifest(opened, choice, root, tuned, options["corpus"])
    manifest.write(out)
    if as_json:
        emit_json({"manifest": str(out), "digest": manifest.digest, "counts": manifest.counts, "cut": selection.cut,
                   "near_cut": selection.near})
        return
    click.echo(columns([[k, str(v)] for k, v in manifest.counts.items()], ("rows", "number")))
    if selection.cut is not None:
        click.echo(f"Cut at s_d = {selection.cut:+.4f}; {selection.near} rows lie within 0.01 of it.")
    say(f"Manifest {out} (digest {manifest.digest[:12]}). Next: train run --mix {out}")


@main.command()
@click.argument("query")
@store_option
@click.option("--eps", type=click.FloatRange(min=0), default=0.1, show_default=True, help="For the view `scores`.")
@click.option("--format", "style", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True,
              help="How to print the rows.")
@click.option("--max-rows", type=click.IntRange(min=1), default=1000, show_default=True,
              help="Rows beyond are left out, and that is said.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="Time limit.")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
def sql(query: str, store: Path | str, style: str, as_json: bool, **options: Any) -> None:
    """Query the evidence: one SELECT over the views examples, corpora, nll, models and scores.

    \b
    Example:
      curate sql "SELECT corpus, count(*) n, avg(s_d) FROM scores WHERE status = 'ok' GROUP BY corpus"
      curate sql "SELECT * FROM scores_at(0.5) ORDER BY s_d DESC LIMIT 5"
    """
    from curate.query import Limits, format_result, run_sql

    result = run_sql(store, query, Limits(seconds=options["seconds"], max_rows=options["max_rows"], eps=options["eps"]))
    click.echo(format_result(result.table, "json" if as_json else style), nl=False)
    if result.cut:
        say(f"Only the first {options['max_rows']} rows are shown; --max-rows raises that.")


@main.command()
@click.argument("which", type=click.Choice(["top", "bottom", "near", "random"]), default="top")
@store_option
@click.option("-n", "--n", type=click.IntRange(min=1), default=5, show_default=True, help="How many rows.")
@click.option("--eps", type=click.FloatRange(min=0), default=0.1, show_default=True, help="In s_d, nats per token.")
@click.option("--frac", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.05, show_default=True,
              help="Where the cut lies, for `near`.")
@click.option("--refusals/--no-refusals", default=None, help="Only refusals, or only other answers.")
@click.option("--seed", default=0, show_default=True, help="For `random`.")
@json_option
def show(which: str, store: Path | str, n: int, as_json: bool, **options: Any) -> None:
    """Read scored rows: top, bottom, near the cut, or random.

    \b
    Example:
      curate show top -n 3 --no-refusals
    """
    from curate.query import connect
    from curate.show import render, rows
    from curate.store import Store

    found = rows(connect(Store.open_read(store), options["eps"], None), which, n, options["frac"], options["seed"],
                 options["refusals"])
    if as_json:
        emit_json(found)
    elif found:
        click.echo(render(found))
    else:
        raise UserError("No row of this store has a score.", "Score it under at least one member: curate score ...")


@main.command()
@click.argument("store", type=click.Path(path_type=Path), default=STORE)
@click.option("--html", "html_path", type=click.Path(path_type=Path, dir_okay=False),
              help="Write one self-contained HTML file.")
@click.option("--eps", type=click.FloatRange(min=0), default=0.1, show_default=True, help="In s_d, nats per token.")
@click.option("--frac", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.05, show_default=True,
              help="Where the cut lies: the top share of the scored rows.")
@json_option
def report(store: Path, html_path: Path | None, eps: float, frac: float, as_json: bool) -> None:
    """Look at a corpus and its scores: rows, s_d, the cut, refusals, the top rows, models and digests.

    \b
    Example:
      curate report scores --html scores.html
    """
    from curate.core.files import write_atomic
    from curate.report import html_page, summarise

    found = summarise(store, eps, frac)
    if html_path:
        write_atomic(html_path, html_page(found).encode())
        say(f"Written: {html_path}")
    if as_json:
        emit_json(found.model_dump(mode="json"))
        return
    click.echo(columns([[one.source, str(one.rows), str(one.statuses.get("ok", 0)), str(one.refusals)]
                        for one in found.sources], ("source", "rows", "ok", "refusals")))
    for cut in found.cuts:
        click.echo(f"The top {frac:g} by {cut.strategy}: {cut.rows} rows, {cut.refusals} refusals, cut at "
                   f"s_d = {cut.s_d:+.4f}.")


@main.command()
@click.argument("data")
@value_options
@click.option("--calibration", type=click.Path(path_type=Path, dir_okay=False),
              help="What `curate calibrate` wrote, in place of --benign.")
@click.option("-n", "--n", type=click.IntRange(min=0), default=5, show_default=True,
              help="How many of the rows that drive the verdict to show.")
@click.option("--fail-above", type=click.FloatRange(0, 1), metavar="FRAC",
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


def _audit_job(options: dict[str, Any]) -> Any:
    return score_job((), options)


@main.command()
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


@main.command()
@click.argument("target", type=read_place, default=STORE, metavar="[STORE|MANIFEST]")
@click.option("--root", type=click.Path(path_type=Path, file_okay=False, exists=True),
              help="Folder that a manifest's paths are relative to. [default: its own]")
@json_option
def verify(target: Path | str, root: Path | None, as_json: bool) -> None:
    """Check a store's files against its ledger, or a manifest against its sources.

    \b
    Example:
      curate verify scores
      curate verify manifest.json
    """
    from curate.verify import verify_manifest, verify_store

    if is_url(target) or Path(target).is_dir():
        found = verify_store(target)
    else:
        found = verify_manifest(Path(target), root or Path(target).parent)
    if as_json:
        emit_json({"target": str(target), **found.as_json()})
    else:
        for problem in found.problems:
            click.echo(safe(problem))
        click.echo(f"{target}: {found.checked} checked, {len(found.problems)} problems")
    if found.problems:
        raise SystemExit(int(Exit.INTEGRITY))


@main.command()
@click.argument("store", type=read_place, default=STORE, metavar="[STORE]")
@json_option
def status(store: Path | str, as_json: bool) -> None:
    """Say how far a store is, also while it is written: models, rows, rate, time left, who writes.

    \b
    Example:
      curate status scores
      curate status s3://bucket/scores --json
    """
    from curate.status import lines
    from curate.status import status as look

    found = look(store)
    if as_json:
        emit_json(found.as_json())
        return
    click.echo(columns([[m.name, m.role, str(m.scored), str(m.left)] for m in found.models],
                       ("model", "role", "scored", "left")))
    for line in lines(found):
        click.echo(safe(line))


@main.command()
@click.argument("store", type=read_place, default=STORE, metavar="[STORE]")
@json_option
def compact(store: Path | str, as_json: bool) -> None:
    """Merge the many small parts of a large store into a few; numbers, digests and what is done stay the same.

    What was replaced is removed by the next command that writes to the store, so that whoever reads now can go on.

    \b
    Example:
      curate compact scores
      curate compact s3://bucket/scores
    """
    from curate.compact import compact as merge

    found = merge(store)
    if as_json:
        emit_json(found.as_json())
        return
    click.echo(f"{found.before} parts of scores are now {found.after}; {found.removed} replaced ones were removed.")
    if found.after < found.before:
        say("What was replaced now is removed by the next `curate score` or `curate compact`.")


@main.command()
@click.argument("manifest", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A .jsonl or .parquet file.")
@click.option("--root", type=click.Path(path_type=Path, file_okay=False, exists=True),
              help="Folder that the manifest's paths are relative to. [default: its own]")
def export(manifest: Path, out: Path, root: Path | None) -> None:
    """Write a mix as plain rows for any other trainer.

    \b
    Example:
      curate export manifest.json --out mix.jsonl
    """
    from curate.core.documents import MixManifest
    from curate.export import export as write

    n = write(MixManifest.read(manifest), root or manifest.parent, out)
    say(f"{n} rows in {out}")


@main.command()
@json_option
def corpora(as_json: bool) -> None:
    """List the corpora that have a name; any hub id or path works too.

    \b
    Example:
      curate corpora
    """
    from curate.corpora import CORPORA

    if as_json:
        emit_json({name: {"source": c.source.name, "about": c.about, "licence": c.licence}
                   for name, c in CORPORA.items()})
    else:
        click.echo(columns([[name, c.source.name, c.licence, c.about] for name, c in CORPORA.items()],
                           ("name", "source", "licence", "what")))


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """Look at this machine: Python, packages, devices, memory, disk, hub login; with the fix for each.

    \b
    Example:
      curate doctor
    """
    from curate.doctor import checks

    found = list(checks())
    if as_json:
        emit_json([check.as_json() for check in found])
    else:
        click.echo(columns([[c.state, c.name, c.found, c.fix] for c in found], ("", "what", "found", "fix")))
    if any(check.state == "missing" for check in found):
        raise SystemExit(int(Exit.ENVIRONMENT))
