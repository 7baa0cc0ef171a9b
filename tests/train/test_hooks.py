"""Hooks and steering: which layer a number means, what is added, and that nothing stays behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from curate.core.decoder import hidden_states
from curate.core.documents import ModelIdentity
from curate.core.errors import Exit, UserError
from curate.core.files import canonical_json, file_sha256
from curate.core.identity import identify
from curate.core.model import load
from tests.fakes import tiny_model
from tests.train.wrapped import encoded, layouts, penalised, wrapped
from train.defenses.kl import Kl
from train.defenses.ldifs import Ldifs
from train.defenses.persona import FORMAT, PROVENANCE, TENSOR, Persona, default_layer
from train.hooks import capture, layers, project_out, reference, steer

PROBE = torch.tensor([[5, 9, 14, 200, 3, 41, 77]])


def write_vector(path: Path, base: Path, rows: torch.Tensor) -> Path:
    """Write a persona vector file for ``base``."""
    provenance = {"format": FORMAT, "base": identify(str(base))[0].model_dump(mode="json")}
    save_file({TENSOR: rows}, path, metadata={PROVENANCE: canonical_json(provenance).decode()})
    return path


@pytest.fixture(scope="module")
def vector(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(7))
    return write_vector(tmp_path_factory.mktemp("vector") / "v.safetensors", tiny, rows)


def n_hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_state_is_the_output_of_the_block_before_it(tiny: Path) -> None:
    model = wrapped(tiny).eval()
    with capture(model, [0, 1, 2]) as found, torch.no_grad():
        out = model(input_ids=PROBE, output_hidden_states=True, use_cache=False)
    llama = model.get_base_model().model
    assert torch.equal(found[0], llama.embed_tokens(PROBE))
    assert torch.equal(found[1], out.hidden_states[1]) and not torch.equal(found[1], found[0])
    assert not torch.equal(found[2], out.hidden_states[2])
    assert torch.equal(llama.norm(found[2]), out.hidden_states[2])
    assert list(layers(model)) == list(llama.layers)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_steering_adds_to_the_named_layer_and_what_follows(tiny: Path, layer: int) -> None:
    model, vector = wrapped(tiny).eval(), torch.arange(16.0) - 7
    with capture(model, [0, 1, 2]) as plain, torch.no_grad():
        model(input_ids=PROBE)
    with steer(model, {layer: vector}), capture(model, [0, 1, 2]) as steered, torch.no_grad():
        model(input_ids=PROBE)
    for state in (0, 1, 2):
        change = steered[state] - plain[state]
        if state < layer:
            assert torch.equal(steered[state], plain[state])
        elif state == layer:
            assert torch.allclose(change, vector.expand_as(change), atol=1e-4)
        else:
            assert change.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projecting_out_leaves_nothing_along_the_direction_and_the_rest_alone(tiny: Path, dtype: torch.dtype) -> None:
    model, direction = wrapped(tiny, dtype=dtype).eval(), torch.arange(16.0) - 7
    unit = direction / direction.norm()
    with capture(model, [1]) as plain, project_out(model, {1: direction}), capture(model, [1]) as without, \
            torch.no_grad():
        model(input_ids=PROBE)
    before, after = plain[1].float(), without[1].float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (before @ unit).abs().max() > 0.5 and (after @ unit).abs().max() < tolerance
    assert torch.allclose(before - (before @ unit)[..., None] * unit, after, atol=tolerance)


def test_the_first_pass_is_kept_and_hooks_go_after_an_exception(tiny: Path) -> None:
    model = wrapped(tiny).eval()
    before = n_hooks(model)
    with capture(model, [1]) as found, torch.no_grad():
        model(input_ids=PROBE)
        first = found[1]
        model(input_ids=PROBE + 1)
    assert found[1] is first
    for context in (lambda: steer(model, {0: torch.ones(16), 1: torch.ones(16)}), lambda: capture(model, [0, 2]),
                    lambda: project_out(model, {2: torch.ones(16)})):
        with pytest.raises(RuntimeError, match="stop"), context():
            assert n_hooks(model) > before
            raise RuntimeError("stop")
        assert n_hooks(model) == before
    with pytest.raises(UserError, match="Layer 3 does not exist: the model has 2 blocks"), capture(model, [1, 3]):
        pass
    assert n_hooks(model) == before


def test_reference_is_the_model_before_training_and_leaves_it_as_it_was(tiny: Path) -> None:
    model, bare = wrapped(tiny, lora_dropout=0.3), load(str(tiny), "float32", "cpu").model
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="stop"), reference(model):
        assert torch.equal(model(input_ids=PROBE).logits, bare(input_ids=PROBE).logits)
        assert not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    assert torch.is_grad_enabled() and model.training
    assert not torch.allclose(model.eval()(input_ids=PROBE).logits, bare(input_ids=PROBE).logits)


def test_persona_adds_alpha_times_the_vector_at_its_layers(tiny: Path, vector: Path) -> None:
    model, batch = wrapped(tiny).eval(), layouts(encoded())["packed"]
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(7))
    with capture(model, [1, 2]) as plain:
        hidden_states(model, batch)
    with Persona(str(vector), alpha=5.0, layers="1").around_forward(model), capture(model, [1]) as steered:
        hidden_states(model, batch)
    assert torch.allclose(steered[1] - plain[1], (5 * rows[1]).expand_as(plain[1]), atol=1e-4)
    with Persona(str(vector), alpha=-2.0, layers="2,1").around_forward(model), steer(model, {1: 2 * rows[1]}), \
            capture(model, [2]) as second:
        hidden_states(model, batch)
    assert torch.allclose(second[2] - plain[2], (-2 * rows[2]).expand_as(plain[2]), atol=1e-4)
    with Persona(str(vector), layers="1", ablate=True).around_forward(model), capture(model, [1]) as without:
        hidden_states(model, batch)
    assert (without[1] @ rows[1]).abs().max() < 1e-3 < (plain[1] @ rows[1]).abs().max()
    assert Persona(str(vector)).chosen(model) == [1]
    assert [default_layer(n) for n in (28, 64, 30, 1)] == [20, 46, 21, 1]
    assert (Persona(str(vector)).alpha, Persona(str(vector)).ablate) == (5.0, False)


def test_persona_is_gone_after_the_block_and_after_an_exception(tiny: Path, vector: Path) -> None:
    model = wrapped(tiny).eval()
    plain, before = model(input_ids=PROBE).logits, n_hooks(model)
    with pytest.raises(RuntimeError, match="stop"), Persona(str(vector)).around_forward(model):
        assert not torch.allclose(model(input_ids=PROBE).logits, plain)
        raise RuntimeError("stop")
    assert n_hooks(model) == before and torch.equal(model(input_ids=PROBE).logits, plain)


@pytest.mark.parametrize("penalty", [Kl(), Ldifs(every=1)], ids=["kl", "ldifs"])
def test_steering_reaches_model_and_reference_alike(tiny: Path, vector: Path, penalty: Kl | Ldifs) -> None:
    batch, persona = layouts(encoded())["packed"], Persona(str(vector))
    model = wrapped(tiny, scale=0)
    with persona.around_forward(model):
        assert penalised(penalty, model, batch).item() == 0
    trained = wrapped(tiny)
    plain = penalised(penalty, trained, batch).item()
    with persona.around_forward(trained):
        assert penalised(penalty, trained, batch).item() != pytest.approx(plain, rel=1e-3)


def test_a_vector_is_checked_against_the_base(tiny: Path, vector: Path, tmp_path: Path) -> None:
    base = identify(str(tiny))[0]
    assert Persona(str(vector)).check(base) == {"vector": file_sha256(vector)}
    other = identify(str(tiny_model(tmp_path / "other", seed=1)))[0]
    with pytest.raises(UserError, match="was extracted from 'tiny'") as caught:
        Persona(str(vector)).check(other)
    assert caught.value.exit_code == Exit.INCOMPATIBLE
    wide = write_vector(tmp_path / "wide.safetensors", tiny, torch.ones(3, 17))
    with pytest.raises(UserError, match=r"of the shape \(3, 17\), but the model needs \(3, 16\)"), \
            Persona(str(wide)).around_forward(wrapped(tiny)):
        pass
    with pytest.raises(UserError, match="Layer 9 does not exist"), \
            Persona(str(vector), layers="1,9").around_forward(wrapped(tiny)):
        pass


def files_that_are_no_vectors(folder: Path, base: ModelIdentity) -> dict[str, Path]:
    good = {PROVENANCE: canonical_json({"format": FORMAT, "base": base.model_dump(mode="json")}).decode()}
    cases = {"no metadata": ({TENSOR: torch.ones(3, 16)}, None), "no tensor": ({"x": torch.ones(3, 16)}, good),
             "wrong shape": ({TENSOR: torch.ones(16)}, good),
             "not json": ({TENSOR: torch.ones(3, 16)}, {PROVENANCE: "{"}),
             "nan": ({TENSOR: torch.full((3, 16), float("nan"))}, good),
             "no base": ({TENSOR: torch.ones(3, 16)}, {PROVENANCE: '{"format": 1}'}),
             "another format": ({TENSOR: torch.ones(3, 16)},
                                {PROVENANCE: good[PROVENANCE].replace('"format":1', '"format":2')})}
    for name, (tensors, metadata) in cases.items():
        save_file(tensors, folder / f"{name}.safetensors", metadata=metadata)
    (folder / "text.safetensors").write_text("nothing of the kind")
    return {path.stem: path for path in folder.glob("*.safetensors")}


def test_what_is_no_vector_is_refused(tiny: Path, tmp_path: Path) -> None:
    base = identify(str(tiny))[0]
    found = files_that_are_no_vectors(tmp_path, base)
    assert len(found) == 8
    for name, path in found.items():
        with pytest.raises(UserError, match="is no persona vector") as caught:
            Persona(str(path)).check(base)
        assert caught.value.exit_code == Exit.BAD_DATA, name
    with pytest.raises(UserError, match="There is no persona vector"):
        Persona(str(tmp_path / "gone")).check(base)


@pytest.mark.parametrize(("values", "message"), [
    ({}, "needs a vector"), ({"vector": "v", "alpha": float("nan")}, "alpha is nan"),
    ({"vector": "v", "layers": "20-24"}, "layers is '20-24'"), ({"vector": "v", "layers": "1,,2"}, "layers is '1,,2'"),
])
def test_wrong_settings_are_named(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Persona(**values)
