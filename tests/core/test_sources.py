"""Reading rows: strict, with line and byte of the first bad one, and counts that add up."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.core import rows, sources
from curate.core.errors import Exit, UserError
from curate.core.example import Example, pair
from curate.core.sources import Reading, Source, builtin, file_source, local_path, read_source, rows_digest
from curate.corpora import open_corpus

GOOD = b'{"prompt": "q%d", "response": "a%d"}'


def write(folder: Path, content: bytes | list[bytes], name: str = "rows.jsonl") -> Source:
    """Write a file of bytes, or of lines, and return its source."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else b"".join(r + b"\n" for r in content))
    return file_source(folder / name, folder)


def read(folder: Path, source: Source, **kwargs: Any) -> tuple[list[Example], Reading]:
    """Read all of a source and check that its counts add up."""
    reading = Reading()
    examples = list(read_source(source, folder, reading, **kwargs))
    assert reading.n_rows == reading.n_examples + sum(reading.filtered.values()) + len(reading.rejects)
    assert reading.n_examples == len(examples)
    return examples, reading


BAD_LINES = [
    (b'{"prompt": "q"', "no valid JSON"),
    (b"{'prompt': 'q'}", "no valid JSON: Expecting property name enclosed in double quotes at character 1"),
    (b'{"prompt": "q", "response": "a\0b"}', "no valid JSON: Invalid control character at at character 30"),
    (b'{"prompt": "q", "response": "a\\u0000b"}', "'response' holds a NUL character"),
    (b'{"prompt": "q", "response": "\xff"}', "no valid UTF-8 at byte 29 of the line"),
    (b'{"prompt": "q", "response": "\xed\xa0\xbd"}', "no valid UTF-8 at byte 29 of the line"),
    ('{"prompt": "q", "response": "a"}'.encode("utf-16-le"), "no valid JSON"),
    (b'{"prompt": "q", "response": "\\ud83d"}', "'response' holds half a surrogate pair"),
    (b'{"prompt": "q", "response": 3}', "'response' is int, not a text"),
    (b'{"prompt": ["q"], "response": "a"}', "'prompt' is list, not a text"),
    (b'"prompt"', "the row is str, not an object"),
    (b"null", "the row is NoneType, not an object"),
    (b"[" * 100_000, "the JSON is nested too deeply"),
    (b'{"n": ' + b"1" * 5000 + b"}", "no usable JSON: Exceeds the limit"),
    (b'{"prompt": "' + b"x" * 10 * 2**20 + b'", "response": "a"}', "the line is longer than 8 MiB"),
    (b'{"prompt": "q", "response": "a"} {}', "no valid JSON: Extra data"),
]
EACH_BAD = pytest.mark.parametrize(("bad", "reason"), BAD_LINES, ids=[reason[:50] for _, reason in BAD_LINES])


@EACH_BAD
def test_a_bad_line_ends_the_reading_with_line_and_byte(tmp_path: Path, bad: bytes, reason: str) -> None:
    lines = [GOOD % (1, 1), GOOD % (22, 22), bad, GOOD % (4, 4)]
    source, got = write(tmp_path, lines), []
    with pytest.raises(UserError) as caught:
        got.extend(read_source(source, tmp_path, max_bad=0.0))
    assert caught.value.exit_code == Exit.BAD_DATA and "--max-bad" in caught.value.hint
    start = len(lines[0]) + 1 + len(lines[1]) + 1
    assert f"rows.jsonl, line 3 (byte {start}): " in caught.value.message and reason in caught.value.message
    assert len(caught.value.message) < 300


@EACH_BAD
def test_max_bad_lets_a_share_through_and_writes_it_aside(tmp_path: Path, bad: bytes, reason: str) -> None:
    source, aside = write(tmp_path, [GOOD % (1, 1), bad, GOOD % (3, 3)]), tmp_path / "aside" / "rejects.jsonl"
    examples, reading = read(tmp_path, source, max_bad=0.34, rejects=aside)
    assert examples == [pair("q1", "a1"), pair("q3", "a3")] and reading.n_rows == 3
    (row,) = [json.loads(line) for line in aside.read_text().splitlines()]
    assert row["place"] == f"line 2 (byte {len(GOOD % (1, 1)) + 1})" and reason in row["reason"]
    with pytest.raises(UserError, match=r"1 of 3 rows of rows\.jsonl are bad \(33\.33%\), more than --max-bad 0\.33"):
        read(tmp_path, source, max_bad=0.33, rejects=aside)
    mended = write(tmp_path, [GOOD % (1, 1)])
    read(tmp_path, mended, max_bad=0.33, rejects=aside)
    assert not aside.exists(), "the list of an earlier reading"


@pytest.mark.parametrize("array", [b'[\n {\n  "prompt": "q",\n  "response": "a"\n }\n]', b'[{"prompt": "q"}]', b"[",
                                   b'\xef\xbb\xbf  [{"prompt": "' + b"q" * 9 * 2**20 + b'"}]'])
def test_one_json_array_is_told_as_such(tmp_path: Path, array: bytes) -> None:
    with pytest.raises(UserError, match=r"line 1 \(byte 0\): it looks like one JSON array, not like a row") as caught:
        read(tmp_path, write(tmp_path, array))
    assert caught.value.hint == f"Write a row on each line: jq -c '.[]' {tmp_path}/rows.jsonl > ROWS.jsonl."


@pytest.mark.parametrize(("name", "content", "hint"), [
    ("rows.json", b' \n[{"prompt": "q"}]', "Write a row on each line: jq -c '.[]' {}/rows.json > {}/rows.jsonl"),
    ("rows.json", GOOD % (1, 1), "If it has one row on each line, let its name end in .jsonl"),
    ("my rows.jsonl.gz", b"\x1f\x8b", "Unpack it first: gunzip -k '{}/my rows.jsonl.gz'")])
def test_the_next_step_of_files_that_others_read(tmp_path: Path, name: str, content: bytes, hint: str) -> None:
    with pytest.raises(UserError, match="is no known format") as caught:
        write(tmp_path, content, name)
    assert caught.value.hint.startswith(hint.replace("{}", str(tmp_path)))
    with pytest.raises(UserError, match="is no known format"):
        open_corpus(str(tmp_path / name))


def test_a_pipe_is_no_corpus(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    reader, writer = os.pipe()
    for path in (tmp_path / "pipe.jsonl", Path(f"/dev/fd/{reader}")):
        for opened in (partial(open_corpus, str(path)), partial(file_source, path, path.parent)):
            with pytest.raises(UserError, match=r"is a pipe or a device\. Rows must lie in a plain file") as caught:
                opened()
            assert str(path) in caught.value.message and "rows.jsonl" in caught.value.hint
    os.close(reader), os.close(writer)
    with pytest.raises(UserError, match="There is no file") as caught:
        open_corpus(f"/dev/fd/{reader}")
    assert f"'/dev/fd/{reader}'" not in caught.value.hint


def test_a_folder_of_save_to_disk_says_how_it_becomes_a_file(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "q", "response": "a"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    for name, split in (("one", ""), ("splits", '["train"]')):
        with pytest.raises(UserError, match="is a folder: name the files in it") as caught:
            open_corpus(str(tmp_path / name))
        code = f'import datasets; datasets.load_from_disk("{tmp_path / name}"){split}.to_parquet("{name}.parquet")'
        assert caught.value.hint == f"It is of datasets' save_to_disk; make a file of it: python -c '{code}'"


def test_byte_order_mark_crlf_blank_lines_and_no_last_newline_are_fine(tmp_path: Path) -> None:
    source = write(tmp_path, b"\xef\xbb\xbf" + GOOD % (1, 1) + b"\r\n\r\n  \t\n  " + GOOD % (2, 2))
    assert read(tmp_path, source)[0] == [pair("q1", "a1"), pair("q2", "a2")]
    second = write(tmp_path, [GOOD % (1, 1), b"\xef\xbb\xbf" + GOOD % (2, 2)])
    with pytest.raises(UserError, match="line 2"):
        read(tmp_path, second)
    assert read(tmp_path, write(tmp_path, b""))[0] == []


def test_offsets_count_skipped_and_overlong_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 37)
    exact, over = b'{"prompt": "q", "response": "abcdef"}', b"x" * 38
    assert len(exact) == 37
    source = write(tmp_path, [exact, over, b"", b"y" * 111, exact])
    examples, reading = read(tmp_path, source, max_bad=0.5)
    assert len(examples) == 2
    assert [r["place"] for r in reading.rejects] == ["line 2 (byte 38)", f"line 4 (byte {38 + 39 + 1})"]


SHAPES = [
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, {}),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {}),
    ({"prompt": "q", "response": "a"}, {}), ({"instruction": "q", "input": "", "output": "a"}, {}),
    ({"ask": "q", "say": "a"}, {"mapping": {"prompt": "ask", "response": "say"}}),
    ({"prompt": "q /no_think", "response": "<think>\n</think>a"}, {"strip_think": True})]


@pytest.mark.parametrize(("row", "options"), SHAPES, ids=lambda value: "+".join(value) or "plain")
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".parquet", ".csv"])
def test_every_shape_in_every_format(tmp_path: Path, suffix: str, row: dict[str, Any], options: dict[str, Any]) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif suffix == ".csv":
        if not all(isinstance(value, str) for value in row.values()):
            pytest.skip("a list fits in no CSV cell")
        path.write_text(",".join(row) + "\n" + ",".join(f'"{value}"' for value in row.values()))
    else:
        path.write_text(json.dumps(row))
    assert read(tmp_path, file_source(path, tmp_path, **options))[0] == [pair("q", "a")]


@pytest.mark.parametrize(("line", "reason"), [
    (b"only", "the number of fields differs"), (b"q,a,b", "the number of fields differs"),
    (b"q,a\0b", "holds a NUL")])
def test_csv_rows_are_strict(tmp_path: Path, line: bytes, reason: str) -> None:
    source = write(tmp_path, [b"\xef\xbb\xbfprompt,response", b'"q\n1","a ""1"""', line], "rows.csv")
    with pytest.raises(UserError, match=rf"rows\.csv, line 4: .*{reason}") as caught:
        read(tmp_path, source)
    assert caught.value.exit_code == Exit.BAD_DATA
    assert read(tmp_path, source, max_bad=0.5)[0] == [pair("q\n1", 'a "1"')]


@pytest.mark.parametrize("line", [b'"q"x,a', b'q,"a', b'"q2","bad "quote" here'])
def test_after_a_stray_quotation_mark_nothing_of_a_csv_is_believed(tmp_path: Path, line: bytes) -> None:
    """The lines below it might be part of an answer."""
    source = write(tmp_path, [b"prompt,response", b"q1,a1", line, b"foo,bar", b"q3,a3"], "rows.csv")
    for max_bad in (None, 0.9):
        with pytest.raises(UserError, match=r"rows\.csv, line [35]: no valid CSV: ") as caught:
            read(tmp_path, source, max_bad=max_bad)
        assert caught.value.exit_code == Exit.BAD_DATA


def test_columns_of_one_name_and_dates_beyond_python_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"several columns called 'response'"):
        read(tmp_path, write(tmp_path, [b"prompt,response,response", b"q,a,b"], "rows.csv"))
    pq.write_table(pa.table([["q"], ["a"], ["b"]], ["prompt", "response", "response"]), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"several columns called 'response'"):
        read(tmp_path, file_source(tmp_path / "rows.parquet", tmp_path))
    late = pa.array([2**62], pa.timestamp("us"))
    pq.write_table(pa.table([["q"], ["a"], late], ["prompt", "response", "at"]), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="no readable Parquet file"):
        read(tmp_path, file_source(tmp_path / "rows.parquet", tmp_path))


def test_csv_in_another_encoding_is_a_bad_row_at_its_own_line(tmp_path: Path) -> None:
    lines = [b"prompt,response,note", *(b"q%d,a,x" % k for k in range(3000)), b"q,a,caf\xe9", b"q,a,x"]
    source = write(tmp_path, lines, "rows.csv")
    with pytest.raises(UserError, match=r"rows\.csv, line 3002: no valid UTF-8 in the column 'note'") as caught:
        read(tmp_path, source)
    assert caught.value.hint == "Save the file as UTF-8.", "there is no --max-bad to offer"
    assert len(read(tmp_path, source, max_bad=0.001)[0]) == 3001
    with pytest.raises(UserError, match="2 of 2 rows"):
        read(tmp_path, write(tmp_path, "prompt,response\nq,a\nr,b".encode("utf-16"), "rows.csv"), max_bad=0.9)


def test_parquet_truncated_flipped_or_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"prompt": [f"q{i}" for i in range(333)], "response": [f"a{i * i}" for i in range(333)]})
    pq.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"q77")] ^= 1
    offsets = pa.array([0, 1], pa.int32()).buffers()[1]
    broken = pa.StringArray.from_buffers(1, offsets, pa.py_buffer(b"\xff"))
    pq.write_table(pa.table({"prompt": broken, "response": ["a"]}), tmp_path / "broken.parquet")
    assert read(tmp_path, write(tmp_path, whole, "rows.parquet"))[1].n_rows == 333
    for content in (whole[:-1], whole[:100], b"", bytes(flipped), (tmp_path / "broken.parquet").read_bytes()):
        source = write(tmp_path, content, "rows.parquet")
        with pytest.raises(UserError, match="no readable Parquet file") as caught:
            read(tmp_path, source)
        assert caught.value.exit_code == Exit.BAD_DATA


def test_parquet_rows_have_their_number(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["q1", None], "response": ["a1", "a2"]}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet, row 2: 'prompt' is NoneType"):
        read(tmp_path, file_source(tmp_path / "rows.parquet", tmp_path))


def test_filters_count_what_they_leave_out(tmp_path: Path) -> None:
    rows = [{"label": "fine", "response": "a"}, {"label": "bad", "response": "b"}, {"label": "fine", "response": None},
            {"label": "bad", "response": ""}, {"response": "e"}]
    source = write(tmp_path, [json.dumps({"prompt": "q", **row}).encode() for row in rows])
    source = source.model_copy(update={"where": {"label": "fine"}, "needs": ("response",)})
    examples, reading = read(tmp_path, source, max_bad=0.2)
    assert examples == [pair("q", "a")]
    assert reading.filtered == {"label is not fine": 1, "response is empty": 2}
    assert [r["reason"] for r in reading.rejects] == ["the column 'label' that the corpus is filtered by is missing"]
    with pytest.raises(UserError, match="line 5"):
        read(tmp_path, source)


def test_a_changed_file_a_folder_and_an_unknown_format_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path, [GOOD % (1, 1)])
    write(tmp_path, [GOOD % (1, 2)])
    with pytest.raises(UserError, match="has changed") as caught:
        read(tmp_path, source)
    assert caught.value.exit_code == Exit.INTEGRITY
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="not a plain file"):
        local_path(Source(kind="file", name="folder"), tmp_path)
    with pytest.raises(UserError, match="There is no file"):
        file_source(tmp_path / "folder", tmp_path)
    (tmp_path / "rows.xml").write_text("<x/>")
    with pytest.raises(UserError, match="no known format") as caught:
        file_source(tmp_path / "rows.xml", tmp_path)
    assert ".parquet" in caught.value.hint


def test_builtin_data_is_named_and_pinned(tmp_path: Path) -> None:
    source = builtin("demo/cooking")
    assert len(read(tmp_path, source)[0]) == sources.builtin_path("demo/cooking").read_bytes().count(b"\n")
    with pytest.raises(UserError, match="has changed"):
        read(tmp_path, source.model_copy(update={"sha256": "0" * 64}))
    with pytest.raises(UserError, match="Unknown builtin data set 'demo/coking'") as caught:
        builtin("demo/coking")
    assert caught.value.hint == "Did you mean 'demo/cooking'?"
    with pytest.raises(UserError, match="Unknown builtin"):
        local_path(Source(kind="builtin", name="../x"), tmp_path)


def test_a_digest_of_rows_does_not_depend_on_their_order() -> None:
    assert rows_digest(["a", "b", "c"]) == rows_digest(["c", "a", "b"]) != rows_digest(["a", "b"])
    assert rows_digest(["ab"]) != rows_digest(["a", "b"])


def test_real_rows_of_others_can_be_read(shared: Path) -> None:
    for name in sorted(str(p.relative_to(shared)) for p in shared.glob("narrow/*_100.jsonl")):
        source = file_source(shared / name, shared, strip_think=True)
        examples, reading = read(shared, source)
        assert len(examples) == reading.n_rows == 100
        assert not any(e.answer.startswith("<think>") or e.prompt.endswith("/no_think") for e in examples)
