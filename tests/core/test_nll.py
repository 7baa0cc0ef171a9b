"""Answer NLLs: known values, equal to the model's plain forward pass, and independent of how they are batched."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as library
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from curate.core import nll
from curate.core.adapters import adapter_open
from curate.core.attend import apart
from curate.core.chat import Encoded, encode
from curate.core.decoder import body, turn, window
from curate.core.errors import Exit, UserError
from curate.core.example import pair
from curate.core.model import Loaded, load
from curate.core.nll import AnswerNll, Budget, answer_nll, check_forward, rows_nll, token_nll
from curate.core.pack import pack, plan
from tests.fakes import VOCABULARY, uniform_model
from train.batches import collate
from train.objective import Objective

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def encoded(loaded: Loaded) -> list[Encoded]:
    """23 examples with 7 prompts and answers of 1 to 40 letters."""
    rng = random.Random(7)
    prompts = ["Why? " * k for k in range(1, 8)]
    answers = ["".join(rng.choices("abc der<|im_end|>é", k=rng.randint(1, 40))) for _ in range(23)]
    return encode(loaded.tokenizer, [pair(prompts[k % 7], a) for k, a in enumerate(answers)], 512)


def scores(model: torch.nn.Module, encoded: list[Encoded], *args: object) -> list[AnswerNll]:
    """Return the evidence in the order of ``encoded``; every index must come exactly once."""
    found = [item for part in answer_nll(model, encoded, *args) for item in part]
    assert sorted(index for index, _ in found) == list(range(len(encoded)))
    return [dict(found)[index] for index in range(len(encoded))]


def plain(model: PreTrainedModel, item: Encoded) -> torch.Tensor:
    """Return the NLL of every id from the answer on, nats [T], by the model's own forward pass."""
    ids = torch.tensor([item.ids])
    with torch.no_grad():
        logits = model(ids).logits[0, item.answer_start - 1:-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, item.answer_start:], reduction="none")


def assert_same(found: list[AnswerNll], expected: list[AnswerNll]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.n_tokens, one.status) == (other.n_tokens, other.status)
        assert one.mean == pytest.approx(other.mean, abs=1e-5) and one.eot_nll == pytest.approx(other.eot_nll, abs=1e-5)


def test_a_uniform_model_costs_ln_v_per_token(tmp_path: Path, encoded: list[Encoded]) -> None:
    uniform = load(str(uniform_model(tmp_path / "uniform")), "float32", "cpu")
    for item, found in zip(encoded, scores(uniform.model, encoded), strict=True):
        assert found.nll_sum == pytest.approx(item.n_answer_tokens * math.log(VOCABULARY), rel=1e-6)
        assert found.eot_nll == pytest.approx(math.log(VOCABULARY), rel=1e-6)
        assert (found.n_tokens, found.status) == (item.n_answer_tokens, "ok")


@pytest.mark.parametrize("budget", [Budget(), Budget(64, 128), Budget(1, 1), Budget(10_000, 20_000)], ids=str)
@pytest.mark.parametrize("along_paths", [True, False])
def test_packed_equals_each_example_alone(loaded: Loaded, encoded: list[Encoded], budget: Budget, along_paths: bool,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    masks, real = [], nll.pack
    window(loaded.model)      # found out once for a model, by passes of its own
    assert apart(body(loaded.model))
    if not along_paths:
        monkeypatch.setattr(nll, "apart", lambda decoder: False)
    monkeypatch.setattr(nll, "pack", lambda *a, **b: masks.append(real(*a, **b)) or masks[-1])
    for item, found in zip(encoded, scores(loaded.model, encoded, budget), strict=True):
        alone = plain(loaded.model, item)
        assert len(alone) == item.n_answer_tokens + 1 == found.n_tokens + 1
        assert found.mean == pytest.approx(alone[:-1].mean().item(), abs=1e-5)
        assert found.eot_nll == pytest.approx(alone[-1].item(), abs=1e-5)
    together = budget.tokens > 1
    assert any(batch.paths is not None for batch in masks) == (together and along_paths)
    assert any(batch.attention_mask is not None for batch in masks) == (together and not along_paths)


def test_packed_equals_alone_with_an_adapter(loaded: Loaded, encoded: list[Encoded], adapter_folder: Path) -> None:
    with adapter_open(loaded, adapter_folder) as model:
        found, alone = scores(model, encoded), [plain(model, item)[:-1].mean().item() for item in encoded]
    assert [f.mean for f in found] == pytest.approx(alone, abs=1e-5)
    assert [f.mean for f in found] != pytest.approx([s.mean for s in scores(loaded.model, encoded)], abs=0.1)


def test_without_an_end_of_turn_there_is_no_number_for_it(loaded: Loaded, encoded: list[Encoded]) -> None:
    bare = [Encoded(item.ids[:item.answer_end], item.answer_start, item.answer_end) for item in encoded]
    for found, whole in zip(scores(loaded.model, bare), scores(loaded.model, encoded), strict=True):
        assert found.eot_nll is None and found.mean == pytest.approx(whole.mean, abs=1e-5)
    assert scores(loaded.model, []) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_none_is_a_status_and_spoils_no_neighbour(model_folder: Path, encoded: list[Encoded],
                                                                   bad: float) -> None:
    own = load(str(model_folder), "float32", "cpu")
    before = scores(own.model, encoded)
    token = own.tokenizer.convert_tokens_to_ids("b")
    hit = [token in item.ids[:-1] for item in encoded]
    with torch.no_grad():
        own.model.model.embed_tokens.weight[token] = bad
    after = scores(own.model, encoded)
    assert [e.status == "nonfinite" for e in after] == hit and 0 < sum(hit) < len(hit)
    assert_same([e for e, h in zip(after, hit) if not h], [e for e, h in zip(before, hit) if not h])


def test_an_impossible_end_of_turn_is_no_number_either() -> None:
    assert nll._evidence(3.0, 2, 1.0).status == nll._evidence(3.0, 2, None).status == "ok"
    for nll_sum, eot in ((math.nan, 1.0), (-math.inf, None), (3.0, math.inf), (3.0, math.nan)):
        assert nll._evidence(nll_sum, 2, eot).status == "nonfinite"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr)
def test_out_of_memory_halves_the_batch_and_says_so(loaded: Loaded, encoded: list[Encoded],
                                                    monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real, expected, said, most = token_nll, scores(loaded.model, encoded), [], 3

    def limited(model: torch.nn.Module, batch: object) -> torch.Tensor:
        if len(set(batch.owner.tolist())) > most:
            raise error
        return real(model, batch)

    monkeypatch.setattr(nll, "token_nll", limited)
    assert_same(scores(loaded.model, encoded, Budget(512, 2048), said.append), expected)
    assert said and all("half a batch" in text for text in said) and "23 examples" in said[0]
    most = 0
    with pytest.raises(UserError, match="Out of memory on a single example") as caught:
        scores(loaded.model, encoded)
    assert caught.value.exit_code == Exit.ENVIRONMENT


def test_other_errors_are_not_taken_for_memory(loaded: Loaded, encoded: list[Encoded],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: torch.nn.Module, batch: object) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(nll, "token_nll", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        scores(loaded.model, encoded)


def test_a_pass_stays_within_its_budget(encoded: list[Encoded]) -> None:
    for budget in (Budget(64, 128), Budget(1, 1), Budget(61, 307)):
        bins = plan(encoded, budget.capacity)
        passes = nll._passes(bins, encoded, budget, sys.maxsize)
        assert [one for bunch in passes for one in bunch] == sorted(bins, key=lambda one: len(one) > 1)
        for bunch in passes:
            assert len({len(one) > 1 for one in bunch}) == 1
            assert pack(encoded, bunch).input_ids.numel() <= budget.tokens or len(bunch) == 1


def test_gradients_equal_those_of_the_plain_pass(model_folder: Path, encoded: list[Encoded],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nll, "HEAD_ROWS", 7)
    model = load(str(model_folder), "float32", "cpu").model
    few = encoded[:3]
    token_nll(model, pack(few, plan(few, 999))).sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for item in few:
        logits = model(torch.tensor([item.ids])).logits[0, item.answer_start - 1:-1]
        targets = torch.tensor(item.ids[item.answer_start:])
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0
        torch.testing.assert_close(packed[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_rows_are_scored_in_pieces_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nll, "HEAD_ROWS", 2)
    logits = torch.tensor([[0.0, 0.0, math.log(2)], [0.0, 0.0, 0.0], [math.log(7), 0.0, 0.0]])
    found = rows_nll(lambda h: h.to(torch.bfloat16).double(), logits, torch.tensor([2, 1, 1]))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([math.log(4 / 2), math.log(3), math.log(9)], abs=0.01)


@pytest.mark.parametrize("tile", [(2, 7), (3, VOCABULARY), (100, 1), (100, 10_000)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_head_is_taken_in_tiles(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int], bias: bool) -> None:
    monkeypatch.setattr(nll, "TILE", tile)
    dice = torch.Generator().manual_seed(0)
    layer, hidden = torch.nn.Linear(16, VOCABULARY, bias=bias), torch.randn(7, 16, generator=dice)
    targets = torch.tensor([0, 6, 7, 8, VOCABULARY - 1, 3, 3])
    with torch.inference_mode():
        found = rows_nll(layer, 50 * hidden, targets)
        exact = torch.nn.functional.cross_entropy(layer.double()(50 * hidden.double()), targets, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert rows_nll(layer.float(), hidden[:0], targets[:0]).shape == (0,)


def test_a_tile_of_impossible_words_is_no_harm_but_an_impossible_target_is_no_number(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nll, "TILE", (2, 2))
    layer = torch.nn.Linear(1, 6)
    with torch.inference_mode():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([-math.inf, -math.inf, 0, 0, 0, -math.inf]))
        found = rows_nll(layer, torch.ones(3, 1), torch.tensor([2, 4, 1])).tolist()
    assert found == [pytest.approx(math.log(3)), pytest.approx(math.log(3)), math.inf]


def test_training_keeps_no_logits_for_the_backward_pass() -> None:
    head, kept = torch.nn.Linear(16, VOCABULARY, bias=False), []
    hidden = torch.randn(7, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        loss = rows_nll(head, hidden, torch.arange(7)).sum()
    assert (7, VOCABULARY) not in kept
    loss.backward()
    assert hidden.grad.abs().sum() > 0 and head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_computes_each_logit_once_and_has_the_plain_gradient(monkeypatch: pytest.MonkeyPatch,
                                                                           dtype: torch.dtype) -> None:
    monkeypatch.setattr(nll, "HEAD_ROWS", 3)
    dice, sizes, kept = torch.Generator().manual_seed(0), [], []
    hidden, weights = torch.randn(7, 16, generator=dice), torch.randn(7, generator=dice)
    targets = torch.randint(VOCABULARY, (7,), generator=dice)
    head = torch.nn.Linear(16, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
    head.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    exact = hidden.double().requires_grad_()
    plain = torch.nn.functional.cross_entropy(exact @ head.weight.double().T, targets, reduction="none")
    (plain * weights).sum().backward()
    ours = hidden.to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        found = rows_nll(head, ours, targets)
    (found * weights).sum().backward()
    assert sizes == [3, 3, 1] and set(kept) >= {(7, 16)}
    assert not any(size[:1] == (7,) and VOCABULARY in size for size in kept)
    close = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(found.double(), plain.detach(), **close)
    torch.testing.assert_close(ours.grad.double(), exact.grad, **close)


def test_check_forward_accepts_what_is_the_same(loaded: Loaded, encoded: list[Encoded]) -> None:
    assert 0 <= check_forward(loaded.model, encoded[:3], 1e-4) < 1e-5


def test_a_window_is_kept_to(encoded: list[Encoded]) -> None:
    wide, narrow = (MistralForCausalLM(MistralConfig(**SIZES, sliding_window=size)).eval() for size in (None, 31))
    narrow.load_state_dict(wide.state_dict())
    assert min(len(item.ids) for item in encoded) < 31 < max(len(item.ids) for item in encoded)
    assert (window(wide), window(narrow)) == (sys.maxsize, 31)
    found = [row.mean for row in scores(narrow, encoded, Budget(128, 256))]
    alone = [plain(narrow, item)[:item.n_answer_tokens].mean().item() for item in encoded]
    assert found == pytest.approx(alone, abs=1e-5)
    longest = max(range(len(encoded)), key=lambda k: len(encoded[k].ids))
    assert found[longest] != pytest.approx(scores(wide, encoded)[longest].mean, abs=1e-3)


ROUTED = {"num_local_experts": 2, "num_experts_per_tok": 1}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, eager": lambda: library.LlamaForCausalLM._from_config(library.LlamaConfig(**SIZES),
                                                                  attn_implementation="eager"),
    "gemma 2, capped": lambda: library.Gemma2ForCausalLM(library.Gemma2Config(**SIZES, head_dim=8, sliding_window=31)),
    "gemma 3": lambda: library.Gemma3ForCausalLM(library.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=31)),
    "gpt-oss": lambda: library.GptOssForCausalLM(library.GptOssConfig(**SIZES, **ROUTED, head_dim=8,
                                                                      sliding_window=31)),
    "granite": lambda: library.GraniteForCausalLM(library.GraniteConfig(**SIZES, logits_scaling=3.0)),
    "cohere 2": lambda: library.Cohere2ForCausalLM(library.Cohere2Config(**SIZES, sliding_window=31)),
    "llama 4": lambda: library.Llama4ForCausalLM(library.Llama4TextConfig(
        **SIZES, head_dim=8, num_local_experts=2, intermediate_size_mlp=24, attention_chunk_size=31)),
    "qwen 2": lambda: library.Qwen2ForCausalLM(library.Qwen2Config(**SIZES)),
    "qwen 3": lambda: library.Qwen3ForCausalLM(library.Qwen3Config(**SIZES, head_dim=8)),
    "mixtral": lambda: library.MixtralForCausalLM(library.MixtralConfig(**SIZES, **ROUTED)),
    "phi 3": lambda: library.Phi3ForCausalLM(library.Phi3Config(**SIZES, pad_token_id=0)),
    "olmo 2": lambda: library.Olmo2ForCausalLM(library.Olmo2Config(**SIZES)),
    "smollm 3": lambda: library.SmolLM3ForCausalLM(library.SmolLM3Config(**SIZES, pad_token_id=0)),
    "gpt-neox": lambda: library.GPTNeoXForCausalLM(library.GPTNeoXConfig(**SIZES)),
    "falcon": lambda: library.FalconForCausalLM(library.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)),
    "mamba 2": lambda: library.Mamba2ForCausalLM(library.Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=8,
        n_groups=1)),
    "lfm 2": lambda: library.Lfm2ForCausalLM(library.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])),
    "falcon h1": lambda: library.FalconH1ForCausalLM(library.FalconH1Config(
        **SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)),
    "minimax": lambda: library.MiniMaxForCausalLM(library.MiniMaxConfig(
        **SIZES, **ROUTED, head_dim=8, layer_types=["linear_attention", "full_attention"])),
    "bloom": lambda: library.BloomForCausalLM(library.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2,
                                                                  n_head=2, initializer_range=0.3)),
}
ALONE = {"mamba 2", "lfm 2", "falcon h1", "minimax", "bloom"}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_get_the_numbers_of_their_own_passes(encoded: list[Encoded], family: str) -> None:
    """Scaled and capped logits, masks that are added, windows and chunks; states that no mask keeps apart."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = FAMILIES[family]().eval()
    assert (window(model) == 0) == (family in ALONE)
    long = sorted(encoded, key=lambda item: -item.n_answer_tokens)[:2]
    assert check_forward(model, encoded, 1e-3) < 1e-5 and check_forward(model, long, 1e-3) < 1e-5
    expected = [plain(model, item) for item in encoded]
    for budget in (Budget(128, 256), Budget(512, 2048)):
        found = [row.mean for row in scores(model, encoded, budget)]
        assert found == pytest.approx([nll[:item.n_answer_tokens].mean().item()
                                       for nll, item in zip(expected, encoded, strict=True)], abs=1e-5)
    batch = collate(encoded, 256, window(model))["packed"]
    assert Objective(model)(batch)[0].item() == pytest.approx(sum(nll.sum().item() for nll in expected), rel=1e-5)


def longrope() -> PreTrainedModel:
    """A Phi-3 whose positions turn another way in any pass that is longer than 31 tokens."""
    scaling = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    return library.Phi3ForCausalLM(library.Phi3Config(**SIZES, pad_token_id=0, max_position_embeddings=512,
                                                      original_max_position_embeddings=31, rope_scaling=scaling)).eval()


def test_lengths_on_both_sides_of_a_turn_do_not_share_a_pass() -> None:
    rng, model = random.Random(0), longrope()
    rows = [Encoded(tuple(rng.randrange(5, VOCABULARY) for _ in range(n)), 4, n - 1) for n in (20, 70, 20, 70, 12, 66)]
    assert turn(model) == window(model) == 31
    alone = [plain(model, item)[:item.n_answer_tokens].mean().item() for item in rows]
    for budget in (Budget(128, 256), Budget(128, 1024)):
        assert [row.mean for row in scores(model, rows, budget)] == pytest.approx(alone, abs=1e-5)


def test_numbers_that_depend_on_the_rows_before_are_refused() -> None:
    """RoPE of the type dynamic remembers the longest row beyond its context, also by itself."""
    rng = random.Random(0)
    short, long, longer = (Encoded(tuple(rng.randrange(5, VOCABULARY) for _ in range(n)), 4, n - 1)
                           for n in (40, 100, 220))
    model = library.LlamaForCausalLM(library.LlamaConfig(**{**SIZES, "max_position_embeddings": 64}, rope_scaling={
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})).eval()
    first = plain(model, long)
    plain(model, longer)
    assert not torch.allclose(plain(model, long), first, atol=1e-3), "the library does so"
    assert scores(model, [short])[0].mean == pytest.approx(plain(model, short)[:-1].mean().item(), abs=1e-5)
    with pytest.raises(UserError, match=r"A row has 100 tokens\..* beyond 64 tokens depend") as caught:
        scores(model, [short, long])
    assert caught.value.hint == "Leave them out with --max-tokens 64." and caught.value.exit_code == Exit.INCOMPATIBLE


class Doubled(library.LlamaForCausalLM):
    """Changes its logits in a way of its own."""

    def forward(self, *args: object, **kwargs: object) -> object:
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


def test_check_forward_refuses_what_is_not(encoded: list[Encoded]) -> None:
    model = Doubled(library.LlamaConfig(**SIZES))
    with pytest.raises(UserError, match="Packed scoring differs") as caught:
        check_forward(model.eval(), encoded[:3], 0.05)
    assert caught.value.exit_code == Exit.INCOMPATIBLE


def test_check_forward_always_looks_at_two_examples_together(encoded: list[Encoded],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest come first to a scorer, and one of them has answer tokens enough."""
    long = [replace(item, ids=item.ids[:item.answer_start] + (9,) * 80, answer_end=item.answer_start + 80)
            for item in encoded[:3]]
    model = library.LlamaForCausalLM(library.LlamaConfig(**SIZES)).eval()
    seen: list[list[list[int]]] = []
    monkeypatch.setattr(nll, "pack", lambda rows, bins, **how: seen.append(bins) or pack(rows, bins, **how))
    check_forward(model, long, 1e-3)
    assert [sorted(map(len, bins)) for bins in seen][-1] == [2]


def test_a_pass_that_cannot_be_made_is_a_sentence(encoded: list[Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    model = library.LlamaForCausalLM(library.LlamaConfig(**SIZES)).eval()
    monkeypatch.setattr(model, "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(UserError, match="cannot be used: ZeroDivisionError") as caught:
        check_forward(model, encoded[:3], 0.05)
    assert caught.value.exit_code == Exit.INCOMPATIBLE


def test_check_forward_refuses_nan(model_folder: Path, encoded: list[Encoded]) -> None:
    own = load(str(model_folder), "float32", "cpu")
    torch.nn.init.constant_(own.model.lm_head.weight, math.nan)
    with pytest.raises(UserError, match="nan nats"):
        check_forward(own.model, encoded[:3], 1.0)


def test_check_forward_weighs_what_a_short_answer_may_differ(loaded: Loaded, encoded: list[Encoded],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 one answer of two tokens may be 0.2 nats apart; that alone is no reason to refuse a model."""
    short, *others = sorted(encoded, key=lambda item: len(item.ids))
    short = replace(short, ids=short.ids[:short.answer_start + 2], answer_end=short.answer_start + 2)
    exact, moved = nll.answer_nll, [short]

    def noisy(model: torch.nn.Module, rows: list[Encoded], *words: object) -> Iterator[list[tuple[int, AnswerNll]]]:
        for part in exact(model, rows, *words):
            yield [(i, replace(found, nll_sum=found.nll_sum + 0.3 * found.n_tokens * (rows[i] in moved)))
                   for i, found in part]

    monkeypatch.setattr(nll, "answer_nll", noisy)
    assert 0 < check_forward(loaded.model, [short, *others], 0.15) < 0.1
    moved += others
    for rows in ([short], [short, *others]):
        with pytest.raises(UserError, match=r"by 0[.]3 nats"):
            check_forward(loaded.model, rows, 0.15)
