"""KL and LDIFS: their value at the start, their formula in float64, their gradient, and that layout changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from curate.core.chat import encode
from curate.core.decoder import head, hidden_states
from curate.core.errors import UserError
from curate.core.nll import token_nll
from tests.fakes import tiny_model, tiny_rows, tiny_tokenizer
from tests.train.wrapped import encoded, gradients, layouts, penalised, plain_states, wrapped
from train import objective
from train.defenses import Defense
from train.defenses.kl import Kl, divergence
from train.defenses.ldifs import Ldifs, distance
from train.objective import head_losses


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three blocks, so that every second block leaves one out."""
    return tiny_model(tmp_path_factory.mktemp("deep") / "deep", num_hidden_layers=3)


def kl_formula(states: list[dict[str, list[torch.Tensor]]], direction: str) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for p_logits, q_logits in zip(states[0]["logits"], states[1]["logits"], strict=True):
        p, q = p_logits.softmax(-1), q_logits.softmax(-1)
        total = total + ((p * (p / q).log()).sum() if direction == "model" else (q * (q / p).log()).sum())
    return total


def ldifs_formula(states: list[dict[str, list[torch.Tensor]]], names: list[str], normalise: str) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for name in names:
        for now, then in zip(states[0][name], states[1][name], strict=True):
            for h, before in zip(now, then, strict=True):
                size = {"none": 1, "mean": len(names) * 16, "relative": len(names) * before.norm() ** 2}[normalise]
                total = total + (h - before).norm() ** 2 / size
    return total


Formula = Callable[[list[dict[str, list[torch.Tensor]]]], torch.Tensor]
CASES: dict[str, tuple[Defense, Formula]] = {
    "kl of the model": (Kl(weight=0.7), lambda s: 0.7 * kl_formula(s, "model")),
    "kl of the reference": (Kl(weight=0.7, direction="reference"), lambda s: 0.7 * kl_formula(s, "reference")),
    "ldifs": (Ldifs(weight=0.3, every=1, normalise="none"),
              lambda s: 0.3 * ldifs_formula(s, ["state 1", "state 2", "before the norm"], "none")),
    "ldifs, every 2nd": (Ldifs(every=2, normalise="none"), lambda s: ldifs_formula(s, ["state 2"], "none")),
    "ldifs, mean": (Ldifs(every=2), lambda s: ldifs_formula(s, ["state 2"], "mean")),
    "ldifs, relative": (Ldifs(every=2, normalise="relative"), lambda s: ldifs_formula(s, ["state 2"], "relative")),
}


def with_last_state(model: torch.nn.Module, states: list[dict[str, list[torch.Tensor]]],
                    rows: list) -> list[dict[str, list[torch.Tensor]]]:
    """Add the last block's output, which the library gives only after the final norm: taken from the norm's input."""
    seen: list[torch.Tensor] = []
    norm = model.get_base_model().model.norm
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    plain_states(model, rows)
    handle.remove()
    width = max(len(row.ids) for row in rows)
    for one, hidden in zip(states, seen, strict=True):
        one["before the norm"] = [hidden[b, width - len(row.ids) + row.answer_start - 1:width - 1]
                                  for b, row in enumerate(rows)]
    return states


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_penalty_and_gradient_are_those_of_the_formula_in_float64(deep: Path, case: str, layout: str) -> None:
    defense, formula = CASES[case]
    rows = encoded()
    exact = wrapped(deep, dtype=torch.float64).eval()
    expected = formula(with_last_state(exact, plain_states(exact, rows), rows))
    expected.backward()
    wanted = gradients(exact)
    model = wrapped(deep)
    found = penalised(defense, model, layouts(rows)[layout])
    found.backward()
    assert expected.item() > 1e-2 and found.item() == pytest.approx(expected.item(), rel=2e-4)
    got = gradients(model)
    assert got.keys() == wanted.keys()
    largest = max(g.abs().max().item() for g in wanted.values())
    assert largest > 0 and max((got[n] - wanted[n]).abs().max().item() for n in wanted) < 1e-3 * largest


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_padding_side_and_packing_do_not_change_the_loss(tiny: Path, layout: str) -> None:
    """The formula is from a pass padded to the left; our layouts are one sequence, and padded to the right."""
    rows = encoded()
    exact = wrapped(tiny, dtype=torch.float64).eval()
    targets = [torch.tensor(row.ids[row.answer_start:]) for row in rows]
    expected = torch.stack([torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") for logits, wanted in
                            zip(plain_states(exact, rows)[0]["logits"], targets, strict=True)]).sum()
    expected.backward()
    wanted = gradients(exact)
    model = wrapped(tiny)
    found = token_nll(model, layouts(rows)[layout]).sum()
    found.backward()
    got = gradients(model)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6) and got.keys() == wanted.keys()
    largest = max(g.abs().max().item() for g in wanted.values())
    assert largest > 0 and max((got[n] - wanted[n]).abs().max().item() for n in wanted) < 1e-4 * largest
    for side in ("left", "right"):
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = side
        assert encode(tokenizer, tiny_rows(3, "tune"), 120) == rows


@pytest.mark.parametrize("defense", [Kl(), Kl(direction="reference"), Ldifs(every=1),
                                     Ldifs(every=1, normalise="relative")], ids=repr)
def test_a_fresh_adapter_costs_nothing_and_only_the_adapter_has_a_gradient(tiny: Path, defense: Defense) -> None:
    batch = layouts(encoded())["packed"]
    assert penalised(defense, wrapped(tiny, scale=0), batch).item() == 0
    model = wrapped(tiny)
    penalised(defense, model, batch).backward()
    found = gradients(model)
    assert all("lora_" in name for name in found) and not any(p.requires_grad for n, p in model.named_parameters()
                                                              if "lora_" not in n)
    touched = [name for name, grad in found.items() if grad.abs().max() > 0]
    assert {name.split(".lora_")[1][0] for name in touched} == {"A", "B"} and len(touched) >= 26


def test_the_weight_is_a_factor(tiny: Path) -> None:
    batch = layouts(encoded())["packed"]
    for one, other in ((Kl(), Kl(weight=10.0)), (Ldifs(every=1), Ldifs(weight=100.0, every=1))):
        values = [penalised(d, wrapped(tiny), batch).item() for d in (one, other)]
        assert values[1] == pytest.approx(100 * values[0], rel=1e-5)


def test_dropout_does_not_reach_the_reference(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "dropping", attention_dropout=0.5)
    batch = layouts(encoded())["packed"]
    model = wrapped(folder, lora_dropout=0.5)
    torch.manual_seed(1)
    one = penalised(Kl(), model, batch).item()
    torch.manual_seed(2)
    other = penalised(Kl(), model, batch).item()
    assert one != other
    assert model.training and all(m.training for m in model.modules())
    model.eval()
    still = [penalised(Kl(), model, batch).item() for _ in range(2)]
    assert still[0] == still[1] and not any(m.training for m in model.modules())


def test_divergence_of_known_distributions() -> None:
    half, skew = (torch.tensor([p, 1 - p]).log().repeat(5, 1) for p in (0.5, 0.9))
    one = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    other = 0.5 * math.log(5 / 9) + 0.5 * math.log(5)
    assert divergence(skew, half, "model").item() == pytest.approx(5 * one, rel=1e-5)
    assert divergence(skew, half, "reference").item() == pytest.approx(5 * other, rel=1e-5)


@pytest.mark.parametrize("learns", [False, True])
def test_pieces_of_the_head_add_up_and_logits_of_a_batch_never_exist(tiny: Path, monkeypatch: pytest.MonkeyPatch,
                                                                     learns: bool) -> None:
    """A head that does not learn computes each logit once, another one again in the backward pass."""
    model, batch = wrapped(tiny), layouts(encoded())["packed"]
    project, n = model.get_base_model().lm_head.requires_grad_(learns), len(batch.targets)
    hidden = hidden_states(model, batch)
    add = [Kl(weight=1.0).row_penalty(model, batch), lambda log_p, rows: (log_p.exp().square().sum(-1)).sum()]
    loss, parts = head_losses(head(model), hidden, batch.targets, add)
    assert parts[0].item() == pytest.approx(token_nll(model, batch).sum().item(), rel=1e-6)
    assert loss.item() == pytest.approx(parts.sum().item(), rel=1e-6) and not parts.requires_grad
    only = [head_losses(head(model), hidden, batch.targets, [one], True)[0].item() for one in add]
    assert parts[1].item() == pytest.approx(sum(only), rel=1e-6) and min(only) > 0
    monkeypatch.setattr(objective, "HEAD_ROWS", 4)
    sizes: list[int] = []
    project.register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    cut = head_losses(head(model), hidden, batch.targets, add)
    assert cut[1].tolist() == pytest.approx(parts.tolist(), rel=1e-5)
    assert max(sizes) == 4 and sum(sizes) == 2 * n
    cut[0].backward()
    assert max(sizes) == 4 and sum(sizes) == (4 if learns else 2) * n
    assert (project.weight.grad is not None) == learns


@pytest.mark.parametrize("only_penalties", [False, True])
def test_the_gradient_is_the_same_whether_the_head_could_learn_or_not(tiny: Path, only_penalties: bool) -> None:
    batch, found = layouts(encoded())["packed"], []
    for learns in (False, True):
        model = wrapped(tiny)
        model.get_base_model().lm_head.requires_grad_(learns)
        hidden = hidden_states(model, batch)
        add = [Kl(weight=1.0).row_penalty(model, batch)]
        (head_losses(head(model), hidden, batch.targets, add, only_penalties)[0] / 7).backward()
        found.append({name: grad for name, grad in gradients(model).items() if "lora_" in name})
    assert found[0].keys() == found[1].keys() and max(grad.abs().max() for grad in found[0].values()) > 0
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-4)


def test_an_adapted_head_has_its_own_reference(tiny: Path) -> None:
    rows = encoded()
    lora = {"target_modules": ["lm_head", "q_proj"]}
    exact = wrapped(tiny, dtype=torch.float64, **lora).eval()
    expected = kl_formula(plain_states(exact, rows), "model").item()
    assert penalised(Kl(weight=1.0), wrapped(tiny, **lora), layouts(rows)["packed"]).item() == pytest.approx(
        expected, rel=2e-4)
    assert penalised(Kl(weight=1.0), wrapped(tiny, scale=0, **lora), layouts(rows)["packed"]).item() == 0


@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "q_proj"]])
def test_an_adapted_head_that_caps_its_logits_has_its_own_reference(tmp_path: Path, targets: list[str]) -> None:
    tokenizer, rows = tiny_tokenizer(), encoded()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Gemma2ForCausalLM(Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.3,
            final_logit_softcapping=3.0, attn_logit_softcapping=5.0, tie_word_embeddings=False, pad_token_id=0,
        )).save_pretrained(tmp_path)
    lora = {"target_modules": targets}
    exact = wrapped(tmp_path, dtype=torch.float64, **lora).eval()
    expected = sum(kl_formula(plain_states(exact, [row]), "model").item() for row in rows)
    assert expected > 0.1
    found = penalised(Kl(weight=1.0), wrapped(tmp_path, **lora), layouts(rows)["packed"]).item()
    assert found == pytest.approx(expected, rel=2e-4)


def test_distance_by_hand() -> None:
    now = {1: torch.tensor([[1.0, 2.0]]), 2: torch.tensor([[0.0, 0.0]])}
    then = {1: torch.tensor([[1.0, 0.0]]), 2: torch.tensor([[3.0, 4.0]])}
    assert distance(now, then, "none").item() == 4 + 25
    assert distance(now, then, "mean").item() == 29 / 4
    assert distance(now, then, "relative").item() == (4 / 1 + 25 / 25) / 2


def test_ldifs_compares_every_fifth_block_and_says_so_where_there_is_none(deep: Path, tiny: Path) -> None:
    assert list(Ldifs(every=1).states(wrapped(deep))) == [1, 2, 3]
    assert list(Ldifs(every=2).states(wrapped(deep))) == [2]
    assert Ldifs().every == 5
    with pytest.raises(UserError, match="every is 5, but the model has 2 blocks"):
        penalised(Ldifs(), wrapped(tiny), layouts(encoded())["packed"])


def test_the_papers_weights_are_the_defaults() -> None:
    assert (Kl().weight, Kl().direction) == (0.1, "model")
    assert (Ldifs().weight, Ldifs().every, Ldifs().normalise) == (1.0, 5, "mean")


@pytest.mark.parametrize(("kind", "values", "message"), [
    (Kl, {"weight": -1.0}, "weight is -1.0"), (Kl, {"weight": float("nan")}, "weight is nan"),
    (Kl, {"direction": "modle"}, "Unknown direction"), (Ldifs, {"every": 0}, "every is 0"),
    (Ldifs, {"normalise": "mena"}, "Unknown normalise"), (Ldifs, {"weight": float("inf")}, "weight is inf"),
])
def test_wrong_settings_are_named(kind: type, values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(**values)
