"""The numbers behind the score tables, in one file without any text: from a store, and back into one.

    python -m bench.study.evidence write OUT/scores docs/study/scores.parquet
    python -m bench.study.evidence restore docs/study/scores.parquet OUT/scores

A file has a row for every example that all models have a number for, in the order in which a sample is drawn, so that
the first thousand are part 1 of the pool: its content id, its source and label, whether it refuses, its answer tokens
and each model's mean NLL. What the store's documents say about models, engine and dtype is in the file's metadata.

A store made of a file knows no rows until it is shown them: ``curate score --corpus POOL --store S --aligned A --dtype
D``, A and D as in the file, reads the corpus and computes nothing, and whoever has the pool can then choose from it
without members or hours. The aligned model is opened to see that it is the same; its numbers are the file's as well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import polars as pl

from curate.intake import draw_key
from curate.parts import NLL_SCHEMA
from curate.query import connect
from curate.records import ScoredModel, StoreHeader
from curate.store import Store

ROWS = ("example_id", "source", "label", "refusal", "n_tokens")
"""Columns about the row itself; all others are mean NLLs, one for each model."""
ALIGNED = "aligned"
SOURCES = {"alpaca-eval:claude-3-5-sonnet-20240620": "AlpacaEval, model A",
           "alpaca-eval:Meta-Llama-3.1-70B-Instruct-Turbo": "AlpacaEval, model B",
           "gpteacher-roleplay": "GPTeacher role play", "llms-from-scratch": "LLMs-from-scratch",
           "safety-tuned-llamas": "safety-tuned LLaMAs"}
"""What the pool calls its sources, to what the study calls them."""
_HEADER, _MODELS = "safeset.store", "safeset.models"


def evidence(place: Path) -> pl.DataFrame:
    """Return the rows that every model has a number for, from a store or from a file of evidence.

    Columns: ``example_id, source, label, refusal (Boolean), n_tokens, aligned`` and one per member, nats per token.
    """
    if place.suffix == ".parquet":
        return pl.read_parquet(place)
    connection = connect(Store.open_read(place), 0.1, None)
    rows = connection.sql("""
        SELECT s.example_id, json_extract_string(e.meta, '$.source') AS source,
               json_extract_string(e.meta, '$.prompt_harm_label') AS label, s.refusal IS NOT NULL AS refusal,
               s.n_answer_tokens AS n_tokens
        FROM scores s JOIN examples e USING (example_id) WHERE s.status = 'ok'""").pl()
    means = connection.sql("""SELECT example_id, CASE role WHEN 'aligned' THEN 'aligned' ELSE name END AS model,
                                     CAST(nll_sum / n_tokens AS FLOAT) AS nll
                              FROM nll JOIN models USING (model_id) WHERE status = 'ok'""").pl()
    table = means.pivot("model", index="example_id", values="nll").drop_nulls()
    models = sorted(set(table.columns) - {"example_id", ALIGNED})
    found = rows.join(table, on="example_id").select(*ROWS, ALIGNED, *models).with_columns(
        pl.col("source").replace(SOURCES))
    return found.sort(found["example_id"].map_elements(draw_key, return_dtype=pl.String))


def write(place: Path, out: Path) -> pl.DataFrame:
    """Write the evidence of a store to a file, with what its documents say; return it."""
    store, found = Store.open_read(place), evidence(place)
    models = json.dumps([json.loads(model.to_bytes()) for model in store.models()])
    found.write_parquet(out, compression="zstd", metadata={_HEADER: store.header.to_bytes().decode(), _MODELS: models})
    return found


def restore(file: Path, place: Path) -> int:
    """Put the numbers of a file of evidence into a store, which is made if need be; return how many there are.

    Means have the precision of float32, and what the models make of an answer's end is not in the file. Raises
    ``UserError`` where the store holds numbers that these cannot be compared with.
    """
    table, said = pl.read_parquet(file), pl.read_parquet_metadata(file)
    models = [ScoredModel.from_body(one) for one in json.loads(said[_MODELS])]
    with Store.create_or_open(place, StoreHeader.from_bytes(said[_HEADER].encode())) as store:
        for model in models:
            column = ALIGNED if model.role == "aligned" else model.name
            rows = table.select(
                "example_id", pl.lit(model.identity.id).alias("model_id"),
                (pl.col(column).cast(pl.Float64) * pl.col("n_tokens")).alias("nll_sum"), "n_tokens",
                pl.lit(None, pl.Float64).alias("eot_nll"), pl.lit("ok").alias("status"))
            store.put_model(model)
            store.put_nll(model.identity.id, rows.to_arrow().cast(NLL_SCHEMA))
    return table.height * len(models)


def main() -> None:
    """Write a file of evidence, or a store made of one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["write", "restore"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "write":
        print(f"{write(arguments.source, arguments.out).height:,} rows")
    else:
        numbers, header = restore(arguments.source, arguments.out), Store.open_read(arguments.out).header
        print(f"{numbers:,} numbers. Next: curate score --corpus POOL --store {arguments.out} "
              f"--aligned {header.aligned.name} --dtype {header.dtype}")


if __name__ == "__main__":
    main()
