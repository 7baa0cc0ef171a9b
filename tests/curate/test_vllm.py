"""The vllm engine, with a package of that name that tests can follow; the real one is in test_real_vllm.py."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import curate.core.vllm as engine
from curate.core.chat import Encoded, encode
from curate.core.errors import Exit, UserError
from curate.core.model import load
from curate.core.nll import AnswerNll
from curate.core.refs import load_tokenizer
from curate.scorers.choose import EngineSettings, Models, choose, open_scorer
from curate.scorers.transformers import TransformersScorer
from curate.scorers.vllm import MAX_BATCHED, MIN_BATCHED, VllmScorer, token_budget
from tests.curate.fake_vllm import EngineDeadError, FakeVllm
from tests.curate.stub_server import rule
from tests.fakes import tiny_adapter, tiny_model, tiny_rows

N_ROWS = 11


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("vllm") / "tiny")


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {f"m{k}": tiny_adapter(model, folder / f"m{k}", seed=k + 1) for k in range(2)}


@pytest.fixture(scope="module")
def encoded(model: Path) -> list[Encoded]:
    return encode(load_tokenizer(str(model)), tiny_rows(N_ROWS, "pool"), 400)


def by_rule(ids: Sequence[int], lora: int) -> list[float]:
    return [rule(ids, t, 3 + 5 * lora) for t in range(1, len(ids))]


def on_gpu(monkeypatch: pytest.MonkeyPatch, **how: Any) -> FakeVllm:
    monkeypatch.setattr(engine, "pick_device", lambda device: "cuda")
    return FakeVllm(on_cpu=False, numbers=by_rule, **how).install(monkeypatch)


def scored(scorer: Any, encoded: Sequence[Encoded], adapter: Path | None = None, notes: list[str] | None = None
           ) -> list[AnswerNll]:
    with scorer.member(adapter):
        found = dict(pair for part in scorer.score(encoded, (notes if notes is not None else []).append)
                     for pair in part)
    return [found[i] for i in range(len(encoded))]


def models(model: Path, adapters: dict[str, Path], device: str = "auto") -> Models:
    return Models(str(model), "tiny", adapters, "float32", device, 400)


def assert_ruled(found: Sequence[AnswerNll], encoded: Sequence[Encoded], lora: int) -> None:
    for item, nll in zip(encoded, found, strict=True):
        numbers = by_rule(item.ids, lora)[item.answer_start - 1:]
        assert (nll.status, nll.n_tokens) == ("ok", item.n_answer_tokens)
        assert nll.nll_sum == pytest.approx(-sum(numbers[:-1])) and nll.eot_nll == pytest.approx(-numbers[-1])


def test_on_cpu_members_are_merged_and_engines_run_one_after_another(
        model: Path, adapters: dict[str, Path], encoded: list[Encoded], monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fake = FakeVllm().install(monkeypatch)
    plain = TransformersScorer(load(str(model), "float32", "cpu"))
    with open_scorer(EngineSettings("vllm"), models(model, adapters, "cpu")) as scorer:
        for adapter in (None, *adapters.values()):
            for ours, theirs in zip(scored(scorer, encoded, adapter), scored(plain, encoded, adapter), strict=True):
                assert ours.nll_sum == pytest.approx(theirs.nll_sum, abs=1e-4) and ours.n_tokens == theirs.n_tokens
                assert ours.eot_nll == pytest.approx(theirs.eot_nll, abs=1e-4)
    assert len(fake.started) == 3 and fake.most_alive == 1 and fake.alive == 0 and set(fake.loras) == {None}
    assert list(tmp_path.iterdir()) == []
    settings = fake.started[0]
    assert settings["model"] == str(model) and fake.started[1]["model"] != str(model)
    assert settings["enable_prefix_caching"] is False and settings["speculative_config"] is None
    assert settings["max_model_len"] == 401 and settings["dtype"] == "float32" and not settings["trust_remote_code"]


def test_the_merged_model_goes_even_when_the_block_breaks_off(
        model: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fake = FakeVllm().install(monkeypatch)
    scorer = VllmScorer(models(model, adapters, "cpu"))
    with pytest.raises(KeyboardInterrupt), scorer.member(adapters["m0"]):
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt
    assert fake.alive == 0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fixed", ["works", "refused", "absent"])
def test_on_a_gpu_members_are_requests_to_one_engine(model: Path, adapters: dict[str, Path], encoded: list[Encoded],
                                                     monkeypatch: pytest.MonkeyPatch, fixed: str) -> None:
    fake = on_gpu(monkeypatch, fixed=fixed)
    scorer = VllmScorer(models(model, adapters))
    for lora, adapter in enumerate((None, *adapters.values())):
        assert_ruled(scored(scorer, encoded, adapter), encoded, lora)
    scorer.close()
    settings, = fake.started
    assert fake.alive == 0 and settings["enable_lora"] and settings["max_loras"] == 2
    assert settings["max_lora_rank"] == 8 and settings["max_num_batched_tokens"] == MAX_BATCHED
    assert settings["enable_prefix_caching"] is False and settings["speculative_config"] is None
    assert [lora and lora.path for lora in fake.loras[-3:]] == [None, *map(str, adapters.values())]
    last = fake.asked[-1]
    if fixed == "works":
        assert last.prompt_logprob_start == encoded[-1].answer_start - 1 and last.prompt_logprobs is None
    else:
        assert last.prompt_logprobs == 0 and last.flat_logprobs and last.max_tokens == 1 and not last.detokenize


def test_without_members_there_is_no_lora(model: Path, encoded: list[Encoded],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    fake = on_gpu(monkeypatch)
    scored(VllmScorer(models(model, {})), encoded)
    assert "enable_lora" not in fake.started[0]


@pytest.mark.parametrize(("fixed", "said"), [("ignored", "returned none"), ("wrong", "differ by 1 nats per token")])
def test_a_fixed_token_path_that_cannot_be_trusted_is_refused(
        model: Path, encoded: list[Encoded], monkeypatch: pytest.MonkeyPatch, fixed: str, said: str) -> None:
    on_gpu(monkeypatch, fixed=fixed)
    with pytest.raises(UserError, match=said) as err:
        scored(VllmScorer(models(model, {})), encoded)
    assert err.value.exit_code == Exit.INCOMPATIBLE


def spoil_flat(kind: str) -> Any:
    def change(output: Any) -> None:
        flat = output.prompt_logprobs
        if len(flat) % 2:
            return
        if kind == "another token":
            flat.token_ids[-2] += 1
        elif kind == "too few":
            flat.token_ids.pop()
            flat.logprobs.pop()
        elif kind == "nothing":
            output.prompt_logprobs = None
        else:
            flat.logprobs[-1] = float(kind)

    return change


@pytest.mark.parametrize("kind", ["another token", "too few", "nothing", "nan", "-inf", "-9999", "0.5"])
def test_what_is_no_log_probability_is_a_status(model: Path, encoded: list[Encoded], monkeypatch: pytest.MonkeyPatch,
                                                kind: str) -> None:
    fake = on_gpu(monkeypatch)
    fake.change = spoil_flat(kind)
    found = scored(VllmScorer(models(model, {})), encoded)
    even = [len(item.ids) % 2 == 0 for item in encoded]
    assert 0 < sum(even) < N_ROWS
    assert [nll.status for nll in found] == ["nonfinite" if e else "ok" for e in even]
    assert all(math.isnan(nll.nll_sum) for nll, e in zip(found, even) if e)


def test_the_nested_form_of_older_versions_is_read(model: Path, encoded: list[Encoded],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    fake = on_gpu(monkeypatch, flat=False)
    assert_ruled(scored(VllmScorer(models(model, {})), encoded), encoded, 0)
    fake.change = lambda output: output.prompt_logprobs.__setitem__(-1, {0: output.prompt_logprobs[-1].popitem()[1]})
    assert {nll.status for nll in scored(VllmScorer(models(model, {})), encoded)} == {"nonfinite"}


@pytest.mark.parametrize("dies_of", [EngineDeadError("dead"), RuntimeError("not enough memory: you tried"),
                                     MemoryError()])
def test_an_engine_without_memory_starts_again_with_half_the_batch(
        model: Path, encoded: list[Encoded], monkeypatch: pytest.MonkeyPatch, dies_of: BaseException) -> None:
    fake = on_gpu(monkeypatch, fits=600, dies_of=dies_of)
    monkeypatch.setattr("curate.scorers.vllm.token_budget", lambda *_: 1100)
    notes: list[str] = []
    assert_ruled(scored(VllmScorer(models(model, {})), encoded, notes=notes), encoded, 0)
    assert [s["max_num_batched_tokens"] for s in fake.started] == [1100, 550]
    assert fake.alive == 1 and len(notes) == 1 and "550 tokens" in notes[0]
    fake.fits = MIN_BATCHED - 1
    with pytest.raises(UserError, match=f"died with {MIN_BATCHED} tokens") as err:
        scored(VllmScorer(models(model, {})), encoded)
    assert err.value.exit_code == Exit.ENVIRONMENT


def test_other_errors_of_the_engine_are_not_hidden(model: Path, encoded: list[Encoded],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    fake = on_gpu(monkeypatch, fits=0, dies_of=RuntimeError("a kernel is missing"))
    with pytest.raises(RuntimeError, match="a kernel is missing"):
        scored(VllmScorer(models(model, {})), encoded)
    fake.start_error = ValueError("max_model_len (401) is greater than 300\nmore")
    with pytest.raises(UserError, match=r"could not start with .*: max_model_len \(401\) is greater than 300\.") as err:
        scored(VllmScorer(models(model, {})), encoded)
    assert err.value.exit_code == Exit.ENVIRONMENT


def test_logits_of_a_batch_fit_into_half_the_free_memory() -> None:
    assert token_budget(vocabulary=1000, free_bytes=2 * 12 * 1000 * 777) == 777
    assert token_budget(vocabulary=150_000, free_bytes=1) == MIN_BATCHED
    assert token_budget(vocabulary=307, free_bytes=2.0**40) == MAX_BATCHED


def test_rows_are_handed_over_in_slices(model: Path, encoded: list[Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch)
    monkeypatch.setattr("curate.scorers.vllm.token_budget", lambda *_: 7)
    scorer = VllmScorer(models(model, {}))
    with scorer.member(None):
        sizes = [len(part) for part in scorer.score(encoded)]
    assert sum(sizes) == N_ROWS and len(sizes) > 3


@pytest.mark.parametrize(("lora", "said", "gpu_only"), [
    ({"target_modules": ["q_proj", "lm_head"]}, "changes .*lm_head", False),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "changes .*embed_tokens", False),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "changes .*lm_head", False),
    ({"use_dora": True}, "has use_dora", False),
    ({"rank_pattern": {"q_proj": 5}}, "has rank_pattern", True),
])
def test_adapters_that_vllm_would_misread_are_refused_before_it_starts(
        model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any], said: str,
        gpu_only: bool) -> None:
    FakeVllm(on_cpu=not gpu_only).install(monkeypatch)
    folder = tiny_adapter(model, tmp_path / "odd", **lora)
    with pytest.raises(UserError, match=f"cannot take the adapter of 'odd': it {said}") as err:
        engine.check_adapters({"odd": folder}, on_gpu=True)
    assert err.value.exit_code == Exit.INCOMPATIBLE
    if gpu_only:
        engine.check_adapters({"odd": folder}, on_gpu=False)
    else:
        with pytest.raises(UserError, match=said):
            choose(EngineSettings("vllm"), "cpu", {"odd": folder})


@pytest.mark.parametrize(("device", "gpu_here", "cpu_build"), [("cpu", False, False), ("auto", True, True),
                                                               ("cuda:1", True, False)])
def test_a_build_for_another_device_is_named(model: Path, monkeypatch: pytest.MonkeyPatch, device: str,
                                             gpu_here: bool, cpu_build: bool) -> None:
    FakeVllm(on_cpu=cpu_build).install(monkeypatch)
    monkeypatch.setattr(engine, "pick_device", lambda device: "cuda" if gpu_here else "cpu")
    with pytest.raises(UserError, match="picks its device itself") as err:
        VllmScorer(models(model, {}, device))
    assert err.value.exit_code == Exit.ENVIRONMENT


def test_without_the_package_the_fix_is_named() -> None:
    pytest.importorskip("torch")
    import importlib.util

    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    with pytest.raises(UserError, match="vllm") as err:
        choose(EngineSettings("vllm"), "cpu", {})
    assert "safeset[vllm]" in err.value.hint and err.value.exit_code == Exit.ENVIRONMENT
