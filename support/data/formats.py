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
from itertools import chain, compress, islice
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from support.data.cells import MODELS, QUERIES
from support.system.errors import UserError
from support.system.files import LFS_POINTER

SUFFIXES = (
    *(".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".json", ".json.gz"),
    *(".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"),
)
METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "croissant.json")
CHUNK_ROWS = 4096

FORMATS = "parquet, CSV in UTF-8 (with commas, semicolons or tabs), or JSON (the last two also gzipped)"
# The parsers' errors on a broken file.
BROKEN = (OSError, EOFError, ValueError, OverflowError, RecursionError, csv.Error, zlib.error, pa.ArrowException)

Chunk = dict[str, list]  # column name -> Python values of some consecutive rows


@dataclass(frozen=True, eq=False)
class Table:
    """An opened file, which is read chunk by chunk."""

    file: Path
    columns: list[str]
    chunks: Callable[[list[str]], Iterator[Chunk]]  # reads the columns of these names
    unreadable: frozenset[str] = frozenset()  # columns of images, dates and the like, which are no texts or numbers

    def first(self, *names: str) -> str | None:
        """The column that has the first of these names, also in other letters: `Prompt`; or None."""
        by_name = {column.strip().lower(): column for column in reversed(self.columns)}
        return next((by_name[name] for name in names if name in by_name), None)

    def read(self, columns: list[str]) -> Iterator[Chunk]:
        """The values of these columns, `CHUNK_ROWS` rows at a time. Raises `UserError` if the file is broken."""
        with _user_errors(self.file):
            yield from self.chunks(columns)


def find_files(path: str) -> tuple[list[Path], list[Path]]:
    """The data files at `path` (a file, a folder, or a glob), sorted, and the files of a folder that are none.

    A folder's hidden files are skipped.
    """
    place = Path(os.path.expanduser(path))
    if os.path.isfile(place):  # Path.is_file raises on a name that is too long
        return [place], []
    if os.path.isdir(place) and path:  # Path("") is the current folder
        inside = sorted(file.relative_to(place) for file in place.rglob("*"))
        names = [name for name in inside if not any(part.startswith(".") for part in name.parts)]
        files = [place / name for name in names if (place / name).is_file()]
        is_data = [file.name.lower().endswith(SUFFIXES) and file.name not in METADATA for file in files]
        return list(compress(files, is_data)), [file for file, kept in zip(files, is_data, strict=True) if not kept]
    return sorted(Path(name) for name in glob.glob(str(place), recursive=True) if os.path.isfile(name)), []


def stem(file: Path) -> str:
    """A data file's name without its suffix."""
    suffix = max((end for end in SUFFIXES if file.name.lower().endswith(end)), key=len, default="")
    return file.name[: len(file.name) - len(suffix)]


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
        _refuse_by_content(file, head)
        parse = {b"{": _json_objects, b"[": _json_array}.get(head[:1], _csv_rows)
        return _open_records(file, lambda: parse(opener(file, "rt", encoding="utf-8-sig", newline="")))


def _refuse_by_content(file: Path, head: bytes) -> None:
    """Raise an error that says what to do about a file that holds no table, from its first bytes."""
    if head.startswith(LFS_POINTER):
        raise UserError(f"{file} is a git-LFS pointer, not the data; run `git lfs pull` in its repository")
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        convert = f"pd.read_pickle({str(file)!r}).to_parquet({str(file.with_suffix('.parquet'))!r})"
        raise UserError(f"{file} is a pickle, and reading one can run code; if you trust it, convert it: {convert}")
    if not head or b"\0" in head:
        raise ValueError("it holds binary data" if head else "it is empty")


def _open_parquet(file: Path) -> Table:
    parquet = pq.ParquetFile(file)
    fields = list(parquet.schema_arrow)

    def chunks(columns: list[str]) -> Iterator[Chunk]:
        for batch in parquet.iter_batches(CHUNK_ROWS, columns=columns):
            yield {name: _as_text(batch.column(name)).to_pylist() for name in columns}

    names = _distinct([field.name for field in fields])
    return Table(file, names, chunks, frozenset(field.name for field in fields if _holds_no_values(field.type)))


def _holds_no_values(kind: pa.DataType) -> bool:
    return pa.types.is_temporal(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _as_text(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    if not any(kind(column.type) for kind in is_binary):
        return column
    return column.cast(pa.binary()).cast(pa.large_string())


def _open_records(file: Path, records: Callable[[], Iterator[dict]]) -> Table:
    def chunks(columns: list[str]) -> Iterator[Chunk]:
        iterator = records()
        while rows := list(islice(iterator, CHUNK_ROWS)):
            yield {name: [row.get(name) for row in rows] for name in columns}

    columns = {}  # all records are read: a column may start late
    for number, record in enumerate(records(), start=1):
        if not isinstance(record, dict):
            raise ValueError(f"record {number} is {str(record)[:40]!r}, expected a JSON object")
        columns |= dict.fromkeys(record)
    return Table(file, list(columns), chunks)


def _json_objects(stream: TextIO) -> Iterator[dict]:
    """The records of JSON lines, or of one object over the whole file."""
    with stream:
        lines = ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
        first = list(islice(lines, 2))
        if len(first) == 2 and _is_json(first[0][1]):
            for number, line in chain(first, lines):
                try:
                    yield json.loads(line, object_pairs_hook=_unique)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is not JSON: {error}") from error
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error
        else:
            text = "".join(line for _, line in chain(first, lines))
            yield from _records_in(json.loads(text, object_pairs_hook=_unique))


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object whose keys occur once."""
    record = dict(pairs)
    if len(record) < len(pairs):
        repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"an object has several values of {', '.join(repeated)}")
    return record


def _records_in(value: dict) -> list[dict]:
    """The records in one JSON object: a list in it, as `records` or `data`, or columns or rows as pandas writes them.

    The name of a model beside the list belongs to each of its records. Numbers beside it, such as mean scores, do not.
    """
    lists = [key for key in ("records", "data") if isinstance(value.get(key), list)]
    records = value[lists[0]] if lists else []
    if len(lists) > 1:
        raise ValueError("it has both `records` and `data`, expected one list")
    if lists and isinstance(value.get("columns"), list):  # pandas' "split"
        return [dict(zip(value["columns"], row, strict=True)) for row in records]
    if lists and not _belongs_to_one_query(value, records):
        shared = {key: cell for key, cell in value.items() if key in MODELS and isinstance(cell, str)}
        return [shared | record if isinstance(record, dict) else record for record in records]
    cells = list(value.values())
    if all(isinstance(cell, dict) for cell in cells):
        if all(key.isdigit() for key in value):  # pandas' "index"
            return cells
        if all(key.isdigit() for cell in cells for key in cell):  # pandas' "columns"
            rows = dict.fromkeys(key for cell in cells for key in cell)
            return [{name: column.get(row) for name, column in value.items()} for row in rows]
    if all(isinstance(cell, list) for cell in cells) and len({len(cell) for cell in cells}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*cells, strict=True)]
    return [value]


def _belongs_to_one_query(value: dict, records: list) -> bool:
    """Whether the records lack a query, and the object has it: then they are the scores of its models."""
    have_one = any(isinstance(record, dict) and not record.keys().isdisjoint(QUERIES) for record in records)
    return not have_one and not value.keys().isdisjoint(QUERIES)


def _json_array(stream: TextIO) -> Iterator[dict]:
    with stream:
        yield from json.load(stream, object_pairs_hook=_unique)


def _csv_rows(stream: TextIO) -> Iterator[dict]:
    # Every cell stays text: "NA", "null" and "None" are queries here, not missing values.
    csv.field_size_limit(2**31 - 1)
    with stream:
        lines = filter(str.strip, stream)
        head = next(lines, "")
        # The delimiter is the one that gives the most columns; one row holds at least the header's first line.
        delimiter = max(",\t;", key=lambda mark: len(next(csv.reader([head], delimiter=mark))))
        reader = csv.reader(chain([head], stream), delimiter=delimiter, strict=True)
        rows = filter(None, reader)  # without blank lines
        try:
            header, cells = _distinct(next(rows, [])), None
            for cells in rows:
                if len(cells) != len(header):
                    raise ValueError(f"line {reader.line_num} has {len(cells)} cells, the header {len(header)}")
                if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
                    raise ValueError(f"line {reader.line_num}: a quotation mark makes one cell of several lines")
                yield dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} is no CSV: {error}") from error
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
