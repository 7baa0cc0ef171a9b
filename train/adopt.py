"""Adapters that were trained elsewhere: checked against their base, and given the run card that members need.

    out/adapter/    a copy of the adapter's two files
    out/run.json    the run card, written last; its recipe is where the adapter came from, and nothing else is known
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.core.adapters import ADAPTER_FILES, adapter_settings
from curate.core.chat import first_difference
from curate.core.documents import Method, RunCard
from curate.core.errors import Exit, UserError
from curate.core.files import write_atomic
from curate.core.identity import WEIGHT_FILES, identify, located, read_run, with_adapter
from curate.core.provenance import git_state, versions
from curate.core.refs import load_tokenizer, readable_errors, ref_in, short_name
from curate.core.terminal import quiet_libraries, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD, ADAPTER = "run.json", "adapter"
EXTRACT = ("Members are LoRA adapters on the aligned base. Extract one from a merged model, for example with "
           "`mergekit-extract-lora`, and adopt that.")
Shapes = dict[str, tuple[int, ...]]


def adopt(folder: Path, base: str, name: str, out: Path) -> RunCard:
    """Copy the adapter in ``folder`` to ``out`` with a run card that says it was not trained here; return the card.

    Raises ``UserError`` for what is no plain LoRA adapter in safetensors, one that does not fit ``base`` weight by
    weight, and an ``out`` that holds another run. Adopted again, it says what is there.
    """
    settings = _settings(folder)
    identity, tokenizer = identify(base)
    check_fits(folder, base)
    _tell_differences(folder, base, settings, tokenizer)
    model = with_adapter(identity, f"{identity.name}+{name}", folder)
    if (out / CARD).exists():
        there, _ = read_run(out)
        if (there.name, there.base.id, there.model.id) != (name, identity.id, model.id):
            raise UserError(f"{out} holds another run, '{there.name}'.", "Choose another --out.")
        return there
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - {ADAPTER}):
        raise UserError(f"{out} is not empty.", "Choose a new folder for --out.")
    for file in ADAPTER_FILES:
        write_atomic(out / ADAPTER / file, (folder / file).read_bytes())
    card = RunCard(
        name=name, base_ref=ref_in(base, out), base=identity, model=model, adapter=ADAPTER,
        recipe={"adopted": model.adapter, "from": str(folder)}, mix="",
        method=Method(strategy="none", n=0, eps=0.0, seed=0, min_answer_tokens=1), n_finetune=0, n_safe=0, statuses={},
        n_steps=0, n_trained_tokens=0, loss_first_nats=None, loss_last_nats=None, seconds=0.0, device="elsewhere",
        versions=versions(), git=git_state())
    card.write(out / CARD)
    return card


def _settings(folder: Path) -> dict[str, Any]:
    """Return an adapter's configuration; ``UserError`` says what else a folder holds, and what to do with it."""
    if folder.is_dir() and not (folder / ADAPTER_FILES[0]).is_file():
        deeper = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_FILES[0]}"))
        if deeper:
            raise UserError(f"{folder} holds no adapter itself, but {', '.join(deeper)} below it do.",
                            f"Adopt one of them, for example {folder / deeper[-1]}.", Exit.BAD_DATA)
        if any(True for pattern in WEIGHT_FILES for _ in folder.glob(pattern)):
            raise UserError(f"{folder} is a whole model and no adapter.", EXTRACT, Exit.INCOMPATIBLE)
    if (folder / "adapter_model.bin").is_file() and not (folder / ADAPTER_FILES[1]).is_file():
        raise UserError(f"The adapter in {folder} is a pickle, which can run code when it is read.",
                        "Save it again with safe_serialization=True.", Exit.BAD_DATA)
    return adapter_settings(folder)


def check_fits(folder: Path, base: str) -> None:
    """Refuse an adapter whose weights are not those that its configuration asks for on this base; no weight is read."""
    from safetensors import safe_open

    wanted = _wanted(folder, base)
    with readable_errors(str(folder)), safe_open(folder / ADAPTER_FILES[1], framework="pt") as file:
        keys = list(file.keys())
        there: Shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    key = next((key for key in sorted({*wanted, *there}) if wanted.get(key) != there.get(key)), None)
    if key is None:
        return
    if key not in wanted:
        what = f"it has {key}, which the base has no place for"
    elif key not in there:
        what = f"it has no {key}"
    else:
        what = f"its {key} is {_by(there[key])}, where the base takes {_by(wanted[key])}"
    raise UserError(f"The adapter in {folder} does not fit '{base}': {what}.",
                    "Give the very base that it was trained on with --base.", Exit.INCOMPATIBLE)


def _wanted(folder: Path, base: str) -> Shapes:
    """Return the shapes of the adapter's weights on a base that has shapes only."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_libraries()
    path, revision = located(base)
    with readable_errors(base), torch.device("meta"):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    lora = LoraConfig.from_pretrained(str(folder))
    lora.init_lora_weights, lora.inference_mode = True, True
    try:
        wrapped = get_peft_model(model, lora)
    except ValueError as err:
        raise UserError(f"The adapter in {folder} does not fit '{base}': {str(err).strip().splitlines()[0]}",
                        "Give the very base that it was trained on with --base.", Exit.INCOMPATIBLE) from err
    state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {key: tuple(weight.shape) for key, weight in state.items()}


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _tell_differences(folder: Path, base: str, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Say where the adapter's folder names another base or holds another tokenizer than the ones it will be used with.

    Shapes cannot tell two models of one architecture apart, so this is all there is to tell them by.
    """
    named = settings.get("base_model_name_or_path")
    if named and short_name(str(named)) != short_name(base):
        say(f"The adapter says that it was trained on '{named}'; it is taken as one of '{base}'.")
    if (folder / "tokenizer_config.json").is_file():
        try:
            difference = first_difference(load_tokenizer(str(folder)), tokenizer)
        except UserError as err:
            difference = err.message
        if difference:
            say(f"The tokenizer beside the adapter is not that of '{base}', which will be used: {difference}.")
