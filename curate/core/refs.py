"""References to models, called ``ref`` everywhere: what ``smollm2``, a folder or a hub id (``id@revision``) means."""

from __future__ import annotations

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


def weights_at(ref: str) -> tuple[str, str | None]:
    """Return the folder or hub id that holds a model's weights, and the revision asked for."""
    name, revision = _split_revision(ref)
    return (str(smollm2_folder()) if name == SMOLLM2 else name), revision


def short_name(ref: str) -> str:
    """Return what people call a model: its hub id, or the last part of a folder's path."""
    name, _ = _split_revision(ref)
    return Path(name).name if Path(name).exists() else name


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
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as err:
        first = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise UserError(f"The model '{ref}' could not be loaded: {first}",
                        "Give 'smollm2', a folder with safetensors, or a hub id (log in with `hf auth login` if it is "
                        "gated).", Exit.ENVIRONMENT) from err


def _split_revision(ref: str) -> tuple[str, str | None]:
    name, _, revision = ref.partition("@") if not Path(ref).exists() else (ref, "", "")
    return name, revision or None
