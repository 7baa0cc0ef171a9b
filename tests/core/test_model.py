"""Models: what is refused, where they run, and how their products are made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from curate.core.errors import Exit, UserError
from curate.core.model import load, multiply_in_float32, pick_device, pick_dtype
from tests.core.changed import CONFIG, as_pickle, copied, edit
from tests.fakes import tiny_model


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("change", "reason"), [
    (without_a_tensor, "not one whole model: the weights of model.layers.0.mlp.up_proj.weight are missing"),
    (lambda f: shutil.copy(f / "config.json", f / CONFIG), "an adapter lies beside its weights"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]), "not be loaded"),
    (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    (as_pickle("model.safetensors", "pytorch_model.bin"), "no file named model.safetensors"),
    (edit("config.json", hidden_size=24), "not be loaded"), (edit("config.json", model_type="nope"), "not be loaded"),
    (lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "not be loaded")],
    ids=["tensor missing", "adapter beside", "truncated", "no weights", "pickle", "other shape", "unknown kind",
         "bad configuration", "bad tokenizer"])
def test_damaged_models_are_refused_in_a_sentence(model_folder: Path, tmp_path: Path, reason: str,
                                                  change: Callable[[Path], object]) -> None:
    folder = copied(model_folder, tmp_path / "damaged", change)
    with pytest.raises(UserError, match=reason) as caught:
        load(str(folder), "float32", "cpu")
    assert "\n" not in caught.value.message and caught.value.exit_code in (Exit.ENVIRONMENT, Exit.INTEGRITY)


def test_code_in_a_model_folder_is_never_run(model_folder: Path, tmp_path: Path) -> None:
    def trap(folder: Path) -> None:
        code = "class Trap: pass\nopen({!r}, 'w').write('ran')\n".format(str(tmp_path / "ran"))
        (folder / "trap.py").write_text(code)
        edit("config.json", auto_map={"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"})(folder)
        edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["trap.Trap", "trap.Trap"]})(folder)

    load(str(copied(model_folder, tmp_path / "trapped", trap)), "float32", "cpu")
    assert not (tmp_path / "ran").exists()


def test_devices_and_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device") as caught:
        load("anything", device="cuda")
    assert caught.value.exit_code == Exit.ENVIRONMENT and "--device cpu" in caught.value.hint
    assert (pick_device(), pick_device("cpu"), pick_dtype("float16", "cpu")) == ("cpu", "cpu", "float16")
    for amx, avx, dtype in ((True, True, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert pick_dtype("auto", "cpu") == dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == pick_device("cuda") == "cuda"


def test_bfloat16_products_are_rounded_once_at_the_end() -> None:
    layer = torch.nn.Linear(7, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[256.0] + [1.0] * 6, [1.0] * 7]))
        layer.bias.copy_(torch.tensor([0.0, -7.0]))
    model = torch.nn.Sequential(layer)
    multiply_in_float32(model)
    found = model(torch.ones(1, 7, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16 and layer.weight.dtype == torch.bfloat16
    assert found.tolist() == [[262.0, 0.0]], "256 + 1 is 256 in bfloat16, so sums along the way must be longer"


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_quantised_checkpoint_whose_library_is_missing_is_a_sentence(tmp_path: Path, method: str) -> None:
    folder = tiny_model(tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32, "zero_point": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="could not be loaded"):
        load(str(folder), "float32", "cpu")


def test_no_room_on_a_device_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, device: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("transformers.PreTrainedModel.to", full)
    with pytest.raises(UserError, match="could not be loaded: CUDA out of memory"):
        load(str(tiny_model(tmp_path / "large")), "float32", "cpu")
