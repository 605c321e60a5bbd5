"""Training on frozen embeddings: flags, recipes, batches, single steps, and the curves of a training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import mixed_battles, written_out

import loss
import rankrouter
import support.training.items
import train
from data_loader import Battles
from rankrouter import RankRouter, RouterConfig
from support.data.battles import ScoreTable
from support.training.batches import BattleBatches
from support.training.checkpoint import TrainingState
from support.training.history import LearningCurves
from support.training.inputs import label_range, validation_interval
from support.training.items import BattleItems, RowItems, ScoreItems, make_items
from support.training.optimization import EMA
from support.training.options import parse_args, router_options

CPU = torch.device("cpu")


def test_the_defaults_are_the_contract():
    args = vars(parse_args([]))
    contract = {
        "data_path": "../data/chatbot_arena/data/train-00000-of-00001-cced8514c7ed782a.parquet",
        "model_path": "../model/Qwen2-0.5B",
        "output_dir": "./outputs",
        "batch_size": 32,
        "epochs": 10,
        "lr": 1e-4,
        "embedding_dim": 512,
        "margin": 1.0,
        "similarity_metric": "dot",
        "num_clusters": 50,
        "loss_type": "bpr",
        "seed": 42,
        "split_seed": 42,
        "ties": "drop",
        "split_by": "query",
        "max_length": 512,
        "pooling": "auto",
        "capability_dim": 64,
        "cluster_dim": 32,
    }
    assert {name: args[name] for name in contract} == contract
    assert RouterConfig(**router_options(parse_args([]))) == RouterConfig()


def test_the_original_recipe_resolves_its_flags_and_explicit_ones_win():
    original = {"dropout": 0.1, "id_dropout": 0.0, "ema_decay": 0.0, "eval_every": 0}
    defaults = vars(parse_args([]))
    for given in ({}, {"dropout": 0.5, "ema_decay": 0.9}, {"id_dropout": 0.1, "eval_every": 5}):  # 0.5 is the default
        flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        args = parse_args(["--recipe", "original", *flags])
        assert vars(args) == defaults | original | {"recipe": "original"} | given, given
        config = RouterConfig(**router_options(args))
        assert (config.dropout, config.id_dropout) == (args.dropout, args.id_dropout), given
        assert (config.scale_dot, config.zero_init) == (False, False), given


def test_the_original_recipe_starts_at_random_and_scales_a_cosine_alone():
    x, cluster_idx = torch.randn(3, 16), torch.tensor([0, 2, 1])
    for metric in ("dot", "cosine"):
        routers = {}
        for recipe in ("default", "original"):
            args = parse_args(["--recipe", recipe, "--similarity_metric", metric, "--num_clusters", "3"])
            routers[recipe] = RankRouter(["a", "b"], 16, RouterConfig(**router_options(args))).eval()
        router = routers["original"]
        last = [each.query_tower.mlp[-1].weight.abs().max().item() for each in routers.values()]
        assert last[0] < 1e-5 < 0.03 < last[1], metric
        q, m = router.query_tower(x, cluster_idx), router.model_tower()
        expected = q @ m.T
        if metric == "cosine":
            expected = 10 * expected / (q.norm(dim=1)[:, None] * m.norm(dim=1))
        torch.testing.assert_close(router(x, cluster_idx), expected, atol=1e-5, rtol=1e-4)


def state_of(items, model_names, num_queries, lr=0.1, batch_size=6, **config):
    """A training of a small router on some items, by plain gradient descent at the rate `lr`; and the embeddings."""
    torch.manual_seed(0)
    config = RouterConfig(num_clusters=0, embedding_dim=8, capability_dim=4, zero_init=False, **config)
    router, x = RankRouter(model_names, 4, config), torch.randn(num_queries, 4)
    x[:, 0] = torch.arange(num_queries)  # by which a test knows a query
    batches = BattleBatches(x, torch.zeros(num_queries, dtype=torch.int64), items, batch_size)
    optimizer = torch.optim.SGD(router.parameters(), lr=lr)
    return TrainingState(router, batches, optimizer, EMA([], 0.0), LearningCurves(), epochs=2), x


def make_state(num_battles=20, **options):
    """`state_of` one battle per query."""
    numbers = np.arange(num_battles)
    outcome = (numbers % 3 / 2).astype(np.float32)
    battles = Battles([f"{i}" for i in numbers], ["x", "y", "z"], numbers, numbers % 2, numbers % 2 + 1, outcome)
    return *state_of(BattleItems(battles, CPU), battles.model_names, num_battles, **options), battles


def train_epoch(state, *flags):
    """Take the steps of an epoch that are left; returns the loss of each."""
    args, losses = parse_args(list(flags)), []
    for batch in state.remaining_batches():
        losses.append(train.train_step(args, state, batch))
        state.record(losses[-1])
    return torch.stack(losses)


def test_each_epoch_has_its_own_order():
    state, _, _ = make_state()
    seen, forward = [], state.router.forward

    def watched(x, cluster_idx):
        seen.extend(x[:, 0].int().tolist())
        return forward(x, cluster_idx)

    state.router.forward = watched
    for _ in range(2):
        assert len(train_epoch(state)) == 4
        state.next_epoch()
    first, second = seen[:20], seen[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert len({tuple(order) for order in (first, second, range(20))}) == 3


def test_the_loss_of_an_epoch_is_the_mean_over_its_battles_also_where_the_last_batch_is_short():
    state, x, battles = make_state(lr=0, dropout=0.0, id_dropout=0.0)
    assert len(train_epoch(state, "--margin", "0.7")) == 4
    with torch.no_grad():
        scores = state.router(x, torch.zeros(20, dtype=torch.int64))
        a, b = (scores[torch.arange(20), torch.from_numpy(idx)] for idx in (battles.model_a_idx, battles.model_b_idx))
        expected = loss.bpr(a, b, torch.from_numpy(battles.outcome), 0.7).mean().item()
    assert state.mean_loss() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["bpr", "bce", "hinge"])
def test_a_step_descends_the_mean_loss_of_its_battles(loss_type):
    """Written out battle by battle, on the steps of an epoch, the last of which has two battles."""
    state, x, battles = make_state(dropout=0.0, id_dropout=0.0)
    twin, *_ = make_state(dropout=0.0, id_dropout=0.0)
    losses = train_epoch(state, "--loss_type", loss_type, "--margin", "0.7")
    router, zero = twin.router, torch.zeros(1, dtype=torch.int64)
    for numbers, step_loss in zip(state.order.split(6), losses, strict=True):
        total = 0.0
        for i in numbers.tolist():
            scores = router(x[i : i + 1], zero)[0]  # (M,)
            a, b, y = scores[battles.model_a_idx[i]], scores[battles.model_b_idx[i]], torch.tensor(battles.outcome[i])
            total = total + loss.LOSSES[loss_type](a, b, y, 0.7) / len(numbers)
        assert step_loss.item() == pytest.approx(total.item(), abs=1e-5)
        gradients = torch.autograd.grad(total, list(router.parameters()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(router.parameters(), gradients, strict=True):
                if gradient is not None:  # that of an unknown model's ID is not used here
                    parameter -= 0.1 * gradient
    start, *_ = make_state()
    for name, weight in state.router.named_parameters():
        torch.testing.assert_close(weight, router.get_parameter(name), atol=1e-5, rtol=1e-4)
    assert not torch.equal(state.router.model_tower.capability.weight, start.router.model_tower.capability.weight)


@pytest.mark.parametrize("loss_type", ["bpr", "bce", "hinge"])
def test_a_step_on_rows_is_that_on_their_pairs_as_single_battles(loss_type, monkeypatch):
    for single, ties, at_once in ((0, True, 1), (0, False, 2**20), (30, True, 200), (30, False, 2**20)):
        monkeypatch.setattr(support.training.items, "PAIRS_AT_ONCE", at_once)  # few: the rows of a step in parts
        battles, found = mixed_battles(single=single, ties=ties), []
        rows, pairs = make_items(battles, CPU, None), make_items(written_out(battles), CPU, None)
        assert (type(rows), type(pairs)) == (RowItems, BattleItems)
        assert (len(rows.counts), len(pairs.counts)) == (single + 40, len(battles))
        for items in (rows, pairs):
            names, options = battles.model_names, {"lr": 0.0, "batch_size": 1000, "dropout": 0.0, "id_dropout": 0.0}
            state, _ = state_of(items, names, 15, **options)
            (step_loss,) = train_epoch(state, "--loss_type", loss_type, "--margin", "0.7")
            assert state.batches.num_battles(state.planned[0]) == len(battles)
            assert items is pairs or (len(state.batches.parts(state.planned[0])) > 1) == (at_once < 2**20)
            gradients = [weight.grad for weight in state.router.parameters() if weight.grad is not None]
            found.append([step_loss, *gradients])
        for value, expected in zip(*found, strict=True):
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
        assert max(gradient.abs().max() for gradient in found[0][1:]) > 0.01


def test_validations_within_an_epoch_are_at_most_about_ten_however_large_the_data():
    for rows, interval in ((40, 100), (1_400 * 32, 100), (2_000 * 32, 200), (7_500 * 32, 800)):
        one = np.zeros(rows, np.int64)
        assert (
            validation_interval(Battles(["q"], ["x", "y"], one, one, one + 1, one.astype(np.float32)), 32) == interval
        )


def test_the_battles_of_a_row_are_its_pairs_of_models():
    battles = Battles(["p", "q"], ["x", "y", "z"], *np.zeros((3, 0), np.int64), np.zeros(0, np.float32))
    table = ScoreTable(np.array([1, 0]), np.array([[0.5, np.nan, 0.5], [0.1, 0.9, 0.1 + 1e-12]]))
    items = RowItems(replace(battles, table=table), CPU)  # in float32, where two of the second row are equal
    assert items.counts.tolist() == [1, 3]
    row, models, outcome = items.targets(torch.tensor([1, 0]))
    found = sorted(zip(row.tolist(), *models.T.tolist(), outcome.tolist(), strict=True))
    assert found == [(0, 1, 0, 1.0), (0, 1, 2, 1.0), (0, 2, 0, 1.0), (1, 0, 2, 0.5)]


def test_scores_are_labels_on_the_range_of_the_training_scores_and_missing_ones_are_left_out():
    assert label_range(np.array([[0.25, np.nan], [0.5, 1.0]])) == [0, 1]  # scores that are labels already
    assert label_range(np.array([[-0.25, np.nan], [0.5, 0.75]])) == [-0.25, 0.75]
    battles = Battles(["p", "q"], ["x", "y", "z"], *np.zeros((3, 0), np.int64), np.zeros(0, np.float32))
    scores = np.array([[1.0, np.nan, 5.0], [3.0, 2.0, np.nan]])
    battles = replace(battles, table=ScoreTable(np.array([1, 0]), scores))
    items = make_items(battles, CPU, label_range(scores))
    assert isinstance(items, ScoreItems)
    assert (items.query_idx.tolist(), items.counts.tolist()) == ([1, 0], [2, 2])
    row, models, labels = items.targets(torch.tensor([1, 0]))
    found = list(zip(row.tolist(), models.tolist(), labels.tolist(), strict=True))
    assert found == [(0, [0], 0.5), (0, [1], 0.25), (1, [0], 0.0), (1, [2], 1.0)]
    # A step takes the mean over the single scores.
    state, x = state_of(items, battles.model_names, 2, dropout=0.0, id_dropout=0.0)
    with torch.no_grad():
        logits = state.router(x, torch.zeros(2, dtype=torch.int64))[[0, 0, 1, 1], [0, 1, 0, 2]]
    label = torch.tensor([0.5, 0.25, 0.0, 1.0])
    expected = -(label * logits.sigmoid().log() + (1 - label) * (1 - logits.sigmoid()).log()).mean()
    torch.testing.assert_close(train_epoch(state, "--loss_type", "pointwise")[0], expected, atol=1e-5, rtol=1e-5)


def test_a_step_trains_with_dropout_also_after_an_evaluation():
    state, x, _ = make_state(num_battles=6, lr=0.0)
    state.router.score(x, torch.zeros(6, dtype=torch.int64))
    assert not state.router.training
    (first,) = train_epoch(state)
    assert state.router.training
    state.next_epoch()
    (second,) = train_epoch(state)
    assert first != second  # of the same battles and weights


def test_scores_do_not_depend_on_the_chunks_in_which_they_are_computed(monkeypatch):
    state, x, _ = make_state()
    zeros = torch.zeros(20, dtype=torch.int64)
    state.router.eval()
    expected = state.router(x, zeros).detach().double().numpy()  # (Q, M)
    for size in (rankrouter.ROWS_AT_ONCE, 7):
        monkeypatch.setattr(rankrouter, "ROWS_AT_ONCE", size)
        np.testing.assert_allclose(state.router.score(x, zeros), expected, atol=1e-5)


def test_the_earliest_of_equal_validations_is_the_best_and_patience_counts_from_it():
    curves = LearningCurves()
    aucs = [(0, 3, 0.5), (0, None, 0.5), (1, 3, 0.7), (1, 9, 0.6), (1, None, 0.7)]
    assert not curves.out_of_patience(1)
    best = [curves.add(epoch, step, 1.0, {"auc": auc}) for epoch, step, auc in aucs]
    assert best == [True, False, True, False, False]
    assert [auc for *_, auc in aucs] == [val["auc"] for *_, val in curves.in_order()]
    assert curves.out_of_patience(2)
    assert not curves.out_of_patience(3)
    assert not curves.out_of_patience(None)
