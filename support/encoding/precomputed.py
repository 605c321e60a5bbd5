"""Precomputed embeddings, of an API or another machine: read from a file by query, in the place of an encoder."""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from support.data.cells import CONVERSATIONS, QUERIES, as_text
from support.data.formats import open_table
from support.data.layouts import listed
from support.data.queries import query_hash
from support.system.errors import UserError, one_line, reason, valid_unicode
from support.system.files import content_hash

EMBEDDINGS = ("embedding", "embeddings", "vector")  # columns of a parquet file
TABLES = (".parquet", ".csv", ".tsv", ".jsonl")  # of the queries beside an .npy file: their rows have an order
HASH = "query_sha256"  # a column in the place of the query's text
# Embeddings whose standardized dimensions are typically beyond these may be those of another encoder: mean squares of
# all-MiniLM-L6-v2 were from 0.4 to 1.5 on three sets of queries other than those of training.
MAX_SQUARE, MIN_VARIANCE, MANY_QUERIES = 4.0, 0.05, 30
MAX_DISTANCE = 0.5  # between embeddings of one query, relative to their norm: those of an API differ a little


class PrecomputedEmbeddings:
    """The embeddings of some queries, in the place of a `QueryEncoder`.

    Args:
        queries: Q texts, or the SHA-256 (hex) of each with white space folded.
        vectors: float (Q, H).
        path: where they are from, for messages and metadata.
        fingerprint: of the file.
        device: of what is computed from them.

    Raises `UserError` where they do not fit together, a vector is not finite, or a query is empty or has two very
    different ones.
    """

    def __init__(
        self,
        queries: list[str],
        vectors: np.ndarray,
        *,
        are_hashes: bool = False,
        path: str = "memory",
        fingerprint: str = "",
        device: str | torch.device = "cpu",
    ):
        if isinstance(queries, str):
            raise UserError("queries is one text, expected a list of texts")
        vectors = np.asarray(vectors)  # (Q, H)
        if vectors.dtype.kind not in "fiu" or vectors.ndim != 2 or len(vectors) != len(queries) or not vectors.size:
            shapes = f"{len(queries)} queries and {vectors.dtype} of shape {list(vectors.shape)}"
            raise UserError(f"{path} has {shapes}; expected numbers (Q, H) for Q queries")
        with np.errstate(over="ignore"):  # refused below
            vectors = torch.from_numpy(np.array(vectors, np.float32))  # (Q, H)
        if len(bad := (~vectors.isfinite().all(1)).nonzero()):
            raise UserError(f"{path}: the embedding in row {int(bad[0]) + 1} is not finite, as float32")
        self.path, self.vectors, self.device, self.dtype = path, vectors, torch.device(device), "float32"
        self.row_of_hash = {}
        for row, query in enumerate(queries):
            if not query.strip():
                raise UserError(f"{path} has no query in row {row + 1}; expected text, or its hash")
            key = query.strip().lower() if are_hashes else query_hash(valid_unicode(query)).hex()
            first = self.row_of_hash.setdefault(key, row)
            if first != row and (vectors[row] - vectors[first]).norm() > MAX_DISTANCE * vectors[first].norm():
                rows = f"in rows {first + 1} and {row + 1}"
                raise UserError(f"{path} has two different embeddings of one query, {rows}; keep one row per query")
        self.usage = {"fingerprint": fingerprint, "dtype": self.dtype, "precomputed": True}
        self.metadata = self.usage | {"path": path, "width": vectors.shape[1]}
        repeated = len(queries) - len(self.row_of_hash)
        self.description = f"none: embeddings of {len(self.row_of_hash)} queries from {path}"
        self.description += f"; of {repeated} rows with a query again, the first counts" if repeated else ""

    @classmethod
    def read(cls, path: str, device: str | torch.device = "cpu") -> "PrecomputedEmbeddings":
        """The embeddings in a parquet file, or in an .npy file (Q, H) beside a table of its queries.

        The parquet file has a column of the query, or of its hash, and one of `EMBEDDINGS`. The table has the name of
        the .npy file with another suffix, and its rows are in the same order. Raises `UserError` where they are not so.
        """
        file = Path(os.path.expanduser(path))
        if not os.path.isfile(file):
            raise UserError(f"no file of embeddings at {path}; expected parquet, or .npy beside a table of its queries")
        files = [file]
        if file.suffix == ".npy":
            files += [beside for end in TABLES if (beside := file.with_suffix(end)).is_file()]
            if len(files) != 2:
                tables = listed(each.name for each in files[1:])
                expected = f"{file.stem}.parquet, .csv or .jsonl, with the queries in the order of its rows"
                raise UserError(f"beside {path} there is {tables}; expected one table, {expected}")
        vectors = _of_npy(file) if file.suffix == ".npy" else _of_parquet(file)  # (Q, H)
        queries, are_hashes = _queries(files[-1])
        named = {"path": str(path), "fingerprint": content_hash(files), "device": device}
        return cls(queries, vectors, are_hashes=are_hashes, **named)

    def embed(self, queries: list[str]) -> tuple[torch.Tensor, int]:
        """Embeddings of queries, float32 (Q, H), and 0, as none is encoded. Raises `UserError` where one is missing."""
        return self.vectors[self.rows(queries)], 0  # (Q, H)

    def rows(self, queries: list[str]) -> list[int]:
        """The row of each query among the vectors, Q of them. Raises `UserError` where one is missing."""
        rows = [self.row_of_hash.get(query_hash(query).hex(), -1) for query in queries]  # (Q,)
        if missing := [query for query, row in zip(queries, rows, strict=True) if row < 0]:
            example = one_line(missing[0])[:60]
            raise UserError(
                f"{self.path} lacks {len(missing)} of {len(queries)} queries, such as {example!r}; add them"
            )
        return rows

    def warn_if_unlike(self, mean: torch.Tensor, scale: torch.Tensor) -> None:
        """Warn where they are unlike those of training, which had this mean and scale (H,)."""
        x = (self.vectors - mean) / scale  # (Q, H)
        square, variance = (float(each.median()) for each in (x.square().mean(0), x.var(0, correction=0)))
        if square > MAX_SQUARE or (len(x) >= MANY_QUERIES and variance < MIN_VARIANCE):
            message = f"mean square {square:.3g} and variance {variance:.3g}, medians over dimensions; training has 1"
            advice = "are they of the same encoder?"
            print(f"warning: {self.path}, standardized as in training: {message}; {advice}", file=sys.stderr)

    def release(self) -> None:
        """Nothing to free."""


def _queries(file: Path) -> tuple[list[str], bool]:
    """The queries of a table, and whether they are hashes."""
    table = open_table(file)
    column = table.first(HASH) or table.first(*QUERIES)
    if column is None:
        expected = f"{HASH}, or one of {', '.join(QUERIES)}"
        raise UserError(f"{file} has the columns {listed(table.columns)}; expected {expected}")
    is_hash, is_conversation = column.lower() == HASH, column.lower() in CONVERSATIONS
    cells = [cell for chunk in table.read([column]) for cell in chunk[column]]
    return [as_text(cell, is_conversation) for cell in cells], is_hash


def _of_npy(file: Path) -> np.ndarray:
    try:
        vectors = np.load(file, mmap_mode="r", allow_pickle=False)  # (Q, H)
    except Exception as error:  # a file of another kind raises anything
        raise UserError(f"{file} is no array that can be read ({reason(error)}); expected numbers (Q, H)") from error
    if not isinstance(vectors, np.ndarray):
        raise UserError(f"{file} holds several arrays; expected one of numbers (Q, H)")
    return vectors


def _of_parquet(file: Path) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
        columns = [name for name in schema.names if name.strip().lower() in EMBEDDINGS]
        if len(columns) != 1:
            message = f"{file} has the columns {listed(schema.names)}"
            raise UserError(f"{message}; expected one named {' or '.join(EMBEDDINGS)}")
        (column,) = columns
        kind = schema.field(column).type
        number = kind.value_type if pa.types.is_nested(kind) and hasattr(kind, "value_type") else None
        if number is None or not (pa.types.is_floating(number) or pa.types.is_integer(number)):
            raise UserError(f"{file}: `{column}` holds {kind}; expected lists of numbers")
        lists = pq.read_table(file, columns=columns)[column].combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{file} is not parquet ({reason(error)}); expected parquet, or an .npy beside a table"
        ) from error
    values = lists.flatten()  # (Q H,), without those that are null
    if lists.null_count or values.null_count:
        raise UserError(f"{file}: `{column}` has missing values; expected numbers")
    widths = pc.list_value_length(lists).unique()
    if len(widths) > 1:
        raise UserError(f"{file}: `{column}` has lists of {listed(map(str, widths))} numbers; expected one width")
    width = widths[0].as_py() if len(widths) else 0
    return values.to_numpy(zero_copy_only=False).reshape(len(lists), width)  # (Q, H)
