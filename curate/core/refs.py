"""References to models, called ``ref`` everywhere: what ``smollm2``, a folder or a hub id (``id@revision``) means."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from curate.core.errors import Exit, UserError
from curate.core.smollm2 import SMOLLM2, smollm2_folder
from curate.core.terminal import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from curate.core.documents import ModelIdentity


def weights_at(ref: str) -> tuple[str, str | None]:
    """Return the folder or hub id that holds a model's weights, and the revision asked for."""
    name, revision = _split_revision(ref)
    return (str(smollm2_folder()) if name == SMOLLM2 else name), revision


def short_name(ref: str) -> str:
    """Return what people call a model: its hub id, or the last part of a folder's path."""
    name, _ = _split_revision(ref)
    return Path(name).name if Path(name).exists() else name


def ref_in(ref: str, folder: Path) -> str:
    """Return a reference as a document in ``folder`` holds it: a relative path from there, beginning with a dot."""
    if Path(ref).is_absolute() or weights_at(ref)[0] != ref or not Path(ref).is_dir():
        return ref
    path = way_to(Path(ref), folder)
    return path if path.startswith("..") else f"./{path}"


def way_to(place: Path, start: Path) -> str:
    """Return the relative path that leads from the folder ``start`` to ``place``, with forward slashes."""
    return Path(os.path.relpath(os.path.realpath(place), os.path.realpath(start))).as_posix()


def ref_from(ref: str, folder: Path) -> str:
    """Return what loads a model that a document in ``folder`` refers to; earlier ones held a path as it was typed."""
    there = ref.startswith(("./", "../")) and (folder / ref).is_dir()
    return os.path.relpath(os.path.realpath(folder / ref)) if there else ref


def ref_of(model: ModelIdentity) -> str | None:
    """Return the reference that loads a model on any machine: smollm2 or ``id@revision``; None for one of a folder."""
    if not (model.name == SMOLLM2 or model.weights.startswith("hub:")):
        return None
    return f"{model.name}@{model.revision}" if model.revision else model.name


def load_tokenizer(ref: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; it always has a padding token afterwards."""
    from transformers import AutoTokenizer

    quiet_libraries()
    path, revision = weights_at(ref)
    with readable_errors(ref):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def readable_errors(ref: str) -> Iterator[None]:
    """Turn what the libraries raise about a model or adapter that they cannot read into a ``UserError``."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError, MemoryError,
            SafetensorError) as err:
        if not Path(weights_at(ref)[0]).is_dir() and _unreachable(err):
            raise UserError(f"The model '{ref}' could not be loaded: it is no folder here, there is no earlier copy, "
                            "and the hub could not be reached.", "Check the name, the network and HF_HUB_OFFLINE, or "
                            "give 'smollm2' or a folder with safetensors.", Exit.REMOTE) from err
        first = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise UserError(f"The model '{ref}' could not be loaded: {first}",
                        "Give 'smollm2', a folder with safetensors, or a hub id (log in with `hf auth login` if it is "
                        "gated).", Exit.ENVIRONMENT) from err


def _unreachable(err: BaseException | None) -> bool:
    """Say whether an error began with a connection that there was not."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    kinds = (ConnectionError, TimeoutError, socket.gaierror, LocalEntryNotFoundError)
    return err is not None and (isinstance(err, kinds) or _unreachable(err.__cause__ or err.__context__))


def _split_revision(ref: str) -> tuple[str, str | None]:
    name, _, revision = ref.partition("@") if not Path(ref).exists() else (ref, "", "")
    return name, revision or None
