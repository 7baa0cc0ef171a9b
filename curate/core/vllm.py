"""vLLM in this process: how an engine starts, how adapters get into it, and answers sampled from one.

On CUDA there is one engine and adapters are LoRA requests to it. On CPU, where LoRA in vLLM is too slow to use, each
adapter is merged into a copy of the model in float32, and one engine runs after another.
"""

from __future__ import annotations

import gc
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from curate.core.adapters import ADAPTER_FILES, adapter_open, adapter_settings
from curate.core.errors import Exit, UserError, require
from curate.core.generate import SampleSettings, decoded, end_ids, row_seeds
from curate.core.model import load, pick_device
from curate.core.refs import weights_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTEAD = "use transformers (--engine transformers, --sample-with transformers)"
GPU_SHARE = 0.8
"""Of the device's memory, what vLLM may plan with; logits of prompts live in the rest."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
NUMBERED = re.compile(r"\.\d+\.")


def check_adapters(adapters: Mapping[str, Path], on_gpu: bool) -> None:
    """Refuse adapters that vLLM would leave out in part, or take for something else.

    Every tensor must belong to a numbered layer: embeddings and the head have no number, and vLLM ignores or misreads
    adapters of theirs. LoRA requests know neither DoRA, biases nor ranks and alphas that differ between modules.
    """
    for name, folder in adapters.items():
        settings = adapter_settings(folder)
        with safe_open(folder / ADAPTER_FILES[1], framework="numpy") as file:
            outside = [key for key in sorted(file.keys()) if not NUMBERED.search(key)]
        unknown = [key for key in ("modules_to_save", "trainable_token_indices", "target_parameters", "use_dora",
                                   "lora_bias", "rank_pattern", "alpha_pattern") if settings.get(key)]
        plain = ("rank_pattern", "alpha_pattern") if not on_gpu else ()
        what = f"changes {outside[0]}, outside the layers" if outside else \
            next((f"has {key}" for key in unknown if key not in plain), None)
        if what:
            raise UserError(f"vLLM cannot take the adapter of '{name}': it {what}.",
                            f"Here, {INSTEAD}.", Exit.INCOMPATIBLE)


class Engine:
    """One engine at a time, of a model with one of ``adapters`` or none."""

    def __init__(self, ref: str, dtype: str, device: str, adapters: Sequence[Path]) -> None:
        """Set vLLM's environment; ``UserError`` where it is missing or built for another device."""
        require("vllm", "vllm")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        self.ref, self.dtype = ref, dtype
        self.on_gpu = pick_device(device).startswith("cuda")
        if not self.on_gpu:
            # One process less to start, and the engine's end gives its memory back to this one.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        _check_platform(device, self.on_gpu)
        self.weights = weights_at(ref)
        self.llm: Any = None
        self.lora: Any = None
        """What goes with a request, so that it is answered with the adapter that is open."""
        self._ids = {folder: number for number, folder in enumerate(adapters, 1)}

    @contextmanager
    def member(self, adapter: Path | None, start: Callable[[], None]) -> Iterator[None]:
        """Open an adapter (None: none) for a while; ``start`` is called when an engine has to start for it."""
        if self.on_gpu:
            if self.llm is None:
                start()
            self.lora = _lora_request(adapter, self._ids[adapter]) if adapter else None
            try:
                yield
            finally:
                self.lora = None
            return
        with merged(self.ref, adapter) if adapter else _as_it_is(self.weights) as weights:
            self.weights = weights
            try:
                start()
                yield
            finally:
                self.close()
                self.weights = weights_at(self.ref)

    def start(self, **settings: Any) -> None:
        """Start vLLM with these settings besides those that every use needs."""
        from vllm import LLM

        path, revision = self.weights
        more: dict[str, Any] = {"enforce_eager": True}
        if self.on_gpu:
            more = {"gpu_memory_utilization": GPU_SHARE}
            if self._ids:
                highest = max(int(adapter_settings(folder)["r"]) for folder in self._ids)
                more |= {"enable_lora": True, "max_loras": len(self._ids),
                         "max_lora_rank": next((r for r in RANKS if r >= highest), highest)}
        try:
            self.llm = LLM(model=path, revision=revision, dtype=self.dtype, enable_chunked_prefill=True,
                           speculative_config=None, skip_tokenizer_init=True, trust_remote_code=False,
                           load_format="safetensors", **settings, **more)
        except (RuntimeError, OSError, MemoryError, *refusals()) as err:
            raise UserError(f"vLLM could not start with '{self.ref}': {first_line(err)}.",
                            f"Lower --max-tokens if the model's context is shorter, free memory, or {INSTEAD}.",
                            Exit.ENVIRONMENT) from err

    def close(self) -> None:
        """Stop the engine, if one is running, and give its memory back."""
        llm, self.llm = self.llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()

    def vocabulary(self) -> int:
        """Return how many logits a token has."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.weights[0], revision=self.weights[1], trust_remote_code=False)
        return int(config.get_text_config().vocab_size)


class VllmSampler:
    """Samples answers as ``curate.core.generate.sample`` does, each from a stream of random numbers of its own.

    A stream is seeded alike, but vLLM draws from it in its own way, so answers are others than those of transformers.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, settings: SampleSettings) -> None:
        """Take an engine that is or will be started (``start``)."""
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.stops: list[int] = []

    def start(self, longest_prompt: int) -> None:
        """Start the engine, with room for prompts of so many tokens."""
        self.engine.start(max_model_len=longest_prompt + self.settings.max_new_tokens, generation_config="vllm",
                          max_num_seqs=self.settings.batch_size, enable_prefix_caching=True)

    def sample(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Return an answer to each of ``prompts`` (token ids), without its end of turn."""
        from vllm import SamplingParams

        self.stops = self.stops or end_ids(self.tokenizer, _own_ends(*weights_at(self.engine.ref)))
        how = [SamplingParams(max_tokens=self.settings.max_new_tokens, temperature=self.settings.temperature,
                              top_p=self.settings.top_p, seed=seed, stop_token_ids=self.stops, detokenize=False)
               for seed in row_seeds(prompts, self.settings.seed)]
        outputs = self.engine.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], how, use_tqdm=False,
                                           lora_request=self.engine.lora)
        if len(outputs) != len(prompts):
            raise UserError(f"vLLM answered {len(outputs)} of {len(prompts)} prompts.", "Type it again.",
                            Exit.ENVIRONMENT)
        return [decoded(self.tokenizer, out.outputs[0].token_ids, self.stops) for out in outputs]


def _own_ends(path: str, revision: str | None) -> list[int]:
    """Return the end tokens that a model's folder names, as transformers reads them."""
    from transformers import AutoConfig, GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(path, revision=revision).eos_token_id
    except OSError:
        own = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False).eos_token_id
    return [t for t in (own if isinstance(own, list) else [own]) if t is not None]


def _check_platform(device: str, on_gpu: bool) -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cpu() == on_gpu or ":" in device:
        built = "CPU" if current_platform.is_cpu() else "GPU"
        raise UserError(f"The vLLM installed here is built for {built} and picks its device itself, which does not "
                        f"go with --device {device}.",
                        f"Leave --device out and choose a GPU with CUDA_VISIBLE_DEVICES, or {INSTEAD}.",
                        Exit.ENVIRONMENT)


def _lora_request(adapter: Path, number: int) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"member-{number}", number, str(adapter))


@contextmanager
def merged(ref: str, adapter: Path) -> Iterator[tuple[str, None]]:
    """Write a model with an adapter added to its weights, in float32, to a folder that goes when the block ends."""
    loaded = load(ref, "float32", "cpu")
    with tempfile.TemporaryDirectory(prefix="safeset-merged-") as folder:
        with adapter_open(loaded, adapter) as model:
            if model is not loaded.model:
                raise UserError(f"The adapter in {adapter} cannot be added to the weights of '{ref}'.",
                                f"Here, {INSTEAD}.", Exit.INCOMPATIBLE)
            try:
                loaded.model.save_pretrained(folder)
                loaded.tokenizer.save_pretrained(folder)
            except (OSError, SafetensorError) as err:
                raise UserError(f"The merged model could not be written to {folder}: {first_line(err)}.",
                                "Free some space there, or choose another folder with TMPDIR.",
                                Exit.ENVIRONMENT) from err
        del loaded, model
        gc.collect()
        yield folder, None


@contextmanager
def _as_it_is(weights: tuple[str, str | None]) -> Iterator[tuple[str, str | None]]:
    yield weights


def engine_dead() -> type[BaseException]:
    """Return what vLLM raises when an engine's process has ended."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return EngineDeadError


def refusals() -> tuple[type[BaseException], ...]:
    """Return what vLLM raises for a request or a setting that it does not take."""
    try:
        from vllm.exceptions import VLLMValidationError
    except ImportError:
        return (ValueError,)
    return ValueError, VLLMValidationError


def first_line(err: BaseException) -> str:
    """Return an error's first line, or its name."""
    return next(iter(str(err).strip().splitlines()), type(err).__name__).rstrip(".")
