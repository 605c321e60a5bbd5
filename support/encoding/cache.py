"""Embeddings on disk, addressed by content: a query that was encoded once is read from then on.

    <cache folder>/embeddings/<encoder>/encoder.json              the encoder and its options
                                        000000-<hash>.safetensors a shard: `keys` (n, 32), `embeddings` (n, H)

A shard is named by its number and its SHA-256, is written beside its place and renamed, and never changes. So any
number of runs can share a folder without a lock: where several stored the same query, the lowest name counts.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from support.system.errors import UserError, one_line, reason
from support.system.files import atomic_write, folder_path, make_folder, remove_leftovers, user_cache_folder

FORMAT_VERSION = 2  # of the shards, and of the arithmetic from text to embedding, unless only rounding differs

SECONDS_PER_SHARD = 5  # of encoding; a killed run loses at most these
SHARD_NAME = re.compile(r"[0-9]{6}-[0-9a-f]{64}\.safetensors")


def encoders_folder(cache_dir: str | Path) -> Path:
    """The folder of all encoders' parts. Raises `UserError` where `cache_dir` is not the path of a folder."""
    return folder_path(cache_dir, "--cache_dir") / "embeddings"


def query_keys(queries: list[str]) -> list[bytes]:
    """SHA-256 (32 bytes) of each query's text."""
    return [hashlib.sha256(query.encode()).digest() for query in queries]


class EmbeddingCache:
    """The embeddings of queries by one encoder with one set of options, on disk or in memory only.

    Args:
        cache_dir: the folder of all encoders' parts; None keeps embeddings in memory.
        usage: everything an embedding depends on beside the query: the encoder's fingerprint, pooling, maximum
            length, dtype. Other values are another part of the cache.

    Raises `UserError` where the folder cannot be created or written to.
    """

    def __init__(self, cache_dir: str | Path | None, usage: dict):
        self.usage, self.folder = usage, None
        if cache_dir is not None:
            content = json.dumps(usage | {"format_version": FORMAT_VERSION}, sort_keys=True)
            self.folder = encoders_folder(cache_dir) / hashlib.sha256(content.encode()).hexdigest()[:32]
            if not self.folder.is_dir():  # a folder that is only read need not be writable
                make_folder(self.folder, "--cache_dir")
            remove_leftovers(self.folder)
        self.names = set()  # file names of the shards that were opened
        self.shards = []  # their embeddings (n, H), memory-mapped
        self.starts = [0]  # the first row of each shard, and the number of rows
        self.row_of_key = {}
        self.pending, self.last_flush = [], time.monotonic()  # (keys, embeddings) not stored yet
        self.metadata = self._read_metadata()  # of an encoder that need not be loaded: `usage`, path, tokens_read

    def refresh(self) -> None:
        """Open the shards that were written since, by other runs too; a damaged one is renamed, with a warning."""
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            if path.name not in self.names and SHARD_NAME.fullmatch(path.name):
                self.names.add(path.name)
                if _is_other_than_file(path):
                    _set_aside(path, "is not a file", "its queries are encoded again")
                elif path.is_file():
                    self._open(path)

    def has(self, keys: list[bytes]) -> np.ndarray:
        """Which queries were stored at the last `refresh`: bool (Q,)."""
        return np.fromiter((key in self.row_of_key for key in keys), bool, len(keys))  # (Q,)

    def read(self, keys: list[bytes]):
        """Embeddings of stored queries: float32 tensor (Q, H). Raises `KeyError` where one is not stored."""
        rows = np.fromiter((self.row_of_key[key] for key in keys), np.int64, len(keys))  # (Q,)
        embeddings = self.shards[0].new_empty(len(keys), self.shards[0].shape[1])  # (Q, H)
        order = np.argsort(rows, kind="stable")  # (Q,)
        bounds = np.searchsorted(rows[order], self.starts)  # (shards + 1,)
        for shard, start, (low, high) in zip(self.shards, self.starts, itertools.pairwise(bounds), strict=False):
            embeddings[order[low:high]] = shard[rows[order[low:high]] - start]  # (rows of this shard, H)
        with suppress(OSError):  # the time of last use, where we may write
            if self.folder:
                os.utime(self.folder / "encoder.json")
        return embeddings

    def add(self, keys: list[bytes], embeddings) -> None:
        """Add embeddings (n, H) of queries; some seconds' worth are stored together, the rest by `flush`."""
        self.pending.append((keys, embeddings))
        if time.monotonic() - self.last_flush >= SECONDS_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Store what was added, as one shard. Raises as `store` does."""
        import torch

        if self.pending:
            keys, embeddings = zip(*self.pending, strict=True)
            self.pending = []
            self.store(list(itertools.chain(*keys)), torch.cat(embeddings))
        self.last_flush = time.monotonic()

    def store(self, keys: list[bytes], embeddings) -> None:
        """Store embeddings (n, H) of queries as a shard; those that are stored already keep theirs.

        Raises `UserError` where the shard cannot be written; the cache then is as it was before.
        """
        import torch
        from safetensors.torch import save

        for _ in range(3):  # again where somebody deleted the folder before the shard could be mapped
            self.refresh()
            new = np.flatnonzero(~self.has(keys))  # (n,)
            if not len(new):
                return
            if self.folder is None:
                self._append([keys[i] for i in new], embeddings[new])
                continue
            self.describe(self.metadata or {})
            rows = torch.frombuffer(bytearray().join(keys[i] for i in new), dtype=torch.uint8).view(-1, 32)  # (n, 32)
            data = save({"keys": rows, "embeddings": embeddings[new]}, metadata={"part": self.folder.name})
            number = max((int(name[:6]) for name in self.names), default=-1) + 1
            self._write(f"{number:06d}-{hashlib.sha256(data).hexdigest()}.safetensors", data)
        raise UserError(f"{self.folder} does not keep what is written to it; choose another folder with --cache_dir")

    def describe(self, metadata: dict) -> None:
        """Write `encoder.json` where it is missing or damaged. Raises `UserError` where it cannot be written."""
        self.metadata = self.metadata or self.usage | metadata
        if self.folder and self._read_metadata() is None:
            self._write("encoder.json", json.dumps(self.metadata, indent=1).encode())

    def _append(self, keys: list[bytes], embeddings) -> None:
        for row, key in enumerate(keys, start=self.starts[-1]):
            self.row_of_key.setdefault(key, row)
        self.shards.append(embeddings)
        self.starts.append(self.starts[-1] + len(embeddings))

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != path.stem[7:]:
                problem = "is damaged: its content is not what was written"
                _set_aside(path, problem, "its queries are encoded again")
                return
            with safe_open(path, framework="pt") as shard:
                if (shard.metadata() or {}).get("part") != self.folder.name:
                    raise ValueError("it belongs to another encoder's part")
                keys, embeddings = shard.get_tensor("keys").numpy().tobytes(), shard.get_tensor("embeddings")
        except FileNotFoundError:  # another run has set it aside
            return
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # but its content is what was written
            print(f"warning: {one_line(path)} cannot be used ({reason(error)}); skipped", file=sys.stderr)
            return
        self._append([keys[32 * row : 32 * row + 32] for row in range(len(embeddings))], embeddings)

    def _read_metadata(self) -> dict | None:
        if self.folder is None:
            return None
        path = self.folder / "encoder.json"
        if _is_other_than_file(path):
            _set_aside(path, "is not a file", "it is written again")
            return None
        try:
            metadata = json.loads(path.read_bytes())
            return metadata if type(metadata["tokens_read"]) is int and metadata["tokens_read"] > 0 else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # missing, or damaged: written again
            return None

    def _write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        try:
            if os.path.lexists(path) and not path.is_file():
                raise UserError(f"{path} is not a file")
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
            atomic_write(path, data)
        except (UserError, OSError) as error:
            advice = "Make room there, choose another folder with --cache_dir, or use --no_cache"
            raise UserError(f"{error}; what was stored before remains. {advice}") from error


class CombinedCache:
    """The caches of several pooled states of the same queries, as one; a query that one of them lacks is missing."""

    def __init__(self, caches: list[EmbeddingCache]):
        self.caches = caches

    @property
    def tokens_read(self) -> int | None:
        """How many tokens of a query are read, where that is known."""
        return None if self.caches[0].metadata is None else self.caches[0].metadata["tokens_read"]

    def refresh(self) -> None:
        """Refresh each cache."""
        for cache in self.caches:
            cache.refresh()

    def has(self, keys: list[bytes]) -> np.ndarray:
        """Of which queries all states were stored at the last `refresh`: bool (Q,)."""
        return np.all([cache.has(keys) for cache in self.caches], axis=0)  # (Q,)

    def add(self, keys: list[bytes], pooled: list) -> None:
        """Add all states, (n, width) each, of queries; some seconds' worth are stored together, the rest by `flush`."""
        for cache, states in zip(self.caches, pooled, strict=True):
            cache.add(keys, states)

    def flush(self) -> None:
        """Store what was added. Raises as `EmbeddingCache.store` does."""
        for cache in self.caches:
            cache.flush()

    def describe(self, metadata: dict) -> None:
        """Describe the encoder in each cache."""
        for cache in self.caches:
            cache.describe(metadata)


def _is_other_than_file(path: Path) -> bool:
    """Whether there is a pipe, a device or a folder in the place of a file: reading some of them would never end."""
    return path.exists() and not path.is_file()


def _set_aside(path: Path, problem: str, consequence: str) -> None:
    """Rename a file that cannot be used, and warn of it."""
    done = "set aside"
    try:
        path.rename(path.with_suffix(".damaged"))
    except OSError as error:
        done = f"not set aside ({error.strerror or error})"
    print(f"warning: {one_line(path)} {problem}; {done}, {consequence}", file=sys.stderr)


def parts(cache_dir: str | Path) -> list[dict]:
    """The cached parts, by encoder: the folder's name, `encoder.json`, number of queries, bytes, time of last use."""
    folders = [folder for folder in sorted(encoders_folder(cache_dir).glob("*/")) if not folder.is_symlink()]
    return [_part(folder) for folder in folders if re.fullmatch("[0-9a-f]{32}", folder.name)]  # others are not ours


def _part(folder: Path) -> dict:
    from safetensors import SafetensorError, safe_open

    row = {"name": folder.name, "metadata": {}, "queries": 0, "bytes": 0, "used": folder.stat().st_mtime}
    for path in (path for path in folder.iterdir() if path.is_file()):
        # A file may be damaged, or just being replaced.
        with suppress(OSError, ValueError, TypeError, RecursionError, SafetensorError):
            row["bytes"] += path.stat().st_size
            if path.name == "encoder.json":
                row["used"], metadata = path.stat().st_mtime, json.loads(path.read_bytes())
                row["metadata"] = {name: str(value) for name, value in dict(metadata).items()}
            elif SHARD_NAME.fullmatch(path.name):
                with safe_open(path, framework="np") as shard:
                    row["queries"] += shard.get_slice("keys").get_shape()[0]
    return row


def main(argv: list[str] | None = None) -> None:
    """List the cached embeddings by encoder, or delete one encoder's part."""
    from support.system.command_line import OneLineParser

    parser = OneLineParser("List the cached embeddings, by encoder; or drop those of one encoder.")
    parser.add_argument("--cache_dir", metavar="DIR", help="where they are, else the user's cache folder")
    parser.add_argument("--drop", metavar="NAME", help="delete this encoder's part, named by its first letters")
    args = parser.parse_args(argv)
    cache_dir = user_cache_folder() if args.cache_dir is None else args.cache_dir
    found = parts(cache_dir)
    if args.drop is not None:
        chosen = [part for part in found if args.drop and part["name"].startswith(args.drop)]
        if len(chosen) != 1:
            names = ", ".join(part["name"][:8] for part in found) or "none"
            raise UserError(f"--drop {args.drop!r} fits {len(chosen)} of the cached encoders; expected one of {names}")
        folder = encoders_folder(cache_dir) / chosen[0]["name"]
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise UserError(f"cannot delete all of {folder}: {error.strerror or error}") from error
        print(f"dropped {chosen[0]['queries']} queries, {chosen[0]['bytes'] / 1e6:.1f} MB")
        return
    print(f"{one_line(encoders_folder(cache_dir))}: {len(found)} encoders")
    if found:
        print(
            f"{'name':<10}{'queries':>9}{'MB':>9}  {'last use':<17}{'dtype':<10}{'pooling':<8}{'layer':<6}{'length':>7}"
            "  encoder"
        )
    for part in sorted(found, key=lambda part: -part["used"]):
        used, metadata = time.strftime("%Y-%m-%d %H:%M", time.localtime(part["used"])), part["metadata"]
        dtype, pooling, length, path = (metadata.get(name, "?") for name in ("dtype", "pooling", "max_length", "path"))
        size, layer = f"{part['queries']:>9}{part['bytes'] / 1e6:>9.1f}", metadata.get("layer", "last")
        print(f"{part['name'][:8]:<10}{size}  {used:<17}{dtype:<10}{pooling:<8}{layer:<6}{length:>7}  {one_line(path)}")


if __name__ == "__main__":
    from support.system.command_line import run_command

    run_command(main)
