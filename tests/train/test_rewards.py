"""Prompts in every shape, and rewards that are functions of the user's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from curate.core.errors import Exit, UserError
from curate.core.example import Message
from curate.core.sources import file_source
from train.prompts import Asked, Prompt, endless, read_prompts
from train.recipe import RlKnobs, rl_from_values
from train.rewards import Rated, Reward, by_path

USER = {"role": "user", "content": "Why?"}
ASKED = Prompt((Message("user", "Why?"),), None, {})


def prompts(tmp_path: Path, *rows: Any, mapping: dict[str, str] | None = None, strip: bool = False) -> list[Prompt]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(file_source(path, tmp_path, mapping, strip), tmp_path)


@pytest.mark.parametrize(("row", "answer", "columns"), [
    ({"messages": [USER]}, None, {}),
    ({"messages": [USER, {"role": "assistant", "content": "So."}], "kind": 1}, "So.", {"kind": 1}),
    ({"conversations": [{"from": "human", "value": "Why?"}]}, None, {}),
    ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}, "So.", {}),
    ({"prompt": "Why?", "level": 2}, None, {"level": 2}),
    ({"prompt": [USER], "level": 2}, None, {"level": 2}),
    ({"prompt": [USER], "answer": "So.", "level": 2}, "So.", {"level": 2}),
    ({"messages": [USER], "response": "So."}, "So.", {}),
    ({"messages": [USER], "answer": ""}, None, {}),
    ({"prompt": "Why?", "response": "So."}, "So.", {}),
    ({"question": "Why?", "answer": ""}, None, {}),
    ({"prompt": "Why?", "response": None}, None, {}),
    ({"instruction": "Why?"}, None, {}),
], ids=json.dumps)
def test_prompts_come_in_every_shape(tmp_path: Path, row: Any, answer: str | None, columns: dict[str, Any]) -> None:
    assert prompts(tmp_path, row) == [Prompt((Message("user", "Why?"),), answer, columns)]


def test_columns_can_be_named_and_thinking_be_stripped(tmp_path: Path) -> None:
    found = prompts(tmp_path, {"q": "Why? /no_think"}, mapping={"prompt": "q", "response": "a"}, strip=True)
    assert found == [ASKED]
    row = {"q": "Why?", "answer": "So.", "level": 2}
    assert prompts(tmp_path, row, mapping={"prompt": "q"}) == [Prompt((Message("user", "Why?"),), "So.", {"level": 2})]
    row = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why? /no_think"},
                        {"role": "assistant", "content": "<think>\n\n</think>\n\nSo."}]}
    one, = prompts(tmp_path, row, strip=True)
    assert [m.role for m in one.messages] == ["system", "user"] and one.answer == "So."


@pytest.mark.parametrize("row", [{"messages": []}, {"messages": "Why?"}, {"text": "Why?"}, [1], {"prompt": 5},
                                 {"messages": [{"role": "assistant", "content": "So."}]},
                                 {"prompt": [USER], "answer": 42}, {"prompt": "Why?", "response": "So.", "answer": "4"},
                                 {"prompt": "Why?", "completions": 3}])
def test_bad_rows_are_refused_with_their_place(tmp_path: Path, row: Any) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl, line 2 \(byte 52\): ") as caught:
        prompts(tmp_path, {"messages": [USER]}, row)
    assert caught.value.exit_code == Exit.BAD_DATA


def test_the_real_prompts_can_be_read(shared: Path) -> None:
    for name, answered in (("medical", True), ("code", False)):
        path = shared / "grpo" / f"{name}_750_train.jsonl"
        found = read_prompts(file_source(path, path.parent, strip_think=True), path.parent)
        assert len(found) > 700 and all((one.answer is not None) == answered for one in found)
        assert not any(one.messages[-1].content.rstrip().endswith("/no_think") for one in found)


def test_every_pass_asks_every_prompt_in_another_order() -> None:
    few = [Asked(Prompt((Message("user", str(k)),), None, {}), ()) for k in range(9)]
    order = endless(few, 3)
    passes = [[next(order) for _ in few] for _ in range(3)]
    assert all(sorted(one) == list(range(9)) for one in passes) and len({tuple(one) for one in passes}) == 3
    again = endless(few, 3)
    assert [next(again) for _ in range(27)] == [k for one in passes for k in one]
    other = endless(few, 4)
    assert [next(other) for _ in few] != passes[0]


@pytest.mark.parametrize(("returned", "rated"), [
    ([1, 0.5], [Rated(1.0), Rated(0.5)]), ([True, None], [Rated(1.0), Rated(None, "missing")]),
    ((float("inf"), "refused"), [Rated(None, "nonfinite"), Rated(None, "refused")]),
    (("ok", ""), [Rated(None, "missing"), Rated(None, "missing")])])
def test_rewards_are_numbers_or_have_a_status(returned: Any, rated: list[Rated]) -> None:
    assert Reward("r", lambda completions: returned).rate([ASKED] * 2, ["a", "b"]) == rated


@pytest.mark.parametrize(("returned", "message"), [
    ([1.0], "returned 1 rewards for 2 completions"), (None, "returned a NoneType for 2"),
    ([{}, 1.0], "returned a dict for a completion"), (0.5, "returned a float for 2")])
def test_a_function_that_returns_something_else_is_refused(returned: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Reward("r", lambda completions: returned).rate([ASKED] * 2, ["a", "b"])
    assert caught.value.exit_code == Exit.BAD_DATA


def test_a_function_is_given_what_it_names() -> None:
    rows = [Prompt((Message("system", "s"), Message("user", "u")), "a", {"level": 3}), ASKED]

    def few(completions: Any, level: Any) -> list[float]:
        assert completions == [[{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": "y"}]]
        assert level == [3, None]
        return [1, 2]

    def all_of_it(**given: Any) -> list[float]:
        assert sorted(given) == ["answer", "completions", "level", "prompts"] and given["answer"] == ["a", None]
        assert given["prompts"][0] == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        return [1, 2]

    for function in (few, all_of_it):
        assert Reward("r", function).rate(rows, ["x", "y"]) == [Rated(1.0), Rated(2.0)]


def test_a_verifiable_reward_needs_reference_answers() -> None:
    with pytest.raises(UserError, match="1 of 2 prompts have no reference answer"):
        Reward("opswap", len, needs_answer=True).check([ASKED, Prompt(ASKED.messages, "5", {})])
    Reward("free", len).check([ASKED])


def test_a_module_that_fails_to_import_something_else_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_reward.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        by_path("broken_reward:f")


def test_knobs_have_the_papers_defaults_and_no_unused_ones() -> None:
    recipe, knobs = rl_from_values({"base": "smollm2", "sft_every": 2, "lora_r": 8})
    assert (recipe.lr, recipe.lora_r, recipe.lora_alpha, recipe.rslora) == (5e-6, 8, 64.0, True)
    assert knobs == RlKnobs(generations=4, temperature=0.8, top_p=0.9, warmup_rows=100, sft_every=2)
    for name, hint in (("epochs", "--steps"), ("limit_steps", "--steps"), ("lora_dropout", "sampled")):
        with pytest.raises(UserError, match=f"'{name}' is no knob of `train rl`") as caught:
            rl_from_values({"base": "smollm2", name: 2})
        assert hint in caught.value.hint
    with pytest.raises(UserError, match="Unknown recipe knob 'generation'") as caught:
        rl_from_values({"base": "smollm2", "generation": 4})
    assert "generations" in caught.value.hint
