"""Reading and changing the hidden states of a model for the length of a ``with`` block.

Hidden state l of a model with L blocks is its residual stream after l blocks, float [S, T, H]:

    state 0        what layers[0] is given (the embeddings)
    state l        the output of layers[l - 1], which is what layers[l] is given
    state L        the output of layers[L - 1], before the final norm

So "layer l" of a defence or a vector file is the l-th block counted from 1, and in code ``layers[l - 1]``. The
library's ``output_hidden_states`` uses the same index, but its last entry comes after the final norm.

Hooks are removed when the block is left, by an exception too. With gradient checkpointing the layers run again in the
backward pass: keep the block open until it is over, or the second run computes other states than the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from curate.core.decoder import causal_lm, hidden_states
from curate.core.errors import Exit, UserError
from curate.core.pack import Packed

if TYPE_CHECKING:
    from peft import PeftModel

Edit = Callable[[torch.Tensor], torch.Tensor | None]
"""Given a hidden state [S, T, H]; returns what to put in its place, or None to leave it."""


def layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """Return the blocks of the model's text decoder; ``UserError`` (incompatible) where they cannot be found."""
    n_blocks = getattr(causal_lm(model).config.get_text_config(), "num_hidden_layers", None)
    for module in causal_lm(model).get_decoder().modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_blocks:
            return module
    raise UserError(f"The blocks of a {type(causal_lm(model)).__name__} were not found, so no layer can be hooked.",
                    "Use a decoder-only model with one list of blocks.", Exit.INCOMPATIBLE)


def check_states(model: torch.nn.Module, states: Sequence[int]) -> None:
    """Raise a ``UserError`` (incompatible) for a hidden state that the model does not have."""
    n_blocks = len(layers(model))
    for state in states:
        if not 0 <= state <= n_blocks:
            raise UserError(f"Layer {state} does not exist: the model has {n_blocks} blocks.",
                            f"Layers are counted from 1 to {n_blocks}; 0 is the embeddings.", Exit.INCOMPATIBLE)


@contextmanager
def editing(model: torch.nn.Module, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Call ``edits[l]`` on hidden state l in every forward pass inside; blocks nest, the outer one is called first."""
    check_states(model, list(edits))
    blocks = layers(model)
    with ExitStack() as stack:
        for state, edit in edits.items():
            handle = blocks[0].register_forward_pre_hook(_before(edit)) if state == 0 else \
                blocks[state - 1].register_forward_hook(_behind(edit))
            stack.callback(handle.remove)
        yield


@contextmanager
def capture(model: torch.nn.Module, states: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Give a dict that the first forward pass inside fills: state -> float [S, T, H], with its gradient.

    Later passes, such as a penalty's reference or the second run of gradient checkpointing, change nothing.
    """
    found: dict[int, torch.Tensor] = {}

    def keep(state: int) -> Edit:
        def edit(hidden: torch.Tensor) -> None:
            found.setdefault(state, hidden)
        return edit

    with editing(model, {state: keep(state) for state in states}):
        yield found


@contextmanager
def steer(model: torch.nn.Module, vectors: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Add ``vectors[l]`` [H] to hidden state l at every position, padding included."""
    def add(vector: torch.Tensor) -> Edit:
        return lambda hidden: hidden + vector.to(hidden)

    with editing(model, {state: add(vector) for state, vector in vectors.items()}):
        yield


@contextmanager
def project_out(model: torch.nn.Module, directions: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Take its part along ``directions[l]`` [H] (of any length but 0) out of hidden state l: h - (h . u) u, |u| = 1."""
    def take(direction: torch.Tensor) -> Edit:
        unit = direction.float() / direction.float().norm()

        def edit(hidden: torch.Tensor) -> torch.Tensor:
            u, h = unit.to(hidden.device), hidden.float()
            return (h - (h @ u)[..., None] * u).to(hidden.dtype)
        return edit

    with editing(model, {state: take(direction) for state, direction in directions.items()}):
        yield


@contextmanager
def reference(model: PeftModel) -> Iterator[None]:
    """Make ``model`` what it was before training: adapter and dropout off, no gradients; afterwards as it was.

    The same weights serve model and reference, so there is no second copy of them.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with model.disable_adapter(), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@dataclass
class Reference:
    """The passes without the adapter: one for each micro batch, for all defences that compare with it."""

    _states: set[int] = field(default_factory=set)
    _open: int = 0
    _found: tuple[Packed, torch.Tensor, dict[int, torch.Tensor]] | None = None

    @contextmanager
    def during(self, states: Sequence[int] = ()) -> Iterator[None]:
        """Keep what the pass finds until the end of the block, hidden states ``states`` too."""
        self._states |= set(states)
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._states, self._found = set(), None

    def __call__(self, model: PeftModel, batch: Packed) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Return what predicts the N targets of ``batch``: last hidden states [N, H], and each wanted state [N, H]."""
        found = self._found
        if found is None or found[0] is not batch:
            with reference(model), capture(model, sorted(self._states)) as states:
                last = hidden_states(model, batch)
            found = (batch, last, {state: h.flatten(0, 1)[batch.rows] for state, h in states.items()})
        self._found = found if self._open else None
        return found[1:]


def share_reference(defenses: Sequence[object]) -> None:
    """Let all ``defenses`` that have a ``Reference`` have the same one."""
    shared = Reference()
    for defense in defenses:
        if hasattr(defense, "reference"):
            defense.reference = shared


def _before(edit: Edit) -> Callable[..., Any]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = edit(args[0])
        return None if changed is None else (changed, *args[1:])
    return hook


def _behind(edit: Edit) -> Callable[..., Any]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        changed = edit(out[0] if isinstance(out, tuple) else out)
        return None if changed is None else (changed, *out[1:]) if isinstance(out, tuple) else changed
    return hook
