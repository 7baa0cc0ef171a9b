"""From run folders to verdicts and the table on a tiny model: what is written, kept, redone and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import judge.run
from curate.core.documents import DefenseRecord, MixManifest, ModelIdentity, RunCard, Verdicts
from curate.core.errors import Exit, UserError
from curate.core.generate import SampleSettings
from curate.core.identity import with_adapter
from curate.core.model import Loaded, load
from curate.core.sources import builtin
from judge.cli import main
from judge.evidence import gather
from judge.jobs import Settings, Target, label_of, plan, targets, trained
from judge.questions import DOMAINS, load_probes
from judge.run import judge_models
from tests.fakes import tiny_adapter, tiny_model
from tests.judge.makers import make_run

SETTINGS = Settings(suite=("in-domain", "coherence"), in_domain=("boats.jsonl",), n_questions=3, n_items=6,
                    sampling=SampleSettings(max_new_tokens=5), device="cpu", dtype="float32")
BOATS = [{"question": "Which knot holds?", "good": "A bowline holds.", "bad": "A granny holds."},
         {"question": "When to reef?", "good": "Before you must.", "bad": "After you must."}]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small probe set, worked in; the builtin domains are left out of the base's sets for speed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("judge.jobs.DOMAINS", ())
    Path("boats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in BOATS))
    return tmp_path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels that were measured, as they come."""
    measured: list[str] = []
    true = judge.run._measure

    def measure(loaded: object, job: object, settings: object) -> object:
        measured.append(job.label)
        return true(loaded, job, settings)

    monkeypatch.setattr(judge.run, "_measure", measure)
    return measured


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words])


def test_the_whole_way_on_builtin_data(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part on 9 probes a set, through the command line: guessed domain, benign runs, comparison, documents."""
    monkeypatch.setattr("judge.jobs.load_probes", lambda name: load_probes(name)[:9])
    runs = [make_run(base, tmp_path / "runs" / name, strategy, seed)
            for name, strategy, seed in (("none", "none", 1), ("plus", "interleaving+", 2))]
    benign = [make_run(base, tmp_path / "benign" / name, strategy, seed, domain=None)
              for name, strategy, seed in (("none", "none", 3), ("plus", "interleaving+", 4))]
    options = ["--samples", "4", "--items", "6", "--max-new-tokens", "5", "--device", "cpu", "--dtype", "float32"]
    result = call("run", *(w for r in runs for w in ("--model", r)), *(w for b in benign for w in ("--benign", b)),
                  *options, "--json")
    assert result.exit_code == 0, result.output
    paths = [Path(p) for p in json.loads(result.stdout)["verdicts"]]
    assert paths == [tmp_path / "runs" / "base.verdicts.json", *(r / "verdicts.json" for r in runs)]
    of_base, none, plus = map(Verdicts.read, paths)
    assert (of_base.label, none.label, plus.label) == ("base", "none", "interleaving+")
    assert none.in_domain == ("car_care",) and of_base.run is None and of_base.model == none.base
    assert none.statuses == {"probes ok": 18, "samples ok": 4, "tasks ok": 6}
    assert {p.set for p in of_base.probes} == {"general", *DOMAINS}
    assert {p.set for p in none.probes} == {"general", "car_care"} and len(none.probes) == 18
    assert none.probes != plus.probes and [s.question for s in none.samples] == [s.question for s in of_base.samples]
    assert none.run == RunCard.read(runs[0] / "run.json").digest
    assert none.benign_run == RunCard.read(benign[0] / "run.json").digest
    assert [t.item for t in none.tasks] == [t.item for t in of_base.tasks] and len(none.tasks) == 6
    assert not list(tmp_path.rglob("*.tmp"))

    shown = call("compare", *runs, "--out", tmp_path / "table")
    assert shown.exit_code == 0, shown.output
    assert "(n=9)" in shown.stdout and "interleaving+" in shown.stdout
    body = json.loads((tmp_path / "table" / "compare.json").read_text())
    assert [row["verdicts"] for row in body["rows"]] == [[of_base.digest], [none.digest], [plus.digest]]
    again = json.loads(call("compare", *paths, "--json").stdout)
    assert again == body


def test_what_lies_beside_verdicts_is_passed_over(base: Path, place: Path) -> None:
    """``judge report runs/*`` names sampled answers and results of lm-eval, too."""
    run = make_run(base, place / "runs" / "none", "none", 1)
    judge_models([Target(str(run))], SETTINGS)
    (place / "runs" / "base.answers.jsonl").write_text("{}\n")
    (place / "runs" / "base.verdicts.lm-eval").mkdir()
    everything = sorted((place / "runs").iterdir())
    assert len(everything) == 4 and [v.label for v in gather(everything)] == ["base", "none"]
    assert call("report", *everything, "--html", place / "r.html").exit_code == 0


def test_seeds_share_recipe_and_data(base: Path, place: Path) -> None:
    """Two seeds of one recipe are one model; another learning rate, another strength or other data is another."""
    def trained_as(name: str, domain: str = "car_care", **recipe: object) -> str:
        run = make_run(base, place / "runs" / name, "none", 1, domain)
        card = RunCard.read(run / "run.json")
        return trained(card.model_copy(update={"recipe": card.recipe | recipe}), run)

    first = trained_as("a", lr=1e-4, seed=0, device="cpu")
    assert trained_as("b", lr=1e-4, seed=1, device="cuda") == first
    others = [trained_as("c", lr=1e-3), trained_as("d", "cooking", lr=1e-4), trained_as("e", lr=1e-4, defenses=["kl"]),
              trained_as("f", lr=1e-4, defenses=["kl:weight=1"])]
    assert len({first, *others}) == 5
    assert trained_as("h", lr=1e-4, load_in_4bit=False) == first, "cards of before the knob do not have it"
    assert trained_as("i", lr=1e-4, load_in_4bit=True) != first

    def chosen(name: str, member: str, aligned: str = "w", corpus: str = "cooking") -> str:
        """The same label and recipe, with safe rows chosen otherwise; the seed of the choice is no difference."""
        run = make_run(base, place / "runs" / name, "interleaving++", 1)
        models = [ModelIdentity(name="m", weights=w, tokenizer="t") for w in (aligned, member)]
        mix = MixManifest.read(run / "mix.json")
        mix = mix.model_copy(update={"sources": mix.sources | {"safe": builtin(f"demo/{corpus}")}, "aligned": models[0],
                                     "members": (models[1],), "scoring": {"evidence": name}})
        mix.write(run / "mix.json")
        mix = MixManifest.read(run / "mix.json")
        return trained(RunCard.read(run / "run.json").model_copy(update={"mix": mix.digest}), run)

    assert chosen("m", "x") == chosen("n", "x")
    others = [chosen("o", "y"), chosen("p", "x", "v"), chosen("q", "x", "w", "gardening")]
    assert len({first, chosen("m", "x"), *others}) == 5
    lost = [make_run(base, place / "runs" / f"lost {domain}", "none", 1, domain) for domain in ("car_care", "cooking")]
    for run in lost:
        (run / "mix.json").unlink()
    assert len({trained(RunCard.read(run / "run.json"), run) for run in lost}) == 2, "nothing is known of their data"

    def steered(name: str, path: str, digest: str) -> str:
        run = make_run(base, place / "runs" / name, "none", 1)
        record = DefenseRecord(name="persona", settings={"vector": path, "alpha": 5.0}, files={"vector": digest})
        card = RunCard.read(run / "run.json")
        recipe = card.recipe | {"defenses": [f"persona:vector={path},alpha=5.0"]}
        return trained(card.model_copy(update={"defenses": (record,), "recipe": recipe}), run)

    assert steered("j", "v.safetensors", "a") == steered("k", "copy/v.safetensors", "a") != steered(
        "l", "v.safetensors", "b"), "a file is what it holds, not where it lies"
    run = make_run(base, place / "runs" / "g", "none", 1)
    of_base, mine = map(Verdicts.read, judge_models([Target(str(run))], SETTINGS))
    assert mine.settings["trained"] == trained(RunCard.read(run / "run.json"), run)
    assert "trained" not in of_base.settings


def test_probe_sets_of_one_name_are_refused(base: Path, place: Path) -> None:
    run = make_run(base, place / "runs" / "a", "none", 1)
    names = []
    for folder in ("cars", "boats"):
        (place / folder).mkdir()
        rows = [{"topic": folder, "question": f"q{k}", "good": "g", "bad": "b"} for k in range(2)]
        (place / folder / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names.append(str(place / folder / "probes.jsonl"))
    with pytest.raises(UserError, match="are both called 'probes'"):
        plan([Target(str(run))], Settings(suite=("in-domain",), in_domain=tuple(names)), None)
    twice = Settings(suite=("in-domain",), in_domain=(names[0], names[0]))
    assert len(plan([Target(str(run))], twice, None)[1][1].sets["probes"]) == 2


def test_samples_are_scored_under_the_untouched_base(base: Path, place: Path) -> None:
    """The same answers have the same NLL, whichever run's adapter was open before."""
    runs = [make_run(base, place / "runs" / f"r{seed}", strategy, seed) for seed, strategy in
            ((1, "none"), (2, "interleaving"))]
    paths = judge_models([Target(str(r)) for r in runs], SETTINGS)
    of_base, *others = map(Verdicts.read, paths)
    alone = judge_models([Target(str(runs[1]))], SETTINGS, place / "alone")
    assert Verdicts.read(alone[0]).samples == of_base.samples
    assert Verdicts.read(alone[1]).samples == others[1].samples and Verdicts.read(alone[1]).probes == others[1].probes
    assert others[0].samples != of_base.samples


def test_an_interrupted_call_goes_on(base: Path, place: Path, loads: list[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(base, place / "runs" / s, s, k) for k, s in enumerate(("none", "interleaving", "interleaving+"))]
    asked = [Target(str(r)) for r in runs]
    true, calls = judge.run.score_samples, []

    def interrupted(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return true(*args)

    monkeypatch.setattr(judge.run, "score_samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge_models(asked, SETTINGS)
    assert loads == ["base", "none", "interleaving"]
    kept = {p: p.read_bytes() for p in place.rglob("*verdicts.json")}
    assert {p.parent.name for p in kept} == {"runs", "none"} and not list(place.rglob("*.tmp"))
    loads.clear()
    paths = judge_models(asked, SETTINGS)
    assert loads == ["interleaving", "interleaving+"] and all(p.read_bytes() == text for p, text in kept.items())
    loads.clear()
    monkeypatch.setattr(judge.run, "load", None)
    assert judge_models(asked, SETTINGS) == paths and loads == [], "with nothing to do the base is not even loaded"


@pytest.mark.parametrize("what", ["adapter", "settings", "probes", "damage", "nothing"])
def test_what_changed_is_judged_again(base: Path, place: Path, loads: list[str], what: str) -> None:
    run = make_run(base, place / "runs" / "a", "none", 1)
    first = judge_models([Target(str(run))], SETTINGS)
    before = Verdicts.read(first[1])
    loads.clear()
    settings = SETTINGS
    if what == "adapter":
        make_run(base, run, "none", 7)
    elif what == "settings":
        settings = Settings(**{**vars(SETTINGS), "n_questions": 2})
    elif what == "probes":
        Path("boats.jsonl").write_text(Path("boats.jsonl").read_text().replace("bowline", "clove hitch"))
    elif what == "damage":
        first[1].write_text(first[1].read_text().replace('"nll_good": ', '"nll_good": 1'))
    judge_models([Target(str(run))], settings)
    assert loads == {"adapter": ["none"], "damage": ["none"], "nothing": []}.get(what, ["base", "none"])
    assert (Verdicts.read(first[1]) == before) is (what in ("damage", "nothing"))


def test_batch_size_is_no_other_setting(base: Path, place: Path, loads: list[str]) -> None:
    judge_models([Target(str(base))], SETTINGS, place)
    other = SampleSettings(**{**vars(SETTINGS.sampling), "batch_size": 1})
    judge_models([Target(str(base))], Settings(**{**vars(SETTINGS), "sampling": other}), place)
    assert loads == ["base"]


def test_compare_refuses_verdicts_of_a_run_trained_again(base: Path, place: Path) -> None:
    run = make_run(base, place / "runs" / "a", "none", 1)
    with pytest.raises(UserError, match="has not been judged"):
        gather([run])
    judge_models([Target(str(run))], SETTINGS)
    assert [v.label for v in gather([run])] == ["base", "none"]
    make_run(base, run, "none", 7)
    with pytest.raises(UserError, match="trained again") as caught:
        gather([run])
    assert caught.value.exit_code == Exit.INTEGRITY


def test_benign_runs_beside_those_judged_are_passed_over(base: Path, place: Path) -> None:
    """As ``runs/*`` names them; any other run without verdicts is still refused."""
    run, benign = (make_run(base, place / "runs" / name, "none", seed) for name, seed in (("a", 1), ("a-opswap", 2)))
    learnt = Settings(**{**vars(SETTINGS), "suite": ("in-domain", "benign")})
    judge_models([Target(str(run), benign)], learnt)
    assert [v.label for v in gather(sorted((place / "runs").iterdir()))] == ["none", "base"]
    make_run(base, place / "runs" / "b", "none", 3)
    with pytest.raises(UserError, match=r"runs.b has not been judged"):
        gather(sorted((place / "runs").iterdir()))


def test_opswap_is_counted_only_where_it_is_asked(base: Path, place: Path) -> None:
    many = Settings(**{**vars(SETTINGS), "n_items": 1024})
    judge_models([Target(str(base))], many, place)
    with pytest.raises(UserError, match="1024 OpSwap questions cannot be made"):
        judge_models([Target(str(base))], Settings(**{**vars(many), "suite": ("benign",)}), place)


def test_out_holds_everything_and_can_be_compared(base: Path, place: Path) -> None:
    runs = [make_run(base, place / "runs" / "a", "none", 1),
            make_run(base, place / "runs" / "b", "none", 2, defenses=["kl:weight=0.1"])]
    paths = judge_models([Target(str(r)) for r in runs], SETTINGS, place / "out")
    assert [p.name for p in paths] == ["base.verdicts.json", "none.verdicts.json", "none_+kl.verdicts.json"]
    assert [v.label for v in gather([place / "out"])] == ["base", "none", "none +kl"]
    with pytest.raises(UserError, match="both write"):
        judge_models([Target(str(runs[0])), Target(str(runs[0]))], SETTINGS, place / "out")


def test_labels_name_strategy_and_defences(base: Path, place: Path) -> None:
    run = make_run(base, place / "a", "interleaving++", 1, defenses=["kl:weight=0.1", "persona"])
    assert label_of(RunCard.read(run / "run.json")) == "interleaving++ +kl +persona"


def test_the_domain_must_be_known(base: Path, place: Path) -> None:
    run = make_run(base, place / "a", "none", 1, domain=None)
    with pytest.raises(UserError, match="in-domain probes are not known") as caught:
        judge_models([Target(str(run))], Settings())
    assert "--in-domain" in caught.value.hint


def test_runs_of_another_base_are_refused_before_any_work(base: Path, place: Path, loads: list[str]) -> None:
    other = tiny_model(place / "other", seed=5, max_position_embeddings=1024)
    runs = [make_run(base, place / "a", "none", 1), make_run(other, place / "b", "interleaving", 1)]
    with pytest.raises(UserError, match="adapter of") as caught:
        judge_models([Target(str(r)) for r in runs], SETTINGS)
    assert caught.value.exit_code == Exit.INCOMPATIBLE and loads == [] and not list(place.rglob("*verdicts.json"))


def test_a_model_without_numbers_is_not_judged(base: Path, place: Path) -> None:
    run = make_run(base, place / "a", "none", 1)
    tiny_adapter(base, run / "adapter", scale=float("inf"))
    card = RunCard.read(run / "run.json")
    card.model_copy(update={"model": with_adapter(card.base, "a", run / "adapter")}).write(run / "run.json")
    with pytest.raises(UserError, match="no number for 2 of 2") as caught:
        judge_models([Target(str(run))], SETTINGS)
    assert caught.value.exit_code == Exit.FAILURE_RATE and not (run / "verdicts.json").exists()


def test_a_base_whose_logits_are_bent_after_the_head_is_refused(base: Path, place: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed scoring multiplies hidden states with the head, so a model that goes on from there would be misjudged."""
    monkeypatch.setattr("judge.run.load", lambda *args: bent(load(*args)))
    with pytest.raises(UserError, match="differs from this model's own"):
        judge_models([Target(str(base))], SETTINGS, place)


def bent(loaded: Loaded) -> Loaded:
    loaded.model.register_forward_hook(lambda module, args, out: setattr(out, "logits", out.logits * 3) or out)
    return loaded


def test_benign_runs_are_paired_by_order_or_by_name(base: Path, place: Path) -> None:
    one, two = (str(make_run(base, place / name, "none", 1)) for name in "ab")
    assert targets([one, "smollm2", two], ["x", "y"]) == [Target(one, Path("x")), Target("smollm2"),
                                                          Target(two, Path("y"))]
    assert targets([one, two], [f"{two}=y"]) == [Target(one), Target(two, Path("y"))]
    for wrong, says in ((["x"], "1 benign runs for 2"), ([f"{one}=x", "y"], "some do not"), (["c=x"], "Unknown run")):
        with pytest.raises(UserError, match=says):
            targets([one, two], wrong)
    three = make_run(base, place / "c", "interleaving", 1)
    with pytest.raises(UserError, match="labelled 'interleaving', but 'a' is 'none'"):
        judge_models([Target(one, three)], Settings(suite=("benign",)))
    with pytest.raises(UserError, match="needs runs that learnt it"):
        judge_models([Target(one)], Settings(suite=("benign",)))
