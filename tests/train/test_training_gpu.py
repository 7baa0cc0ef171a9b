"""The benchmark against trl runs, at toy size on a CPU, and counts what it should."""

from __future__ import annotations

from argparse import Namespace

import pytest
from transformers import Qwen2Config

from bench.training_gpu import SHAPES, model_flops, report, rows_of, turn


def test_model_flops_by_hand() -> None:
    config = Qwen2Config(hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=10)
    frozen, adapted = 16 + 8 + 8 + 16 + 3 * 24, 3 * (8 + 6 + 6 + 8 + 3 * 10)
    attention = 3 * 2 * 2 * 4 * (5**2 + 2**2) / 2
    assert model_flops(config, 3, [5, 2], 3) == 7 * (4 * frozen + 6 * adapted) + 3 * 4 * 40 + attention


def test_the_shapes_are_those_of_qwen() -> None:
    """Frozen matrices of 0.36 and 6.5 billion weights, as published (without embeddings)."""
    for name, billions in (("0.5B", 0.36), ("7B", 6.53)):
        config = Qwen2Config(**SHAPES[name])
        weights = model_flops(config, 0, [1], 0) - 6 * config.num_hidden_layers * config.hidden_size
        assert weights / 4e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("engine", ["safeset", "trl"])
def test_a_turn_measures_at_toy_size(engine: str) -> None:
    if engine == "trl":
        pytest.importorskip("trl")
    found = turn(engine, Namespace(shape="toy", rows=8, longest=24, batch_size=2, device="cpu",
                                   gradient_checkpointing=False))
    assert found["tokens_per_s"] > 0 and 0 < found["mfu"] < 1 and found["peak_mib"] is None


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(5, 24, 307)
    assert [row.answer_start for row in rows] == [len(row.ids) // 2 for row in rows] and len(rows) == 5
    one = {"tokens_per_s": 1000.0, "mfu": 0.25, "ceiling": 4e14, "peak_mib": 10.0}
    report(Namespace(shape="7B", device="cuda", batch_size=8, longest=1024),
           {"safeset": [one, {**one, "tokens_per_s": 1500.0}], "trl": [one]})
    assert "| safeset | 1,000 / 1,250 / 1,500 | 25% | 10 |" in capsys.readouterr().out
