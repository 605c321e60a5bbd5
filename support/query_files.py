"""Queries from text lines, JSON lines or tables, chunk by chunk as they come; what is malformed, by its number."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from support.files import UserError
from support.layouts import listed
from support.tables import open_table

READ_AT_ONCE = 2**20  # bytes at most; of a pipe, what is there
TEXT_COLUMNS = ("query", "prompt", "question")
TABLES = (".parquet", ".csv", ".csv.gz", ".json", ".json.gz")
NO_QUERY = "empty"

Chunk = list[tuple[int, str | None, str | None]]  # number of the line or row, its query, or what is wrong with it


def read_queries(path: str) -> Iterator[Chunk]:
    """The queries of a file, or of standard input where `path` is "-".

    Parquet, CSV and JSON arrays hold them in a column `query`, `prompt` or `question`; JSON lines, told by the suffix
    .jsonl or by a first line that begins with a brace, in a field of that name; any other file has a query per line.
    Raises `UserError` where there is no such file, it holds binary data, or is not UTF-8.
    """
    if path == "-":
        return _lines(sys.stdin.buffer, "standard input", False)
    try:
        stream = open(Path(path).expanduser(), "rb")  # noqa: SIM115, closed by those who read it
        is_table = stream.peek(4)[:4] == b"PAR1" or path.endswith(TABLES)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; expected a file of queries, or -") from error
    if not is_table:
        return _lines(stream, path, path.endswith(".jsonl"))
    stream.close()
    return _rows(path)


def _rows(path: str) -> Iterator[Chunk]:
    table = open_table(Path(path).expanduser())
    column = next((name for name in TEXT_COLUMNS if name in table.columns), None)
    if column is None:
        raise UserError(f"{path} has the columns {listed(table.columns)}; expected one of {', '.join(TEXT_COLUMNS)}")
    number = 0
    for chunk in table.read([column]):
        yield [(number + i, *_checked(cell, column)) for i, cell in enumerate(chunk[column], start=1)]
        number += len(chunk[column])


def _lines(stream: BinaryIO, name: str, is_json: bool) -> Iterator[Chunk]:
    number, rest = 0, b""
    with stream:
        while data := stream.read1(READ_AT_ONCE):
            *lines, rest = (rest + data).split(b"\n")
            if not number:
                is_json = is_json or b"".join(lines or [rest]).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"
            if lines:
                yield [(number + i, *_parsed(line, number + i, name, is_json)) for i, line in enumerate(lines, start=1)]
            number += len(lines)
        if rest:
            yield [(number + 1, *_parsed(rest, number + 1, name, is_json))]


def _parsed(line: bytes, number: int, name: str, is_json: bool) -> tuple[str | None, str | None]:
    if b"\0" in line:
        raise UserError(f"{name} holds binary data in line {number}; expected text or JSON, a query per line")
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 in line {number}; convert it, with `iconv -t UTF-8` for example"
        ) from error
    if not is_json or not text.strip():
        return _checked(text, "line")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, f"no JSON ({error})"
    field = next((field for field in TEXT_COLUMNS if isinstance(record, dict) and field in record), None)
    if field is None:
        return None, f"a JSON object with one of {', '.join(TEXT_COLUMNS)} is expected"
    return _checked(record[field], field)


def _checked(cell: object, name: str) -> tuple[str | None, str | None]:
    if not isinstance(cell, str):
        return None, f"{name} is {str(cell)[:40]!r}, a text is expected"
    return (cell.strip(), None) if cell.strip() else (None, NO_QUERY)
