"""Manifest to rows: the exact order, and every kind of tampering refused before any model is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curate.core.documents import MixManifest
from curate.core.errors import Exit, UserError
from curate.core.example import pair
from curate.core.sources import Source, file_source
from tests.fakes import tiny_mix, tiny_rows, tiny_tokenizer, write_rows
from train.data import MixRow, encode_mix, load_mix
from train.jobs import prepare
from train.recipe import Recipe

ABSENT = "f" * 32


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    return tiny_mix(tmp_path / "data", n_finetune=5, n_safe=2)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all values of a JSON document that are no containers with something in them."""
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    if isinstance(value, list) and value:
        return [leaf for key, inner in enumerate(value) for leaf in leaves(inner, (*path, key))]
    return [path]


def changed(body: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """Return a copy of ``body`` with another value at ``path``, of the same kind where it has one."""
    body = json.loads(json.dumps(body))
    place = body
    for key in path[:-1]:
        place = place[key]
    old = place[path[-1]]
    new: Any = {str: lambda: old[:-1] + ("0" if old[-1:] != "0" else "1"), bool: lambda: not old, int: lambda: old + 1,
                float: lambda: old + 0.5, list: lambda: ["x"], dict: lambda: {"x": "y"}}.get(type(old), lambda: "x")()
    place[path[-1]] = new
    return body


def sample_body() -> dict[str, Any]:
    source = {"kind": "file", "name": "tune.jsonl", "sha256": "0" * 64}
    method = {"strategy": "interleaving", "n": 1, "eps": 0.1, "seed": 0, "min_answer_tokens": 1}
    manifest = MixManifest.model_validate({
        "sources": {"finetune": source, "safe": source}, "order": (f"finetune/{ABSENT}",), "method": method,
        "counts": {"corpus": 1}, "scoring": {"engine": "x"}, "safeset": "1"})
    return json.loads(manifest.to_bytes())


@pytest.mark.parametrize("path", leaves(sample_body()), ids=lambda p: ".".join(map(str, p)))
def test_any_changed_field_is_refused(tmp_path: Path, path: tuple[Any, ...]) -> None:
    whole = tiny_mix(tmp_path, n_finetune=1, n_safe=1)
    body = json.loads(whole.read_bytes()) | {"scoring": {"engine": "x"}}
    body["digest"] = MixManifest.model_validate({k: v for k, v in body.items() if k not in (
        "kind", "version", "digest")}).digest
    whole.write_text(json.dumps(body))
    assert len(prepare(Recipe("none"), whole, tmp_path / "out").rows) == 2
    whole.write_text(json.dumps(changed(body, path)))
    with pytest.raises(UserError) as caught:
        prepare(Recipe("none"), whole, tmp_path / "out")
    assert caught.value.exit_code in (Exit.INTEGRITY, Exit.INCOMPATIBLE)


def test_rows_come_in_the_manifests_order(mix: Path) -> None:
    manifest = MixManifest.read(mix)
    rows = load_mix(manifest, mix.parent)
    assert tuple(f"{row.source}/{row.example.id}" for row in rows) == manifest.order
    assert [row.source for row in rows] == ["finetune", "safe", "finetune", "finetune", "finetune", "safe", "finetune"]
    backwards = manifest.model_copy(update={"order": manifest.order[::-1]})
    assert load_mix(backwards, mix.parent) == rows[::-1]


def with_source(**fields: Any) -> Callable[[MixManifest], MixManifest]:
    def change(manifest: MixManifest) -> MixManifest:
        source = manifest.sources["safe"].model_copy(update=fields)
        return manifest.model_copy(update={"sources": {**manifest.sources, "safe": source}})
    return change


def with_order(change: Callable[[tuple[str, ...]], tuple[str, ...]]) -> Callable[[MixManifest], MixManifest]:
    return lambda manifest: manifest.model_copy(update={"order": change(manifest.order)})


FORGERIES: dict[str, tuple[Callable[[MixManifest], MixManifest], str]] = {
    "parent folder": (with_source(name="../data/safe.jsonl"), "leaves the folder"),
    "absolute path": (with_source(name="/etc/passwd"), "leaves the folder"),
    "backslash": (with_source(name="..\\safe.jsonl"), "leaves the folder"),
    "symbolic link": (with_source(name="link.jsonl"), "symbolic link"),
    "linked folder": (with_source(name="linked/safe.jsonl"), "symbolic link"),
    "missing file": (with_source(name="gone.jsonl"), "is missing"),
    "folder": (with_source(name="folder.jsonl"), "not a plain file"),
    "other content": (with_source(sha256="0" * 64), "has changed"),
    "no digest": (with_source(sha256=None), "has no sha256"),
    "no revision": (with_source(kind="hub", name="a/b", sha256=None), "has no revision"),
    "unknown builtin": (with_source(kind="builtin", name="demoo"), "does not exist"),
    "no source": (lambda m: m.model_copy(update={"sources": {"finetune": m.sources["finetune"]}}), "names no row"),
    "empty order": (with_order(lambda order: ()), "names no rows"),
    "duplicate id": (with_order(lambda order: (*order, order[0])), "twice"),
    "duplicate id under another source": (
        with_order(lambda order: (*order, order[0].replace("finetune", "safe"))), "twice"),
    "absent id": (with_order(lambda order: (*order, f"safe/{ABSENT}")), "are not in its sources"),
    "id of the other source": (
        with_order(lambda order: (order[0].replace("finetune", "safe"), *order[1:])), "are not in its sources"),
    "unknown source name": (with_order(lambda order: (*order, f"other/{ABSENT}")), "names no row"),
    "no id": (with_order(lambda order: (*order, "safe/")), "names no row"),
    "short id": (with_order(lambda order: (*order, "safe/" + "f" * 31)), "names no row"),
    "id with a newline": (with_order(lambda order: (*order, f"safe/{ABSENT}\n")), "names no row"),
    "upper case": (with_order(lambda order: (*order, "safe/" + "F" * 32)), "names no row"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest_with_a_right_digest_is_refused(mix: Path, name: str) -> None:
    (mix.parent / "link.jsonl").symlink_to(mix.parent / "safe.jsonl")
    (mix.parent / "linked").symlink_to(mix.parent)
    (mix.parent / "folder.jsonl").mkdir()
    change, message = FORGERIES[name]
    change(MixManifest.read(mix)).write(mix)
    with pytest.raises(UserError, match=message) as caught:
        prepare(Recipe("none"), mix, mix.parent / "out")
    assert caught.value.exit_code == Exit.INTEGRITY
    assert caught.value.hint


def test_a_changed_row_is_refused(mix: Path) -> None:
    write_rows(mix.parent / "tune.jsonl", [*tiny_rows(4, "tune"), pair("tune 4", "other")])
    with pytest.raises(UserError, match="has changed") as caught:
        prepare(Recipe("none"), mix, mix.parent / "out")
    assert caught.value.exit_code == Exit.INTEGRITY


def test_root_moves_the_manifest_away_from_its_data(mix: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_bytes(mix.read_bytes())
    with pytest.raises(UserError, match="is missing") as caught:
        prepare(Recipe("none"), elsewhere, tmp_path / "out")
    assert "--root" in caught.value.hint
    assert len(prepare(Recipe("none"), elsewhere, tmp_path / "out", mix.parent).rows) == 7


def test_bad_rows_that_the_order_does_not_name_do_not_matter(tmp_path: Path) -> None:
    rows = tiny_rows(2, "tune")
    path = write_rows(tmp_path / "tune.jsonl", rows)
    path.write_text("no JSON\n" + path.read_text())
    body = sample_body() | {"sources": {"finetune": file_source(path, tmp_path).model_dump()},
                            "order": [f"finetune/{row.id}" for row in rows]}
    manifest = MixManifest.model_validate({k: v for k, v in body.items() if k not in ("kind", "version", "digest")})
    assert [row.example for row in load_mix(manifest, tmp_path)] == rows


def test_hub_rows_are_found_by_id_at_the_pinned_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows, asked = tiny_rows(3, "tune"), []

    def load(source: Source) -> list[dict[str, Any]]:
        asked.append((source.name, source.revision))
        return [row.to_row() for row in rows]

    monkeypatch.setattr("curate.core.sources._load_hub", load)
    body = sample_body() | {"sources": {"finetune": {"kind": "hub", "name": "a/b", "revision": "c0ffee"}},
                            "order": [f"finetune/{rows[2].id}"]}
    manifest = MixManifest.model_validate({k: v for k, v in body.items() if k not in ("kind", "version", "digest")})
    assert load_mix(manifest, tmp_path) == [MixRow("finetune", rows[2])]
    assert asked == [("a/b", "c0ffee")]


def test_no_torch_before_the_rows_are_checked() -> None:
    code = "import sys, train.jobs; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_row_has_a_status_and_nothing_is_cut() -> None:
    rows = [MixRow("finetune", pair("one", "two")), MixRow("safe", pair("one", "")),
            MixRow("safe", pair("one", "two " * 50)), MixRow("safe", pair("three", "four"))]
    mix = encode_mix(tiny_tokenizer(), rows, 60)
    assert mix.statuses == {"empty_answer": 1, "ok": 2, "too_long": 1}
    assert (mix.n_finetune, mix.n_safe, len(mix.rows)) == (1, 1, 2)
    with pytest.raises(UserError, match="No row of the mix") as caught:
        encode_mix(tiny_tokenizer(), rows[1:3], 60)
    assert caught.value.exit_code == Exit.BAD_DATA
