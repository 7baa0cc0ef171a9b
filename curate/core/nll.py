"""Negative log-likelihoods of answer tokens: the one forward pass behind scoring, training and judging.

Only the hidden states that predict a target go through the head, a few hundred rows at a time, so that logits over
the whole vocabulary never exist for a whole batch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.checkpoint import checkpoint

from curate.core.attend import along, apart
from curate.core.chat import Encoded
from curate.core.errors import Exit, UserError
from curate.core.pack import Packed, pack, plan

HEAD_ROWS = 128
"""Rows of hidden states through the head at once: ``HEAD_ROWS * vocabulary * 4`` bytes of logits at a time."""
TILE = (2048, 4096)
"""Rows of hidden states and words of the vocabulary at once, where the head is a matrix and nothing learns. Many rows,
because reading the matrix anew for every few costs more than multiplying by it (docs/benchmarks.md)."""


@dataclass(frozen=True)
class AnswerNll:
    """The evidence about one example: sums in nats, not rounded. ``status`` is ``ok`` or ``nonfinite``."""

    nll_sum: float
    n_tokens: int
    eot_nll: float | None
    status: str

    @property
    def mean(self) -> float:
        """Nats per answer token."""
        return self.nll_sum / self.n_tokens


def token_nll(model: torch.nn.Module, batch: Packed) -> torch.Tensor:
    """Return ``-log P(target | what it sees)`` in nats for every target of ``batch``: float32 [N].

    ``model`` is a causal language model with a decoder body and an output embedding (wrapped by an adapter or not).
    Differentiable, with no logits kept for the backward pass (see ``rows_nll``).
    """
    return rows_nll(head(model), hidden_states(model, batch), batch.targets)


def hidden_states(model: torch.nn.Module, batch: Packed) -> torch.Tensor:
    """Return the last hidden states that predict the targets: [N, H]."""
    decoder = body(model)
    with along(decoder, batch.paths):
        out = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids,
                      attention_mask=_mask_for(decoder, batch.attention_mask), use_cache=False).last_hidden_state
    return out.reshape(-1, out.shape[-1])[batch.rows]


def _mask_for(decoder: torch.nn.Module, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return a mask as the attention of a decoder takes it: that called eager adds it, all others read it."""
    if mask is None or decoder.config.get_text_config()._attn_implementation != "eager":
        return mask
    dtype = decoder.get_input_embeddings().weight.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def rows_nll(project: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor,
             targets: torch.Tensor) -> torch.Tensor:
    """Return cross entropies in nats, float32 [N], of ``project(hidden)`` [N, V] against ``targets`` [N], in pieces.

    ``project`` takes each row by itself. Where it is a module that does not learn, gradients are worked out piece by
    piece while its logits are there; otherwise its logits are computed again in the backward pass.
    """
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        layer, finish = (project.layer, project.finish) if isinstance(project, FinishedHead) else (project, None)
        if type(layer) is torch.nn.Linear and "forward" not in vars(layer):
            return torch.cat([_tiled_nll(layer, finish, h, t) for h, t in _pieces(hidden, targets, TILE[0])])
        return torch.cat([_piece_nll(project, h, t) for h, t in _pieces(hidden, targets)])
    if isinstance(project, torch.nn.Module) and not any(p.requires_grad for p in project.parameters()):
        return _FrozenHead.apply(hidden, targets, project)
    return torch.cat([checkpoint(_piece_nll, project, h, t, use_reentrant=False)
                      for h, t in _pieces(hidden, targets)])


def _pieces(hidden: torch.Tensor, targets: torch.Tensor,
            n_rows: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(hidden.split(n_rows or HEAD_ROWS), targets.split(n_rows or HEAD_ROWS), strict=True)


def _piece_nll(project: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor,
               targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(project(hidden).float(), targets, reduction="none")


def _tiled_nll(layer: torch.nn.Linear, finish: Callable[[torch.Tensor], torch.Tensor] | None, hidden: torch.Tensor,
               targets: torch.Tensor) -> torch.Tensor:
    """Return the cross entropies of one tile's rows: ``top - target + log(sum of exp(logit - top))``, a part at a time.

    ``top`` is the largest logit so far, so that the small difference of two large numbers is taken once.
    """
    wanted = torch.full(targets.shape, -math.inf, device=hidden.device)
    top, total = torch.full_like(wanted, torch.finfo(torch.float32).min), torch.zeros_like(wanted)
    for start in range(0, layer.out_features, TILE[1]):
        words = slice(start, start + TILE[1])
        bias = None if layer.bias is None else layer.bias[words]
        logits = torch.nn.functional.linear(hidden, layer.weight[words], bias).float()
        logits = logits if finish is None else finish(logits)
        place = targets - start
        inside = (place >= 0) & (place < logits.shape[-1])
        wanted = torch.where(inside, logits.gather(-1, place.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0], wanted)
        before, top = top, torch.maximum(top, logits.amax(-1))
        total = total * (before - top).exp() + logits.sub_(top[:, None]).exp_().sum(-1)
    return top - wanted + total.log()


class _FrozenHead(torch.autograd.Function):
    """Cross entropies whose gradient, [N, H] instead of [N, V], is worked out with them: each logit is computed once.

    The idea is that of fused linear cross entropy (Liger Kernel, arXiv 2410.10989), here without a kernel of its own.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, project: torch.nn.Module) -> torch.Tensor:
        """Return float32 [N], and keep each one's gradient with respect to its own row of ``hidden``."""
        nll, slopes = [], []
        for h, t in _pieces(hidden, targets):
            with torch.enable_grad():
                row = h.detach().requires_grad_()
                one = _piece_nll(project, row, t)
                slopes += torch.autograd.grad(one.sum(), row)
            nll.append(one.detach())
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(nll)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Scale each row's gradient by what its cross entropy counts in the loss."""
        slopes, = ctx.saved_tensors
        return (slopes * grad[:, None]).to(slopes.dtype), None, None


def causal_lm(model: torch.nn.Module) -> torch.nn.Module:
    """Return the transformers model inside an adapter's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body(model: torch.nn.Module) -> torch.nn.Module:
    """Return the decoder: ids -> last hidden state."""
    lm = causal_lm(model)
    return lm.base_model if lm.base_model is not lm else lm.model


class FinishedHead(torch.nn.Module):
    """A head and what some models do to its logits, each by itself."""

    def __init__(self, layer: torch.nn.Module, finish: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.finish = layer, finish

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states."""
        return self.finish(self.layer(hidden))


def head(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module that turns hidden states into logits, scaled and capped as the model does it."""
    lm = causal_lm(model)
    settings, layer = lm.config.get_text_config(), lm.get_output_embeddings()
    family = str(getattr(settings, "model_type", ""))
    scale = 1.0
    if family.startswith("granite"):
        scale = 1 / settings.logits_scaling
    elif family.startswith("cohere"):
        scale = settings.logit_scale
    cap = getattr(settings, "final_logit_softcapping", None)
    if cap:
        return FinishedHead(layer, lambda logits: cap * torch.tanh(logits * (scale / cap)))
    return layer if scale == 1 else FinishedHead(layer, lambda logits: logits * scale)


@dataclass(frozen=True)
class Budget:
    """How much is computed at once: packed sequences of ``capacity`` tokens, ``tokens`` in one forward pass.

    Where attention goes example by example (``curate/core/attend.py``) there is one sequence in a pass, of ``tokens``.
    """

    capacity: int = 256
    tokens: int = 2048


def default_budget(device: str) -> Budget:
    """Return how much to compute at once on ``device``."""
    return Budget(capacity=512, tokens=32768) if device.startswith("cuda") else Budget()


TOLERANCE_NATS = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}
"""How far packed and plain passes may differ per token; wrong masks and scaled logits differ by whole nats."""
UNSUPPORTED = "This architecture is not supported by the transformers engine; score it with another."
CHECKED_TOKENS, CHECKED_ROWS = 64, 32
"""How many answer tokens, of how many rows at most, ``check_forward`` looks at: in bfloat16 a single short answer may
move by 0.2 nats per token with the company it has in a batch, the mean over this many by 0.01."""


def answer_nll(model: torch.nn.Module, encoded: Sequence[Encoded], budget: Budget = Budget(),
               notify: Callable[[str], None] = lambda text: None) -> Iterator[list[tuple[int, AnswerNll]]]:
    """Yield ``(index, evidence)`` for every example, a forward pass at a time.

    All of ``encoded`` must have the status ``ok``. Out of memory halves the batch, down to one sequence, and says so
    through ``notify``; then a ``UserError`` (environment). Scores do not depend on the split beyond rounding.
    """
    limit = window(model)
    along_paths = apart(body(model)) and all(len(item.ids) <= limit for item in encoded)
    if along_paths:
        budget = Budget(budget.tokens, budget.tokens)
    bins = plan(encoded, budget.capacity if along_paths else min(budget.capacity, limit))
    queue = _passes(bins, encoded, budget, limit)
    while queue:
        bunch = queue.pop(0)
        try:
            done = _one_pass(model, encoded, bunch, along_paths)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as err:
            if not is_out_of_memory(err):
                raise
            if len(bunch) == 1 and len(bunch[0]) == 1:
                raise UserError(f"Out of memory on a single example of {len(encoded[bunch[0][0]].ids)} tokens.",
                                "Lower --max-tokens, or use a machine with more memory.", Exit.ENVIRONMENT) from err
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            queue = _halved(bunch) + queue
            notify(f"out of memory: going on with half a batch ({sum(map(len, bunch))} examples before)")
            continue
        # Attention adds 0 * NaN for what a token must not see: one bad example spoils its sequence, so try each alone.
        alone = [i for i, evidence in done if evidence.status != "ok"] if len(done) > 1 else []
        queue = [[[i]] for i in alone] + queue
        if len(alone) < len(done):
            yield [(i, evidence) for i, evidence in done if i not in alone]


def window(model: torch.nn.Module) -> int:
    """Return how long a sequence may be that examples share: how many tokens back every layer can look at least.

    A mask of ours knows no windows, so sequences that need one are no longer than this; a longer example is alone in
    its sequence, where the model's own masks hold. Nor is it beyond ``turn``. 0 if the model cannot keep examples in
    one sequence apart.
    """
    if not keeps_apart(model):
        return 0
    settings = causal_lm(model).config.get_text_config()
    sizes = [getattr(settings, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min(turn(model), *(size for size in sizes if size), sys.maxsize)


def turn(model: torch.nn.Module) -> int:
    """Return the length beyond which a pass turns the positions of *all* its rows otherwise (longrope, dynamic)."""
    settings = causal_lm(model).config.get_text_config()
    rope = getattr(settings, "rope_parameters", None) or {}
    name = "original_max_position_embeddings"
    lengths = [one.get(name) or getattr(settings, name, None) or settings.max_position_embeddings
               for one in (rope, *rope.values())
               if isinstance(one, dict) and one.get("rope_type") in ("longrope", "dynamic")]
    return min(lengths, default=sys.maxsize)


_KEEPS_APART: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def keeps_apart(model: torch.nn.Module) -> bool:
    """Whether a model computes two examples in one sequence as it does each alone; found out once, with two made up.

    Not so where states are handed on along the sequence (mamba, convolutions, linear attention), whatever the mask,
    nor where attention takes no mask of ours.
    """
    lm = causal_lm(model)
    if lm not in _KEEPS_APART:
        _KEEPS_APART[lm] = not any(isinstance(m, torch.nn.Conv1d) for m in body(lm).modules()) and _same_together(lm)
    return _KEEPS_APART[lm]


def _same_together(model: torch.nn.Module) -> bool:
    ids = [(7 * k * k + 3 * k + 5) % min(model.config.get_text_config().vocab_size, 512) for k in range(24)]
    two = [Encoded(tuple(ids[:14]), 6, 13, "ok"), Encoded(tuple(ids[14:]), 4, 9, "ok")]
    device, learning = next(model.parameters()).device, model.training
    if learning:
        model.eval()
    try:
        with torch.no_grad():
            alone = hidden_states(model, pack(two, [[0], [1]], device=device).to(device)).float()
            for along_paths in {False, apart(body(model))}:
                together = hidden_states(model, pack(two, [[0, 1]], device=device, along_paths=along_paths).to(device))
                far = (together.float() - alone).norm(dim=-1) / alone.norm(dim=-1).clamp_min(1e-9)
                if not far.mean() <= (1e-3 if together.dtype == torch.float32 else 0.1):
                    return False
    except Exception as err:
        if is_out_of_memory(err):
            raise
        return False
    finally:
        if learning:
            model.train()
    return True


def _passes(bins: list[list[int]], encoded: Sequence[Encoded], budget: Budget, limit: int) -> list[list[list[int]]]:
    """Group sequences into forward passes: of one example within the limit, of one beyond it, of several."""
    def kind(one: list[int]) -> int:
        return 2 if len(one) > 1 else int(len(encoded[one[0]].ids) > limit)

    passes: list[list[list[int]]] = []
    width = 0
    for one in sorted(bins, key=kind):
        size = max(budget.capacity, max(len(encoded[i].ids) for i in one))
        if not passes or (len(passes[-1]) + 1) * max(width, size) > budget.tokens or kind(passes[-1][0]) != kind(one):
            passes.append([])
            width = 0
        passes[-1].append(one)
        width = max(width, size)
    return passes


def _halved(bunch: list[list[int]]) -> list[list[list[int]]]:
    if len(bunch) == 1:
        middle = len(bunch[0]) // 2
        return [[bunch[0][:middle]], [bunch[0][middle:]]]
    return [bunch[:len(bunch) // 2], bunch[len(bunch) // 2:]]


def is_out_of_memory(err: BaseException) -> bool:
    if isinstance(err, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "not enough memory" in str(err) or "can't allocate memory" in str(err)


def _one_pass(model: torch.nn.Module, encoded: Sequence[Encoded], bins: list[list[int]],
              along_paths: bool) -> list[tuple[int, AnswerNll]]:
    device = next(model.parameters()).device
    batch = pack(encoded, bins, device=device, along_paths=along_paths)
    with torch.inference_mode():
        nll = token_nll(model, batch.to(device)).double().cpu()
    order = [i for one in bins for i in one]
    place = {index: k for k, index in enumerate(order)}
    owner = torch.tensor([place[i] for i in batch.owner.tolist()])
    answer = ~batch.is_eot
    sums = torch.zeros(len(order), dtype=torch.float64).index_add_(0, owner[answer], nll[answer]).tolist()
    eots = {order[int(k)]: float(v) for k, v in zip(owner[batch.is_eot], nll[batch.is_eot], strict=True)}
    return [(i, _evidence(sums[k], encoded[i].n_answer_tokens, eots.get(i))) for k, i in enumerate(order)]


def _evidence(nll_sum: float, n_tokens: int, eot: float | None) -> AnswerNll:
    finite = math.isfinite(nll_sum) and (eot is None or math.isfinite(eot))
    return AnswerNll(nll_sum, n_tokens, eot, "ok" if finite else "nonfinite")


def check_forward(model: torch.nn.Module, encoded: Sequence[Encoded], tolerance: float) -> float:
    """Compare our pass, all in one sequence if the model can, with its own plain one on the shortest of some examples.

    Returns the mean difference of rows, weighted by their tokens, in nats per token. Raises ``UserError``
    (incompatible) above ``tolerance``, or where a pass cannot be made: such a model changes its logits after the head
    in a way that is not known here, or does not take its inputs as others do, and our numbers would be wrong.
    """
    rows = _shortest(encoded)
    total = sum(len(item.ids) for item in rows)
    try:
        return _difference(model, rows, Budget(total, total), tolerance)
    except UserError:
        raise
    except Exception as err:
        if is_out_of_memory(err):
            raise
        raise UserError(f"This model's forward pass cannot be used: {type(err).__name__}: {err}.", UNSUPPORTED,
                        Exit.INCOMPATIBLE) from err


def _difference(model: torch.nn.Module, rows: Sequence[Encoded], budget: Budget, tolerance: float) -> float:
    packed = dict(pair for part in answer_nll(model, rows, budget) for pair in part)
    device = next(model.parameters()).device
    apart = 0.0
    for index, item in enumerate(rows):
        ids = torch.tensor([item.ids], device=device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, item.answer_start - 1:item.answer_end - 1].float()
        plain = torch.nn.functional.cross_entropy(logits, ids[0, item.answer_start:item.answer_end]).item()
        apart += abs(plain - packed[index].mean) * item.n_answer_tokens
    difference = apart / sum(item.n_answer_tokens for item in rows) if rows else 0.0
    if not difference <= tolerance:
        raise UserError(
            f"Packed scoring differs from this model's own forward pass by {difference:.3g} nats per token.",
            UNSUPPORTED, Exit.INCOMPATIBLE)
    return difference


def _shortest(encoded: Sequence[Encoded]) -> list[Encoded]:
    """Return the shortest examples, two and as many as it takes to have ``CHECKED_TOKENS`` answer tokens."""
    found: list[Encoded] = []
    for item in sorted(encoded, key=lambda item: len(item.ids))[:CHECKED_ROWS]:
        if len(found) > 1 and sum(one.n_answer_tokens for one in found) >= CHECKED_TOKENS:
            break
        found.append(item)
    return found
