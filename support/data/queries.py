"""Queries from text lines, JSON lines or tables, in chunks as they arrive; malformed ones with their line number."""

import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from support.data.cells import CONVERSATION, CONVERSATIONS, QUERIES, READ, as_text
from support.data.formats import open_table
from support.data.layouts import listed
from support.system.errors import UserError, one_line, valid_unicode

READ_AT_ONCE = 2**20  # bytes at most; from a pipe, as many as have arrived
LONGEST_LINE = 2**27  # bytes: a stream without line ends would never end
TABLES = (".parquet", ".csv", ".tsv", ".json")
JSON_LINES = (".jsonl", ".ndjson")

Chunk = list[tuple[int, str | None, str | None]]  # (line or row number from 1, query or None, problem or None)


def query_hash(query: str) -> bytes:
    """The SHA-256 (32 bytes) of a query's text with white space folded, so that spellings of it are one query."""
    return hashlib.sha256(" ".join(query.split()).encode()).digest()


def as_query(query: object, read: str, name: str) -> str:
    """The stripped text of a query: a text itself, or what `read` takes of chat messages, see `as_text`.

    Chat messages are a list of mappings with `role` and `content`. Raises `UserError`, which names the query, where
    there is no such text.
    """
    if read not in READ:
        raise UserError(f"read is {read!r}, expected one of {', '.join(READ)}")
    is_text = isinstance(query, str)
    if not is_text and not (isinstance(query, list) and query and all(isinstance(turn, dict) for turn in query)):
        raise UserError(f"{name} is {one_line(repr(query))[:80]}, expected text or a list of chat messages")
    text = valid_unicode(query if is_text else as_text(query, is_conversation=True, read=read)).strip()
    if not text:
        problem = "empty" if is_text else f"without text in the user's turn ({read}) of its {len(query)} messages"
        raise UserError(f"{name} is {problem}, expected text")
    return text


def read_queries(path: str, column: str | None = None, read: str = "first") -> Iterator[Chunk]:
    """Read queries from a file, perhaps gzipped, or from standard input if `path` is "-".

    Tables have a column of the query, found by its name as in training data, or named by `column`; JSON lines,
    recognized by the file's suffix or by such a record among the first lines, a field of that name; any other file has
    one query per line. Of conversations `read` takes a part, see `as_text`.

    Raises `UserError` if the file cannot be read, holds binary data, or is not UTF-8.
    """
    if path == "-":
        if sys.stdin is None:
            raise UserError("standard input is closed; expected queries there, or a file with --input")
        return _lines(sys.stdin.buffer, "standard input", column, True if column else None, read)
    name = path.lower().removesuffix(".gz")
    try:
        stream = open(path, "rb")  # noqa: SIM115, read below, chunk by chunk
        magic = stream.peek(4)[:4]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; expected a file of queries, or -") from error
    if magic == b"PAR1" or name.endswith(TABLES):
        stream.close()
        return _rows(path, column, read)
    is_json = True if name.endswith(JSON_LINES) or column else None
    return _lines(gzip.open(stream) if magic[:2] == b"\x1f\x8b" else stream, path, column, is_json, read)


def _rows(path: str, column: str | None, read: str) -> Iterator[Chunk]:
    table = open_table(Path(path))
    column = column or table.first(*QUERIES)
    if column not in table.columns:
        expected = f"{column}" if column else f"one of {', '.join(QUERIES)}, or its name with --query_column"
        raise UserError(f"{path} has the columns {listed(table.columns)}; expected {expected}")
    num_rows = 0
    for chunk in table.read([column]):
        yield [(i, *_checked(cell, column, read)) for i, cell in enumerate(chunk[column], start=num_rows + 1)]
        num_rows += len(chunk[column])


def _lines(stream: BinaryIO, name: str, column: str | None, is_json: bool | None, read: str) -> Iterator[Chunk]:
    """The queries of lines; whether they are JSON is decided from the first complete lines if `is_json` is None."""
    num_lines, rest = 0, b""
    try:
        with stream:
            while data := stream.read1(READ_AT_ONCE):
                *lines, rest = (rest + data).split(b"\n")
                _refuse_unfinished(rest, num_lines + len(lines) + 1, name)
                if lines and is_json is None:
                    records = [_record(line) for line in lines if line.strip()]
                    is_json = any(map(_field, records)) or None not in records
                if lines:
                    numbered = enumerate(lines, start=num_lines + 1)
                    yield [(i, *_parsed(line, i, name, column, is_json, read)) for i, line in numbered]
                num_lines += len(lines)
            if rest:
                is_json = _record(rest) is not None if is_json is None else is_json
                yield [(num_lines + 1, *_parsed(rest, num_lines + 1, name, column, is_json, read))]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {name}: {error}; expected whole lines of text, also gzipped") from error


def _refuse_unfinished(line: bytes, number: int, name: str) -> None:
    """Raise `UserError` on the start of a line that is binary data, or longer than any query."""
    if b"\0" in line:
        raise UserError(f"{name} holds binary data in line {number}; expected text or JSON, a query per line")
    if len(line) > LONGEST_LINE:
        raise UserError(f"line {number} of {name} is longer than {LONGEST_LINE} bytes; expected a query per line")


def _record(line: bytes) -> dict | None:
    """The JSON object in a line, or None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        return None
    return record if isinstance(record, dict) else None


def _field(record: dict | None, column: str | None = None) -> str | None:
    """The field of a JSON object that holds the query: `column`, or the first of `QUERIES`, in any letters."""
    if record is None or column is not None:
        return column if record is not None and column in record else None
    names = {name.strip().lower(): name for name in reversed(record)}
    return next((names[name] for name in QUERIES if name in names), None)


def _parsed(
    line: bytes, number: int, name: str, column: str | None, is_json: bool, read: str
) -> tuple[str | None, str | None]:
    """The query of a line, or the problem with it."""
    _refuse_unfinished(line, number, name)
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        advice = "convert it, with `iconv -t UTF-8` for example"
        raise UserError(f"{name} is not UTF-8 in line {number}; {advice}") from error
    if column is None and CONVERSATION.fullmatch(text):
        return _checked(text, "messages", read)
    if not is_json or not text.strip():
        query = valid_unicode(text).strip()
        return (query, None) if query else (None, "empty")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, f"no JSON ({error})"
    field = _field(record if isinstance(record, dict) else None, column)
    if field is None:
        return None, f"a JSON object with {column or ' or '.join(QUERIES)} is expected"
    return _checked(record[field], field, read)


def _checked(cell: object, name: str, read: str) -> tuple[str | None, str | None]:
    """The query in a cell or field, or the problem with it."""
    query = valid_unicode(as_text(cell, name.strip().lower() in CONVERSATIONS, read)).strip()
    if not query and cell not in (None, "") and str(cell).strip():
        return None, f"{name} is {str(cell)[:40]!r}, a text or a conversation is expected"
    return (query, None) if query else (None, "empty")
