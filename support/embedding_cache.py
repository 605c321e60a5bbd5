"""Embeddings on disk, addressed by content: what an encoder once made of a query is read, not computed again.

    <cache folder>/embeddings/<encoder>/encoder.json              which encoder, and how it was used
                                        000000-<hash>.safetensors a shard: `keys` (n, 32), `embeddings` (n, H)

A shard is named by its number and its own SHA-256, is written beside its place and renamed, and never changes. So any
number of runs may share a folder without a lock: where several stored the same query, the lowest name counts.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from support.command_line import OneLineParser, run_command
from support.files import UserError, atomic_write, make_folder, remove_leftovers, user_cache_folder

FORMAT_VERSION = 2  # of the shards, and of the arithmetic from text to embedding that they hold

SECONDS_PER_SHARD = 5  # of encoding that a killed run loses at most
SHARD_NAME = re.compile(r"[0-9]{6}-[0-9a-f]{64}\.safetensors")


def encoders_folder(cache_dir: str | Path) -> Path:
    """The folder of all encoders' parts. Raises `UserError` where `cache_dir` is an empty string."""
    if not str(cache_dir):
        raise UserError("--cache_dir is empty; expected a folder")
    return Path(os.path.expanduser(cache_dir)) / "embeddings"


def query_keys(queries: list[str]) -> list[bytes]:
    """SHA-256 (32 bytes) of each query's text."""
    return [hashlib.sha256(query.encode()).digest() for query in queries]


class EmbeddingCache:
    """What one encoder, used in one way, made of queries.

    Args:
        cache_dir: the folder of all encoders' parts.
        usage: all that an embedding depends on beside the query: the encoder's fingerprint, pooling, maximum
            length, dtype. Other values are another part of the cache.

    Raises `UserError` where the folder cannot be made or written to.
    """

    def __init__(self, cache_dir: str | Path, usage: dict):
        self.usage = usage
        content = json.dumps(usage | {"format_version": FORMAT_VERSION}, sort_keys=True)
        self.folder = encoders_folder(cache_dir) / hashlib.sha256(content.encode()).hexdigest()[:32]
        if not self.folder.is_dir():  # one that is only read need not be writable
            make_folder(self.folder, "--cache_dir")
        remove_leftovers(self.folder)
        self.names = set()  # of the shards looked at
        self.shards = []  # their embeddings (n, H), memory-mapped
        self.starts = [0]  # rows in the shards before each, and in all
        self.row_of_key = {}
        self.facts = self._read_facts()

    def look_up(self, keys: list[bytes]) -> np.ndarray:
        """Which queries are stored: bool (Q,), those that other runs stored meanwhile too.

        A shard that is damaged is set aside with a warning on stderr; its queries then are not stored.
        """
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self.names and SHARD_NAME.fullmatch(path.name):
                self.names.add(path.name)
                self._open(path)
        return np.fromiter((key in self.row_of_key for key in keys), bool, len(keys))  # (Q,)

    def read(self, keys: list[bytes]):
        """Embeddings of stored queries: float32 tensor (Q, H). Raises `KeyError` where one is not stored."""
        import torch

        rows = np.fromiter((self.row_of_key[key] for key in keys), np.int64, len(keys))  # (Q,)
        embeddings = torch.empty(len(keys), self.shards[0].shape[1])  # (Q, H)
        order = np.argsort(rows, kind="stable")  # (Q,)
        bounds = np.searchsorted(rows[order], self.starts)  # (shards + 1,)
        for shard, start, (low, high) in zip(self.shards, self.starts, itertools.pairwise(bounds), strict=False):
            embeddings[order[low:high]] = shard[rows[order[low:high]] - start]  # (rows of this shard, H)
        with suppress(OSError):  # the time of last use, where we may write
            os.utime(self.folder / "encoder.json")
        return embeddings

    def store(self, keys: list[bytes], embeddings, facts: dict) -> None:
        """Write the embeddings (n, H) of some queries as a shard; what is stored already stays as it is.

        `facts` are what a run must know of an encoder that it does not load. Raises `UserError` where the shard
        cannot be written; the cache then is as it was before.
        """
        import torch
        from safetensors.torch import save

        for _ in range(3):  # again where somebody has dropped the part before the shard could be mapped
            self.describe(facts)
            new = np.flatnonzero(~self.look_up(keys))  # (n,)
            if not len(new):
                return
            array = np.frombuffer(b"".join(keys[i] for i in new), np.uint8).reshape(-1, 32)  # (n, 32)
            tensors = {"keys": torch.from_numpy(array.copy()), "embeddings": torch.from_numpy(embeddings[new])}
            data = save(tensors, metadata={"part": self.folder.name})
            number = max((int(name[:6]) for name in self.names), default=-1) + 1
            self._write(f"{number:06d}-{hashlib.sha256(data).hexdigest()}.safetensors", data)
        raise UserError(f"{self.folder} does not keep what is written to it; choose another folder with --cache_dir")

    def fill(self, keys: list[bytes], stored: np.ndarray, batches: Iterable, facts: dict) -> int:
        """Store batches as they come, indices into `keys` (B,) and embeddings (B, H), some seconds' worth in a shard.

        `stored` (Q,) is kept up with what all runs store. Returns how many queries were encoded that were not stored.
        """
        waiting, since, encoded = [], time.monotonic(), 0

        def flush():
            batch, vectors = (np.concatenate(part) for part in zip(*waiting, strict=True))  # (n,), (n, H)
            waiting.clear()
            self.store([keys[i] for i in batch], vectors, facts)
            stored[:] = self.look_up(keys)

        try:
            for batch in batches:
                waiting.append(batch)
                encoded += int((~stored[batch[0]]).sum())
                if time.monotonic() - since >= SECONDS_PER_SHARD:
                    flush()
                    since = time.monotonic()
        finally:  # what an error or Ctrl-C leaves is kept too
            if waiting:
                flush()
        return encoded

    def describe(self, facts: dict) -> None:
        """Write `encoder.json` where there is none, or none that can be read. Raises `UserError` where it cannot."""
        self.facts = self.facts or self.usage | facts
        if self._read_facts() is None:
            self._write("encoder.json", json.dumps(self.facts, indent=1).encode())

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != path.stem[7:]:
                path.rename(path.with_suffix(".damaged"))
                told = "is damaged: its content is not what was written; set aside, its queries are encoded again"
                print(f"warning: {path} {told}", file=sys.stderr)
                return
            with safe_open(path, framework="pt") as shard:
                if (shard.metadata() or {}).get("part") != self.folder.name:
                    raise ValueError("it belongs to another encoder's part")
                keys, embeddings = shard.get_tensor("keys").numpy().tobytes(), shard.get_tensor("embeddings")
        except FileNotFoundError:  # another run has set it aside
            return
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # but it is whole, for others to read
            print(f"warning: {path} cannot be used ({error}); passed over", file=sys.stderr)
            return
        for row in range(len(embeddings)):
            self.row_of_key.setdefault(keys[32 * row : 32 * row + 32], self.starts[-1] + row)
        self.shards.append(embeddings)
        self.starts.append(self.starts[-1] + len(embeddings))

    def _read_facts(self) -> dict | None:
        try:
            facts = json.loads((self.folder / "encoder.json").read_bytes())
            return facts if type(facts["tokens_read"]) is int and facts["tokens_read"] > 0 else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not begun, or damaged: written again
            return None

    def _write(self, name: str, data: bytes) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have dropped it meanwhile
            atomic_write(self.folder / name, data)
        except (UserError, OSError) as error:
            raise UserError(
                f"{error}; what was stored before stays. Make room there, or choose another folder with --cache_dir, "
                "or do without by --no_cache"
            ) from error


def parts(cache_dir: str | Path) -> list[dict]:
    """What is cached, by encoder: its folder's name, `encoder.json`, queries, shards, bytes, time of last use."""
    from safetensors import SafetensorError, safe_open

    found = []
    for folder in sorted(encoders_folder(cache_dir).glob("*/")):
        if not re.fullmatch("[0-9a-f]{32}", folder.name) or folder.is_symlink():  # not ours, and not ours to drop
            continue
        row = {"name": folder.name, "facts": {}, "queries": 0, "bytes": 0, "used": folder.stat().st_mtime}
        for path in folder.iterdir():
            # Damaged, or just being replaced.
            with suppress(OSError, ValueError, TypeError, RecursionError, SafetensorError):
                row["bytes"] += path.stat().st_size
                if path.name == "encoder.json":
                    row["used"], facts = path.stat().st_mtime, json.loads(path.read_bytes())
                    row["facts"] = {name: str(fact) for name, fact in dict(facts).items()}
                elif SHARD_NAME.fullmatch(path.name):
                    with safe_open(path, framework="np") as shard:
                        row["queries"] += shard.get_slice("keys").get_shape()[0]
        found.append(row)
    return found


def main(argv: list[str] | None = None) -> None:
    """List what is cached, or drop one encoder's part."""
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
    print(f"{encoders_folder(cache_dir)}: {len(found)} encoders")
    if found:
        print(f"{'name':<10}{'queries':>9}{'MB':>9}  {'last use':<17}{'dtype':<10}{'pooling':<8}{'length':>7}  encoder")
    for part in sorted(found, key=lambda part: -part["used"]):
        used, facts = time.strftime("%Y-%m-%d %H:%M", time.localtime(part["used"])), part["facts"]
        told = f"{facts.get('dtype', '?'):<10}{facts.get('pooling', '?'):<8}{facts.get('max_length', '?'):>7}"
        size = f"{part['queries']:>9}{part['bytes'] / 1e6:>9.1f}"
        print(f"{part['name'][:8]:<10}{size}  {used:<17}{told}  {facts.get('path', '?')}")


if __name__ == "__main__":
    run_command(main)
