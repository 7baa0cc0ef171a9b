"""The hub path of ``sources``, on a copy kept from earlier and with the errors that the hub answers with."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import datasets
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from curate.core import sources
from curate.core.errors import Exit, UserError
from curate.core.example import from_row, pair
from curate.core.sources import Source, hub_revision, pinned, read_source
from curate.corpora import CORPORA, open_corpus


def bare(error: type[Exception]) -> Exception:
    """Return an error of the hub's client without the response that it wants (whose library changes)."""
    return error.__new__(error)


COMMIT = "c0ffee" + "0" * 34


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and a cache that holds the data set ``some/data`` of the hub at ``COMMIT``."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"q{k}", "response": "a" if k else "", "label": "fine"} for k in range(3)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    builder = datasets.load_dataset_builder(str(tmp_path / "data"))
    builder.download_and_prepare()
    shutil.copytree(builder.cache_dir, tmp_path / "cache" / "some___data" / "default" / "0.0.0" / COMMIT)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


TALK = [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}]
PUBLISHED = {
    "wildguardmix": {"prompt": "q", "adversarial": False, "response": "a", "prompt_harm_label": "unharmful",
                     "response_refusal_label": None, "response_harm_label": "unharmful", "subcategory": "benign"},
    "dolly": {"instruction": "q", "context": "", "response": "a", "category": "open_qa"},
    "alpaca-cleaned": {"output": "a", "input": "", "instruction": "q"},
    "no-robots": {"prompt": "q", "prompt_id": "1", "messages": TALK, "category": "Chat"},
    "smoltalk": {"messages": TALK, "source": "s"},
    "openhermes": {"system_prompt": None, "source": "s", "model": None, "skip_prompt_formatting": None, "views": None,
                   "conversations": [{"from": "human", "value": "q", "weight": None},
                                     {"from": "gpt", "value": "a", "weight": None}]}}
"""The columns that named corpora have on the hub."""


@pytest.mark.parametrize("name", [name for name in CORPORA if name != "demo"])
def test_rows_of_named_corpora_are_examples(name: str) -> None:
    assert from_row(PUBLISHED[name], CORPORA[name].source.mapping) == pair("q", "a")


def test_rows_of_a_data_set_come_in_order_and_filtered(folder: Path) -> None:
    source = Source(kind="hub", name="some/data", split="train", needs=("response",), where={"label": "fine"})
    assert list(read_source(source, Path("unused"))) == [pair("q1", "a"), pair("q2", "a")]
    with pytest.raises(UserError, match="row 1: the column 'colour'"):
        list(read_source(source.model_copy(update={"where": {"colour": "red"}, "needs": ()}), Path("unused")))


def test_what_cannot_be_asked_is_the_commit_of_the_copy_or_refused(folder: Path) -> None:
    corpus = open_corpus("some/data")
    assert corpus.source.revision == COMMIT and hub_revision("some/data") is None
    assert len(list(read_source(corpus.source, corpus.folder))) == 3
    with pytest.raises(UserError, match="another") as caught:
        list(read_source(open_corpus("some/data@" + "1" * 40).source, corpus.folder))
    assert caught.value.exit_code == Exit.REMOTE
    for name in ("some/data@main", "some/data@c0ffee"):
        with pytest.raises(UserError, match="cannot be found out which commit") as caught:
            open_corpus(name)
        assert caught.value.exit_code == Exit.REMOTE and "online" in caught.value.hint
    with pytest.raises(UserError, match="could not be reached") as caught:
        pinned(Source(kind="hub", name="other/data"))
    assert caught.value.exit_code == Exit.REMOTE
    assert len(CORPORA["wildguardmix"].source.revision) == 40
    other = open_corpus(f"wildguardmix@{'a' * 40}").source
    assert other == CORPORA["wildguardmix"].source.model_copy(update={"revision": "a" * 40}) and other.where
    with pytest.raises(UserError, match="Unknown corpus 'demo@main'"):
        open_corpus("demo@main")


def test_a_branch_is_the_commit_it_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "hub_revision", lambda name, revision: ("2" if revision else "1") * 40)
    assert [open_corpus(name).source.revision[0] for name in ("a/b", "a/b@main", "a/b@" + "3" * 40)] == ["1", "2", "3"]


def test_a_folder_of_that_name_is_not_read_in_place_of_the_hub(folder: Path) -> None:
    planted = folder / "some" / "data"
    planted.mkdir(parents=True)
    (planted / "train.jsonl").write_text('{"prompt": "planted", "response": "x"}\n')
    with pytest.raises(UserError, match="in place of the hub's"):
        list(read_source(Source(kind="hub", name="some/data", revision=COMMIT), folder))
    for name in ("some/data", "./some/data"):
        with pytest.raises(UserError, match="is a folder: name the files in it") as caught:
            open_corpus(name)
        assert "some/data/train.jsonl" in caught.value.hint


@pytest.mark.parametrize(("name", "words", "hint"), [
    ("data/pool.jsn", "There is no file data/pool.jsn", "Did you mean 'data/pool.jsonl'"),
    ("data/pool", "There is no file data/pool", "NAME@REVISION"), ("none/rows.parq", "There is no file", ".parquet"),
    ("../none", "There is no file", ".csv"), ("rows.json", "There is no file", ".jsonl"),
    ("a/b/c", "There is no file", ".jsonl"), ("dmo", "Unknown corpus", "'demo'"),
    ("zzz", "Unknown corpus", "cleaned, demo, demo/car_care")])
def test_a_misspelt_path_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str,
                                                 hint: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pool.jsonl").touch()
    with pytest.raises(UserError, match=words) as caught:
        open_corpus(name)
    assert caught.value.exit_code == Exit.USAGE and hint in caught.value.hint


@pytest.mark.parametrize("change", [{"split": "tost"}, {"config": "other"}], ids=["split", "configuration"])
def test_unknown_splits_and_configurations_say_how_to_name_them(folder: Path, change: dict[str, str]) -> None:
    source = Source(kind="hub", name="some/data").model_copy(update=change)
    with pytest.raises(UserError, match="could not be loaded") as caught:
        list(read_source(source, folder))
    assert "ID:CONFIG:SPLIT" in caught.value.hint


def test_damaged_data_is_no_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder.parent / "data"
    (data / "train.jsonl").write_text('{"prompt": "q", "response": {"deep')
    monkeypatch.setattr(sources, "_builder", lambda source: datasets.load_dataset_builder(str(data)))
    with pytest.raises(UserError, match="could not be loaded"):
        list(read_source(Source(kind="hub", name="some/data"), folder))


FULL = OSError(errno.ENOSPC, "No space left on device")
WHILE_WRITING = datasets.exceptions.DatasetGenerationError("An error occurred")
WHILE_WRITING.__cause__ = FULL


@pytest.mark.parametrize(("raised", "code", "words"), [
    (bare(GatedRepoError), Exit.ENVIRONMENT, "hf auth login"),
    (bare(RepositoryNotFoundError), Exit.ENVIRONMENT, "Accept its terms at huggingface.co/datasets/some/data"),
    (datasets.exceptions.DatasetNotFoundError("none"), Exit.ENVIRONMENT, "HF_TOKEN"),
    (bare(HfHubHTTPError), Exit.REMOTE, "local copy"),
    (OfflineModeIsEnabled("offline"), Exit.REMOTE, "HF_HUB_OFFLINE"),
    (ConnectionError("refused"), Exit.REMOTE, "Check the network"),
    (TimeoutError("slow"), Exit.REMOTE, "Check the network"),
    (FULL, Exit.ENVIRONMENT, "HF_HOME"), (WHILE_WRITING, Exit.ENVIRONMENT, "Free some space"),
    (PermissionError(errno.EACCES, "Permission denied"), Exit.ENVIRONMENT, "HF_HOME")],
    ids=lambda value: type(value).__name__)
def test_what_the_hub_answers_becomes_a_next_step(monkeypatch: pytest.MonkeyPatch, raised: Exception, code: Exit,
                                                  words: str) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(UserError, match="some/data") as caught:
        list(read_source(Source(kind="hub", name="some/data"), Path("unused")))
    assert caught.value.exit_code == code and words in caught.value.hint


def test_configuration_and_revision_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def fail(*args: object, **kwargs: object) -> None:
        seen.append((args, kwargs))
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(UserError):
        list(read_source(Source(kind="hub", name="some/data", config="c", revision=COMMIT), Path("unused")))
    assert seen == [(("some/data", "c"), {"revision": COMMIT})]
