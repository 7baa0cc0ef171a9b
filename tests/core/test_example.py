"""Rows of every usual shape become the same example; everything else is refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from curate.core.example import Example, Message, RowError, from_row, pair

ASKED, ANSWERED = "What boils?", "Water."

SAME = [
    {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]},
    {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]},
    {"prompt": ASKED, "response": ANSWERED},
    {"prompt": ASKED, "completion": ANSWERED},
    {"question": ASKED, "answer": ANSWERED},
    {"query": ASKED, "output": ANSWERED},
    {"instruction": ASKED, "input": "", "output": ANSWERED},
    {"instruction": ASKED, "input": None, "output": ANSWERED},
    {"instruction": ASKED, "response": ANSWERED, "system": ""},
    {"instruction": ASKED, "context": "", "response": ANSWERED, "system_prompt": None},
    {"prompt": [{"role": "user", "content": ASKED}], "completion": [{"role": "assistant", "content": ANSWERED}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "boils?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": ANSWERED, "image_url": None}]}]},
    {"messages": [{"role": "user", "content": ASKED, "weight": 0, "tools": None},
                  {"role": "assistant", "content": ANSWERED, "weight": 1.0, "images": []}]},
]
TURNS = SAME[0]["messages"]
DOLLY = {"prompt": "instruction", "input": "context", "response": "response"}

REFUSED = [
    (["no", "object"], "the row is list, not an object"),
    (None, "the row is NoneType, not an object"),
    ({}, "fit no known shape; name them with --map"),
    ({"text": "x"}, "the columns ['text'] fit no known shape"),
    ({"prompt": 3, "response": "x"}, "'prompt' is int, not a text"),
    ({"prompt": "x", "response": None}, "'response' is NoneType, not a text"),
    ({"instruction": "x"}, "'output' is missing"),
    ({"messages": "x"}, "'messages' is not a list of messages"),
    ({"messages": []}, "'messages' is not a list of messages"),
    ({"messages": ["x"]}, "'messages'[0] is not an object"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "has the role 'wizard'; possible: system, user"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "has the role ['user']"),
    ({"messages": [{"content": "x"}]}, "has the role None"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "'messages'[0].'content' is list, not a text"),
    ({"messages": [{"role": "user"}]}, "'messages'[0].'value' is missing"),
    ({"messages": [{"role": "user", "content": "x"}]}, "not from the assistant, so there is no answer"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "no message before the answer"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]},
     "'messages'[1] has tool_calls, which would be left out"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "reasoning_content": "z"}]},
     "'messages'[1] has reasoning_content, which would be left out"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "system": 3},
     "'system' is int, not a text"),
    *[({"messages": TURNS, name: value}, f"'{name}' is part of what the model was told, and would be left out")
      for name, value in (("images", ["a.png"]), ("image", {"bytes": b"x"}), ("audio", "a.wav"), ("videos", ["b.mp4"]),
                          ("tools", [{"name": "f"}]), ("functions", '[{"name": "f"}]'), ("history", [["a", "b"]]))],
    ({"instruction": "x", "output": "y", "history": [["a", "b"]]}, "'history' is part of what the model was told"),
    ({"question": ASKED, "context": "A text.", "answer": "x"}, "'context' stands beside 'question'"),
    ({"prompt": ASKED, "input": "A text.", "output": "x"}, "'input' stands beside 'prompt'"),
    ({"instruction": "x", "input": "a", "context": "b", "output": "y"}, "'input' and 'context' differ, and one of"),
    ({"messages": TURNS, "system": "a", "system_prompt": "b"}, "'system' and 'system_prompt' differ"),
    ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "'messages'[1] has the weight 0, which would be ignored"),
    ({"messages": [*TURNS[:1], {**TURNS[1], "weight": 0.5}, *TURNS]}, "'messages'[1] has the weight 0.5"),
    ({"messages": [{**TURNS[0], "images": ["a.png"]}, TURNS[1]]}, "'messages'[0] has images, which would be left out"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}, TURNS[1]]},
     "'messages'[0] has a part of the type 'image_url', which would be left out"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'messages'[0].'text' is missing"),
    ({"messages": [{"role": "user", "content": []}]}, "'messages'[0].'content' is list, not a text"),
    ({"prompt": TURNS[:1], "response": "x"}, "'prompt' is list, not a text"),
    ({"prompt": TURNS[:1], "completion": TURNS[:1]}, "not from the assistant"),
    ({"prompt": "a", "response": "x", "\ud83d": 1}, "'\\ud83d' holds half a surrogate pair"),
    ({"prompt": "a\0b", "response": "x"}, "'prompt' holds a NUL character"),
    ({"prompt": "a", "response": "\ud83d"}, "'response' holds half a surrogate pair"),
    ({"prompt": "a", "response": "x", "note": "\ud83d"}, "'note' holds half a surrogate pair"),
    ({"prompt": "a", "response": "x", "notes": [{"of": "\ud83d"}]}, "'notes' holds half a surrogate pair"),
]


@pytest.mark.parametrize("row", SAME, ids=lambda row: "+".join(row))
def test_every_shape_is_the_same_example(row: dict[str, Any]) -> None:
    assert from_row(row) == pair(ASKED, ANSWERED)
    assert from_row(row).id == pair(ASKED, ANSWERED).id
    assert from_row(row).meta == {}


@pytest.mark.parametrize(("row", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusals_say_why(row: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        from_row(row)
    assert reason in str(caught.value)


def test_input_is_put_below_the_instruction_and_a_system_turn_above() -> None:
    example = from_row({"system": "Be brief.", "instruction": "Sum up.", "input": "A long text.", "output": "Long."})
    assert example.messages == (Message("system", "Be brief."), Message("user", "Sum up.\n\nA long text."),
                                Message("assistant", "Long."))


@pytest.mark.parametrize("turns", [{"messages": [{"role": "user", "content": ASKED},
                                                 {"role": "assistant", "content": ANSWERED, "tool_calls": None}]},
                                   {"conversations": [{"from": "human", "value": ASKED},
                                                      {"from": "gpt", "value": ANSWERED}]}])
def test_a_system_column_opens_a_conversation_that_has_no_system_turn(turns: dict[str, Any]) -> None:
    (key,) = turns
    example = from_row({"system": "Be brief.", **turns})
    assert example.messages == (Message("system", "Be brief."), *pair(ASKED, ANSWERED).messages)
    assert from_row({"system": "", **turns}) == pair(ASKED, ANSWERED) and not example.meta
    own = {key: [{"role": "system", "content": "Be long."}, *turns[key]]}
    assert from_row({"system": "Be brief.", **own}).messages[0].content == "Be long."
    assert from_row({"system": "Be brief.", **own}).meta == {"system": "Be brief."}


def test_what_the_model_was_told_is_taken_by_itself() -> None:
    """The shapes of OpenOrca and Dolly, and the newer name of the system role."""
    orca = {"system_prompt": "Be brief.", "question": ASKED, "response": ANSWERED}
    opened = (Message("system", "Be brief."), *pair(ASKED, ANSWERED).messages)
    assert from_row(orca).messages == from_row(orca, {"response": "response"}).messages == opened
    assert from_row({"system_prompt": "Be brief.", **SAME[1]}).messages == opened
    assert from_row({"messages": [{"role": "developer", "content": "Be brief."}, *TURNS]}).messages == opened
    assert from_row({"prompt": TURNS[:1], "completion": TURNS[1:], "system": "Be brief."}).messages == opened
    dolly = {"instruction": "Sum up.", "context": "A text.", "response": "T."}
    assert from_row(dolly) == from_row(dolly, DOLLY) == from_row(dolly, {"response": "response"}) \
        == pair("Sum up.\n\nA text.", "T.")
    assert from_row(dolly).meta == {}


@pytest.mark.parametrize("empty", [None, "", " ", [], {}, "[]", "null", [None], {"bytes": None, "path": None}, False])
def test_an_empty_column_leaves_nothing_out(empty: object) -> None:
    for name in ("history", "images", "tools"):
        assert from_row({"messages": TURNS, name: empty}).meta == {name: empty}


def test_a_column_that_is_named_is_not_left_out_nor_guessed_at() -> None:
    row = {"question": ASKED, "context": "A text.", "history": "Before.", "answer": ANSWERED}
    with pytest.raises(RowError, match="'history' is part") as caught:
        from_row(row, {"input": "context"})
    assert caught.value.mend == "Write it into the messages, or take it out of the row"
    assert from_row(row, {"input": "context", "system": "history"}).messages \
        == (Message("system", "Before."), *pair(f"{ASKED}\n\nA text.", ANSWERED).messages)
    with pytest.raises(RowError, match="'context' stands beside 'question'") as caught:
        from_row(row, {"system": "history"})
    assert caught.value.mend == "Add --map input=context, or map both prompt and response if it is not"
    told = from_row(row, {"prompt": "question", "response": "answer", "system": "history"})
    assert told.prompt == ASKED and told.meta == {"context": "A text."}
    assert len(from_row({"q": ASKED, "system": "A text.", "answer": ANSWERED}, {"prompt": "q", "input": "system"})
               .messages) == 2, "no column is taken twice"
    with pytest.raises(RowError, match="'a' cannot stand below the messages of 'prompt'"):
        from_row({"prompt": TURNS[:1], "completion": TURNS[1:], "a": "A text."}, {"input": "a"})


def test_a_mapping_leaves_nothing_of_the_usual_columns_out() -> None:
    row = {"instruction": "Sum up.", "input": "A text.", "system": "Be brief.", "output": "T.", "chosen": "Text."}
    for mapping, answer in (({"prompt": "instruction"}, "T."), ({"response": "chosen"}, "Text.")):
        assert [m.content for m in from_row(row, mapping).messages] == ["Be brief.", "Sum up.\n\nA text.", answer]
    mapped = from_row({"q": ASKED, "a": ANSWERED, "input": "unasked"}, {"prompt": "q", "response": "a"})
    assert mapped == pair(ASKED, ANSWERED) and mapped.meta == {"input": "unasked"}


def test_mapping_names_the_columns_and_a_misspelt_one_is_no_silent_default() -> None:
    row = {"q": ASKED, "a": ANSWERED, "rules": "Be brief.", "prompt": "not this", "kind": "fact"}
    example = from_row(row, {"prompt": "q", "response": "a", "system": "rules"})
    assert [m.content for m in example.messages] == ["Be brief.", ASKED, ANSWERED]
    assert example.meta == {"prompt": "not this", "kind": "fact"}
    assert len(from_row({**row, "rules": ""}, {"prompt": "q", "response": "a", "system": "rules"}).messages) == 2
    for wrong in ({"prompt": "Q", "response": "a"}, {"prompt": "q", "response": "a", "system": "rule"}):
        with pytest.raises(RowError, match="is missing"):
            from_row(row, wrong)


@pytest.mark.parametrize("context", ["", None, "A long text."])
def test_an_empty_mapped_input_adds_nothing(context: str | None) -> None:
    row = {"instruction": ASKED, "context": context, "response": ANSWERED}
    assert from_row(row, DOLLY).prompt == (f"{ASKED}\n\n{context}" if context else ASKED)


@pytest.mark.parametrize(("mapping", "reason", "mend"), [
    ({"prompt": "qestion", "response": "reply"}, "'qestion' is missing; the row has the columns ['question', 'reply']",
     "Correct --map (prompt=question?), or mend the row"),
    ({"prompt": "zzz", "response": "reply"}, "'zzz' is missing", "Correct --map prompt=COLUMN, or mend the row"),
    ({"prompt": "question"}, "no column for the response is mapped; the row has", "Add --map response=COLUMN"),
    ({"prompt": "question", "response": "reply", "input": "text"}, "'text' is missing", "Correct --map input=COLUMN")])
def test_a_wrong_mapping_is_not_blamed_on_the_row(mapping: dict[str, str], reason: str, mend: str) -> None:
    with pytest.raises(RowError) as caught:
        from_row({"question": ASKED, "reply": ANSWERED}, mapping)
    assert reason in str(caught.value) and caught.value.mend.startswith(mend)


@pytest.mark.parametrize("row", [{"ask": ASKED, "answer": ANSWERED}, {"question": ASKED, "say": ANSWERED},
                                 {"ask": ASKED, "completion": ANSWERED, "kind": "fact"}], ids="+".join)
def test_what_is_not_mapped_has_its_usual_name(row: dict[str, str]) -> None:
    mapping = {"prompt": "ask"} if "ask" in row else {"response": "say"}
    assert from_row(row, mapping) == pair(ASKED, ANSWERED)


def test_other_columns_become_meta_and_no_part_of_the_identity() -> None:
    one, other = pair(ASKED, ANSWERED, source="a"), pair(ASKED, ANSWERED, source="b")
    assert one == other and one.id == other.id and one.meta != other.meta
    assert from_row({"prompt": ASKED, "response": ANSWERED, "source": "a"}).meta == {"source": "a"}


def test_identity_is_the_content_of_the_turns() -> None:
    ids = {pair("ab", "c").id, pair("a", "bc").id, pair("c", "ab").id, pair("ab", "c ").id,
           Example((Message("system", "ab"), Message("assistant", "c"))).id,
           Example((Message("user", "ab"), Message("user", "c"))).id}
    assert len(ids) == 6 and all(len(i) == 32 and set(i) <= set("0123456789abcdef") for i in ids)


def test_to_row_round_trips_and_prompt_is_the_last_question() -> None:
    turns = [("system", "S"), ("user", "one"), ("assistant", "1"), ("user", "two é\u2028"), ("assistant", "2\n")]
    example = Example(tuple(Message(*t) for t in turns))
    assert from_row(example.to_row()) == example
    assert (example.prompt, example.answer) == ("two é\u2028", "2\n")
    assert Example((Message("system", "S"), Message("assistant", "x"))).prompt == ""


@pytest.mark.parametrize(("answer", "kept"), [
    ("<think>\n\n</think>\n\nWater.", "Water."), (" <think></think>Water.", "Water."),
    ("<think>hm</think>Water.", "<think>hm</think>Water."), ("Water. <think></think>", "Water. <think></think>"),
    ("<think></think>", ""), ("<think>\n</think>\n\n<think></think>\nWater.", "Water.")])
def test_strip_think_removes_only_an_empty_block_at_the_start(answer: str, kept: str) -> None:
    row = {"prompt": f"{ASKED} /no_think", "response": answer}
    assert from_row(row, strip_think=True) == pair(ASKED, kept)
    assert from_row(row) == pair(f"{ASKED} /no_think", answer)
    assert from_row({"prompt": "/no_think or not?", "response": "x"}, strip_think=True).prompt == "/no_think or not?"


def test_a_turn_that_is_not_to_be_learnt_may_stand_before_the_answer() -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *TURNS]
    weighted = [said[0], {**said[1], "weight": 0}, said[2], {**said[3], "weight": 1}]
    assert from_row({"messages": weighted}) == from_row({"messages": said})
