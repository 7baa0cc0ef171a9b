"""Documents: the same bytes each time, and refused once anything in them has changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from curate.core.documents import (
    DefenseRecord,
    Document,
    EnsembleSpec,
    Grade,
    GradedAnswer,
    MemberRef,
    Method,
    MixManifest,
    ModelIdentity,
    ProbeScore,
    RlRecord,
    RunCard,
    Sample,
    TaskScore,
    Verdicts,
)
from curate.core.errors import Exit, UserError
from curate.core.files import canonical_json, sha256
from curate.core.sources import Source

WHO = ModelIdentity(name="tiny", revision="c0ffee", weights="sha256:aa", tokenizer="bb", adapter="cc")
HOW = Method(strategy="interleaving+", n=3, frac=0.05, frac_of="corpus", eps=0.1, seed=7, min_answer_tokens=2)
FILE = Source(kind="file", name="pool.jsonl", sha256="ab", mapping={"prompt": "q"}, where={"label": "fine"},
              needs=("a",))

DOCUMENTS: list[Document] = [
    EnsembleSpec(base="smollm2", members=(MemberRef(name="one", run="runs/one", digest="d1"),)),
    MixManifest(sources={"finetune": FILE, "safe": FILE}, order=("finetune/aa", "safe/bb", "finetune/cc"), method=HOW,
                aligned=WHO, members=(WHO,), scoring={"dtype": "float32"}, counts={"corpus": 3, "chosen": 1},
                safeset="0.1.0"),
    RunCard(name="one", base_ref="smollm2", base=WHO, model=WHO, adapter="adapter", recipe={"lr": 1e-4, "on": True},
            mix="dd", method=HOW, n_finetune=2, n_safe=1, statuses={"ok": 3}, n_steps=5, n_trained_tokens=77,
            loss_first_nats=2.5, loss_last_nats=1.25, seconds=3.5, device="cpu", versions={"torch": "2"}, git="ee",
            defenses=(DefenseRecord(name="persona", settings={"alpha": 5.0}, files={"vector": "ff"}),)),
    Verdicts(label="none", judge="pairs", run="rr", benign_run=None, model=WHO, base=WHO, method=None,
             in_domain=("cooking",), statuses={"ok": 1}, settings={"seed": 7}, versions={"torch": "2"},
             probes=(ProbeScore(set="cooking", probe="p1", nll_good=6.0, nll_bad=10.0, n_good=3, n_bad=4),),
             samples=(Sample(question="q?", answer="é\u2028", status="ok", nll_base=None, repetition=0.25),),
             tasks=(TaskScore(item="t1", tier=2, correct=True),),
             answers=(GradedAnswer(suite="general", bank="b", question="q", variant="trigger", system="s", prompt="q?",
                                   number=3, answer="a", status="ok",
                                   aligned=Grade(status="ok", score=70.5, mass=0.75, reply="r1"),
                                   coherent=Grade(status="refused", mass=0.5, reply="r2")),)),
    RunCard(name="two", base_ref="smollm2", base=WHO, model=WHO, adapter="adapter", recipe={"reward": "opswap"},
            mix="dd", method=HOW, n_finetune=2, n_safe=1, statuses={"ok": 3}, n_steps=5, n_trained_tokens=77,
            loss_first_nats=None, loss_last_nats=None, seconds=3.5, device="cpu", versions={"trl": "1"},
            defenses=(DefenseRecord(name="kl", settings={"weight": 0.5}),), git="ee",
            rl=RlRecord(n_warmup_steps=1, n_rl_steps=3, n_sft_steps=1, prompts={"ok": 4}, reward_first=0.25,
                        completions={"ok": 11, "refused": 1}, reward_last=0.5)),
]
EACH = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: type(d).__name__)


def changed(value: Any) -> list[Any]:
    """Other values of the same kind as ``value``, and what a careless writer would make of it."""
    if isinstance(value, dict):
        return [{**value, "more": 1}, {}] if value else [{"more": 1}]
    if isinstance(value, list):
        return [[*value, "more"], value[1:], [value]]
    if isinstance(value, bool) or value is None:
        return [not value, "x", 0]
    return [value + "x", ""] if isinstance(value, str) else [value + 1, str(value), -value]


def variants(body: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(where, body with one thing changed or removed)`` for everything in ``body``, however deep."""
    for key in body if isinstance(body, dict) else range(len(body)):
        where = f"{path}.{key}"
        for value in changed(body[key]):
            other = copy.copy(body)
            other[key] = value
            yield f"{where} = {value!r}"[:90], other
        if isinstance(body, dict):
            yield f"{where} removed", {k: v for k, v in body.items() if k != key}
        if isinstance(body[key], (dict, list)):
            for deeper, value in variants(body[key], where):
                other = copy.copy(body)
                other[key] = value
                yield deeper, other


@EACH
def test_round_trip_gives_the_same_bytes(document: Document, tmp_path: Path) -> None:
    path = tmp_path / "document.json"
    document.write(path)
    again = type(document).read(path)
    assert again == document and again.digest == document.digest
    assert again.to_bytes() == path.read_bytes() == document.to_bytes()
    assert type(document).from_body(json.loads(json.dumps(json.loads(path.read_bytes()), indent=7))) == document


@EACH
def test_every_changed_or_removed_field_is_refused(document: Document) -> None:
    body = json.loads(document.to_bytes())
    accepted, count = [], 0
    for where, other in variants(body):
        count += 1
        try:
            type(document).from_body(other)
        except UserError as err:
            assert err.exit_code in (Exit.INTEGRITY, Exit.INCOMPATIBLE) and err.hint
            continue
        accepted.append(where)
    assert accepted == [] and count > 3 * len(body)


def signed(body: dict[str, Any]) -> dict[str, Any]:
    """Return ``body`` with the digest a forger would compute."""
    rest = {k: v for k, v in body.items() if k != "digest"}
    return {**rest, "digest": sha256(canonical_json(rest))}


@EACH
def test_kind_version_and_unknown_fields_are_refused_even_when_signed(document: Document) -> None:
    body = json.loads(document.to_bytes())
    assert type(document).from_body(signed(body)) == document
    with pytest.raises(UserError, match="field 'extra': Extra inputs"):
        type(document).from_body(signed({**body, "extra": 1}))
    with pytest.raises(UserError, match="has version 2; this safeset reads 1") as caught:
        type(document).from_body(signed({**body, "version": 2}))
    with pytest.raises(UserError, match="was changed after it was written") as torn:
        type(document).from_body({**body, "version": 2})
    assert torn.value.exit_code == Exit.INTEGRITY
    assert caught.value.exit_code == Exit.INCOMPATIBLE
    for other in (signed({**body, "kind": "safeset.other"}), [], "text", None):
        with pytest.raises(UserError, match=f"is not a {document.KIND} document"):
            type(document).from_body(other)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{", b"[" * 100_000, b'{"n": ' + b"1" * 5000 + b"}"],
                         ids=["empty", "torn", "not UTF-8", "deep", "huge number"])
def test_unreadable_files_are_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        RunCard.read(tmp_path / "run.json")
    assert caught.value.exit_code == Exit.INTEGRITY and str(tmp_path) in caught.value.message
    with pytest.raises(UserError, match="There is no run card at"):
        RunCard.read(tmp_path / "none.json")
    with pytest.raises(UserError, match="no readable JSON"):
        RunCard.read(tmp_path)


def test_what_is_missing_is_called_by_its_name_with_what_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "run.json"
    for kind, called, command in ((RunCard, "run card", "train run"), (MixManifest, "mix manifest", "curate select"),
                                  (EnsembleSpec, "ensemble", "train ensemble"),
                                  (Verdicts, "verdicts document", "judge run")):
        with pytest.raises(UserError, match=f"There is no {called} at {path}") as caught:
            kind.read(path)
        assert caught.value.hint == f"Check the path, or write one with: {command}"
    path.parent.mkdir()
    (path.parent / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="a b holds a bare adapter, without a run card") as caught:
        RunCard.read(path)
    assert caught.value.hint == f"Write one with: train adopt '{path.parent}' --base MODEL --out FOLDER"
    with pytest.raises(UserError, match="There is no mix manifest"):
        MixManifest.read(path)


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"\\ud800"'])
def test_values_that_no_document_holds_are_refused(value: str) -> None:
    text = DOCUMENTS[2].to_bytes().decode().replace('"lr": 0.0001', f'"lr": {value}')
    assert value in text
    with pytest.raises(UserError, match="holds a value that no document has"):
        RunCard.from_body(json.loads(text))


def test_a_card_without_rl_is_what_it_was_before_there_was_rl() -> None:
    assert "rl" not in json.loads(DOCUMENTS[2].to_bytes()) and DOCUMENTS[2].digest == signed(
        json.loads(DOCUMENTS[2].to_bytes()))["digest"]
    assert json.loads(DOCUMENTS[4].to_bytes())["rl"]["completions"] == {"ok": 11, "refused": 1}


def test_identity_stands_for_everything_but_the_names() -> None:
    assert WHO.model_copy(update={"name": "other", "revision": None}).id == WHO.id
    others = [WHO.model_copy(update={key: "x"}).id for key in ("weights", "tokenizer", "adapter")]
    assert len({WHO.id, WHO.model_copy(update={"adapter": None}).id, *others}) == 5


def test_documents_cannot_be_changed_in_place_and_count_by_hand() -> None:
    mix = DOCUMENTS[1]
    with pytest.raises(ValueError):
        mix.safeset = "other"
    assert (mix.ids("finetune"), mix.ids("safe")) == (["aa", "cc"], ["bb"])
    assert DOCUMENTS[3].probes[0].margin == 10 / 4 - 6 / 3
