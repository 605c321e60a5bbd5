"""Seconds of each stage of a run on synthetic battles, and its peak of memory, as JSON: `benchmark.py scale` starts it.

One size in a process, so that the peak is its own.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.runs import tune_cpu

TOWERS = {
    "embedding_dim": 512,
    "num_clusters": 50,
    "cluster_dim": 32,
    "capability_dim": 64,
    "no_capability": False,
    "no_model_id": False,
    "dropout": 0.5,
    "id_dropout": 0.1,
    "random_start": False,
    "unscaled": False,
    "similarity_metric": "dot",
}


def write_synthetic(path: Path, num_battles: int) -> None:
    """Battles in the Arena layout, two of a query, with answers of a kilobyte."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    names = np.array([f"model-{i:02d}" for i in range(20)])
    answers = [{"role": "assistant", "content": f"{i} " * 400} for i in range(50)]
    writer = None
    for low in range(0, num_battles, 50_000):
        size = min(50_000, num_battles - low)
        a = rng.integers(20, size=size)  # (size,)
        turns = [[{"role": "user", "content": f"query number {(low + i) // 2}"}, answers[i % 50]] for i in range(size)]
        table = pa.table(
            {
                "model_a": names[a],
                "model_b": names[(a + rng.integers(1, 20, size)) % 20],
                "winner": rng.choice(["model_a", "model_b"], size),
                "conversation_a": turns,
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def main(path: str) -> None:
    """Print the measures of a run on the battles in a file."""
    import numpy as np
    import torch

    from data_loader import load_battles, split_battles
    from loss import bpr_loss
    from rankrouter import RankRouter
    from support.batches import BattleBatches, begin, to_tensors
    from train import evaluate, train_epoch

    tune_cpu()
    stages, clock = {}, time.perf_counter()

    def lap(name):
        nonlocal clock
        stages[name], clock = time.perf_counter() - clock, time.perf_counter()

    battles, _ = load_battles(path)
    lap("load")
    split, _ = split_battles(battles, 0)
    lap("split")
    torch.manual_seed(0)
    embeddings = torch.randn(len(split.train.queries), 16)  # (Q, H)
    router = RankRouter(split.train.model_names, 16, TOWERS)
    clock = time.perf_counter()
    router.query_tower.fit(embeddings[torch.from_numpy(np.unique(split.train.query_idx))], 0)
    points = router.query_tower.standardise(embeddings)  # (Q, H)
    cluster_idx = router.query_tower.assign(points)  # (Q,)
    lap("cluster")
    optimiser = torch.optim.AdamW(router.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    batches = BattleBatches(points, cluster_idx, to_tensors(split.train, points.device), 32)
    for _ in train_epoch(router, optimiser, bpr_loss, batches, begin(batches)):
        pass
    lap("epoch")
    asked = split.test.fought[0]
    evaluate(router, points[asked], cluster_idx[asked], split.test, 1.0)
    lap("evaluate")
    # Of Linux; the peak of `resource.getrusage` would be that of the process that started this one, if it is higher.
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])  # KiB
    print(json.dumps(stages | {"peak GB": peak / 2**20}))


if __name__ == "__main__":
    main(sys.argv[1])
