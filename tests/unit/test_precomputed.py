"""Precomputed embeddings: files of them read by query, and everything in them that is refused."""

import hashlib

import numpy as np
import pandas as pd
import pytest
import torch

from support.encoding.precomputed import PrecomputedEmbeddings
from support.system.errors import UserError

QUERIES = ["How do I\n invert a matrix?", "Lentil soup, please", "naïve 猫"]
VECTORS = np.arange(6.0).reshape(3, 2)


def sha256(query):
    return hashlib.sha256(" ".join(query.split()).encode()).hexdigest()


def parquet(path, queries=QUERIES, vectors=VECTORS, column="prompt", name="embedding"):
    pd.DataFrame({column: queries, name: list(vectors)}).to_parquet(path / "e.parquet")
    return str(path / "e.parquet")


def npy(path, vectors=VECTORS, suffix="csv"):
    np.save(path / "e.npy", vectors)
    table = pd.DataFrame({"prompt": QUERIES})
    table.to_csv(path / "e.csv") if suffix == "csv" else table.to_json(path / "e.jsonl", orient="records", lines=True)
    return str(path / "e.npy")


@pytest.mark.parametrize(
    "write",
    [
        parquet,
        lambda path: parquet(path, vectors=VECTORS.astype(np.float32), name="Embeddings"),
        lambda path: parquet(path, list(map(sha256, QUERIES)), column="query_sha256"),
        lambda path: parquet(path, [sha256(query).upper() for query in QUERIES], column="query_sha256"),
        lambda path: parquet(path, [[{"role": "user", "content": query}] for query in QUERIES], column="messages"),
        npy,
        lambda path: npy(path, VECTORS.astype(np.float16), suffix="jsonl"),
        lambda path: npy(path, VECTORS.astype(np.int64)),
    ],
)
def test_a_query_has_the_vector_of_its_row_in_any_spelling_of_white_space(write, tmp_path):
    embeddings = PrecomputedEmbeddings.read(write(tmp_path))
    result, encoded = embeddings.embed([QUERIES[2], " How do I invert a   matrix? ", QUERIES[1]])
    assert result.dtype == torch.float32
    assert result.tolist() == [[4, 5], [0, 1], [2, 3]]
    assert encoded == 0
    assert embeddings.metadata["precomputed"]
    assert embeddings.metadata["width"] == 2


def test_a_missing_query_is_named(tmp_path):
    embeddings = PrecomputedEmbeddings.read(parquet(tmp_path))
    with pytest.raises(UserError, match=r"e.parquet lacks 2 of 3 queries, such as 'new one'; add them"):
        embeddings.embed(["new\none", QUERIES[0], "newer"])


def test_of_a_repeated_query_the_first_counts_unless_they_are_of_two_encoders(tmp_path):
    twice = [*QUERIES, "How do I invert a matrix?"]
    near, other = np.vstack([VECTORS, VECTORS[:1] + 0.01]), np.vstack([VECTORS, VECTORS[1:2]])
    embeddings = PrecomputedEmbeddings.read(parquet(tmp_path, twice, near))
    assert embeddings.embed(QUERIES)[0].tolist() == VECTORS.tolist()
    assert "of 1 rows with a query again, the first counts" in embeddings.description
    with pytest.raises(UserError, match="two different embeddings of one query, in rows 1 and 4; keep one row"):
        PrecomputedEmbeddings.read(parquet(tmp_path, twice, other))


def test_what_cannot_be_read_is_refused(tmp_path):
    def refused(path, message):
        with pytest.raises(UserError, match=message):
            PrecomputedEmbeddings.read(path)

    refused(str(tmp_path / "gone.parquet"), "no file of embeddings at .*; expected parquet")
    refused(parquet(tmp_path, column="text"), "has the columns embedding, text; expected query_sha256, or one of")
    refused(parquet(tmp_path, name="numbers"), "expected one named embedding or embeddings or vector")
    refused(parquet(tmp_path, vectors=[[1.0, 2.0], [3.0], [4.0, 5.0, 6.0]]), "lists of 1, 2, 3 numbers")
    refused(parquet(tmp_path, vectors=[[True, False]] * 3), r"holds list<.*bool>; expected lists of numbers")
    refused(parquet(tmp_path, vectors=[[[1.0]], [[2.0]], [[3.0]]]), "expected lists of numbers")
    refused(parquet(tmp_path, [], []), "expected lists of numbers")
    pd.DataFrame({"prompt": QUERIES, "vector": [*VECTORS], "embedding": [*VECTORS]}).to_parquet(
        tmp_path / "two.parquet"
    )
    refused(str(tmp_path / "two.parquet"), "columns embedding, prompt, vector; expected one named")
    refused(parquet(tmp_path, ["a", " ", "c"]), "has no query in row 2; expected text")
    refused(parquet(tmp_path, vectors=[[1.0, 2.0], None, [4.0, 5.0]]), "missing values")
    refused(parquet(tmp_path, vectors=[[1.0, 2.0], [np.inf, 1.0], [4.0, 5.0]]), "in row 2 is not finite")
    refused(parquet(tmp_path, vectors=[[1.0, 2.0], [1e300, 1.0], [4.0, 5.0]]), "in row 2 is not finite, as float32")
    refused(parquet(tmp_path, vectors=["a", "b", "c"]), "holds .*string; expected lists of numbers")
    refused(parquet(tmp_path, vectors=[["a"], ["b"], ["c"]]), "expected lists of numbers")
    (tmp_path / "e.parquet").unlink()
    refused(npy(tmp_path, VECTORS[:2]), r"has 3 queries and float64 of shape \[2, 2\]; expected numbers")
    refused(npy(tmp_path, VECTORS[0]), r"float64 of shape \[2\]; expected numbers")
    refused(npy(tmp_path, VECTORS * 1j), "has 3 queries and complex128")
    refused(npy(tmp_path, VECTORS.astype(str)), "expected numbers")
    np.save(tmp_path / "e.npy", np.array([{}], object), allow_pickle=True)
    refused(str(tmp_path / "e.npy"), "is no array that can be read")
    np.savez(tmp_path / "e.npz", VECTORS)
    (tmp_path / "e.npz").rename(tmp_path / "e.npy")
    refused(str(tmp_path / "e.npy"), "holds several arrays; expected one")
    refused(npy(tmp_path, suffix="jsonl"), "beside .*there is e.csv, e.jsonl; expected one table")
    (tmp_path / "e.csv").unlink(), (tmp_path / "e.jsonl").unlink()
    refused(str(tmp_path / "e.npy"), "there is none; expected one table")
    (tmp_path / "text").write_text("hello")
    refused(str(tmp_path / "text"), "is not parquet")
