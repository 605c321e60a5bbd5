"""Prices: budgets against every possible weight, and what is refused."""

import itertools

import numpy as np
import pytest

from support.routing.cost import cheapest_first, choose, mean_price, read_prices, weight_for_budget
from support.system.errors import UserError


def test_the_budget_is_met_by_the_choice_of_the_highest_scores():
    rng = np.random.default_rng(0)
    for _ in range(30):
        scores, prices = rng.normal(size=(6, 3)), np.sort(rng.random(3))
        most, least = mean_price(scores, prices, 0.0), prices.min()
        budget = rng.uniform(least, most)
        weight = weight_for_budget(scores, prices, budget)
        chosen = choose(scores, prices, weight)
        spent, got = prices[chosen].mean(), scores[np.arange(6), chosen].sum()
        assert spent <= budget * (1 + 1e-9)
        # Of all 729 ways to choose, none that costs no more than this one scores more.
        for other in itertools.product(range(3), repeat=6):
            if prices[list(other)].mean() <= spent:
                assert scores[np.arange(6), list(other)].sum() <= got + 1e-9
        # And any lower weight would exceed the budget, unless the router meets it without prices.
        assert weight == 0 or mean_price(scores, prices, weight * (1 - 1e-9)) > budget


def test_a_budget_above_the_routers_own_price_changes_nothing():
    scores, prices = np.array([[1.0, 3.0], [2.0, 1.0]]), np.array([0.1, 1.0])
    assert weight_for_budget(scores, prices, 0.55) == 0
    assert weight_for_budget(scores, prices, 5.0) == 0
    # At 0.5 the first query chooses the cheaper model, which it does from this weight on.
    assert weight_for_budget(scores, prices, 0.5) == pytest.approx(2 / 0.9)
    with pytest.raises(UserError, match=r"less than the cheapest models cost, 0\.1 per query"):
        weight_for_budget(scores, prices, 0.09)


def test_of_equal_utilities_the_cheaper_is_chosen():
    assert choose(np.array([[1.0, 1.0]]), np.array([0.1, 0.2]), 0.0).tolist() == [0]
    names, prices = cheapest_first(["a", "b", "c"], ["a", "b", "c"], {"a": 3.0, "b": 1.0, "c": 2.0}, "prices.csv")
    assert names == ["b", "c", "a"]
    assert prices.tolist() == [1, 2, 3]


def test_prices_per_token_are_converted_to_a_query_with_its_answer(tmp_path):
    (tmp_path / "p.csv").write_text("model,price_per_million_tokens\na,10\nb,0.5\n")
    assert read_prices(str(tmp_path / "p.csv"), 2000.0) == pytest.approx({"a": 0.02, "b": 0.001})


def test_invalid_price_files_are_refused(tmp_path):
    for text, tokens, expected in (
        ("model,price\na,1\n", None, "has the columns model, price; expected `model` and one of"),
        ("model,price_per_query,price_per_million_tokens\na,1,2\n", None, "expected `model` and one of"),
        ("model,price_per_query\na,1\na,2\n", None, "two prices of a"),
        ("model,price_per_query\na,-1\n", None, "the price of a is '-1'; expected a number of at least 0"),
        ("model,price_per_query\na,free\n", None, "the price of a is 'free'"),
        ("model,price_per_query\na,nan\n", None, "the price of a is 'nan'"),
        ("model,price_per_million_tokens\na,1\n", None, "which needs --tokens_per_query"),
        ("model,price_per_query\na,1\n", 100.0, "which takes no --tokens_per_query"),
    ):
        (tmp_path / "p.csv").write_text(text)
        with pytest.raises(UserError) as error:
            read_prices(str(tmp_path / "p.csv"), tokens)
        assert expected in str(error.value), text


def test_every_model_needs_a_price_and_every_price_a_model():
    with pytest.raises(UserError, match=r"p.csv has no price of b; .* --models can choose"):
        cheapest_first(["a", "b"], ["a", "b"], {"a": 1.0}, "p.csv")
    with pytest.raises(UserError, match="of gtp-4, which the router does not know; the router knows a, gpt-4"):
        cheapest_first(["a"], ["a", "gpt-4"], {"a": 1.0, "gtp-4": 2.0}, "p.csv")
