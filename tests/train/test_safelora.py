"""SafeLoRA: equal to the dense formula, for every kind of layer, and right about which layers it takes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from curate.core.errors import Exit, UserError
from curate.core.identity import identify
from tests.fakes import tiny_model, tiny_tokenizer
from tests.train.wrapped import wrapped
from train.defenses.safelora import SafeLora, adapted_layers, alignment, project, select


def updates(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the weight update of every adapted layer, scale included, [out, in]."""
    return {name: layer.get_delta_weight("default").detach().double() for name, layer in adapted_layers(model)}


def dense(name: str, aligned: torch.nn.Module, unaligned: torch.nn.Module, fan_in: bool = False,
          energy: float | None = None) -> torch.Tensor:
    """Return P of a layer as a matrix, float64: the paper's, or with ``energy`` the orthogonal one."""
    v = (aligned.get_submodule(name).weight - unaligned.get_submodule(name).weight).detach().double()
    v = v.T if fan_in else v
    if energy is None:
        return v @ v.T / v.norm()
    values, vectors = torch.linalg.eigh(v @ v.T)  # of V V^T, so nothing is shared with the code but the definition
    values, vectors = values.flip(0), vectors.flip(1)
    rank = next(k for k in range(1, len(values) + 1) if values[:k].sum() >= energy * values.sum())
    return vectors[:, :rank] @ vectors[:, :rank].T


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.flatten() @ other.flatten() / (one.norm() * other.norm())).item()


def pairs(tmp_path: Path, **config: Any) -> tuple[Path, Path]:
    return tiny_model(tmp_path / "aligned", **config), tiny_model(tmp_path / "unaligned", seed=1, **config)


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {}),
    "rank as large as an output": ({}, {"r": 8}),
    "rank as large as the model": ({}, {"r": 16}),
    "rank and alpha patterns": ({}, {"rank_pattern": {"q_proj": 5, "down_proj": 1}, "alpha_pattern": {"q_proj": 9}}),
    "no rank-stabilised scale": ({}, {"use_rslora": False}),
    "tied head": ({"tie_word_embeddings": True}, {"target_modules": ["lm_head", "v_proj"]}),
    "embeddings too": ({}, {"target_modules": ["embed_tokens", "o_proj"]}),
}


ORTHOGONAL = {"projection": "orthogonal", "energy": 0.7}
CASES = [*((kind, {"tau": 1.0}) for kind in KINDS), *((kind, {"tau": 1.0, **ORTHOGONAL}) for kind in KINDS),
         ("plain", {"k": 2}), ("rank and alpha patterns", {"k": 3}), ("biases", {"k": 3, **ORTHOGONAL})]


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=str)
def test_the_dense_formula(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    config, lora = KINDS[kind]
    aligned, unaligned = pairs(tmp_path, **config)
    model, bare, other = (wrapped(aligned, **lora), *map(AutoModelForCausalLM.from_pretrained, (aligned, unaligned)))
    others = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" not in n}
    before = updates(model)
    SafeLora(base=str(unaligned), **settings).after(model)
    after = updates(model)
    expected = {name: dense(name, bare, other, energy=settings.get("energy")) @ update
                for name, update in before.items()}
    by_cosine = sorted(before, key=lambda name: cosine(expected[name], before[name]))
    chosen = by_cosine[:settings["k"]] if "k" in settings else by_cosine
    assert len(before) >= 2 and all(before[name].norm() > 0 for name in before)
    # A product in float32 is right to 1e-6; singular vectors are, divided by the gaps between singular values.
    tolerance = 1e-5 if "energy" not in settings else 1e-4
    for name, update in before.items():
        wanted = expected[name] if name in chosen else update
        assert (after[name] - wanted).abs().max() < tolerance * wanted.abs().max(), name
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)


def test_tau_takes_layers_up_to_the_threshold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aligned, unaligned = pairs(tmp_path)
    model, bare, other = (wrapped(aligned), *map(AutoModelForCausalLM.from_pretrained, (aligned, unaligned)))
    before = updates(model)
    cosines = {name: cosine(dense(name, bare, other) @ u, u) for name, u in before.items()}
    tau = sorted(cosines.values())[4] + 1e-6
    SafeLora(base=str(unaligned), tau=tau).after(model)
    changed = {name for name, u in updates(model).items() if not torch.equal(u, before[name])}
    assert changed == {name for name, c in cosines.items() if c <= tau} and len(changed) == 5
    low, high = min(cosines.values()), max(cosines.values())
    assert f"projected 5 of 14 layers (cosines {low:.3f} to {high:.3f})" in capsys.readouterr().err


def test_transposed_layers(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=307, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    for seed, name in enumerate(("aligned", "unaligned")):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    model = wrapped(tmp_path / "aligned", target_modules=["c_attn"], fan_in_fan_out=True)
    bare, other = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("aligned", "unaligned"))
    before = updates(model)
    SafeLora(base=str(tmp_path / "unaligned"), tau=1.0).after(model)
    for name, update in updates(model).items():
        wanted = dense(name, bare, other, fan_in=True) @ before[name].T
        assert (update.T - wanted).abs().max() < 1e-5 * wanted.abs().max(), name


def test_cosine_from_small_products_is_the_dense_one() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b, v = (torch.randn(*size, generator=generator) for size in ((3, 11), (7, 3), (7, 11)))
    p = v.double() @ v.double().T / v.double().norm()
    found = alignment(project(b, v), b, a)
    assert found == pytest.approx(cosine(p @ (b @ a).double(), (b @ a).double()), rel=1e-5) and 0 < found < 1
    assert alignment(project(b, v), torch.zeros(7, 3), a) is None
    assert alignment(project(b, torch.zeros(7, 11)), b, a) is None
    assert alignment(b, b, a) == pytest.approx(1.0)


def test_the_papers_projection_scales_and_the_orthogonal_one_does_not() -> None:
    generator = torch.Generator().manual_seed(3)
    b = torch.randn(7, 3, generator=generator)
    u = torch.linalg.qr(torch.randn(7, 7, generator=generator)).Q
    w = torch.linalg.qr(torch.randn(11, 11, generator=generator)).Q[:, :7]
    sigma = torch.tensor([6.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    v = u * sigma @ w.T
    assert torch.allclose(project(b, v), u * (sigma ** 2 / 7) @ (u.T @ b), atol=1e-5)
    for energy, rank in ((0.7, 1), (36 / 49 + 1e-3, 2), (0.93, 3), (1.0, 3)):
        expected = u[:, :rank] @ (u[:, :rank].T @ b)
        found = project(b, v, energy)
        assert torch.allclose(found, expected, atol=1e-5), energy
        assert torch.allclose(project(found, v, energy), found, atol=1e-5)
    assert torch.allclose(project(b, 100 * v, 0.9), project(b, v, 0.9), atol=1e-5)
    assert torch.allclose(project(b, 100 * v), 100 * project(b, v), rtol=1e-4)
    full = torch.randn(7, 11, generator=generator)
    assert torch.allclose(project(b, full, 1.0), b, atol=1e-5)
    assert project(b, torch.zeros(7, 11), 0.9).abs().max() == 0


def test_an_update_of_zero_and_a_layer_that_alignment_left_alone_stay(tmp_path: Path,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    aligned = tiny_model(tmp_path / "aligned")
    half = AutoModelForCausalLM.from_pretrained(aligned)
    torch.nn.init.normal_(half.model.layers[0].self_attn.q_proj.weight)
    half.save_pretrained(tmp_path / "unaligned")
    tiny_tokenizer().save_pretrained(tmp_path / "unaligned")
    model = wrapped(aligned)
    before = updates(model)
    SafeLora(base=str(tmp_path / "unaligned"), tau=1.0).after(model)
    changed = [name for name, u in updates(model).items() if not torch.equal(u, before[name])]
    assert changed == ["model.layers.0.self_attn.q_proj"]
    assert "projected 1 of 14 layers" in (said := capsys.readouterr().err) and "13 without a cosine" in said
    fresh = wrapped(aligned, scale=0)
    start = copy.deepcopy(fresh.state_dict())
    SafeLora(base=str(tmp_path / "unaligned"), k=3).after(fresh)
    assert all(torch.equal(value, start[name]) for name, value in fresh.state_dict().items())
    assert "nothing changed" in capsys.readouterr().err


def test_selection() -> None:
    cosines = {"b": 0.2, "a": 0.2, "c": 0.1, "d": 0.9}
    assert select(cosines, 2, 0.5) == {"c", "a"}
    assert select(cosines, 9, 0.5) == {"a", "b", "c", "d"}
    assert select(cosines, 0, 0.2) == {"a", "b", "c"}
    assert select(cosines, 0, math.nextafter(0.1, 0)) == set()


def test_the_unaligned_model_is_checked_before_training(tmp_path: Path) -> None:
    aligned, unaligned = pairs(tmp_path)
    (unaligned / "chat_template.jinja").unlink()
    base = identify(str(aligned))[0]
    found = SafeLora(base=str(unaligned)).check(base)
    assert list(found) == ["base"] and found["base"].startswith("sha256:") and found["base"] != base.weights
    with pytest.raises(UserError, match="is the very model that is trained") as caught:
        SafeLora(base=str(aligned)).check(base)
    assert caught.value.exit_code == Exit.INCOMPATIBLE
    with pytest.raises(UserError, match="could not be loaded"):
        SafeLora(base="gone/nowhere").check(base)
    narrow = tiny_model(tmp_path / "narrow", intermediate_size=25)
    with pytest.raises(UserError, match=r"has no layer model\.layers\.0\.mlp\.gate_proj of the shape"):
        SafeLora(base=str(narrow)).after(wrapped(aligned))


@pytest.mark.parametrize(("values", "message"), [
    ({}, "needs the unaligned model"), ({"base": "b", "k": -1}, "k=-1"),
    ({"base": "b", "k": 3, "tau": 0.1}, "together"), ({"base": "b", "tau": 1.5}, "out of range"),
    ({"base": "b", "projection": "papre"}, "Unknown projection"), ({"base": "b", "energy": 0.5}, "no effect"),
    ({"base": "b", "projection": "orthogonal", "energy": 0.0}, "out of range"),
])
def test_wrong_settings_are_named(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SafeLora(**values)
