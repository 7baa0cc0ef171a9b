"""Negative log-likelihoods of answer tokens: the one forward pass behind scoring, training and judging.

Only the hidden states that predict a target go through the head, a few hundred rows at a time, so that logits over
the whole vocabulary never exist for a whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from curate.core.attend import apart
from curate.core.chat import Encoded
from curate.core.decoder import FinishedHead, body, head, hidden_states, is_out_of_memory, window
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
