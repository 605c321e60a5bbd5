"""The capability flags of `train.py`: initial vectors, and what they become."""

import numpy as np
import pandas as pd
import torch

from data_loader import load_battles, split_battles
from model_profiling import win_rate_profiles
from query_representation import query_features
from rankrouter import RankRouter
from support.data.battles import count_wins
from support.encoding.encoder import QueryEncoder

QUICK = ("--limit", "600", "--epochs", "2", "--num_clusters", "6", "--embedding_dim", "32", "--baselines", "none")
NAMES = [f"demo-model-{letter}" for letter in "abcdefghijkl"]


def test_win_rates_are_of_the_training_battles_in_the_clusters_of_the_router(run_demo, demo):
    flags = ("--capability_init", "win_rate", "--freeze_capabilities")
    history, output = run_demo(*QUICK, *flags)
    assert history["args"]["capability_dim"] == 6
    router = RankRouter.load(output / "best_model.pt")
    train_side = split_battles(load_battles(str(demo / "battles.parquet"), limit=600)[0], 42)[0].train
    queries = [train_side.queries[i] for i in train_side.unique_queries]
    encoder = QueryEncoder(str(demo / "encoder"), torch.device("cpu"), dtype="float32")
    features = query_features(queries, encoder.embed(queries)[0], router.config.surface_features)
    clusters = router.query_tower.inputs(features)[1].numpy()  # (Qt,)
    (pairs,) = train_side.chunks()
    wins = count_wins(clusters[pairs.row], *pairs[1:], num_models=12)
    expected = win_rate_profiles(wins, 12, 6)
    torch.testing.assert_close(router.model_tower.capability.weight.double(), expected, atol=0.01, rtol=0)
    torch.testing.assert_close(router.metadata.profiles["known"], expected, atol=0.01, rtol=0)


def test_benchmark_scores_are_standardized_and_stay_fixed_if_frozen(run_demo, tmp_path):
    """A file of two benchmarks: one cell of model a is missing, and model l has no row."""
    scores = pd.DataFrame({"model": NAMES[:11], "mmlu": np.arange(11.0) ** 2, "gsm8k": [None, *range(10)]})
    scores.to_csv(tmp_path / "profiles.csv", index=False)
    mmlu, gsm8k = np.arange(11.0) ** 2, np.arange(10.0)
    expected = np.zeros((12, 2))
    expected[:11, 0] = (mmlu - mmlu.mean()) / mmlu.std()
    expected[1:11, 1] = (gsm8k - gsm8k.mean()) / gsm8k.std()
    missing = np.zeros((12, 2), bool)
    missing[0, 1] = missing[11] = True
    for frozen in ((), ("--freeze_capabilities",)):
        profiles = ("--capability_file", str(tmp_path / "profiles.csv"), "--allow_missing_profiles")
        history, output = run_demo(*QUICK, *profiles, *frozen)
        assert history["args"]["capability_dim"] == 2
        tower = RankRouter.load(output / "best_model.pt").model_tower
        weights = tower.capability.weight.detach().numpy()
        assert (weights[missing] == 0).all(), frozen
        assert np.array_equal(tower.capability_mask.numpy() == 0, missing), frozen
        if frozen:
            np.testing.assert_allclose(weights, expected, atol=1e-6)
        else:
            moved = np.abs(weights - expected)[~missing]
            assert (moved[np.abs(expected[~missing]) > 1e-6] > 0).all()
            assert moved.max() < 0.1


def test_frozen_random_vectors_are_those_of_the_seed(run_demo):
    weights = {}
    for flags in ((), ("--freeze_capabilities",), ("--freeze_capabilities", "--lr", "0.001")):
        _, output = run_demo(*QUICK, *flags)
        weights[flags] = RankRouter.load(output / "best_model.pt").model_tower.capability.weight
    plain, frozen, faster = weights.values()
    assert torch.equal(frozen, faster)
    assert not torch.equal(plain, frozen)
    torch.testing.assert_close(plain, frozen, atol=0.1, rtol=0)
