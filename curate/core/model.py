"""Models in memory: load one by reference, on which device, in which dtype, and how its products are made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from curate.core.documents import ModelIdentity
from curate.core.errors import Exit, UserError, require
from curate.core.identity import ALSO_ADAPTER, identify, located
from curate.core.processes import keep_freed_memory
from curate.core.refs import readable_errors
from curate.core.terminal import quiet_libraries

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    """Resolve ``auto``: bfloat16 where the hardware multiplies it (docs/benchmarks.md), else float32.

    That is CUDA from Ampere on, and CPUs with AMX or AVX512_BF16.
    """
    import torch

    if dtype != "auto":
        return dtype
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.startswith("cuda") \
        else _multiplies_bfloat16()
    return "bfloat16" if native else "float32"


def _multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16."""
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
    """Load a model by reference: ``smollm2``, a folder or a hub id (``id@revision``).

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

    if device == "cpu":
        keep_freed_memory()
    quantised = _in_4bit(getattr(torch, dtype), device) if in_4bit else {}
    path, revision = located(ref)
    with readable_errors(ref):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True,
            trust_remote_code=False, output_loading_info=True, **quantised)
    if info["missing_keys"] or getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"'{ref}' is not one whole model: " + (
            f"the weights of {min(info['missing_keys'])} are missing." if info["missing_keys"] else ALSO_ADAPTER),
            "Save the model again, or give base and adapter apart.", Exit.INTEGRITY)
    if in_4bit or getattr(model, "is_quantized", False):
        _keep_gradients(model)
    if in_4bit:
        return model.eval()
    with readable_errors(ref):
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
