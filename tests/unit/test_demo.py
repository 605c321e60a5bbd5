"""The built-in demo: its true skills, and that it is the same wherever and whenever it is generated."""

import json

import numpy as np
import pytest

import metrics
import support.data.demo
from data_loader import load_battles
from support.data.demo import FILES, demo_folder, true_skills


def test_the_fixed_skills_are_the_best_that_ignore_the_query(demo):
    names = [f"demo-model-{letter}" for letter in "abcdefghijkl"]
    truth = json.loads((demo / "truth.json").read_text())
    _, fixed = true_skills(demo, [], names)
    skills = np.array(truth["skills"])
    a, b = np.triu_indices(12, 1)
    p = 1 / (1 + np.exp(skills[:, b] - skills[:, a]))  # (topics, pairs)

    def expected_loss(s):
        d = s[a] - s[b]
        return np.mean(p * np.logaddexp(0, -d) + (1 - p) * np.logaddexp(0, d))

    rng = np.random.default_rng(0)
    others = [skills.mean(0), *(fixed + rng.normal(0, 0.1, 12) for _ in range(50))]
    assert all(expected_loss(fixed) < expected_loss(other) for other in others)


def test_the_true_margins_are_the_log_odds_that_drew_the_outcomes(demo):
    battles, _ = load_battles(str(demo / "battles.parquet"))
    decisive = battles.select(battles.outcome != 0.5, None)
    skills, _ = true_skills(demo, battles.queries, battles.model_names)
    d = skills[decisive.query_idx, decisive.model_a_idx] - skills[decisive.query_idx, decisive.model_b_idx]
    assert metrics.fit_temperature(d, decisive.outcome) == pytest.approx(1, abs=0.08)
    assert 0.03 < np.mean(battles.outcome == 0.5) < 0.3


def test_the_demo_is_the_same_wherever_it_is_written_and_a_lost_file_is_generated_again(tmp_path, monkeypatch):
    monkeypatch.setattr(support.data.demo, "NUM_QUERIES", 60)
    first, second = (demo_folder(str(tmp_path / name)) for name in ("first", "second"))
    files = {path.relative_to(first): path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert len(files) >= len(FILES) == 5
    for lost in (None, *FILES):
        if lost is not None:
            (second / lost).unlink()
        assert demo_folder(str(tmp_path / "second")) == second
        assert all((second / file).read_bytes() == content for file, content in files.items()), lost
    other = demo_folder(str(tmp_path / "first"), seed=1)
    assert other.name != first.name
    assert (other / "truth.json").read_bytes() != (first / "truth.json").read_bytes()
