"""Parquet, CSV and JSON files as columns and chunks of Python values; the format is told by the first bytes."""

import codecs
import csv
import glob
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from support.files import UserError

SUFFIXES = (".parquet", ".csv", ".csv.gz", ".json", ".json.gz", ".jsonl", ".jsonl.gz")
CHUNK_ROWS = 4096
NO_NUMBER = ("", "NA", "N/A", "None", "null")  # what tables write where a number is missing

FORMATS = "parquet, comma-separated CSV in UTF-8, or JSON (the last two also gzipped)"
# What the parsers raise on a broken file.
BROKEN = (OSError, EOFError, ValueError, OverflowError, RecursionError, csv.Error, zlib.error, pa.ArrowException)

Chunk = dict[str, list]  # column name -> Python values of some consecutive rows


@dataclass(frozen=True)
class Table:
    """An opened file: its columns, those that hold numbers, and how to read some of them chunk by chunk."""

    file: Path
    columns: list[str]
    numeric: list[str]
    chunks: Callable[[list[str]], Iterator[Chunk]]

    def read(self, columns: list[str]) -> Iterator[Chunk]:
        """The values of some columns, `CHUNK_ROWS` rows at a time. Raises `UserError` on a broken file."""
        chunks = self.chunks(columns)
        while chunk := _reading(self.file, lambda: next(chunks, None)):
            yield chunk


def find_files(path: str) -> list[Path]:
    """The data files that `path` (a file, a folder, or a glob) stands for, sorted; hidden ones are passed over."""
    place = Path(os.path.expanduser(path))
    if os.path.isfile(place):  # unlike Path's own, it takes any string, however long
        return [place]
    if os.path.isdir(place) and path:  # no name is not this folder
        inside = sorted(file.relative_to(place) for file in place.rglob("*"))
        shown = [name for name in inside if not any(part.startswith(".") for part in name.parts)]
        return [place / name for name in shown if name.name.endswith(SUFFIXES) and (place / name).is_file()]
    return sorted(Path(name) for name in glob.glob(str(place), recursive=True) if os.path.isfile(name))


def open_table(file: Path) -> Table:
    """Open a file and learn its columns. Raises `UserError` where it is none of our formats."""
    return _reading(file, lambda: _open(file))


def as_number(value: object) -> float | None:
    """The number that a cell holds, true and false being 1 and 0, or None; it may be infinite or NaN."""
    try:
        return float({"true": 1, "false": 0}.get(str(value).strip().lower(), value))
    except (TypeError, ValueError, OverflowError):
        return None


def _open(file: Path) -> Table:
    with open(file, "rb") as stream:
        magic = stream.read(4)
    if magic == b"PAR1":
        return _open_parquet(file)
    opener = gzip.open if magic[:2] == b"\x1f\x8b" else open
    with opener(file, "rb") as stream:
        head = stream.read(65536).removeprefix(codecs.BOM_UTF8).lstrip()
    if not head or b"\0" in head:
        raise ValueError("it holds binary data" if head else "it is empty")
    parse = {b"{": _json_lines, b"[": _json_array}.get(head[:1], _csv_rows)
    return _open_records(file, lambda: parse(opener(file, "rt", encoding="utf-8-sig", newline="")))


def _open_parquet(file: Path) -> Table:
    parquet = pq.ParquetFile(file)
    fields = list(parquet.schema_arrow)

    def chunks(columns: list[str]) -> Iterator[Chunk]:
        for batch in parquet.iter_batches(CHUNK_ROWS, columns=columns):
            yield {name: _as_text(batch.column(name)).to_pylist() for name in columns}

    types = pa.types
    kinds = (types.is_floating, types.is_integer, types.is_decimal, types.is_boolean)
    numeric = [field.name for field in fields if any(kind(field.type) for kind in kinds)]
    return Table(file, _distinct([field.name for field in fields]), numeric, chunks)


def _as_text(column: pa.Array) -> pa.Array:
    is_bytes = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    return column.cast(pa.large_string()) if is_bytes else column


def _open_records(file: Path, records: Callable[[], Iterator[dict]]) -> Table:
    def chunks(columns: list[str]) -> Iterator[Chunk]:
        rest = records()
        while some := list(islice(rest, CHUNK_ROWS)):
            yield {name: [record.get(name) for record in some] for name in columns}

    # All rows are looked at: a column may begin late, and a text may follow a thousand numbers.
    numeric = {}  # column -> whether every filled cell is a number; None where none is filled
    for record in records():
        for name, cell in record.items():
            if numeric.setdefault(name) is not False and cell is not None and cell not in NO_NUMBER:
                numeric[name] = as_number(cell) is not None
    return Table(file, list(numeric), [name for name, holds in numeric.items() if holds], chunks)


def _json_lines(stream: TextIO) -> Iterator[dict]:
    with stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number} is not JSON: {error}") from error
                yield _json_object(record, number)


def _json_array(stream: TextIO) -> Iterator[dict]:
    with stream:
        for number, record in enumerate(json.load(stream), start=1):
            yield _json_object(record, number)


def _json_object(record: object, number: int) -> dict:
    if not isinstance(record, dict):
        raise ValueError(f"record {number} is {str(record)[:40]!r}, expected a JSON object")
    return record


def _csv_rows(stream: TextIO) -> Iterator[dict]:
    # Every cell stays text: "NA", "null" and "None" are queries here, not missing values.
    csv.field_size_limit(2**31 - 1)
    with stream:
        lines = csv.reader(stream, strict=True)
        header, num_rows = [], 0
        for cells in filter(None, lines):
            if not header:
                header = _distinct(cells)
            elif len(cells) != len(header):
                raise ValueError(f"line {lines.line_num} has {len(cells)} cells, the header {len(header)}")
            else:
                num_rows += 1
                yield dict(zip(header, cells, strict=True))
        if not num_rows:
            raise ValueError(f"it has the columns {', '.join(header) or 'none'} and no row")


def _distinct(names: list[str]) -> list[str]:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"several columns are named {', '.join(repeated)}")
    return names


def _reading(file: Path, step: Callable):
    """One step of reading; what the parsers raise on a broken file is the user's to mend, and names no file."""
    try:
        return step()
    except BROKEN as error:
        raise UserError(f"cannot read {file}: {error}; expected {FORMATS}") from error
