"""Published schemas are those of the code, and every committed manifest is valid, unchanged and complete."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from curate.core.documents import Document, EnsembleSpec, MixManifest, RunCard, Verdicts
from curate.verify import verify_manifest

ROOT = Path(__file__).parents[1]
SCHEMAS: dict[str, type[Document]] = {"mix": MixManifest, "run": RunCard, "ensemble": EnsembleSpec,
                                      "verdicts": Verdicts}
MANIFESTS = sorted((ROOT / "manifests").rglob("*.json"))


@pytest.mark.parametrize("name", SCHEMAS)
def test_published_schema_is_the_code(name: str) -> None:
    published = json.loads((ROOT / f"docs/schemas/{name}-{SCHEMAS[name].VERSION}.json").read_text())
    assert published == SCHEMAS[name].json_schema()


def test_there_are_manifests() -> None:
    assert len(MANIFESTS) >= 4


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_manifest_is_valid_and_complete(path: Path) -> None:
    schema = MixManifest.json_schema()
    body = json.loads(path.read_text())
    jsonschema.validate(body, schema)
    assert verify_manifest(path, path.parent).problems == ()
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**body, "surprise": 1}, schema)
