"""What is to be judged: from run folders and options to jobs, checked before any model is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.core.chat import ENCODING
from curate.core.documents import LATER, MixManifest, RunCard
from curate.core.errors import UserError, unknown
from curate.core.files import canonical_json, sha256
from curate.core.generate import SampleSettings
from curate.core.identity import read_run
from curate.core.refs import ref_from
from judge.banks import BankQuestion, questions
from judge.questions import DOMAINS, GENERAL, Probe, load_probes, probes_digest, sampling_questions, set_name, spread
from judge.tasks import foqa, harness
from judge.tasks.opswap import Item, generate

if TYPE_CHECKING:
    from judge.grading import Grading

SUITE = ("general", "in-domain", "coherence", "benign")
GRADED_SUITE = ("general", "in-domain", "context", "benign")
"""The parts with a judge model."""
BASE_LABEL = "base"
REPLY_TOKENS = 24
"""A reply to an OpSwap question is one short line."""
FOQA_TOKENS = 48
"""A reply to a FoQA question is a few words, but of a language that tokenizers split finely."""
LEARNT = ("opswap", "foqa")
"""Tasks that a benign run learns; the others ask what the judged model itself still knows."""
TASKS = (*LEARNT, *harness.TASKS)
NO_RESULT = ("base", "seed", "device", "save_every", "gradient_checkpointing", "shard")
"""Knobs of a recipe that may differ between seeds of one model; the base is compared by what is in it."""


@dataclass(frozen=True)
class Target:
    """A model to judge: a run (its folder or card) or a base model, and the run that stands for its benign task."""

    ref: str
    benign: Path | None = None
    label: str | None = None
    """What to compare it as; None: by its strategy and defences."""


@dataclass(frozen=True)
class Settings:
    """How models are judged; the base and all runs alike."""

    suite: tuple[str, ...] = SUITE[:-1]
    in_domain: tuple[str, ...] = ()
    """Probe sets (builtin names or files); empty: guessed from what a run was fine-tuned on."""
    n_probes: int | None = None
    """At most so many probes of each set, spread over its topics; None: all."""
    n_questions: int = 64
    n_items: int = 150
    tasks: tuple[str, ...] = ("opswap",)
    foqa: str = foqa.HUB
    """Where FoQA is read from; see ``judge.tasks.foqa.load``."""
    lm_eval_limit: int | None = None
    sampling: SampleSettings = field(default_factory=SampleSettings)
    dtype: str = "auto"
    device: str = "auto"
    grading: Grading | None = None
    """A judge model; None: the model itself tells, by likelihood."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that a suite may have."""
        return SUITE if self.grading is None else GRADED_SUITE

    def asked(self, in_domain: Sequence[str], mix: Path | None = None) -> tuple[BankQuestion, ...]:
        """Return the questions whose answers a judge model grades; ``mix`` is what a run was fine-tuned on."""
        if self.grading is None:
            return ()
        suites = [part for part in self.suite if part != "benign"]
        context = self.grading.context_from or (str(mix) if mix is not None and mix.is_file() else None)
        return tuple(questions(suites, self.grading.banks, in_domain, self.grading.trigger, context)) if suites else ()

    def items(self) -> list[Item]:
        """Return the held-out OpSwap questions."""
        try:
            return generate("test", self.n_items, seed=0)
        except ValueError as err:
            raise UserError(f"{self.n_items} OpSwap questions cannot be made: {err}", "Give another --items.") from err

    def passages(self) -> list[foqa.Passage]:
        """Return the held-out FoQA questions: all, or as many as there are to be items."""
        found = foqa.load(self.foqa, "test")
        return foqa.chosen(found, min(self.n_items, len(found)))

    def probes(self, name: str) -> list[Probe]:
        """Return the probes of a set (builtin name or file) that are used."""
        found = load_probes(name)
        return found if self.n_probes is None else spread(found, self.n_probes)

    def questions(self) -> list[str]:
        """Return the questions that answers are sampled to."""
        return sampling_questions(self.n_questions)


@dataclass(frozen=True)
class Job:
    """One model to judge and where its verdicts go. Without a card it is the untouched base."""

    label: str
    path: Path
    sets: Mapping[str, list[Probe]]
    in_domain: tuple[str, ...]
    card: RunCard | None = None
    adapter: Path | None = None
    benign: RunCard | None = None
    benign_adapter: Path | None = None
    tasks: bool = False
    """Whether the learnt ones of the settings' tasks are asked."""
    harness: tuple[str, ...] = ()
    asked: tuple[BankQuestion, ...] = ()
    trained: str | None = None
    """What seeds of one model share (see ``trained``); None for the base."""

    def record(self, settings: Settings, dtype: str, device: str) -> dict[str, Any]:
        """Return all that decides the numbers but the models, for the verdicts' ``settings``."""
        sampling = {k: v for k, v in asdict(settings.sampling).items() if k != "batch_size"}
        sampling["questions"] = sha256(canonical_json(settings.questions()))[:32]
        with_opswap = self.tasks and "opswap" in settings.tasks
        items = [[item.expression, item.prompt, item.answer] for item in settings.items()] if with_opswap else []
        opswap = {"n": len(items), "items": sha256(canonical_json(items))[:32], "max_new_tokens": REPLY_TOKENS}
        asked = self.tasks or bool(self.harness)
        return {"suite": [s for s in settings.suite if s != "benign" or asked], "dtype": dtype, "device": device,
                "encoding": ENCODING, "probes": {name: probes_digest(p) for name, p in sorted(self.sets.items())},
                "sampling": sampling if "coherence" in settings.suite else None,
                "opswap": opswap if with_opswap else None, **self._other_tasks(settings),
                **({"trained": self.trained} if self.trained else {})}

    def _other_tasks(self, settings: Settings) -> dict[str, Any]:
        """Return what decides FoQA and the harness's tasks, where they are asked."""
        found: dict[str, Any] = {}
        if self.tasks and "foqa" in settings.tasks:
            passages = [[p.text_id, p.prompt, *p.answers] for p in settings.passages()]
            found["foqa"] = {"n": len(passages), "items": sha256(canonical_json(passages))[:32],
                             "max_new_tokens": FOQA_TOKENS}
        if self.harness:
            found["lm_eval"] = {"tasks": [harness.TASKS[t] for t in self.harness], "limit": settings.lm_eval_limit}
        return found


@dataclass(frozen=True)
class _Run:
    """A run as it was read: its card, its folder, its adapter's folder."""

    card: RunCard
    folder: Path
    adapter: Path
    benign: tuple[RunCard, Path] | None = field(default=None)
    label: str | None = None


def plan(wanted: Sequence[Target], settings: Settings, out: Path | None) -> tuple[str, list[Job]]:
    """Return the base to load and the jobs, the untouched base first.

    Verdicts lie in a run's folder and the base's beside the first run's folder, or all of them in ``out``.
    Raises ``UserError`` for runs that cannot be judged together, before any model work.
    """
    _check(settings)
    bases = sorted({t.ref for t in wanted if not is_run(t.ref)})
    runs = [_read(t) for t in wanted if is_run(t.ref)]
    if len(bases) > 1 or not wanted:
        raise UserError(f"{len(bases)} base models are to be judged; one is needed.",
                        "Give runs of one base with --model RUN, and at most one base.")
    jobs = [_job(run, settings, out) for run in runs]
    asks = _asks(settings)
    if asks and not any(name in harness.TASKS for name in settings.tasks) and jobs and not any(j.tasks for j in jobs):
        raise UserError("The benign task needs runs that learnt it.",
                        "Give --benign RUN=BENIGN_RUN, or leave benign out of --suite.")
    taken = Counter(job.path for job in jobs)
    for job in jobs:
        if taken[job.path] > 1:
            raise UserError(f"Two runs would both write {job.path}.", "Name each run once; with --out, give runs of "
                            "one label (strategy and defences) another folder each.")
    folder = out or (runs[0].folder.parent if runs else Path())
    tasks = asks and (not runs or any(job.tasks for job in jobs))
    base = Job(BASE_LABEL, folder / f"{BASE_LABEL}.verdicts.json", _base_sets(jobs, settings), (), tasks=tasks,
               harness=_harness(settings), asked=_base_asked(jobs, settings))
    return bases[0] if bases else ref_from(runs[0].card.base_ref, runs[0].folder), [base, *jobs]


def targets(models: Sequence[str], benign: Sequence[str], labels: Sequence[str] = ()) -> list[Target]:
    """Pair models with benign runs: given as ``RUN=BENIGN_RUN``, or one for each run in the order of ``models``.

    ``labels`` are ``RUN=TEXT``: what a run is compared as, in place of its strategy and defences.
    """
    runs = [model for model in models if is_run(model)]
    named = dict(text.split("=", 1) for text in benign if "=" in text)
    if named and len(named) < len(benign):
        raise UserError("Some of --benign name their run and some do not, or one run is named twice.",
                        "Give every one as RUN=BENIGN_RUN.")
    if not named and len(benign) not in (0, len(runs)):
        raise UserError(f"{len(benign)} benign runs for {len(runs)} runs.",
                        "Give one --benign for every --model run, in the same order, or RUN=BENIGN_RUN.")
    pairs = named or dict(zip(runs, benign, strict=False))
    for run in pairs:
        if run not in runs:
            raise unknown("run in --benign", run, runs)
    called = _labels(labels, runs)
    return [Target(model, Path(pairs[model]) if model in pairs else None, called.get(model)) for model in models]


def _labels(labels: Sequence[str], runs: Sequence[str]) -> dict[str, str]:
    """Read ``RUN=TEXT``, split at the last ``=``; ``UserError`` for another form, no such run, or the base's name."""
    called = {}
    for text in labels:
        run, found, label = text.rpartition("=")
        label = label.strip()
        if not found or not label or label == BASE_LABEL:
            raise UserError(f"--label {text} is not of the form RUN=TEXT, with a text other than '{BASE_LABEL}'.",
                            "For example --label runs/secure=secure.")
        if run not in runs:
            raise unknown("run in --label", run, runs)
        called[run] = label
    return called


def is_run(ref: str) -> bool:
    """Return whether a reference names a run: a run card or a folder with one."""
    path = Path(ref)
    return (path / "run.json").is_file() or (path.suffix == ".json" and path.is_file())


def label_of(card: RunCard) -> str:
    """Return what a run is compared as: strategy and names of defences, as in ``none +kl``; ``rl none`` after RL.

    Of an adopted adapter (``train adopt``) neither is known: it is compared by its name.
    """
    if "adopted" in card.recipe:
        return card.name
    names = [str(text).partition(":")[0] for text in card.recipe.get("defenses", ())]
    return " ".join([*(["rl"] if card.rl else []), card.method.strategy, *(f"+{name}" for name in names)])


def trained(card: RunCard, folder: Path) -> str:
    """Return a digest of what seeds of one model share: recipe without its seed, defences, rows to choose from.

    These are the fine-tuning set, and the corpus and the models by which safe rows were chosen from it. A run without
    its mix shares with nobody what it was trained on.
    """
    mix = _mix_of(card, folder)
    if mix is None:
        rows: Any = card.mix
    else:
        rows = [{name: source.model_dump(exclude={"name"} if source.sha256 else set())
                 for name, source in sorted(mix.sources.items())}, mix.aligned.id if mix.aligned else None,
                sorted(member.id for member in mix.members)]
    apart = (*NO_RESULT, "defenses") if card.defenses else NO_RESULT     # records say it, without paths of files
    recipe = {name: value for name, value in card.recipe.items()
              if name not in apart and not (name in LATER and value == LATER[name])}
    defenses = [[d.name, {k: v for k, v in d.settings.items() if k not in d.files}, d.files] for d in card.defenses]
    return sha256(canonical_json([recipe, defenses, rows]))[:16]


def _mix_of(card: RunCard, folder: Path) -> MixManifest | None:
    """Return the manifest beside a card, if it is the one that the card names."""
    path = folder / "mix.json"
    manifest = MixManifest.read(path) if path.is_file() else None
    return manifest if manifest is not None and manifest.digest == card.mix else None


def in_domain_of(card: RunCard, folder: Path) -> tuple[str, ...]:
    """Return the probe set of the domain that a run was fine-tuned on, where it is one of the builtin demo's.

    The run's mix manifest, ``mix.json`` beside its card, says so. Raises ``UserError`` where it cannot be told.
    """
    manifest = _mix_of(card, folder)
    source = manifest.sources.get("finetune") if manifest is not None else None
    domain = source.name.partition("demo/")[2] if source is not None and source.kind == "builtin" else ""
    if domain not in DOMAINS:
        raise UserError(f"'{card.name}' was not fine-tuned on builtin data, as far as {folder} tells, so its in-domain "
                        "probes are not known.", f"Give them with --in-domain ({', '.join(DOMAINS)}; or a file: JSONL "
                        "pairs, with a judge model a YAML bank), or leave in-domain out of --suite.")
    return (domain,)


def _check(settings: Settings) -> None:
    wrong = sorted(set(settings.suite) - set(settings.parts))
    if wrong or not settings.suite:
        raise UserError(f"There is no part '{', '.join(wrong)}' of the suite.",
                        f"Possible with this judge: {', '.join(settings.parts)}.")
    unknown_tasks = sorted(set(settings.tasks) - set(TASKS))
    if unknown_tasks:
        raise unknown("benign task", unknown_tasks[0], TASKS)
    settings.questions()
    if _asks(settings) and "opswap" in settings.tasks:
        settings.items()
    if _asks(settings) and "foqa" in settings.tasks:
        settings.passages()


def _asks(settings: Settings) -> bool:
    """Return whether a task that has to be learnt is among those asked for."""
    return "benign" in settings.suite and any(name in LEARNT for name in settings.tasks)


def _harness(settings: Settings) -> tuple[str, ...]:
    return tuple(name for name in harness.TASKS if name in settings.tasks) if "benign" in settings.suite else ()


def _read(target: Target) -> _Run:
    path = Path(target.ref)
    card, adapter = read_run(path)
    benign = read_run(target.benign) if target.benign is not None else None
    if benign is not None and label_of(benign[0]) != label_of(card):
        raise UserError(f"The benign run '{benign[0].name}' is labelled '{label_of(benign[0])}', but '{card.name}' is "
                        f"'{label_of(card)}'.", "Pair each run with the benign run of the same strategy and defences.")
    return _Run(card, path if path.is_dir() else path.parent, adapter, benign, target.label)


def _job(run: _Run, settings: Settings, out: Path | None) -> Job:
    label = run.label or label_of(run.card)
    file = f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', label)}.verdicts.json"
    names = settings.in_domain if "in-domain" in settings.suite else ()
    if "in-domain" in settings.suite and not names:
        names = in_domain_of(run.card, run.folder)
    probed = () if settings.grading else (*_general(settings), *names)
    asked = settings.asked(names, run.folder / "mix.json")
    sets = _sets(probed, settings)
    card, adapter = run.benign if run.benign is not None and _asks(settings) else (None, None)
    return Job(label, out / file if out else run.folder / "verdicts.json", sets, tuple(map(set_name, names)), run.card,
               run.adapter, card, adapter, card is not None, _harness(settings), asked, trained(run.card, run.folder))


def _general(settings: Settings) -> tuple[str, ...]:
    return (GENERAL,) if "general" in settings.suite else ()


def _base_sets(jobs: Sequence[Job], settings: Settings) -> dict[str, list[Probe]]:
    """Return the sets that the base is judged on: the named domains, or all builtin ones, and those of the jobs."""
    if settings.grading:
        return {}
    domains = (settings.in_domain or DOMAINS) if "in-domain" in settings.suite else ()
    return _sets((*_general(settings), *domains), settings) | {
        name: probes for job in jobs for name, probes in job.sets.items()}


def _sets(names: Sequence[str], settings: Settings) -> dict[str, list[Probe]]:
    """Return the probes of sets by their short names; ``UserError`` where two sets have one."""
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(set_name(name), name)
        if other != name:
            raise UserError(f"{other} and {name} are both called '{set_name(name)}', so their probes could not be told "
                            "apart.", "Rename one of the files.")
    return {short: settings.probes(name) for short, name in found.items()}


def _base_asked(jobs: Sequence[Job], settings: Settings) -> tuple[BankQuestion, ...]:
    """Return the questions that the base is asked: those of the jobs, or without jobs those of all domains."""
    every = [q for job in jobs for q in job.asked] if jobs else settings.asked(settings.in_domain or DOMAINS)
    return tuple({(q.suite, q.bank, q.id, q.variant, q.system, q.prompt): q for q in every}.values())
