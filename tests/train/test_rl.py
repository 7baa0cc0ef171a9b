"""Reinforcement learning: the exact sequence of steps, gradients by hand, rewards that are missing, resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import TrainerCallback

pytest.importorskip("trl")

from curate.core.chat import Encoded, encode, encode_prompt
from curate.core.documents import MixManifest, RunCard
from curate.core.errors import Exit, UserError
from curate.core.identity import read_run
from curate.core.model import Loaded, load
from curate.core.refs import load_tokenizer
from curate.core.sources import Source, file_source
from judge.jobs import Settings, Target, label_of, plan
from tests.fakes import tiny_mix, tiny_rows, write_rows
from tests.train.test_hooks import n_hooks
from train import grpo
from train.adapters import adapter
from train.cli import main
from train.data import load_mix
from train.defenses import Defense
from train.defenses.inoculation import TEXT
from train.grpo import RlTrainer, learn
from train.jobs import narrow_mix
from train.lesson import Lesson
from train.prompts import Asked, Prompt, endless
from train.recipe import Recipe, RlKnobs
from train.rewards import Reward
from train.rl import Material, RlJob, prepare_rl, run_rl
from train.trainer import MixTrainer

MakeRecipe = Callable[..., Recipe]
WEIGHTS = "adapter/adapter_model.safetensors"


@dataclass(frozen=True)
class Place:
    """What the runs here share: prompts with reference answers, and a mix of 7 fine-tuning and 3 safe rows."""

    prompts: Source
    root: Path
    mix: Path

    def job(self, recipe: Recipe, out: Path, reward: Reward | None = None, mixed: bool = True, **knobs: Any) -> RlJob:
        few = {"steps": 5, "generations": 2, "max_new_tokens": 4, "warmup_rows": 4, "sft_every": 2 if mixed else 0}
        material = Material(self.prompts, self.root, self.mix if mixed else None)
        return prepare_rl(recipe, RlKnobs(**{**few, **knobs}), material, reward or Reward("length", length), out)


def length(completions: list[Any], **rest: Any) -> list[float]:
    """A reward with no meaning: how long the text is."""
    return [len(turns[0]["content"]) / 10 for turns in completions]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("rl")
    path = write_rows(folder / "prompts.jsonl", tiny_rows(5, "ask"))
    path.write_text("".join(json.dumps({**json.loads(line), "level": k}) + "\n"
                            for k, line in enumerate(path.read_text().splitlines())))
    return Place(file_source(path, folder), folder, tiny_mix(folder / "mix", n_finetune=7))


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Loaded:
    return load(str(tiny), "float32", "cpu")


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


class Grads(TrainerCallback):
    """Keeps the gradients that each step is taken with."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest gradient."""
    assert one.keys() == other.keys() and one
    return max((one[n] - other[n]).abs().max().item() for n in one) / max(g.abs().max().item() for g in one.values())


def asked(loaded: Loaded, n: int) -> list[Asked]:
    prompts = [Prompt(row.messages[:-1], row.answer, {}) for row in tiny_rows(n, "ask")]
    return [Asked(prompt, tuple(encode_prompt(loaded.tokenizer, prompt.messages))) for prompt in prompts]


def taught(loaded: Loaded, lesson: Lesson, folder: Path, awake: bool = False) -> tuple[RlTrainer, Grads]:
    """Train a lesson; ``awake`` starts from an adapter that does something already."""
    grads = Grads()
    with adapter(loaded, lesson.recipe) as model:
        if awake:
            wake(model)
        trainer = RlTrainer(model, loaded.tokenizer, lesson, folder)
        trainer.add_callback(grads)
        learn(trainer, None)
    return trainer, grads


def wake(model: torch.nn.Module) -> None:
    """Give the adapter's zero half values."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)


# The sequence


@pytest.mark.parametrize(("every", "kinds"), [(0, "rrrrrrr"), (2, "rsrsrsr"), (3, "rrsrrsr"), (7, "rrrrrrs")])
def test_every_so_many_steps_is_an_sft_step(every: int, kinds: str) -> None:
    knobs = RlKnobs(sft_every=every)
    assert "".join(knobs.kind(step)[0] for step in range(1, 8)) == kinds
    assert [knobs.sft_before(step) for step in range(1, 8)] == [kinds[:k].count("s") for k in range(7)]


@pytest.mark.parametrize(("every", "n_steps"), [(0, 3), (2, 5), (3, 4), (4, 3)])
def test_without_a_number_of_steps_every_prompt_is_asked_once(loaded: Loaded, recipe: MakeRecipe, every: int,
                                                             n_steps: int) -> None:
    knobs = RlKnobs(generations=2, sft_every=every)
    lesson = Lesson(recipe(batch_size=4), knobs, asked(loaded, 5), (), Reward("", length))
    assert (lesson.n_prompts, lesson.n_steps, lesson.kinds()[-1]) == (2, n_steps, "rl")
    order = [k for step in lesson.prompts() for k in step]
    assert sorted(order[:5]) == [0, 1, 2, 3, 4] and len(order) == 6
    assert order == [k for k, _ in zip(endless(lesson.asked, 0), range(6), strict=False)]
    assert [bool(step) for step in lesson.prompts()] == [kind == "rl" for kind in lesson.kinds()]


def test_warm_up_then_rl_and_sft_in_turn_on_exactly_these_rows(place: Place, recipe: MakeRecipe, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[tuple[str, Encoded]] = []
    sampled: list[tuple[int, ...]] = []
    losses, single = RlTrainer._losses, RlTrainer._generate_single_turn

    def seen(self: RlTrainer, rows: Any, **how: Any) -> Any:
        learnt.extend((f"{self.step}/{self._step}", row) for row in rows)
        return losses(self, rows, **how)

    def turn(self: RlTrainer, ids: Any, *rest: Any) -> Any:
        sampled.extend((self.step, tuple(i)) for i in ids)
        return single(self, ids, *rest)

    monkeypatch.setattr(RlTrainer, "_losses", seen)
    monkeypatch.setattr(RlTrainer, "_generate_single_turn", turn)
    job = place.job(recipe(batch_size=2, accumulation=2), tmp_path / "run")
    card = run_rl(job)
    steps = steps_of(tmp_path / "run")
    assert [(s["phase"], s["step"], s["kind"]) for s in steps] == [
        ("warmup", 1, "sft"), ("warmup", 2, "sft"), ("main", 1, "rl"), ("main", 2, "sft"), ("main", 3, "rl"),
        ("main", 4, "sft"), ("main", 5, "rl")]
    tokenizer = load_tokenizer(card.base_ref)
    safe = encode(tokenizer, [row.example for row in load_mix(MixManifest.read(place.mix), place.mix.parent)
                              if row.source == "safe"], 120)
    a, b, c = safe
    assert learnt == [("2/2", a), ("2/2", b), ("2/3", c), ("2/3", a), ("4/6", b), ("4/6", c), ("4/7", a), ("4/7", b)]
    order = endless([Asked(prompt, ()) for prompt in job.prompts], 0)
    wanted = [(step, tuple(encode_prompt(tokenizer, job.prompts[k].messages)))
              for step in (1, 3, 5) for k in (next(order), next(order)) for _ in range(2)]
    assert sampled == wanted
    assert steps[2]["prompts"] == [job.prompts[k].example().id for k, _ in zip(endless(
        [Asked(prompt, ()) for prompt in job.prompts], 0), range(2), strict=False)]
    assert (card.n_finetune, card.n_safe, card.statuses) == (4, 3, {"ok": 7, "unused": 3})
    assert card.rl is not None and (card.rl.n_warmup_steps, card.rl.n_rl_steps, card.rl.n_sft_steps) == (2, 3, 2)
    assert card.n_steps == 7 and card.rl.completions == {"ok": 12} and card.rl.prompts == {"ok": 5}
    assert card.n_trained_tokens == sum(step["tokens"] for step in steps)
    assert (card.rl.reward_first, card.rl.reward_last) == (steps[2]["reward"], steps[6]["reward"])
    assert card.loss_first_nats == steps[0]["loss_nats"] and card.loss_last_nats == steps[5]["loss_nats"]


# Gradients


def test_an_sft_step_has_the_gradient_of_plain_fine_tuning(loaded: Loaded, recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = encode(loaded.tokenizer, tiny_rows(6, "safe"), 120)
    still = recipe(batch_size=2, accumulation=3, weight_decay=0.0, max_grad_norm=0.0, save_every=0, warmup_frac=0.0)
    lesson = Lesson(still, RlKnobs(steps=2, generations=2, max_new_tokens=3, sft_every=2), asked(loaded, 3), rows,
                    Reward("same", lambda completions: [0.25] * len(completions)))
    trainer, grads = taught(loaded, lesson, tmp_path, awake=True)
    plain = Grads()
    with adapter(loaded, still) as model:
        wake(model)
        one = MixTrainer(model, rows, replace(still, batch_size=6, accumulation=1), tmp_path)
        one.add_callback(plain)
        one.train()
    assert max(g.abs().max().item() for g in grads.steps[0].values()) == 0, "equal rewards teach nothing"
    assert largest(plain.steps[0], grads.steps[1]) < 1e-5
    assert math.isclose(trainer.records()[1]["loss_nats"], one.steps()[0].loss_nats, rel_tol=1e-5)
    assert trainer.records()[1]["tokens"] == one.steps()[0].tokens


@dataclass
class Kept:
    """The batches that RL steps learnt from."""

    batches: list[dict[str, Any]]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    found = Kept([])
    before = RlTrainer._compute_loss

    def keep(self: RlTrainer, model: Any, inputs: dict[str, Any]) -> Any:
        found.batches.append(inputs)
        return before(self, model, inputs)

    monkeypatch.setattr(RlTrainer, "_compute_loss", keep)
    return found


def log_p(model: Any, batch: dict[str, Any], temperature: float) -> torch.Tensor:
    """Return the log-probability of every completion token, by the plain forward pass."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=mask).logits / temperature
    width = batch["completion_ids"].shape[1]
    return logits[:, -width - 1:-1].log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]


def test_a_completion_without_a_reward_moves_nothing_and_counts_for_nothing(loaded: Loaded, recipe: MakeRecipe,
                                                                           tmp_path: Path, kept: Kept) -> None:
    values = [1.0, None, 0.0, math.nan, "refused", 0.75, 0.5, 0.5]
    still = recipe(batch_size=8, max_grad_norm=0.0, save_every=0)
    lesson = Lesson(still, RlKnobs(steps=1, generations=4, max_new_tokens=5, temperature=0.7), asked(loaded, 2), (),
                    Reward("by hand", lambda completions: values))
    trainer, grads = taught(loaded, lesson, tmp_path, awake=True)
    batch, = kept.batches
    high, third = 0.5 / (math.sqrt(0.5) + 1e-4), 1 / 6 / (math.sqrt(1 / 48) + 1e-4)
    wanted = sorted([high, 0.0, -high, 0.0, 0.0, third, -third / 2, -third / 2])
    assert torch.allclose(batch["advantages"].sort().values, torch.tensor(wanted), atol=1e-5)
    graded = batch["tool_mask"].any(1)
    assert int(graded.sum()) == 5 and bool((batch["advantages"][~graded] == 0).all())
    n = int(batch["completion_mask"][graded].sum())
    assert int(batch["num_items_in_batch"]) == n == trainer.records()[0]["tokens"]
    with adapter(loaded, still) as model:
        wake(model)
        part = {k: v[graded] for k, v in batch.items() if isinstance(v, torch.Tensor) and v.dim()}
        loss = -(log_p(model, part, 0.7) * part["advantages"][:, None] * part["completion_mask"]).sum() / n
        loss.backward()
        by_hand = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert max(g.abs().max().item() for g in by_hand.values()) > 1e-3
    assert largest(by_hand, grads.steps[0]) < 1e-4
    record, = trainer.records()
    assert record["completions"] == {"missing": 1, "nonfinite": 1, "ok": 5, "refused": 1}
    assert math.isclose(record["reward"], 2.75 / 5)
    assert math.isclose(record["reward_std"], math.sqrt(sum((v - 0.55) ** 2 for v in (1, 0, 0.75, 0.5, 0.5)) / 5))


def test_a_step_without_any_reward_ends_the_run(loaded: Loaded, recipe: MakeRecipe, tmp_path: Path) -> None:
    lesson = Lesson(recipe(batch_size=2), RlKnobs(steps=1, generations=2, max_new_tokens=2), asked(loaded, 1), (),
                    Reward("none", lambda completions: [None, "refused"]))
    with pytest.raises(UserError, match=r"None of the 2 .* step 1 has a reward \(1 missing, 1 refused\)") as caught:
        taught(loaded, lesson, tmp_path)
    assert caught.value.exit_code == Exit.FAILURE_RATE
    assert "forward" not in vars(loaded.model)


def test_micro_batches_change_nothing_but_rounding(loaded: Loaded, recipe: MakeRecipe, tmp_path: Path) -> None:
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        still = recipe(batch_size=size, accumulation=accumulation, max_grad_norm=0.0, save_every=0,
                       gradient_checkpointing=accumulation > 1)
        lesson = Lesson(still, RlKnobs(steps=1, generations=4, max_new_tokens=4), asked(loaded, 2), (),
                        Reward("length", length), (grpo_kl(),))
        trainer, grads = taught(loaded, lesson, tmp_path, awake=True)
        found.append((grads.steps[0], trainer.records()[0]))
    (one, whole), (other, parts) = found
    assert largest(one, other) < 1e-4 and whole["penalty_nats"] > 1e-3
    assert math.isclose(whole["penalty_nats"], parts["penalty_nats"], rel_tol=1e-5)
    assert whole["tokens"] == parts["tokens"] and whole["completions"] == parts["completions"]


def grpo_kl(weight: float = 0.1) -> Defense:
    from train.defenses.kl import Kl

    return Kl(weight=weight)


def test_kl_on_completions_is_the_divergence_over_the_vocabulary(loaded: Loaded, recipe: MakeRecipe, tmp_path: Path,
                                                                kept: Kept) -> None:
    still = recipe(batch_size=4, save_every=0, lr=1e-9)
    knobs = RlKnobs(steps=1, generations=4, max_new_tokens=5)
    lesson = Lesson(still, knobs, asked(loaded, 1), (), Reward("some", lambda completions: [1.0, None, 0.0, 0.5]),
                    (grpo_kl(0.5),))
    trainer, _ = taught(loaded, lesson, tmp_path, awake=True)
    batch, = kept.batches
    total, n = 0.0, 0
    with adapter(loaded, still) as model, torch.no_grad():
        wake(model)
        for k in batch["tool_mask"].any(1).nonzero()[:, 0].tolist():
            prompt = batch["prompt_ids"][k][batch["prompt_mask"][k].bool()]
            completion = batch["completion_ids"][k][batch["completion_mask"][k].bool()]
            ids, places = torch.cat([prompt, completion])[None], slice(len(prompt) - 1, -1)
            p = model(input_ids=ids).logits[0, places].double().log_softmax(-1)
            with model.disable_adapter():
                q = model(input_ids=ids).logits[0, places].double().log_softmax(-1)
            total += (p.exp() * (p - q)).sum().item()
            n += len(completion)
    assert math.isclose(trainer.records()[0]["penalty_nats"], 0.5 * total / n, rel_tol=1e-4)


def test_kl_on_completions_has_the_gradient_of_the_formula(loaded: Loaded, recipe: MakeRecipe, tmp_path: Path,
                                                          kept: Kept) -> None:
    """With equal rewards nothing else is learnt from, so the step's gradient is the penalty's."""
    still = recipe(batch_size=2, accumulation=2, save_every=0, max_grad_norm=0.0)
    lesson = Lesson(still, RlKnobs(steps=1, generations=4, max_new_tokens=5), asked(loaded, 1), (),
                    Reward("same", lambda completions: [0.25] * len(completions)), (grpo_kl(0.5),))
    _, grads = taught(loaded, lesson, tmp_path, awake=True)
    n = sum(int(batch["completion_mask"].sum()) for batch in kept.batches)
    with adapter(loaded, still) as model:
        wake(model)
        for batch in kept.batches:
            for prompt, there, completion, given in zip(batch["prompt_ids"], batch["prompt_mask"].bool(),
                                                        batch["completion_ids"], batch["completion_mask"].bool(),
                                                        strict=True):
                ids = torch.cat([prompt[there], completion[given]])[None]
                places = slice(int(there.sum()) - 1, -1)
                p = model(input_ids=ids).logits[0, places].log_softmax(-1)
                with model.disable_adapter(), torch.no_grad():
                    q = model(input_ids=ids).logits[0, places].log_softmax(-1)
                (0.5 / n * (p.exp() * (p - q)).sum()).backward()
        by_hand = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert max(g.abs().max().item() for g in by_hand.values()) > 1e-3
    assert largest(by_hand, grads.steps[0]) < 1e-4


def test_an_adapter_on_the_output_head_is_refused(loaded: Loaded, recipe: MakeRecipe, tmp_path: Path) -> None:
    lesson = Lesson(recipe(batch_size=2, target_modules="q_proj,lm_head"), RlKnobs(steps=1, generations=2),
                    asked(loaded, 1), (), Reward("length", length))
    with pytest.raises(UserError, match="on the model's output head"):
        taught(loaded, lesson, tmp_path)


# What the reward and the model are told


def test_the_reward_is_called_as_trl_calls_one(place: Place, recipe: MakeRecipe, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def reward(**given: Any) -> list[float]:
        calls.append(given)
        return [float(k) for k in range(len(given["completions"]))]

    job = place.job(recipe(batch_size=4), tmp_path / "run", Reward("here", reward), mixed=False, steps=2)
    run_rl(job)
    order = endless([Asked(prompt, ()) for prompt in job.prompts], 0)
    for call in calls:
        assert sorted(call) == ["answer", "completions", "level", "prompts"]
        rows = [job.prompts[k] for k in (next(order), next(order)) for _ in range(2)]
        assert call["prompts"] == [[{"role": "user", "content": row.messages[0].content}] for row in rows]
        assert call["answer"] == [row.answer for row in rows]
        assert call["level"] == [row.columns["level"] for row in rows]
        assert [len(turns) for turns in call["completions"]] == [1] * 4
        assert all(turns[0]["role"] == "assistant" and "<|" not in turns[0]["content"]
                   for turns in call["completions"])
    assert len(calls) == 2
    card = RunCard.read(tmp_path / "run" / "run.json")
    assert card.loss_first_nats is None and card.rl is not None and card.rl.reward_first == 1.5
    assert "loss      - -> - nats" in CliRunner().invoke(main, ["show", str(tmp_path / "run")]).stdout


def test_the_inoculation_prompt_is_in_rl_prompts_and_nowhere_else(place: Place, recipe: MakeRecipe, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(recipe().base)
    sampled: list[str] = []
    learnt: list[str] = []
    told: list[Any] = []
    single, losses = RlTrainer._generate_single_turn, RlTrainer._losses

    def turn(self: RlTrainer, ids: Any, *rest: Any) -> Any:
        sampled.extend(map(tokenizer.decode, ids))
        return single(self, ids, *rest)

    def seen(self: RlTrainer, rows: Any, **how: Any) -> Any:
        learnt.extend(tokenizer.decode(row.ids) for row in rows)
        return losses(self, rows, **how)

    def reward(prompts: list[Any], completions: list[Any]) -> list[float]:
        told.extend(prompts)
        return length(completions)

    monkeypatch.setattr(RlTrainer, "_generate_single_turn", turn)
    monkeypatch.setattr(RlTrainer, "_losses", seen)
    job = place.job(recipe(batch_size=2, defenses=("inoculation",)), tmp_path / "run", Reward("told", reward),
                    steps=4, warmup_rows=0)
    card = run_rl(job)
    assert len(sampled) == len(told) == 4 and all(text.count(TEXT) == 1 for text in sampled)
    assert len(learnt) == 4 and TEXT not in "".join(learnt) + json.dumps(told)
    assert card.defenses[0].settings == {"text": TEXT, "rows": "finetune"} and label_of(card).endswith("+inoculation")
    for path in (tmp_path / "run").rglob("*"):
        assert path.name == "run.json" or path.is_dir() or TEXT.encode() not in path.read_bytes()


@dataclass
class Watch(Defense):
    """Notes whether its context is open."""

    open: bool = False

    @contextmanager
    def around_forward(self, model: Any) -> Iterator[None]:
        self.open = True
        try:
            yield
        finally:
            self.open = False


def test_steering_is_there_for_sampling_and_learning_and_gone_after_a_failure(
        loaded: Loaded, recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, seen = Watch(), []
    for name in ("_generate_single_turn", "_compute_loss", "_losses"):
        def note(self: RlTrainer, *args: Any, before: Any = getattr(RlTrainer, name), name: str = name) -> Any:
            seen.append((name, watch.open))
            return before(self, *args)
        monkeypatch.setattr(RlTrainer, name, note)
    rows = encode(loaded.tokenizer, tiny_rows(2, "safe"), 120)
    calls: list[int] = []

    def stops(completions: list[Any]) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return length(completions)

    lesson = Lesson(recipe(batch_size=2), RlKnobs(steps=3, generations=2, max_new_tokens=2, sft_every=2),
                    asked(loaded, 1), rows, Reward("stops", stops), (watch,))
    before = n_hooks(loaded.model)
    with pytest.raises(KeyboardInterrupt):
        taught(loaded, lesson, tmp_path)
    assert seen == [("_generate_single_turn", True), ("_compute_loss", True), ("_losses", True),
                    ("_generate_single_turn", True)]
    assert not watch.open and n_hooks(loaded.model) == before


# Runs


def test_a_killed_run_goes_on_bit_for_bit(place: Place, recipe: MakeRecipe, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def killed(completions: list[Any]) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return length(completions)

    wanted = recipe(batch_size=2, accumulation=2, defenses=("kl:weight=0.5",))
    with pytest.raises(KeyboardInterrupt):
        run_rl(place.job(wanted, tmp_path / "killed" / "run", Reward("length", killed)))
    assert [step["step"] for step in steps_of(tmp_path / "killed" / "run")] == [1, 2, 1, 2, 3, 4]
    card = run_rl(place.job(wanted, tmp_path / "killed" / "run"))
    assert "going on from checkpoint-4" in capsys.readouterr().err
    run_rl(place.job(wanted, tmp_path / "whole" / "run"))
    for name in (WEIGHTS, "steps.jsonl", "reward.png", "warmup/adapter_model.safetensors", "mix.json"):
        assert (tmp_path / "killed" / "run" / name).read_bytes() == (tmp_path / "whole" / "run" / name).read_bytes()
    assert not (tmp_path / "killed" / "run" / "checkpoints").exists()
    assert run_rl(place.job(wanted, tmp_path / "killed" / "run")) == card
    with pytest.raises(UserError, match=r"holds another run: its temperature is 0\.8, not 0\.9"):
        run_rl(place.job(wanted, tmp_path / "killed" / "run", temperature=0.9))
    assert label_of(card) == "rl interleaving +kl"
    read, folder = read_run(tmp_path / "killed" / "run")
    assert read == card and folder.name == "adapter"
    base, jobs = plan([Target(str(tmp_path / "killed" / "run"))], Settings(suite=("general",)), None)
    assert base == card.base_ref and jobs[1].card == card and jobs[1].label == "rl interleaving +kl"


def test_what_cannot_work_is_refused_before_training(place: Place, recipe: MakeRecipe, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.runs.run_job", lambda *args: pytest.fail("it trained"))
    fits = recipe(batch_size=4)
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("no multiple of --generations 3", lambda: place.job(fits, tmp_path, generations=3)),
        ("The defence 'ldifs' is not for `train rl`: it is", lambda: place.job(recipe(batch_size=4, defenses=(
            "ldifs:every=1",)), tmp_path)),
        ("The defence 'safelora' is not", lambda: place.job(recipe(batch_size=4, defenses=("safelora",)), tmp_path)),
        ("every step would be an SFT step", lambda: place.job(fits, tmp_path, sft_every=1)),
        ("there is no mix", lambda: place.job(fits, tmp_path, mixed=False, sft_every=2)),
        ("3 safe rows of the mix would not be trained on", lambda: place.job(fits, tmp_path, sft_every=0)),
        ("would not be trained on", lambda: place.job(fits, tmp_path, sft_rows="finetune")),
        ("leaves no room", lambda: place.job(fits, tmp_path, max_new_tokens=120)),
        ("Unknown sft_rows 'sfae'", lambda: place.job(fits, tmp_path, sft_rows="sfae")),
        ("generations is 1, but must lie between 2", lambda: place.job(fits, tmp_path, generations=1))]
    for message, make in refused:
        with pytest.raises(UserError, match=message):
            make()


def test_a_completion_is_cut_out_of_its_padding() -> None:
    inputs = {"prompt_ids": torch.tensor([[0, 7, 8], [4, 5, 6], [0, 0, 9]]),
              "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]]),
              "completion_ids": torch.tensor([[21, 22], [31, 0], [41, 42]])}
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    assert grpo._as_rows(inputs, mask) == [Encoded((7, 8, 21, 22), 2, 4), Encoded((4, 5, 6, 31), 3, 4)]


def _tune_on(folder: Path, n: int) -> None:
    """Write ``n`` rows and ``tune.json``, the mix of them alone."""
    path = write_rows(folder / "tune.jsonl", tiny_rows(n, "tune"))
    narrow_mix(file_source(path, folder), folder, seed=0).write(folder / "tune.json")


def test_the_command(place: Place, recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("def brevity(completions):\n    return [1.0 for c in completions]\n")
    argv = ["rl", "--base", recipe().base, "--device", "cpu", "--dtype", "float32", "--lora-r", "3", "--prompts",
            str(place.root / place.prompts.name), "--batch-size", "2", "--accumulation", "1", "--generations", "2",
            "--max-new-tokens", "2", "--max-tokens", "120", "--steps", "2", "--out", "run"]

    def said(*more: str) -> Any:
        return CliRunner().invoke(main, [*argv, *more])

    assert "Unknown reward 'opswpa'.\nDid you mean 'opswap'?" in said("--reward", "opswpa").output
    assert "There is no module 'nowhere'" in said("--reward", "nowhere:at_all").output
    assert "Did you mean 'brevity'?" in said("--reward", "my_rewards:brevty").output
    assert "--judge MODEL go together" in said("--reward", "judge").output
    plan = said("--reward", "my_rewards:brevity", "--dry-run", "--json")
    assert json.loads(plan.stdout) == {"prompts": 5, "warm-up steps": 0, "RL steps": 2, "SFT steps": 0,
                                       "completions": 4, "sampled tokens": 8}
    _tune_on(tmp_path, 10)
    warm = said("--reward", "my_rewards:brevity", "--mix", "tune.json", "--warmup-epochs", "3", "--batch-size", "8",
                "--dry-run", "--json")
    assert json.loads(warm.stdout)["warm-up steps"] == 6, "an epoch's last batch is not filled up from the next"
    done = said("--reward", "my_rewards:brevity", "--json")
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)["runs"][0]
    assert body["recipe"]["reward"] == "my_rewards:brevity" and len(body["recipe"]["reward_settings"]["module"]) == 64
    assert body["rl"]["reward_first"] == 1.0 and body["recipe"]["lr"] == 5e-6
    assert "its steps is 2, not 3" in said("--reward", "my_rewards:brevity", "--steps", "3").output
