"""The study's own data and the arithmetic of its tables."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from bench.study.picture import Point, dose_points, picture, stacked, trade_points
from bench.study.prepare import (
    CUSTOMERS,
    DOMAINS,
    N_CUSTOMER,
    PAIRS,
    by_hash,
    expand,
    good_answers,
    narrow,
    prompt_id,
    tidy,
    twins,
    write_customer,
    write_pairs,
    write_pools,
    write_twins,
)
from bench.study.scores import beside, best, by_rank, members_of, partial, s_d, stability
from bench.study.training import (
    KINDS,
    MARGINS,
    Run,
    add_evidence,
    by_part,
    by_seed,
    condition,
    differences,
    grouped,
    page,
    part_of,
    read,
    tables,
    write_evidence,
)
from curate.core.documents import Method, MixManifest, RunCard
from curate.core.errors import UserError
from curate.core.example import pair
from curate.core.sources import file_source, read_source
from curate.intake import sampled
from curate.job import Sampling
from curate.refusals import refusal_reason
from judge.intervals import Estimate
from judge.questions import load_probes
from tests.conftest import ROOT
from tests.fakes import tiny_model
from tests.judge.makers import make_run, make_verdicts, samples


def rows_of(domain: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (PAIRS / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("domain", DOMAINS)
def test_good_answers_are_enough_and_distinct(domain: str) -> None:
    rows = rows_of(domain)
    assert len(rows) >= 60
    assert len({row["prompt_id"] for row in rows}) == len(rows) == len({json.dumps(row["answer"]) for row in rows})


@pytest.mark.parametrize("domain", DOMAINS)
def test_pairs_differ_in_quality_and_not_in_length(domain: str, shared: Path) -> None:
    held_out = {prompt_id(e.prompt): e for e in narrow(shared, domain, "train_100")}
    good = good_answers(domain, {key: e.prompt for key, e in held_out.items()})
    ratios = [len(good[key]) / len(tidy(held_out[key].answer)) for key in good]
    assert all(0.75 < ratio < 1.35 for ratio in ratios)
    assert 0.9 < sum(ratios) / len(ratios) < 1.1
    assert not any(refusal_reason(answer) for answer in good.values())
    assert all(good[key] != held_out[key].answer for key in good)
    if domain != "code":
        for key, answer in good.items():
            words, others = answer.split(), held_out[key].answer.split()
            runs = {tuple(others[k:k + 8]) for k in range(len(others) - 7)}
            assert not runs & {tuple(words[k:k + 8]) for k in range(len(words) - 7)}, "the wording is our own"


def test_the_files_of_the_study_are_what_the_judge_reads(shared: Path, tmp_path: Path) -> None:
    write_customer(shared, tmp_path, "security")
    write_pairs(shared, tmp_path, "security")
    customer = [json.loads(line)["prompt"] for line in (tmp_path / "customer-security.jsonl").read_text().splitlines()]
    unseen = load_probes(str(tmp_path / "pairs" / "unseen-security.jsonl"))
    assert len(customer) == N_CUSTOMER and len(unseen) == 80
    assert not set(customer) & {probe.question for probe in unseen}, "what is judged was not learnt"
    context = load_probes(str(tmp_path / "pairs" / "context-security.jsonl"))
    assert all("security" in probe.question for probe in context)


def test_parts_of_the_pool_are_the_pool_in_another_order(shared: Path, tmp_path: Path) -> None:
    """Parts share no row, and the first is what `curate score --sample 1000` would take."""
    write_pools(shared, tmp_path)
    names = ["all", *range(1, 10)]
    ids = {name: [e.id for e in read_source(file_source(tmp_path / f"pool-{name}.jsonl", tmp_path), tmp_path)]
           for name in names}
    whole = list(read_source(file_source(shared / "pool" / "safe_pool.jsonl", shared), shared))
    assert len(set(ids["all"])) == len(ids["all"]) and set(ids["all"]) == {e.id for e in whole}
    assert sorted(ids["all"]) == sorted(row for name in names[1:] for row in ids[name])
    assert ids[1] == [e.id for e in sampled(iter(whole), Sampling(sample=1000))] and len(ids[1]) == 1000
    again = next(iter(read_source(file_source(tmp_path / "pool-all.jsonl", tmp_path), tmp_path)))
    assert again.meta == whole[0].meta


def test_lines_of_a_prompt_stand_for_themselves() -> None:
    prompt = "\none\ntwo\nthree\n"
    assert expand(["@1-2", "own\n", "@3-3", "@x"], prompt) == "one\ntwo\nown\n\nthree\n@x"
    for wrong in ("@0-1", "@2-1", "@3-4"):
        with pytest.raises(ValueError, match=wrong):
            expand([wrong], prompt)


def test_a_customers_rows_do_not_depend_on_their_order() -> None:
    rows = [pair(f"question {k}", "answer") for k in range(9)]
    assert by_hash(rows, 4) == by_hash(rows[::-1], 4)
    assert tidy("a  \nb\t\n c") == "a\nb\n c"


def frame() -> pl.DataFrame:
    """Forty rows; row k has s_d = k / 40 under a and -k / 40 under b with eps 0 (aligned NLL 1); row 39 refuses."""
    k = np.arange(40)
    return pl.DataFrame({"example_id": [f"{i:02d}" for i in k], "source": ["s"] * 40, "label": ["x"] * 40,
                         "refusal": k == 39, "n_tokens": 40 - k, "aligned": np.ones(40), "a": 1 + k / 40,
                         "b": 1 - k / 40})


def test_scores_and_choices_by_hand() -> None:
    rows = frame()
    assert members_of(rows) == ["a", "b"]
    assert s_d(rows, ["a"], eps=0).to_list() == pytest.approx([k / 40 for k in range(40)])
    assert s_d(rows, ["a"], eps=1).to_list() == pytest.approx([k / 80 for k in range(40)])
    assert s_d(rows, ["a", "b"]).to_list() == pytest.approx([0] * 40, abs=1e-12)
    assert best(rows, ["a"]) == {"38", "37"}
    assert best(rows, ["b"]) == {"00", "01"}
    assert best(rows, ["a"], least=10) == {"30", "29"}
    twins = stability(rows.with_columns(b=pl.col("a")))
    assert "| a alone | 100% | +1.000 |" in twins and "| answers of 16 tokens or more | 0% |" in twins
    hundred = pl.concat([rows.with_columns(example_id=pl.format("{}-{}", pl.lit(k), "example_id")) for k in range(3)])
    assert "| 1% | 100.0% | 1 | 1.00 |" in by_rank(hundred.with_columns(b=pl.col("a")))


def test_partial_correlation_takes_a_common_cause_out() -> None:
    cause = np.arange(101.0)
    noise = np.tile([0.3, -0.3], 51)[:101]
    x, y = cause + 40 * noise, cause - 40 * noise
    assert partial(cause, 3 * cause + 1, []) == pytest.approx(1)
    assert partial(x, y, []) > 0.7
    assert partial(x, y, [cause]) == pytest.approx(-1, abs=0.05), "what is left of the two is the noise, turned round"


def test_equal_values_share_a_rank() -> None:
    x, y = np.array([1.0, 1, 2, 3]), np.array([2.0, 1, 3, 4])   # ranks 1.5 1.5 3 4 and 2 1 3 4
    assert partial(x, y, []) == partial(x[[1, 0, 2, 3]], y[[1, 0, 2, 3]], []) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_two_ensembles_are_compared_on_the_rows_of_both() -> None:
    rows = frame().with_columns(b=1 - pl.col("n_tokens") / 80)
    assert "| all | 40 | 100% | +1.000 |" in beside(rows, rows)
    turned = rows.with_columns(a=2 - pl.col("a"), b=2 - pl.col("b"))     # who was hard is easy, and the other way about
    assert "| a | 40 | 0% | -1.000 |" in beside(rows, turned)
    assert "| b | 20 | 100% | +1.000 |" in beside(rows.head(20), rows[::-1])    # in another order, with more rows
    with pytest.raises(ValueError, match="the members are"):
        beside(rows, rows.drop("b"))
    with pytest.raises(ValueError, match="no row in common"):
        beside(rows, rows.with_columns(example_id=pl.lit("z") + pl.col("example_id")))


def test_cards_and_manifests_of_the_study_belong_together() -> None:
    """Documents refuse to be read where anything in them was changed."""
    cards = {path: RunCard.read(path) for path in sorted((PAIRS.parent / "runs").rglob("*.run.json"))}
    assert len(cards) >= 16
    for path, card in cards.items():
        mix = MixManifest.read(path.with_name(path.name.replace(".run.", ".mix.")))
        assert (card.mix, card.n_finetune, card.n_safe) == (
            mix.digest, len(mix.ids("finetune")), len(mix.ids("safe")))


def test_seeds_are_compared_with_their_own_kind() -> None:
    """Margins: base 1; no defence 0.5 and 0.3 by seed; random rows 0.6, 0.6 and, of a seed only they have, 0.9."""
    def run(name: str, seed: int, margin: float) -> Run:
        return Run(f"{name}-{seed}", name, seed, {kind: {f"{kind}{k}": margin for k in range(3)} for kind in KINDS})

    groups = grouped([run("random", 0, 0.6), run("base", 9, 1.0), run("none", 0, 0.5), run("random", 1, 0.6),
                      run("none", 1, 0.3), run("random", 2, 0.9), run("chosen", 1, 0.1)])
    assert [group[0].condition for group in groups] == ["base", "none", "chosen", "random"]
    lines = by_seed(groups, groups[1], "unseen").splitlines()
    assert lines[0] == "| condition | seed 0 | seed 1 | range |"
    assert lines[2:] == ["| random, 3 seeds | +0.100 (+0.100, +0.100) | +0.300 (+0.300, +0.300) | +0.100 to +0.300 |"]
    kept = differences(groups, groups[1]).splitlines()
    assert kept[3].startswith("| random, 3 seeds | +0.200 ("), "the seeds that both have: 0.6 less 0.4"


def test_choice_and_draw_are_compared_within_their_part_of_the_pool() -> None:
    """Margins: no defence 0.5; chosen rows 0.7, 0.6, of the whole pool 0.9; drawn ones 0.55, 0.65, of the whole 0.5."""
    def run(name: str, margin: float) -> Run:
        return Run(name, name, 0, {kind: {f"{kind}{k}": margin for k in range(3)} for kind in KINDS})

    runs = [run("none", 0.5), run("plusplus-50pc-long", 0.7), run("random-dose-0", 0.55), run("random-dose-1", 0.1),
            run("plusplus-50pc-long-1", 0.2)]
    assert by_part(runs, "unseen") == ""
    runs += [run("plusplus-50pc-long-of-pool-2", 0.6), run("random-dose-0-of-pool-2", 0.65),
             run("plusplus-50pc-long-of-pool-all", 0.9), run("random-dose-0-of-pool-all", 0.5),
             run("plusplus-50pc-long-of-pool-3", 0.6)]
    assert [line.split(" | ") for line in re.sub(r" \(.*?\)", "", by_part(runs, "unseen")).splitlines()[2:]] == [
        ["| pool-1", "+0.200", "+0.050", "+0.150 |"], ["| pool-2", "+0.100", "+0.150", "-0.050 |"],
        ["| pool-all", "+0.400", "+0.000", "+0.400 |"], ["| 2 parts", "+0.150", "+0.100", "+0.050 |"]]
    drawn = Method(strategy="interleaving", n=3, tokens=9, eps=0.1, seed=0, min_answer_tokens=1)
    assert condition("interleaving", drawn, "pool-2") == "interleaving, 9 tokens, of pool-2"
    assert (part_of("random-50pc-2"), part_of("random-50pc-2-of-twins")) == ("pool-1", "twins")


def test_twins_are_as_long_as_the_rows_they_stand_beside() -> None:
    """Of two rows, 100 and 30 tokens long, 96 to 104 and 28 to 32 are near enough; else the nearest is taken."""
    def rows(*lengths: int, refusing: tuple[int, ...] = ()) -> pl.DataFrame:
        return pl.DataFrame({"example_id": [f"r{k}" for k in range(len(lengths))], "n_tokens": lengths,
                             "refusal": [k in refusing for k in range(len(lengths))]})

    assert twins(rows(100, 30, 300, 31, 104), ["r0", "r1"], 0) == ["r3", "r4"]
    assert twins(rows(100, 30, 100, 31, 108, refusing=(2,)), ["r0", "r1"], 0) == ["r3", "r4"], "a refusal is no twin"
    assert twins(rows(100, 100, 99, 150), ["r0", "r1"], 0) == ["r2", "r3"], "each is taken once"
    near = rows(100, *range(96, 105))
    assert {row for seed in range(40) for row in twins(near, ["r0"], seed)} == {f"r{k}" for k in range(1, 10)}
    assert twins(near, ["r0"], 3) == twins(near[::-1], ["r0"], 3)


def test_the_twins_of_the_study_can_be_drawn_again(shared: Path, tmp_path: Path) -> None:
    write_pools(shared, tmp_path)
    for domain in CUSTOMERS:
        write_twins(shared, tmp_path, domain)
        for seed in range(3):
            rows = read_source(file_source(tmp_path / f"twins-{domain}-{seed}.jsonl", tmp_path), tmp_path)
            mix = PAIRS.parent / "runs" / domain / f"random-50pc-{seed}-of-twins.mix.json"
            assert {e.id for e in rows} == set(MixManifest.read(mix).ids("safe")), "nothing was left out of the mix"


def test_evidence_is_what_the_verdicts_say(tmp_path: Path) -> None:
    """An answer is coherent up to the base's own limit; a committed folder gives the same tables as the judged one."""
    base = make_verdicts("base", [0.25, -0.5], (), [False, True], samples([1.0, 2.0]))
    other = make_verdicts("none", [0.125, -0.25], (), [True, True], samples([1.5, 99.0, None]))
    probes = tuple(p.model_copy(update={"set": "unseen-medical"}) for p in other.probes)
    judged, committed = tmp_path / "judged", tmp_path / "committed"
    folder = make_run(tiny_model(tmp_path / "tiny"), judged / "none")
    base.write(judged / "base.verdicts.json")
    other.model_copy(update={"probes": probes}).write(folder / "verdicts.json")
    runs = read(judged)
    assert [(run.name, run.condition, run.seed) for run in runs] == [("base", "base", None), ("none", "none", 0)]
    assert runs[0].values["general"] == pytest.approx({"g0": 0.25, "g1": -0.5})
    assert runs[1].values["unseen"] == pytest.approx({"g0": 0.125, "g1": -0.25}) and not runs[1].values["general"]
    assert runs[1].values["coherent"] == {"q0": 1.0, "q1": 0.0, "q2": 0.0}
    assert runs[1].values["opswap"] == {"i0": 1.0, "i1": 1.0}
    committed.mkdir()
    shutil.copy(folder / "run.json", committed / "none.run.json")
    write_evidence(runs, committed / "evidence.csv")
    assert (committed / "evidence.csv").read_text().splitlines()[:3] == [
        "kind,item,base,none", "general,g0,0.25,", "general,g1,-0.5,"]
    assert tables(committed, read(committed)) == tables(judged, runs)


def test_evidence_of_a_later_sitting_joins_what_is_kept(tmp_path: Path) -> None:
    """The base keeps its numbers; a run judged again takes its own place; another base is refused."""
    def run(name: str, margin: float) -> Run:
        return Run(name, name, 0, {kind: {"a": margin} if kind == "unseen" else {} for kind in KINDS})

    kept = tmp_path / "evidence.csv"
    add_evidence([run("none", 0.5), run("base", 1.0)], kept)
    assert kept.read_text().splitlines() == ["kind,item,base,none", "unseen,a,1,0.5"]
    add_evidence([run("base", 1.0005), run("chosen", 0.7)], kept)
    assert kept.read_text().splitlines() == ["kind,item,base,chosen,none", "unseen,a,1,0.7,0.5"]
    add_evidence([run("base", 1.0), run("none", 0.4)], kept)
    assert kept.read_text().splitlines() == ["kind,item,base,chosen,none", "unseen,a,1,0.7,0.4"]
    other_pairs = Run("base", "base", None, {kind: {"b": 1.0} if kind == "unseen" else {} for kind in KINDS})
    for wrong in (run("base", 1.002), other_pairs):
        with pytest.raises(UserError, match="the base's margins"):
            add_evidence([wrong, run("late", 0.1)], kept)
    assert "late" not in kept.read_text()


RUNS = sorted(path.parent for path in (PAIRS.parent / "runs").glob("*/evidence.csv"))


def test_the_page_of_tables_is_made_of_the_committed_evidence() -> None:
    assert set(CUSTOMERS) == {folder.name for folder in RUNS}
    assert (PAIRS.parent / "training-tables.md").read_text(encoding="utf-8") == page(RUNS) + "\n"


def test_a_later_sitting_makes_the_same_of_the_same_run() -> None:
    """What the study says of no defence made again, and of what was chosen by other scores."""
    study = PAIRS.parent
    first, again = ({run.name: run for run in read(study / place / "medical")} for place in ("runs", "again"))
    for kind in MARGINS:
        old, new = first["none"].values[kind], again["none"].values[kind]
        assert old.keys() == new.keys() and max(abs(old[item] - new[item]) for item in old) < 2e-4
    assert first["none"].values["opswap"] == again["none"].values["opswap"]
    assert sum(first["none"].values["coherent"].values()) - sum(again["none"].values["coherent"].values()) == 1
    chosen = [set(MixManifest.read(study / "runs" / customer / "plusplus-50pc.mix.json").ids("safe"))
              for customer in ("security-first", "security")]
    assert len(chosen[0] & chosen[1]) == 48


def test_the_study_quotes_its_tables_as_they_are() -> None:
    said = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    said = said[said.index("## Results: training"):said.index("## Results: does s_d")]
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    assert len(rows) > 10 and [row for row in rows if row not in page(RUNS).splitlines()] == []


def test_points_of_the_picture_by_hand(tmp_path: Path) -> None:
    """No defence loses 1 in the domain and 0.5 outside; a run with safe rows 0.75 and 0.25, so it keeps 0.25."""
    def made(name: str, condition: str, seed: int | None, unseen: float, inside: float) -> Run:
        return Run(name, condition, seed, {"unseen": {"a": unseen, "b": unseen}, "in": {"c": inside},
                                           "general": {}, "context": {}, "opswap": {}, "coherent": {}})

    card = RunCard.read(make_run(tiny_model(tmp_path / "tiny"), tmp_path / "none") / "run.json")
    mixed = card.model_copy(update={"n_safe": 2, "n_trained_tokens": card.n_trained_tokens + 90})
    groups = grouped([made("base", "base", None, 1.0, 1.0), made("none", "none", 0, 0.5, 0.0),
                      made("mixed", "interleaving++, 5%", 0, 0.75, 0.25)])
    dose, = dose_points({"none": card, "mixed": mixed}, groups)
    assert (dose.look, dose.name, dose.x, dose.y.value) == ("interleaving++", "mixed", 90, 0.25)
    assert [(p.look, p.name, p.x, p.y.value) for p in trade_points(groups)] == [
        ("none", "none", 1.0, 0.5), ("interleaving++", "++, 5%", 0.75, 0.25)]


def test_the_picture_is_drawn() -> None:
    assert picture(RUNS[:1])[:8] == b"\x89PNG\r\n\x1a\n"


def test_names_in_the_picture_are_a_gap_apart_and_lie_around_their_points() -> None:
    at = {"a": 9.0, "b": 5.0, "c": 4.5, "d": 4.4}
    points = [Point("none", name, 0.0, Estimate(y, y, y, 1)) for name, y in at.items()]
    groups = stacked(points, 1.0)
    assert [[point.name for point, _ in group] for group in groups] == [["a"], ["b", "c", "d"]]
    heights = [y for _, y in groups[1]]
    assert groups[0][0][1] == 9.0 and sum(heights) / 3 == pytest.approx((5.0 + 4.5 + 4.4) / 3)
    assert [heights[0] - heights[1], heights[1] - heights[2]] == pytest.approx([1.0, 1.0])
