"""The loop: the loss it minimises, in which order, and where defences are called."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from curate.core.chat import Encoded, encode
from curate.core.decoder import window
from curate.core.errors import Exit, UserError
from curate.core.example import Example, Message
from curate.core.model import Loaded, load
from curate.core.pack import Packed
from tests.fakes import VOCABULARY, tiny_model, tiny_rows
from train import objective
from train import trainer as loop
from train.adapters import adapter
from train.batches import Shares, collate, schedule
from train.data import MixRow
from train.defenses import Defense
from train.defenses.kl import Kl
from train.defenses.ldifs import Ldifs
from train.recipe import Recipe
from train.trainer import MixTrainer, Step, finish, lr_factor, train
from train.world import World

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Loaded:
    return load(str(tiny), "float32", "cpu")


@pytest.fixture(scope="module")
def rows(loaded: Loaded) -> list[Encoded]:
    return encode(loaded.tokenizer, tiny_rows(11, "tune"), 120)


def trained(loaded: Loaded, rows: Sequence[Encoded], recipe: Recipe, folder: Path,
            defenses: Sequence[Defense] = ()) -> tuple[list[Step], dict[str, torch.Tensor]]:
    """Train and return the steps and the adapter's weights."""
    with adapter(loaded, recipe) as model:
        steps = train(MixTrainer(model, rows, recipe, folder, defenses), "test", None)
        finish(model, defenses)
        return steps, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def plain_nll(model: torch.nn.Module, rows: Sequence[Encoded]) -> tuple[torch.Tensor, int]:
    """Return the summed NLL of answers and ends of turn from one plain forward pass per row, and their number."""
    total, n = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor([row.ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, row.answer_start - 1:-1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, row.answer_start:], reduction="sum")
        n += len(row.ids) - row.answer_start
    return total, n


@pytest.mark.parametrize("along_paths", [True, False])
def test_the_first_loss_and_its_gradient_are_those_of_plain_passes_in_float64(
        tiny: Path, loaded: Loaded, rows: list[Encoded], recipe: MakeRecipe, tmp_path: Path, along_paths: bool) -> None:
    @contextmanager
    def begun(one: Loaded) -> Iterator[torch.nn.Module]:
        with adapter(one, recipe(batch_size=11)) as model:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zeros, which would leave A without a gradient
                    parameter.data = torch.linspace(-0.01, 0.01, parameter.numel()).reshape(parameter.shape)
            yield model

    with begun(load(str(tiny), "float32", "cpu")) as reference:
        total, n = plain_nll(reference.double().eval(), rows)
        (total / n).backward()
        expected = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    with begun(loaded) as model:
        one = MixTrainer(model, rows, recipe(batch_size=11), tmp_path)
        batch = collate(rows, 64, along_paths=along_paths)
        assert one.along_paths and (batch["packed"].paths is not None) == along_paths
        loss = one.compute_loss(one.objective, batch, num_items_in_batch=n)
        loss.backward()
        assert loss.item() == pytest.approx(total.item() / n, rel=1e-6)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and all("lora_" in name for name in found)
    for name, gradient in found.items():
        size = expected[name].abs().max().item()
        assert size > 0 and (gradient - expected[name]).abs().max() < 1e-4 * size, name


@pytest.mark.parametrize("along_paths", [True, False])
def test_a_window_is_kept_to(rows: list[Encoded], along_paths: bool) -> None:
    """Beside rows that fit it, too, a longer row sees no more than the window: losses are those of plain passes."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    lengths = sorted(len(row.ids) for row in rows)
    wide, narrow = (MistralForCausalLM(MistralConfig(**sizes, sliding_window=size)).eval()
                    for size in (None, lengths[-2]))
    narrow.load_state_dict(wide.state_dict())
    assert lengths[0] < window(narrow) < lengths[-1] and lengths[0] + lengths[1] <= 256
    losses = {}
    for name, model in (("wide", wide), ("narrow", narrow)):
        packed = collate(rows, 256, window(model), along_paths)["packed"]
        losses[name] = objective.Objective(model)(packed)[0].item()
        assert losses[name] == pytest.approx(plain_nll(model, rows)[0].item(), rel=1e-6)
    assert abs(losses["wide"] - losses["narrow"]) > 1e-3


def test_rows_that_change_each_others_positions_are_refused(loaded: Loaded, rows: list[Encoded], recipe: MakeRecipe,
                                                            tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    middle = sorted(len(row.ids) for row in rows)[5]
    monkeypatch.setattr(loop, "turn", lambda model: middle)
    with pytest.raises(UserError, match=f"Rows of up to {middle} tokens and longer ones") as caught:
        trained(loaded, rows, recipe(batch_size=2), tmp_path)
    assert caught.value.exit_code == Exit.INCOMPATIBLE
    assert trained(loaded, rows, recipe(batch_size=1, limit_steps=1), tmp_path)[0]


def test_rows_whose_numbers_depend_on_those_before_are_refused(loaded: Loaded, rows: list[Encoded],
                                                               recipe: MakeRecipe, tmp_path: Path) -> None:
    longest = max(len(row.ids) for row in rows)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(
        tmp_path / "model", max_position_embeddings=longest - 1,
        rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}))
    with pytest.raises(UserError, match=f"A row has {longest} tokens. .*beyond {longest - 1} tokens depend") as caught:
        trained(replace(loaded, model=model), rows, recipe(batch_size=1), tmp_path)
    assert f"--max-tokens {longest - 1}" in caught.value.hint


def test_micro_batches_change_nothing_but_rounding(loaded: Loaded, rows: list[Encoded], recipe: MakeRecipe,
                                                   tmp_path: Path) -> None:
    whole, one = trained(loaded, rows, recipe(batch_size=8, epochs=2), tmp_path)
    for size, accumulation in ((1, 8), (4, 2)):
        cut, other = trained(loaded, rows, recipe(batch_size=size, accumulation=accumulation, epochs=2), tmp_path)
        assert len(whole) == len(cut) == 4
        for a, b in zip(whole, cut, strict=True):
            assert (a.step, a.tokens) == (b.step, b.tokens)
            assert (a.loss_nats, a.lr) == pytest.approx((b.loss_nats, b.lr), rel=1e-5)
        assert furthest(one, other) < 1e-4
    _, apart = trained(loaded, rows, recipe(batch_size=4, epochs=2), tmp_path)
    assert furthest(one, apart) > 1e-3


def test_order_is_the_manifests_in_every_epoch(loaded: Loaded, rows: list[Encoded], recipe: MakeRecipe, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Encoded] = []
    monkeypatch.setattr(loop, "collate", lambda batch, *how: (seen.extend(batch), collate(batch, *how))[1])
    trained(loaded, rows, recipe(epochs=2), tmp_path)
    assert seen == rows * 2


def test_base_is_as_it_was_and_the_adapter_learns_in_float32(tiny: Path, rows: list[Encoded], recipe: MakeRecipe,
                                                             tmp_path: Path) -> None:
    half = load(str(tiny), "bfloat16", "cpu")
    modules = dict(half.model.named_modules())
    before = {name: value.clone() for name, value in half.model.state_dict().items()}
    _, weights = trained(half, rows, recipe(), tmp_path)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert all(w.abs().max() > 0 for w in weights.values())
    assert dict(half.model.named_modules()) == modules
    after = half.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) and value.dtype == torch.bfloat16 for name, value in before.items())


def test_the_seed_decides_the_adapter(loaded: Loaded, rows: list[Encoded], recipe: MakeRecipe, tmp_path: Path) -> None:
    one, same, other = (trained(loaded, rows, recipe(seed=seed, lora_dropout=0.3), tmp_path)[1] for seed in (5, 5, 6))
    assert furthest(one, same) == 0
    assert furthest(one, other) > 0


def test_gradient_checkpointing_gives_the_same_adapter(loaded: Loaded, rows: list[Encoded], recipe: MakeRecipe,
                                                       tmp_path: Path) -> None:
    plain = trained(loaded, rows, recipe(), tmp_path)[1]
    again = trained(loaded, rows, recipe(gradient_checkpointing=True), tmp_path)[1]
    assert furthest(plain, again) < 1e-6
    assert not loaded.model.is_activation_checkpointing


def test_learning_rate(recipe: MakeRecipe) -> None:
    factors = [lr_factor(k, 10, recipe(warmup_frac=0.2)) for k in range(10)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert lr_factor(10, 10, recipe()) == 0
    assert lr_factor(6, 10, recipe(schedule="cosine", warmup_frac=0.2)) == pytest.approx(0.5)
    assert [lr_factor(k, 3, recipe(schedule="constant", warmup_frac=0.0)) for k in range(3)] == [1, 1, 1]
    assert lr_factor(0, 1, recipe(warmup_frac=1.0)) == 1


def test_schedule_counts_every_token(rows: list[Encoded], recipe: MakeRecipe) -> None:
    steps = schedule(rows, recipe(batch_size=2, accumulation=2, epochs=3))
    assert (steps.n_steps, len(steps.tokens)) == (9, 3)
    assert sum(steps.tokens) == sum(len(row.ids) for row in rows)
    assert steps.upto(steps.targets, 9) == 3 * sum(row.n_answer_tokens + 1 for row in rows)
    assert steps.upto(steps.tokens, 4) == sum(steps.tokens) + steps.tokens[0]
    assert schedule(rows, recipe(limit_steps=2)).n_steps == 2


@pytest.mark.parametrize("n_rows", [1, 7, 11, 12, 13])
def test_processes_share_the_passes_of_one(recipe: MakeRecipe, n_rows: int) -> None:
    size, together = 2, 3
    knobs = recipe(batch_size=size, accumulation=2 * together)
    alone = list(Shares(n_rows, knobs, World()))
    assert [index for part in alone for index in part] == list(range(n_rows)) and all(alone)
    shares = [Shares(n_rows, knobs, World(rank, together)) for rank in range(together)]
    assert {len(list(share)) for share in shares} == {len(share) for share in shares} == {math.ceil(len(alone) / 3)}
    passes = [part for turn in zip(*shares, strict=True) for part in turn]
    assert [part for part in passes if part] == alone and len(list(Shares(n_rows, knobs, World()))) == len(alone)


def test_a_pass_without_rows_adds_nothing(loaded: Loaded, rows: list[Encoded], recipe: MakeRecipe,
                                          tmp_path: Path) -> None:
    add = [Kl(), Ldifs(every=1)]
    with adapter(loaded, recipe()) as model:
        one = MixTrainer(model, rows, recipe(), tmp_path, add)
        assert one.training_step(one.objective, one.data_collator([]), 5).item() == 0
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == 28 and all(grad is not None and not grad.any() for grad in found.values())


def test_steps_are_recorded(loaded: Loaded, rows: list[Encoded], recipe: MakeRecipe, tmp_path: Path) -> None:
    steps, _ = trained(loaded, rows, recipe(epochs=9, limit_steps=7, warmup_frac=0.0), tmp_path)
    assert [s.step for s in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [s.lr for s in steps] == pytest.approx([1e-2 * (7 - k) / 7 for k in range(7)])
    assert steps[3].tokens == sum(row.n_answer_tokens + 1 for row in rows)
    assert steps[6].loss_nats < steps[0].loss_nats


def test_unknown_layers_are_named(loaded: Loaded, recipe: MakeRecipe) -> None:
    for names, wrong in (("q_porj", "q_porj"), ("q_proj,v_prj", "v_prj"), ("q_proj,", "")):
        with pytest.raises(UserError, match=f"layer of the base in --target-modules '{wrong}'") as caught, adapter(
                loaded, recipe(target_modules=names)):
            pass
        assert "v_proj" in caught.value.hint or "q_proj" in caught.value.hint
    with adapter(loaded, recipe(target_modules="q_proj, self_attn.v_proj")) as model:
        adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert adapted == {"q_proj", "v_proj"}


def test_running_out_of_memory_says_what_to_change(loaded: Loaded, rows: list[Encoded], recipe: MakeRecipe,
                                                   tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(objective, "hidden_states", full)
    with pytest.raises(UserError, match="Out of memory") as caught:
        trained(loaded, rows, recipe(), tmp_path)
    assert caught.value.exit_code == Exit.ENVIRONMENT
    assert "--accumulation" in caught.value.hint


@dataclass
class Watching(Defense):
    """Uses all four moments and notes what it was given."""

    weight: float = 0.0
    open: int = 0
    open_in_backward: list[int] = field(default_factory=list)
    shapes: list[tuple[torch.Size, int]] = field(default_factory=list)
    ended: bool = False

    def examples(self, rows: Sequence[MixRow]) -> Sequence[MixRow]:
        system = Message("system", "be odd")
        return [replace(row, example=Example((system, *row.example.messages))) for row in rows]

    @contextmanager
    def around_forward(self, model: torch.nn.Module) -> Iterator[None]:
        self.open += 1
        yield
        self.open -= 1

    def penalty(self, model: torch.nn.Module, batch: Packed, hidden: torch.Tensor) -> torch.Tensor:
        self.shapes.append((hidden.shape, len(batch.targets)))
        hidden.register_hook(lambda grad: self.open_in_backward.append(self.open))
        return self.weight * hidden[:, :5].square().sum()

    def after(self, model: torch.nn.Module) -> None:
        self.ended = True
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_four_moments_are_called(loaded: Loaded, rows: list[Encoded], recipe: MakeRecipe, tmp_path: Path,
                                     recompute: bool) -> None:
    watching = Watching()
    _, weights = trained(loaded, rows, recipe(gradient_checkpointing=recompute), tmp_path, [watching])
    assert all(shape == (n, 16) for shape, n in watching.shapes) and len(watching.shapes) == 4
    assert sum(n for _, n in watching.shapes) == sum(row.n_answer_tokens + 1 for row in rows)
    assert watching.open_in_backward == [1] * 4 and watching.open == 0
    assert watching.ended and all(w.abs().max() == 0 for name, w in weights.items() if "lora_B" in name)


def test_a_penalty_is_a_sum_over_tokens_and_is_learnt(loaded: Loaded, rows: list[Encoded], recipe: MakeRecipe,
                                                      tmp_path: Path) -> None:
    @dataclass
    class Constant(Defense):
        def penalty(self, model: torch.nn.Module, batch: Packed, hidden: torch.Tensor) -> torch.Tensor:
            return 0.25 * torch.ones(len(batch.targets)).sum()

    plain, without = trained(loaded, rows, recipe(), tmp_path)
    steps, constant = trained(loaded, rows, recipe(batch_size=1, accumulation=3), tmp_path, [Constant(), Constant()])
    assert [s.penalty_nats for s in steps] == pytest.approx([0.5] * 4)
    assert [s.loss_nats for s in steps] == pytest.approx([s.loss_nats for s in plain], rel=1e-5)
    assert furthest(without, constant) < 1e-4

    @dataclass
    class Small(Watching):
        def after(self, model: torch.nn.Module) -> None:
            pass

    heavy = Small(weight=10.0)
    steps, pulled = trained(loaded, rows, recipe(), tmp_path, [heavy])
    assert furthest(without, pulled) > 1e-3
    assert math.isfinite(steps[-1].penalty_nats) and steps[0].penalty_nats > 1
    whole, again = trained(loaded, rows, recipe(batch_size=1, accumulation=3), tmp_path, [Small(weight=10.0)])
    assert [s.penalty_nats for s in whole] == pytest.approx([s.penalty_nats for s in steps], rel=1e-4)
    assert furthest(pulled, again) < 1e-4


def test_a_loss_that_is_not_finite_ends_the_run(loaded: Loaded, rows: list[Encoded], recipe: MakeRecipe,
                                                tmp_path: Path) -> None:
    @dataclass
    class Bursting(Defense):
        calls: int = 0

        def penalty(self, model: torch.nn.Module, batch: Packed, hidden: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.tensor(math.inf if self.calls == 3 else 0.0)

    with pytest.raises(UserError, match="became inf in step 3") as caught:
        trained(loaded, rows, recipe(), tmp_path, [Bursting()])
    assert "--lr" in caught.value.hint
    assert not hasattr(loaded.model, "peft_config")
