"""Parquet, CSV and JSON files as columns and chunks of Python values; the first bytes give the format."""

import codecs
import csv
import glob
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from support.system.errors import UserError

SUFFIXES = (".parquet", ".csv", ".csv.gz", ".json", ".json.gz", ".jsonl", ".jsonl.gz")
CHUNK_ROWS = 4096
NO_NUMBER = ("", "NA", "N/A", "None", "null")  # what tables write where a number is missing

FORMATS = "parquet, comma-separated CSV in UTF-8, or JSON (the last two also gzipped)"
# The parsers' errors on a broken file.
BROKEN = (OSError, EOFError, ValueError, OverflowError, RecursionError, csv.Error, zlib.error, pa.ArrowException)

Chunk = dict[str, list]  # column name -> Python values of some consecutive rows


@dataclass(frozen=True)
class Table:
    """An opened file, which is read chunk by chunk."""

    file: Path
    columns: list[str]
    numeric: list[str]  # the columns of numbers
    chunks: Callable[[list[str]], Iterator[Chunk]]  # reads the columns of these names

    def first(self, *names: str) -> str | None:
        """The first of these names that is a column, or None."""
        return next((name for name in names if name in self.columns), None)

    def read(self, columns: list[str]) -> Iterator[Chunk]:
        """The values of these columns, `CHUNK_ROWS` rows at a time. Raises `UserError` if the file is broken."""
        with _user_errors(self.file):
            yield from self.chunks(columns)


def find_files(path: str) -> list[Path]:
    """The data files at `path` (a file, a folder, or a glob), sorted; a folder's hidden files are skipped."""
    place = Path(os.path.expanduser(path))
    if os.path.isfile(place):  # Path.is_file raises on a name that is too long
        return [place]
    if os.path.isdir(place) and path:  # Path("") is the current folder
        inside = sorted(file.relative_to(place) for file in place.rglob("*"))
        visible = [name for name in inside if not any(part.startswith(".") for part in name.parts)]
        return [place / name for name in visible if name.name.endswith(SUFFIXES) and (place / name).is_file()]
    return sorted(Path(name) for name in glob.glob(str(place), recursive=True) if os.path.isfile(name))


def open_table(file: Path) -> Table:
    """Open a file and find its columns. Raises `UserError` if it is in none of the known formats."""
    with _user_errors(file):
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


def as_number(value: object) -> float | None:
    """The number in a cell, perhaps infinite or NaN; true is 1, false is 0; None if it holds something else."""
    try:
        return float({"true": 1, "false": 0}.get(str(value).strip().lower(), value))
    except (TypeError, ValueError, OverflowError):
        return None


def _open_parquet(file: Path) -> Table:
    parquet = pq.ParquetFile(file)
    fields = list(parquet.schema_arrow)

    def chunks(columns: list[str]) -> Iterator[Chunk]:
        for batch in parquet.iter_batches(CHUNK_ROWS, columns=columns):
            yield {name: _as_text(batch.column(name)).to_pylist() for name in columns}

    kinds = (pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal, pa.types.is_boolean)
    numeric = [field.name for field in fields if any(kind(field.type) for kind in kinds)]
    return Table(file, _distinct([field.name for field in fields]), numeric, chunks)


def _as_text(column: pa.Array) -> pa.Array:
    return column.cast(pa.large_string()) if column.type in (pa.binary(), pa.large_binary()) else column


def _open_records(file: Path, records: Callable[[], Iterator[dict]]) -> Table:
    def chunks(columns: list[str]) -> Iterator[Chunk]:
        iterator = records()
        while rows := list(islice(iterator, CHUNK_ROWS)):
            yield {name: [row.get(name) for row in rows] for name in columns}

    # All rows are read: a column may start late, and a text may follow a thousand numbers.
    is_numeric = {}  # column -> whether every filled cell is a number; None if none is filled
    for number, record in enumerate(records(), start=1):
        if not isinstance(record, dict):
            raise ValueError(f"record {number} is {str(record)[:40]!r}, expected a JSON object")
        for name, cell in record.items():
            if is_numeric.setdefault(name) is not False and cell is not None and cell not in NO_NUMBER:
                is_numeric[name] = as_number(cell) is not None
    return Table(file, list(is_numeric), [name for name, numeric in is_numeric.items() if numeric], chunks)


def _json_lines(stream: TextIO) -> Iterator[dict]:
    with stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number} is not JSON: {error}") from error


def _json_array(stream: TextIO) -> Iterator[dict]:
    with stream:
        yield from json.load(stream)


def _csv_rows(stream: TextIO) -> Iterator[dict]:
    # Every cell stays text: "NA", "null" and "None" are queries here, not missing values.
    csv.field_size_limit(2**31 - 1)
    with stream:
        lines = csv.reader(stream, strict=True)
        rows = filter(None, lines)  # without blank lines
        header, cells = _distinct(next(rows, [])), None
        for cells in rows:
            if len(cells) != len(header):
                raise ValueError(f"line {lines.line_num} has {len(cells)} cells, the header {len(header)}")
            yield dict(zip(header, cells, strict=True))
        if cells is None:
            raise ValueError(f"it has the columns {', '.join(header) or 'none'} and no row")


def _distinct(names: list[str]) -> list[str]:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"several columns are named {', '.join(repeated)}")
    return names


@contextmanager
def _user_errors(file: Path) -> Iterator[None]:
    """Turn the parsers' errors on a broken file, which do not name it, into a `UserError`."""
    try:
        yield
    except BROKEN as error:
        raise UserError(f"cannot read {file}: {error}; expected {FORMATS}") from error
