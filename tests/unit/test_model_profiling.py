"""Capability vectors: win rates and fitted vectors against independent fits; masks, ID dropout, new models."""

import numpy as np
import torch
from scipy.optimize import minimize

from model_profiling import SMOOTHING, ModelTower, fitted_vector, win_rate_profiles
from support.data.battles import count_wins


def random_battles(strengths, num_battles, seed):
    """Clusters (N,), models (N, 2), outcomes (N,) drawn from strengths (M, K) by Bradley-Terry."""
    rng = np.random.default_rng(seed)
    num_models, num_clusters = strengths.shape
    models = np.array([rng.choice(num_models, 2, replace=False) for _ in range(num_battles)])
    clusters = rng.integers(num_clusters, size=num_battles)
    d = strengths[models[:, 0], clusters] - strengths[models[:, 1], clusters]
    outcome = (rng.random(num_battles) < 1 / (1 + np.exp(-d))).astype(float)
    return clusters, models, outcome


def profiles_of(clusters, models, outcome, num_models, num_clusters, known=None):
    """The win-rate profiles of a list of battles."""
    wins = count_wins(np.asarray(clusters), *np.asarray(models).T, np.asarray(outcome), num_models)
    return win_rate_profiles(wins, num_models, num_clusters, known)


def test_planted_strengths_are_recovered_in_each_cluster():
    planted = np.array([[2.0, -1.0], [0.0, 0.5], [-1.0, 1.5], [-1.0, -1.0]])
    battles = random_battles(planted, 40_000, seed=0)
    found = profiles_of(*battles, 4, 2).numpy()
    np.testing.assert_allclose(found - found.mean(0), planted - planted.mean(0), atol=0.12)


def test_win_rates_equal_an_independent_minimization():
    clusters, models, outcome = random_battles(np.random.default_rng(1).normal(size=(4, 3)), 150, seed=1)
    outcome[::7] = 0.5

    def loss(x):
        x = x.reshape(4, 4)
        strength = x[:, :1] + x[:, 1:]
        total = 0.5 * (x[:, 0] ** 2).sum() / 100 + 0.5 * SMOOTHING / 4 * (x[:, 1:] ** 2).sum()
        for k, (a, b), y in zip(clusters, models, outcome, strict=True):
            d = strength[a, k] - strength[b, k]
            total += y * np.logaddexp(0, -d) + (1 - y) * np.logaddexp(0, d)
        return total

    x = minimize(loss, np.zeros(16), tol=1e-12).x.reshape(4, 4)
    found = profiles_of(clusters, models, outcome, 4, 3)
    np.testing.assert_allclose(found.numpy(), x[:, :1] + x[:, 1:], atol=1e-3)


def test_a_win_counts_by_the_strength_of_the_beaten_model():
    known = torch.tensor([[3.0], [-3.0], [0.0]])
    zeros, outcome = torch.zeros(20, dtype=torch.int64), (torch.arange(20) % 2 == 0).double()
    against = {strong: torch.tensor([[3, 0 if strong else 1]] * 20) for strong in (True, False)}
    by_opponent = {
        strong: profiles_of(zeros, models, outcome, 4, 1, known)[-1].item() for strong, models in against.items()
    }
    assert by_opponent[True] > 1.5  # even with the strongest
    assert by_opponent[False] < -1.5


def test_a_new_model_has_the_mean_profile_without_battles_and_the_most_probable_one_with_them():
    known = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, -1.0]]).double()
    none = torch.zeros(0, dtype=torch.int64)
    profiles = profiles_of(none, none.reshape(0, 2), torch.zeros(0), 4, 2, known)
    assert torch.equal(profiles[:3], known)
    torch.testing.assert_close(profiles[3], known.mean(0))

    clusters, opponents = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 2, 1])
    outcome = torch.tensor([1.0, 0.0, 1.0, 0.5]).double()
    models = torch.stack([torch.full((4,), 3), opponents], 1)
    new = profiles_of(clusters, models, outcome, 4, 2, known)[3]
    p = torch.sigmoid(new[clusters] - known[opponents, clusters])
    pull = torch.zeros(2).double().index_add_(0, clusters, outcome - p)  # of the likelihood, per cluster
    deviation = pull / (SMOOTHING / 4)
    overall = pull.sum() * known.mean(1).var()
    torch.testing.assert_close(new, known.mean(0) + overall + deviation, atol=1e-5, rtol=0)


def test_known_models_of_equal_strength_leave_a_prior_of_minimal_variance():
    models = torch.tensor([[2, 0], [2, 1]])
    new = profiles_of(torch.zeros(2).long(), models, torch.ones(2), 3, 1, torch.ones(2, 1))[2]
    assert 1 < new.item() < 1.3


def test_a_fitted_vector_is_the_prior_mean_without_battles_and_the_posterior_mean_with_them():
    torch.manual_seed(0)
    vectors, target, weight = torch.randn(4, 3).double(), torch.tensor([1.0, -2.0, 0.5]).double(), 7.0
    torch.testing.assert_close(fitted_vector(vectors, 2.0, lambda v: 0 * v.sum()), vectors.mean(0))
    found = fitted_vector(vectors, 2.0, lambda v: weight / 2 * (v - target).square().sum())
    covariance = 4.0 * torch.cov(vectors.T)  # spread 2
    gain = covariance @ torch.linalg.inv(covariance + torch.eye(3) / weight)  # of a Gaussian observation
    torch.testing.assert_close(found, vectors.mean(0) + gain @ (target - vectors.mean(0)), atol=1e-5, rtol=0)


def test_ids_are_dropped_only_in_training_and_capability_vectors_never():
    tower = ModelTower(400, embedding_dim=6, capability_dim=3, id_dropout=0.25)
    with torch.no_grad():
        tower.unknown_id.fill_(9.0)
    torch.manual_seed(0)
    features = tower.train().features()
    dropped = (features[:, 3:] == 9.0).all(1)
    assert 0.18 < dropped.float().mean() < 0.32
    assert torch.equal(features[:, :3], tower.capability.weight)
    assert torch.equal(features[~dropped, 3:], tower.model_id.weight[~dropped])
    assert torch.equal(tower.eval().features()[:, 3:], tower.model_id.weight)
    features.sum().backward()
    assert torch.equal(tower.unknown_id.grad, dropped.sum().expand(6).float())


def test_no_id_is_dropped_unless_models_have_both_parts():
    for part in ("use_model_id", "use_capability"):
        tower = ModelTower(5, embedding_dim=6, capability_dim=3, id_dropout=0.9, **{part: False}).train()
        assert tower.unknown_id is None, part
        assert torch.equal(tower.features(), tower.eval().features()), part


def test_a_missing_value_stays_0_in_training():
    tower = ModelTower(2, embedding_dim=6, capability_dim=3)
    tower.set_capabilities(torch.tensor([[1.0, float("nan"), 2.0], [0.5, 1.5, float("nan")]]))
    expected = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.5, 0.0]])
    assert torch.equal(tower.capability.weight, expected)
    assert torch.equal(tower.features()[:, :3], expected)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        tower().square().sum().backward()
        optimizer.step()
    changed = tower.features()[:, :3]
    assert torch.equal(changed == 0, expected == 0)
    assert not torch.equal(changed, expected)


def test_a_new_model_has_its_vector_and_the_unknown_id():
    torch.manual_seed(0)
    for dropout in (0.1, 0.0):
        tower = ModelTower(3, embedding_dim=6, capability_dim=2, id_dropout=dropout)
        expected = torch.zeros(6) if dropout else tower.model_id.weight.mean(0)
        before = tower.eval().features()
        tower.add_model(torch.tensor([0.5, float("nan")]))
        assert torch.equal(tower.features()[:3], before)
        assert torch.equal(tower.features()[3], torch.cat([torch.tensor([0.5, 0.0]), expected]))
        assert tower.capability_mask[3].tolist() == [1, 0]
        torch.testing.assert_close(tower.unknown_features(torch.tensor([[0.5, 0.0]]))[0], tower.features()[3])
