"""Corpora by name: the paper's, a few open instruction sets, any hub id, any path."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from curate.core.errors import UserError, unknown
from curate.core.objects import is_url
from curate.core.sources import BUILTIN, FORMATS, Source, builtin, check_plain, file_source, pinned, url_source
from curate.core.terminal import quoted


@dataclass(frozen=True)
class NamedCorpus:
    """A corpus that the command line knows by name."""

    source: Source
    about: str
    licence: str


@dataclass(frozen=True)
class Corpus:
    """A corpus ready to be read: its label in the store, its source, and the folder that file names refer to."""

    label: str
    source: Source
    folder: Path


def _hub(repo: str, config: str | None = None, **fields: object) -> Source:
    return Source.model_validate({"kind": "hub", "name": repo, "config": config, "split": "train", **fields})


OTHER_FORMATS = (".json", ".txt", ".tsv", ".gz", ".zst", ".zip", ".arrow", ".pq", ".xlsx", ".yaml")
"""Endings of data files that cannot be read, and that no hub id has."""

CORPORA: Mapping[str, NamedCorpus] = {
    "demo": NamedCorpus(Source(kind="builtin", name="demo"), "440 instructions and polite refusals, ships with safeset",
                        "Apache-2.0"),
    "wildguardmix": NamedCorpus(
        _hub("allenai/wildguardmix", "wildguardtrain", needs=("prompt", "response"),
             revision="d29c47f41c8b51348b5c8e8c81c039b3132b66d1",
             where={"prompt_harm_label": "unharmful", "response_harm_label": "unharmful"}),
        "the paper's pool: benign subset of WildGuardMix (prompt and response labelled unharmful); gated", "ODC-BY"),
    "dolly": NamedCorpus(
        _hub("databricks/databricks-dolly-15k",
             mapping={"prompt": "instruction", "input": "context", "response": "response"}, needs=("response",)),
        "15k instructions written by people", "CC BY-SA 3.0"),
    "alpaca-cleaned": NamedCorpus(_hub("yahma/alpaca-cleaned", needs=("output",)),
                                  "52k generated instructions, cleaned", "CC BY-NC 4.0"),
    "no-robots": NamedCorpus(_hub("HuggingFaceH4/no_robots", needs=("messages",)),
                             "10k instructions written by people", "CC BY-NC 4.0"),
    "smoltalk": NamedCorpus(_hub("HuggingFaceTB/smoltalk", "all", needs=("messages",)),
                            "1M generated conversations", "Apache-2.0"),
    "openhermes": NamedCorpus(_hub("teknium/OpenHermes-2.5", needs=("conversations",)),
                              "1M generated conversations (ShareGPT shape)", "see its page"),
}


def open_corpus(name: str, mapping: Mapping[str, str] | None = None, strip_think: bool = False) -> Corpus:
    """Return the corpus for a path, a URL, a name of ``CORPORA`` or a hub id (``ID[:CONFIG[:SPLIT]][@REVISION]``).

    Names of hub sets may end in ``@REVISION`` too. A hub corpus without a commit is pinned to the one it is at now.
    Raises ``UserError`` with the nearest name.
    """
    if is_url(name):
        return Corpus(name.rpartition("/")[2], url_source(name, mapping, strip_think), Path())
    path = Path(name)
    check_plain(path)
    if path.suffix in FORMATS or path.is_file():
        real = _real_file(path)
        return Corpus(path.name, file_source(real, real.parent, mapping, strip_think), real.parent.resolve())
    named, _, revision = name.partition("@")
    if named in CORPORA and (not revision or CORPORA[named].source.kind == "hub"):
        source = CORPORA[named].source
        source = source.model_copy(update={"revision": revision or source.revision})
    elif name in BUILTIN:
        source = builtin(name)
    elif path.is_dir():
        raise UserError(f"{name} is a folder: name the files in it.", _of_folder(path))
    elif _is_no_hub_id(name):
        raise _no_file(path)
    elif "/" in name:
        source = _from_hub_id(name)
    else:
        raise unknown("corpus", name, {**CORPORA, **BUILTIN})
    if source.kind == "builtin":
        return Corpus(name, builtin(source.name), Path())
    changes: dict[str, object] = {"strip_think": strip_think or source.strip_think}
    if mapping:
        changes["mapping"] = dict(mapping)
    return Corpus(name, pinned(source).model_copy(update=changes), Path())


def _real_file(path: Path) -> Path:
    """Return the file that a path means; ``UserError`` where a document could not name it."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(f"The name of the file {str(path)!a} is no valid UTF-8, so no document can hold it.",
                        "Rename it.") from None
    if not path.is_symlink():
        return path
    real = path.resolve()
    if real.is_file() and real.suffix not in FORMATS:
        raise UserError(f"{path} is a link to {real}, whose name does not say its format.",
                        f"Copy it to a file that ends in one of {', '.join(FORMATS)}.")
    return real


def _is_no_hub_id(name: str) -> bool:
    """Say whether a name must be meant as a path: it is none of a hub id, looks like a data file, or has a folder."""
    if name.startswith((".", "/", "~")):
        return True
    if re.search("[:@]", name):
        return False
    ending = Path(name).suffix.lower()
    near = difflib.get_close_matches(ending, FORMATS, n=1, cutoff=0.7)
    return bool(near) or ending in OTHER_FORMATS or name.count("/") > 1 or ("/" in name and Path(name).parent.is_dir())


def _of_folder(path: Path) -> str:
    """Return what to do about a folder that was meant as a corpus."""
    splits = sorted(found.parent.name for found in path.glob("*/state.json"))
    if splits or (path / "state.json").is_file():
        split = f"[{json.dumps(splits[0])}]" if splits else ""
        made = json.dumps(f"{path.resolve().name}.parquet")
        code = f"import datasets; datasets.load_from_disk({json.dumps(str(path))}){split}.to_parquet({made})"
        return f"It is of datasets' save_to_disk; make a file of it: python -c {quoted(code)}"
    files = sorted(p.name for p in path.iterdir() if p.suffix in FORMATS)
    if not files:
        return f"It holds none of {', '.join(FORMATS)}."
    return f"For example --corpus {quoted(str(path / files[0]))}"


def _no_file(path: Path) -> UserError:
    there = [p.name for p in path.parent.iterdir() if p.name != path.name] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1)
    known = f"Possible endings: {', '.join(FORMATS)}. A data set of the hub is told from a path by NAME@REVISION."
    return UserError(f"There is no file {path}.", f"Did you mean '{path.parent / near[0]}'?" if near else known)


def _from_hub_id(name: str) -> Source:
    name, _, revision = name.partition("@")
    repo, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    return Source(kind="hub", name=repo, config=config or None, split=split or "train", revision=revision or None)
