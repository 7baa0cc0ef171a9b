"""Who a model is: digests of content, run cards, and runs that belong to another base."""

from __future__ import annotations

from pathlib import Path

import pytest

from curate.core.documents import Method, ModelIdentity, RunCard
from curate.core.errors import Exit, UserError
from curate.core.files import file_sha256
from curate.core.identity import adapter_digest, check_base, identify, read_run, with_adapter
from curate.core.model import Loaded, load
from tests.core.changed import CONFIG, copied, edit
from tests.fakes import tiny_adapter, tiny_model, tiny_tokenizer


def test_identity_is_the_content_and_not_the_name(model_folder: Path, tmp_path: Path) -> None:
    moved = copied(model_folder, tmp_path / "renamed", lambda folder: None)
    one, other = identify(str(model_folder))[0], identify(str(moved))[0]
    assert one.id == other.id and (one.name, other.name) == ("tiny", "renamed")
    assert load(str(moved), "bfloat16", "cpu").identity == other


def test_identity_changes_with_weights_template_and_configuration(model_folder: Path, tmp_path: Path) -> None:
    def other_template(folder: Path) -> None:
        tiny_tokenizer("Be kind.").save_pretrained(folder)

    folders = [model_folder, tiny_model(tmp_path / "seed", seed=1),
               copied(model_folder, tmp_path / "template", other_template),
               copied(model_folder, tmp_path / "config", edit("config.json", rms_norm_eps=0.1))]
    identities = [identify(str(folder))[0] for folder in folders]
    assert len({i.id for i in identities}) == 4
    assert identities[0].weights == identities[2].weights and identities[0].tokenizer == identities[1].tokenizer


def test_adapters_are_told_apart_by_weights_and_settings_not_by_paths(
        loaded: Loaded, model_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    moved = copied(adapter_folder, tmp_path / "moved", edit(CONFIG, base_model_name_or_path="elsewhere", revision="x"))
    stronger = copied(adapter_folder, tmp_path / "stronger", edit(CONFIG, lora_alpha=7))
    other = tiny_adapter(model_folder, tmp_path / "other", seed=2)
    assert adapter_digest(moved) == adapter_digest(adapter_folder)
    assert len({adapter_digest(f) for f in (adapter_folder, stronger, other)}) == 3
    member = with_adapter(loaded.identity, "member", moved)
    assert member.id != loaded.identity.id and member.weights == loaded.identity.weights and member.name == "member"


def test_fakes_are_the_same_each_time(model_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    again = tiny_model(tmp_path / "again")
    assert file_sha256(again / "model.safetensors") == file_sha256(model_folder / "model.safetensors")
    assert adapter_digest(tiny_adapter(again, tmp_path / "adapter")) == adapter_digest(adapter_folder)


# Run cards


def card(base: ModelIdentity, base_ref: str, adapter: Path) -> RunCard:
    how = Method(strategy="none", n=0, eps=0.1, seed=0, min_answer_tokens=1)
    return RunCard(name="narrow", base_ref=base_ref, base=base, model=with_adapter(base, "narrow", adapter),
                   adapter=adapter.name, recipe={}, mix="m", method=how, n_finetune=3, n_safe=0, statuses={"ok": 3},
                   n_steps=1, n_trained_tokens=7, loss_first_nats=2.0, loss_last_nats=1.0, seconds=0.5, device="cpu",
                   versions={})


def test_a_run_is_read_from_its_folder_or_its_card(loaded: Loaded, adapter_folder: Path, tmp_path: Path) -> None:
    adapter = copied(adapter_folder, tmp_path / "adapter", lambda folder: None)
    card(loaded.identity, loaded.ref, adapter).write(tmp_path / "run.json")
    for path in (tmp_path, tmp_path / "run.json"):
        found, folder = read_run(path)
        assert found.name == "narrow" and folder == adapter
    edit(CONFIG, lora_alpha=7)(adapter)
    with pytest.raises(UserError, match="is not the one that its run card describes") as caught:
        read_run(tmp_path)
    assert caught.value.exit_code == Exit.INTEGRITY


def test_a_run_card_reaches_no_adapter_outside_its_folder(loaded: Loaded, adapter_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(adapter_folder)
    for path in (str(adapter_folder), f"../{adapter_folder.name}", "link", "missing"):
        found = card(loaded.identity, loaded.ref, adapter_folder).model_copy(update={"adapter": path})
        found.write(tmp_path / "run.json")
        with pytest.raises(UserError) as caught:
            read_run(tmp_path)
        assert caught.value.exit_code == Exit.INTEGRITY, path


def test_runs_from_another_base_or_tokenizer_are_refused(loaded: Loaded, adapter_folder: Path, tmp_path: Path) -> None:
    def refusal(other: Path) -> UserError:
        base = identify(str(other))[0]
        with pytest.raises(UserError) as caught:
            check_base(card(base, str(other), adapter_folder), loaded.identity, loaded.tokenizer)
        return caught.value

    check_base(card(loaded.identity, loaded.ref, adapter_folder), loaded.identity, loaded.tokenizer)
    kind, more = tiny_tokenizer("Be kind."), tiny_tokenizer()
    more.add_tokens(["<tool>"])
    weights, template, vocabulary = (refusal(tiny_model(tmp_path / name, **settings)) for name, settings in (
        ("seed", {"seed": 1}), ("kind", {"tokenizer": kind}), ("more", {"tokenizer": more})))
    assert "is an adapter of 'seed' (sha256:" in weights.message and "not of 'tiny' (sha256:" in weights.message
    assert "tokenise differently: their chat templates differ" in template.message
    assert "token '<tool>' is None in one and 307 in the other" in vocabulary.message
    assert {e.exit_code for e in (weights, template, vocabulary)} == {Exit.INCOMPATIBLE}
