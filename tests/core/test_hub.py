"""The hub path of ``sources``, on local folders and with the errors that the hub answers with."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from curate.core.errors import Exit, UserError
from curate.core.example import pair
from curate.core.sources import Source, hub_revision, read_source


def bare(error: type[Exception]) -> Exception:
    """Return an error of the hub's client without the response that it wants (whose library changes)."""
    return error.__new__(error)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in a folder, as ``load_dataset`` takes it in place of a hub id; its cache is temporary, too."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"q{k}", "response": "a" if k else "", "label": "fine"} for k in range(3)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data"


def test_rows_of_a_data_set_come_in_order_and_filtered(folder: Path) -> None:
    source = Source(kind="hub", name=str(folder), split="train", needs=("response",), where={"label": "fine"})
    assert list(read_source(source, Path("unused"))) == [pair("q1", "a"), pair("q2", "a")]
    with pytest.raises(UserError, match="row 1: the column 'colour'"):
        list(read_source(source.model_copy(update={"where": {"colour": "red"}, "needs": ()}), Path("unused")))


@pytest.mark.parametrize("change", [{"split": "tost"}, {"config": "other"}], ids=["split", "configuration"])
def test_unknown_splits_and_configurations_say_how_to_name_them(folder: Path, change: dict[str, str]) -> None:
    source = Source(kind="hub", name=str(folder)).model_copy(update=change)
    with pytest.raises(UserError, match="could not be loaded") as caught:
        list(read_source(source, folder))
    assert "ID:CONFIG:SPLIT" in caught.value.hint


def test_damaged_data_is_no_traceback(folder: Path) -> None:
    (folder / "train.jsonl").write_text('{"prompt": "q", "response": {"deep')
    with pytest.raises(UserError, match="could not be loaded"):
        list(read_source(Source(kind="hub", name=str(folder)), folder))


@pytest.mark.parametrize(("raised", "code", "words"), [
    (bare(GatedRepoError), Exit.ENVIRONMENT, "hf auth login"),
    (bare(RepositoryNotFoundError), Exit.ENVIRONMENT, "Accept its terms"),
    (datasets.exceptions.DatasetNotFoundError("none"), Exit.ENVIRONMENT, "HF_TOKEN"),
    (bare(HfHubHTTPError), Exit.REMOTE, "local copy"),
    (OfflineModeIsEnabled("offline"), Exit.REMOTE, "HF_HUB_OFFLINE"),
    (ConnectionError("refused"), Exit.REMOTE, "Check the network"),
    (TimeoutError("slow"), Exit.REMOTE, "Check the network")], ids=lambda value: type(value).__name__)
def test_what_the_hub_answers_becomes_a_next_step(monkeypatch: pytest.MonkeyPatch, raised: Exception, code: Exit,
                                                  words: str) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="some/data") as caught:
        list(read_source(Source(kind="hub", name="some/data"), Path("unused")))
    assert caught.value.exit_code == code and words in caught.value.hint


def test_the_revision_is_passed_on_and_unknown_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[object, ...], dict[str, object]]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: seen.append((a, k)) or [])
    assert list(read_source(Source(kind="hub", name="some/data", config="c", revision="c0ffee"), Path("unused"))) == []
    assert seen == [(("some/data", "c"), {"split": "train", "revision": "c0ffee"})]
    assert hub_revision("some/data") is None
