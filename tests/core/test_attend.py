"""Attention along paths: when it is possible, that it is over afterwards, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from curate.core.attend import along, apart
from curate.core.decoder import body, hidden_states
from curate.core.errors import Exit, UserError
from curate.core.pack import pack
from tests.core.test_pack import DRAWN

SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.3}


def model(implementation: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=implementation)).eval()


def test_it_takes_the_library_s_fused_attention_on_a_cpu() -> None:
    assert apart(body(model()))
    assert not apart(body(model("eager"))) and not apart(torch.nn.Linear(1, 1))
    assert not apart(body(model()).to("meta"))


def test_hidden_states_are_those_of_the_mask_and_differ_from_plain_causal_ones() -> None:
    decoder = model()
    with torch.inference_mode():
        masked, along_paths = (hidden_states(decoder, pack(DRAWN, [[0, 1, 2]], along_paths=way))
                               for way in (False, True))
        batch = pack(DRAWN, [[0, 1, 2]], along_paths=True)
        batch.paths = None
        wrong = hidden_states(decoder, batch)
    torch.testing.assert_close(along_paths, masked, atol=1e-5, rtol=1e-5)
    assert (wrong - masked).abs().max() > 0.01


def test_it_is_over_afterwards_after_a_failure_too() -> None:
    decoder = body(model())
    with pytest.raises(KeyError), along(decoder, [(((0, 2),), 2)]):
        assert not apart(decoder)
        raise KeyError
    assert apart(decoder) and decoder.config._attn_implementation == "sdpa"
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        assert decoder(input_ids=ids).last_hidden_state.shape == (1, 3, 16)


def test_a_bias_of_the_model_s_own_is_refused() -> None:
    decoder = body(model())
    attention = decoder.layers[0].self_attn
    states, angles = torch.zeros(1, 2, 16), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    with along(decoder, [(((0, 2),), 2)]), pytest.raises(UserError, match="bias of its own") as caught:
        attention(states, position_embeddings=angles, attention_mask=None, position_bias=torch.zeros(1, 4, 2, 2))
    assert caught.value.exit_code == Exit.INCOMPATIBLE
