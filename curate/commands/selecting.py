"""Commands that read scores and choose rows by them, up to a mix for any trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from curate.core.errors import UserError
from curate.core.objects import read_place
from curate.core.terminal import Number, columns, emit_json, quoted, say
from curate.options import STORE, eps_option, json_option, members_option, store_option


@click.command()
@store_option
@click.option("--frac", type=float, help="Share of the fine-tuning set (or of the corpus) to add as safe rows.")
@click.option("--n", type=click.IntRange(min=0), help="Number of safe rows, instead of --frac.")
@click.option("--tokens", type=click.IntRange(min=1), help="Instead of --frac: as many rows as have no more answer "
              "tokens than this together. Compares strategies at one dose, since chosen rows may be shorter.")
@click.option("--finetune", metavar="PATH|demo/NAME", help="The fine-tuning set that the safe rows are mixed into.")
@click.option("--strategy", type=click.Choice(["none", "interleaving", "interleaving+", "interleaving++"]),
              default="interleaving++", show_default=True,
              help="none: the fine-tuning set alone; random; top by s_d; top by s_d without refusals.")
@click.option("--corpus", metavar="NAME|PATH", help="Which corpus of the store, where there are several; or where "
              "its file is now, if it was moved.")
@eps_option
@members_option
@click.option("--min-answer-tokens", type=click.IntRange(min=1), default=16, show_default=True,
              help="Shorter answers are not taken: of a few tokens, s_d is large by chance.")
@click.option("--placement", type=click.Choice(["even", "shuffled"]), default="even", show_default=True,
              help="Where safe rows stand in the training order.")
@click.option("--seed", default=0, show_default=True, help="Decides the random strategy and the order.")
@click.option("--map", "mapping", multiple=True, metavar="FIELD=COLUMN", help="Columns of the fine-tuning set.")
@click.option("--strip-think", is_flag=True, help="Clean the fine-tuning set of empty <think> blocks and /no_think.")
@click.option("--max-bad", type=Number(0, 1), default=0.0, show_default=True,
              help="Share of unreadable rows of the fine-tuning set to put aside instead of stopping.")
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
    from curate.core.refs import ref_of
    from curate.corpora import open_corpus
    from curate.records import PlannedCorpus
    from curate.select import Choice, build_manifest, rerooted
    from curate.store import Store

    if options["strategy"] != "none" and sum(options[name] is not None for name in ("frac", "n", "tokens")) != 1:
        raise UserError("Say how many safe rows: one of --frac, --n and --tokens.", "For example --frac 0.05.")
    root = root or out.parent
    tuned = None
    if finetune:
        found = open_corpus(finetune, parse_mapping(options["mapping"]), options["strip_think"])
        tuned = rerooted(PlannedCorpus(label=found.label, source=found.source, folder=str(found.folder), key="",
                                       n_rows=0), root)
    names = ("strategy", "frac", "n", "tokens", "eps", "members", "seed", "min_answer_tokens", "placement",
             "max_bad")
    choice = Choice(**{name: options[name] for name in names})
    opened = None if choice.strategy == "none" else Store.open_read(store)
    rejects = out.with_name(f"{out.stem}.rejects.jsonl")
    manifest, selection = build_manifest(opened, choice, root, tuned, options["corpus"], rejects)
    manifest.write(out)
    if as_json:
        emit_json({"manifest": str(out), "digest": manifest.digest, "counts": manifest.counts, "cut": selection.cut,
                   "near_cut": selection.near, "answer_tokens": selection.tokens,
                   "answer_tokens_by_chance": selection.tokens_by_chance})
        return
    click.echo(columns([[k, str(v)] for k, v in manifest.counts.items()], ("rows", "number")))
    if selection.cut is not None:
        click.echo(f"Cut at s_d = {selection.cut:+.4f}; {selection.near} rows lie within 0.01 of it.")
    if selection.ids:
        click.echo(f"Answer tokens of the safe rows: {selection.tokens:,}; as many rows drawn at random would have "
                   f"{selection.tokens_by_chance:,.0f} on average.")
    if manifest.counts.get("finetune_rejected"):
        say(f"The rejected rows of the fine-tuning set are listed in {rejects}.")
    rooted = "" if root.resolve() == out.parent.resolve() else f" --root {quoted(str(root))}"
    based = "" if manifest.aligned is not None and ref_of(manifest.aligned) else " --base MODEL"
    say(f"Manifest {out} (digest {manifest.digest[:12]}). Next: train run --mix {quoted(str(out))}{rooted}{based}")


@click.command()
@click.argument("query")
@store_option
@eps_option
@members_option
@click.option("--format", "style", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True,
              help="How to print the rows.")
@click.option("--max-rows", type=click.IntRange(min=1), default=1000, show_default=True,
              help="A table leaves out the rows beyond, and says so; csv and json are never cut: more rows end with "
              "exit code 2.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.parquet",
              help="Write all rows to this file, however many, instead of printing them.")
@click.option("--seconds", type=Number(min=0.1), default=60.0, show_default=True, help="Time limit.")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
def sql(query: str, store: Path | str, style: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Query the evidence: one SELECT over the views examples, corpora, nll, models and scores.

    \b
    Example:
      curate sql "SELECT corpus, count(*) n, avg(s_d) FROM scores JOIN corpora USING (example_id) GROUP BY corpus"
      curate sql "SELECT * FROM scores_at(0.5) ORDER BY s_d DESC LIMIT 5"
      curate sql "SELECT example_id, s_d FROM scores" --out scores.parquet
    """
    from curate.sandbox import Limits, format_result, run_sql, write_sql

    style = "json" if as_json else style
    if out:
        n_rows = write_sql(store, query, out, Limits(**options))
        if style == "json":
            emit_json({"out": str(out), "rows": n_rows})
        say(f"{n_rows:,} rows in {out}")
        return
    result = run_sql(store, query, Limits(**options))
    if result.cut and style != "table":
        raise UserError(f"The query has more than {options['max_rows']} rows, and {style} is not cut.",
                        "Raise --max-rows, write all with --out FILE.parquet, or add a LIMIT to the query.")
    click.echo(format_result(result.table, style), nl=False)
    if result.cut:
        say(f"Only the first {options['max_rows']} rows are shown; --max-rows raises that.")


@click.command()
@click.argument("which", type=click.Choice(["top", "bottom", "near", "random"]), default="top")
@store_option
@click.option("-n", "--n", type=click.IntRange(min=1), default=5, show_default=True, help="How many rows.")
@eps_option
@members_option
@click.option("--frac", type=Number(0, 1, min_open=True, max_open=True), default=0.05, show_default=True,
              help="Where the cut lies, for `near`.")
@click.option("--refusals/--no-refusals", default=None, help="Only refusals, or only other answers.")
@click.option("--corpus", metavar="NAME|PATH", help="Only the rows of one corpus. [default: of all]")
@click.option("--seed", default=0, show_default=True, help="For `random`.")
@json_option
def show(which: str, store: Path | str, n: int, as_json: bool, **options: Any) -> None:
    """Read scored rows: top, bottom, near the cut, or random.

    \b
    Example:
      curate show top -n 3 --no-refusals
    """
    from curate.query import connect
    from curate.select import planned_corpus
    from curate.show import Kept, render, rows
    from curate.store import Store

    opened = Store.open_read(store)
    key = planned_corpus(opened, options["corpus"]).key if options["corpus"] else None
    scored = connect(opened, options["eps"], options["members"])
    found = rows(scored, which, n, Kept(options["refusals"], key), options["frac"], options["seed"])
    if as_json:
        emit_json(found)
    elif found:
        click.echo(render(found))
    elif options["refusals"] is not None and rows(scored, which, 1, Kept(key=key)):
        click.echo(f"No scored row is {'a refusal' if options['refusals'] else 'anything but a refusal'}.")
    else:
        raise UserError("No row of this store has a score.", "Score it under at least one member: curate score ...")


@click.command()
@click.argument("store", type=read_place, default=STORE, metavar="[FOLDER|URL]")
@click.option("--html", "html_path", type=click.Path(path_type=Path, dir_okay=False),
              help="Write one self-contained HTML file.")
@eps_option
@members_option
@click.option("--frac", type=Number(0, 1, min_open=True, max_open=True), default=0.05, show_default=True,
              help="Where the cut lies: the top share of the scored rows.")
@json_option
def report(store: Path | str, html_path: Path | None, eps: float, members: tuple[str, ...] | None, frac: float,
           as_json: bool) -> None:
    """Look at a corpus and its scores: rows, s_d, the cut, refusals, the top rows, models and digests.

    \b
    Example:
      curate report scores --html scores.html
    """
    from curate.core.files import write_atomic
    from curate.report import html_page, summarise

    found = summarise(store, eps, frac, members)
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


@click.command()
@click.argument("manifest", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A .jsonl or .parquet file.")
@click.option("--root", type=click.Path(path_type=Path, file_okay=False, exists=True),
              help="Folder that the manifest's paths are relative to. [default: its own]")
@json_option
def export(manifest: Path, out: Path, root: Path | None, as_json: bool) -> None:
    """Write a mix as plain rows for any other trainer.

    \b
    Example:
      curate export manifest.json --out mix.jsonl
    """
    from curate.core.documents import MixManifest
    from curate.export import export as write

    mix = MixManifest.read(manifest)
    n = write(mix, root or manifest.parent, out)
    if as_json:
        emit_json({"out": str(out), "rows": n, "manifest": str(manifest), "digest": mix.digest})
    say(f"{n} rows in {out}")
