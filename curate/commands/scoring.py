"""Commands for the store of scores: what to score, with what, how far it is, whether it is whole, fewer parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from curate.core.errors import Exit, UserError
from curate.core.objects import is_url, read_place
from curate.core.terminal import Number, columns, emit_json, quoted, safe, say
from curate.options import ENSEMBLE, STORE, engine_options, json_option, score_job, store_option


@click.command()
@click.option("--corpus", "corpora", multiple=True, required=True, metavar="NAME|PATH|URL|HUB_ID",
              help="What to score; several are allowed. `curate corpora` lists names.")
@click.option("--aligned", help="The aligned model: smollm2, a folder or a hub id[@revision]. "
                                "[default: the ensemble's base]")
@click.option("--ensemble", type=click.Path(path_type=Path),
              help="Ensemble of misaligned members, from `train ensemble`. "
                   f"[default: {ENSEMBLE} if it exists and no --member is given]")
@click.option("--member", "members", multiple=True, type=click.Path(path_type=Path),
              help="A member: a run. Several are allowed, with --ensemble on top of its members.")
@store_option
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True,
              help="auto: bfloat16 on GPUs from Ampere on and CPUs with AMX or AVX512_BF16, else float32; "
                   "float32 for vLLM on a CPU.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--max-tokens", type=click.IntRange(min=8), default=4096, show_default=True,
              help="Longer examples get the status too_long; nothing is cut.")
@click.option("--map", "mapping", multiple=True, metavar="FIELD=COLUMN",
              help="Where prompt, response, system or input stand, for unusual columns.")
@click.option("--strip-think", is_flag=True, help="Drop empty <think> blocks and a trailing /no_think.")
@click.option("--max-bad", type=Number(0, 1), default=0.0, show_default=True,
              help="Share of unreadable rows to put aside instead of stopping.")
@click.option("--max-failures", type=Number(0, 1), default=0.01, show_default=True,
              help="Share of the rows that can be scored (not those too long or without an answer) that may come out "
                   "without a finite number; as soon as more have, scoring stops with exit code 8.")
@click.option("--retry-failed", is_flag=True, help="Score the chunks with rows that gave no finite number again; what "
                                                  "was stored of them is put aside.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first rows of each corpus; no row after is read.")
@click.option("--sample", type=click.IntRange(min=1), help="A random sample of so many rows of each corpus, decided by "
                                                          "content.")
@click.option("--seed", default=0, show_default=True, help="Seed of the sample.")
@engine_options
@click.option("--shard", metavar="I/N", help="Only the I-th of N shares of the work, I from 1: for schedulers. Shares "
                                            "are dealt out by chance; together they give what one run gives.")
@click.option("--ray", metavar="auto|ADDRESS", help="Compute on the Ray cluster at this address; auto: the one that "
                                                   "runs here. The store is still read and written here. The engine "
                                                   "is transformers, or vllm where --engine says so; never server.")
@click.option("--ray-cpus", type=click.IntRange(min=1), default=1, show_default=True,
              help="Cores of one Ray worker; each worker holds one model.")
@click.option("--dry-run", is_flag=True, help="Do not score: say what it would take, after a short calibration on "
                                            "this machine, without --ray.")
@click.option("--gpu-hour", type=Number(min=0), metavar="PRICE", help="Price of an hour, for --dry-run.")
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
        if options["ray"]:
            raise UserError("--dry-run measures the machine that it runs on, and with --ray others do the work.",
                            "Type it without --ray on a machine like the workers; divide the hours by their number.")
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
    store = quoted(str(options["store"]))
    if summary.left:
        say(f"This shard is done; {summary.left} rows of other shards (counted once for each model) are not scored "
            f"yet. Look with: curate status {store}")
    else:
        say(f"Evidence in {options['store']}. Next: curate select --store {store} --frac 0.05")


def _dry_run(job: Any, price: float | None, as_json: bool) -> None:
    from curate.estimate import estimate, lines

    found = estimate(job, price)
    if as_json:
        emit_json(found.as_json())
        return
    click.echo(columns(lines(found), ("what", "how much")))
    say("Nothing was scored. Hours and cost are those of one machine like this one.")


@click.command()
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
    click.echo(columns([[m.name, m.role, str(m.scored), "-" if m.left is None else str(m.left)] for m in found.models],
                       ("model", "role", "scored", "left")))
    for line in lines(found):
        click.echo(safe(line))


@click.command()
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


@click.command()
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


@click.command()
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


@click.command()
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
