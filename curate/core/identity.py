"""Who a model is, by content and not by name: digests, run cards, and whether a run belongs to a base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from curate.core.adapters import ADAPTER_FILES, adapter_settings
from curate.core.chat import first_difference, tokenizer_digest
from curate.core.documents import ModelIdentity, RunCard
from curate.core.errors import Exit, UserError
from curate.core.files import canonical_json, file_sha256, inside, sha256
from curate.core.refs import load_tokenizer, readable_errors, ref_from, short_name, weights_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHT_FILES = ("*.safetensors", "config.json")
ALSO_ADAPTER = "an adapter lies beside its weights, and the library would add it unasked."


def identify(ref: str) -> tuple[ModelIdentity, PreTrainedTokenizerBase]:
    """Return who a model is, and its tokenizer, without loading its weights."""
    path, commit = located(ref)
    tokenizer = load_tokenizer(ref)
    return ModelIdentity(name=short_name(ref), revision=commit,
                         weights=_weights_digest(Path(path), commit), tokenizer=tokenizer_digest(tokenizer)), tokenizer


def weights_digest(ref: str) -> str:
    """Return the digest of a model's weights, as in ``ModelIdentity``; its tokenizer need not know conversations."""
    path, commit = located(ref)
    return _weights_digest(Path(path), commit)


def located(ref: str) -> tuple[str, str | None]:
    """Return where a model's weights are (a folder or a hub id), and their hub commit.

    Raises ``UserError`` (integrity) where an adapter lies beside them.
    """
    from transformers import AutoConfig

    path, revision = weights_at(ref)
    if (Path(path) / ADAPTER_FILES[0]).is_file():
        raise UserError(f"'{ref}' is not one whole model: {ALSO_ADAPTER}", "Give base and adapter apart.",
                        Exit.INTEGRITY)
    with readable_errors(ref):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    return path, getattr(config, "_commit_hash", None)


def adapter_digest(folder: Path) -> str:
    """Return the digest of an adapter's weights and configuration; paths in the configuration do not count."""
    settings = {k: v for k, v in adapter_settings(folder).items() if k not in ("base_model_name_or_path", "revision")}
    return sha256(canonical_json([file_sha256(folder / ADAPTER_FILES[1]), settings]))[:32]


def with_adapter(base: ModelIdentity, name: str, folder: Path) -> ModelIdentity:
    """Return the identity of ``base`` with the adapter in ``folder``."""
    return base.model_copy(update={"name": name, "adapter": adapter_digest(folder)})


def read_run(path: Path) -> tuple[RunCard, Path]:
    """Read the run card at ``path`` (file or folder), check its adapter, and return both."""
    card_path = path / "run.json" if path.is_dir() else path
    card = RunCard.read(card_path)
    folder = inside(card_path.parent, card.adapter)
    if adapter_digest(folder) != card.model.adapter:
        raise UserError(f"The adapter in {folder} is not the one that its run card describes.",
                        "Restore it, or train the run again.", Exit.INTEGRITY)
    return card, folder


def check_base(card: RunCard, identity: ModelIdentity, tokenizer: PreTrainedTokenizerBase,
               folder: Path = Path()) -> None:
    """Refuse a run, whose card lies in ``folder``, of another base or another tokenizer, before any work."""
    if card.base.tokenizer != identity.tokenizer:
        what = _difference(tokenizer, ref_from(card.base_ref, folder))
        raise UserError(f"'{card.name}' and '{identity.name}' tokenise differently: {what}.",
                        "Score and train with one tokenizer and one chat template.", Exit.INCOMPATIBLE)
    if card.base.weights != identity.weights:
        raise UserError(f"'{card.name}' is an adapter of '{card.base.name}' ({card.base.weights[:16]}), "
                        f"not of '{identity.name}' ({identity.weights[:16]}).",
                        "Use the base that it was trained from.", Exit.INCOMPATIBLE)


def _difference(tokenizer: PreTrainedTokenizerBase, ref: str) -> str:
    try:
        return first_difference(tokenizer, load_tokenizer(ref)) or "the tokenizer has changed since"
    except UserError:
        return f"the tokenizer of its base '{ref}' is another, and cannot be read here to tell where"


def _weights_digest(path: Path, commit: str | None) -> str:
    if not path.is_dir():
        return f"hub:{commit}"
    files = sorted(f for pattern in WEIGHT_FILES for f in path.glob(pattern))
    return "sha256:" + sha256(canonical_json([[f.name, file_sha256(f)] for f in files]))[:32]
