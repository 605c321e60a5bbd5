"""Profiles from files: hand-computed standardization, missing cells, models without a row, refused files."""

import numpy as np
import pytest

from support.data.benchmarks import read_profiles, standardize
from support.system.errors import UserError

CSV = 'model,maker,mmlu,gsm8k\na,X,50,1\n"b, c",Y,70,\norg/d,Z,60,4\nunused,Z,1000,NA\n'


@pytest.fixture
def write(tmp_path):
    def to(text, name="profiles.csv"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return to


def test_scores_are_standardized_over_the_models_of_the_battles(write):
    profiles = read_profiles(write(CSV))
    assert profiles.columns == ["mmlu", "gsm8k"]
    statistics = profiles.statistics(["a", "b, c", "org/d"])
    assert statistics["mean"] == [60, 2.5]
    np.testing.assert_allclose(statistics["scale"], [np.sqrt(200 / 3), 1.5])
    table = standardize(profiles.of(["a", "b, c", "org/d"]), statistics)
    high = 10 / np.sqrt(200 / 3)
    np.testing.assert_allclose(table, [[-high, -1], [high, np.nan], [0, 1]])


def test_a_model_without_a_row_is_an_error_or_has_no_scores(write):
    profiles = read_profiles(write(CSV))
    with pytest.raises(UserError, match=r"has no row for e, f; .*--allow_missing_profiles"):
        profiles.of(["a", "f", "e"])
    assert np.isnan(profiles.of(["f"], allow_missing=True)).all()
    statistics = profiles.statistics(["a", "org/d", "f"])  # f is ignored
    assert statistics["mean"] == [55, 2.5]


def test_a_benchmark_on_which_all_are_equal_has_an_infinite_scale(write):
    profiles = read_profiles(write("model_name,x,y\na,3,0.1\nb,3,0.1\nc,3,0.1\n"))  # three times 0.1 is not 0.3
    statistics = profiles.statistics(["a", "b", "c"])
    assert statistics["scale"] == [np.inf, np.inf]
    np.testing.assert_allclose(statistics["mean"], [3.0, 0.1])


def test_files_that_are_not_profiles_are_refused(write):
    table = [
        ("name,x\na,3\n", "has the columns name, x; expected `model`"),
        ("model,id\na,3\n", "has the columns id, model; expected a column of numbers"),
        ("model,x\na,high\n", "has the columns model, x; expected"),
        ("model,x\na,3\na,4\n", "two rows of a"),
        ("model,x\n,3\n", "a row without a model's name"),
        ("model,x\n", "no row"),
        ("model,x\na,3,4\n", "3 cells"),
    ]
    for cell in ("1e300", "inf", "5%", "five"):
        expected = f"has '{cell}' for b in x; expected a finite number, or an empty cell"
        table.append((f"model,x,y\na,1,1\nb,{cell},2\n", expected))
    for text, expected in table:
        with pytest.raises(UserError) as error:
            read_profiles(write(text))
        assert expected in str(error.value), text


def test_a_benchmark_without_a_number_for_any_model_in_use_is_refused(write):
    with pytest.raises(UserError, match="gsm8k has no number for any model of the battles"):
        read_profiles(write(CSV.replace("NA", "7"))).statistics(["b, c"])


def test_the_usual_marks_of_a_missing_number_are_missing(write):
    for cell in ("", "NA", "nan", "null"):
        profiles = read_profiles(write(f"model,x,y\na,1,1\nb,{cell},2\n"))
        np.testing.assert_array_equal(profiles.of(["b"]), [[np.nan, 2]], cell)
    # A new model's own file may even lack all numbers of a benchmark.
    profiles = read_profiles(write("model,x,y\nnew,1,\n"))
    assert profiles.columns == ["x", "y"]
    np.testing.assert_array_equal(profiles.of(["new"]), [[1, np.nan]])
