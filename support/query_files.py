"""Queries from text lines, JSON lines or tables, chunk by chunk as they come; what is malformed, by its number."""

import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from support.files import UserError, valid_unicode
from support.layouts import listed
from support.tables import open_table

READ_AT_ONCE = 2**20  # bytes at most; of a pipe, what is there
TEXT_COLUMNS = ("query", "prompt", "question")
TABLES = (".parquet", ".csv", ".tsv", ".json")
JSON_LINES = (".jsonl", ".ndjson")

Chunk = list[tuple[int, str | None, str | None]]  # number of the line or row, its query, or what is wrong with it


def read_queries(path: str) -> Iterator[Chunk]:
    """The queries of a file, also gzipped, or of standard input where `path` is "-".

    Parquet, CSV and JSON arrays hold them in a column `query`, `prompt` or `question`; JSON lines, told by their suffix
    or by such a record among the first lines, in a field of that name; any other file has a query per line. Raises
    `UserError` where there is no such file, it holds binary data, or is not UTF-8.
    """
    if path == "-":
        if sys.stdin is None:
            raise UserError("standard input is closed; expected queries there, or a file with --input")
        return _lines(sys.stdin.buffer, "standard input", "")
    suffixes = path.lower().removesuffix(".gz")
    try:
        stream = open(path, "rb")  # noqa: SIM115, read below, chunk by chunk
        magic = stream.peek(4)[:4]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; expected a file of queries, or -") from error
    if magic == b"PAR1" or suffixes.endswith(TABLES):
        stream.close()
        return _rows(path)
    return _lines(gzip.open(stream) if magic[:2] == b"\x1f\x8b" else stream, path, suffixes)


def _rows(path: str) -> Iterator[Chunk]:
    table = open_table(Path(path))
    column = next((name for name in TEXT_COLUMNS if name in table.columns), None)
    if column is None:
        raise UserError(f"{path} has the columns {listed(table.columns)}; expected one of {', '.join(TEXT_COLUMNS)}")
    number = 0
    for chunk in table.read([column]):
        yield [(number + i, *_checked(cell, column)) for i, cell in enumerate(chunk[column], start=1)]
        number += len(chunk[column])


def _lines(stream: BinaryIO, name: str, suffixes: str) -> Iterator[Chunk]:
    is_json, number, rest = None, 0, b""
    try:
        with stream:
            while data := stream.read1(READ_AT_ONCE):
                *lines, rest = (rest + data).split(b"\n")
                if lines and is_json is None:  # half a line says nothing
                    is_json = suffixes.endswith(JSON_LINES) or any(map(_is_record, lines))
                if lines:
                    yield [(i, *_parsed(line, i, name, is_json)) for i, line in enumerate(lines, start=number + 1)]
                number += len(lines)
            if rest:
                is_json = suffixes.endswith(JSON_LINES) or _is_record(rest) if is_json is None else is_json
                yield [(number + 1, *_parsed(rest, number + 1, name, is_json))]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {name}: {error}; expected whole lines of text, also gzipped") from error


def _is_record(line: bytes) -> bool:
    """Whether a line says that its file is JSON lines."""
    if not line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        return False
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # no UTF-8 either
        return False
    return bool(set(record).intersection(TEXT_COLUMNS))


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
    query = valid_unicode(cell).strip()
    return (query, None) if query else (None, "empty")
