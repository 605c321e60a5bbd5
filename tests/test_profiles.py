"""Profiles from files: standardised by hand, missing cells, models without a row, and what is refused."""

import numpy as np
import pytest

from support.files import UserError
from support.profiles import read_profiles, standardise

CSV = 'model,maker,mmlu,gsm8k\na,X,50,1\n"b, c",Y,70,\norg/d,Z,60,4\nunused,Z,1000,NA\n'


@pytest.fixture
def write(tmp_path):
    def to(text, name="profiles.csv"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return to


def test_scores_are_standardised_over_the_models_of_the_battles(write):
    profiles = read_profiles(write(CSV))
    assert profiles.columns == ["mmlu", "gsm8k"]
    facts = profiles.facts(["a", "b, c", "org/d"])
    assert facts["mean"] == [60, 2.5]
    np.testing.assert_allclose(facts["scale"], [np.sqrt(200 / 3), 1.5])
    table = standardise(profiles.of(["a", "b, c", "org/d"]), facts)
    high = 10 / np.sqrt(200 / 3)
    np.testing.assert_allclose(table, [[-high, -1], [high, np.nan], [0, 1]])


def test_a_model_without_a_row_is_an_error_that_names_it_or_is_missing_throughout(write):
    profiles = read_profiles(write(CSV))
    with pytest.raises(UserError, match=r"has no row for e, f; .*--allow_missing_profiles"):
        profiles.of(["a", "f", "e"])
    assert np.isnan(profiles.of(["f"], allow_missing=True)).all()
    facts = profiles.facts(["a", "org/d", "f"])  # which does not count
    assert facts["mean"] == [55, 2.5]


def test_a_benchmark_on_which_all_are_equal_says_nothing(write):
    profiles = read_profiles(write("model_name,x,y\na,3,0.1\nb,3,0.1\nc,3,0.1\n"))  # three times 0.1 is not 0.3
    facts = profiles.facts(["a", "b", "c"])
    assert facts["scale"] == [np.inf, np.inf]
    np.testing.assert_allclose(facts["mean"], [3.0, 0.1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name,x\na,3\n", "has the columns name, x; expected `model`"),
        ("model,id\na,3\n", "has the columns id, model; expected a column of numbers"),
        ("model,x\na,high\n", "has the columns model, x; expected"),
        ("model,x\na,3\na,4\n", "two rows of a"),
        ("model,x\n,3\n", "a row without a model's name"),
        ("model,x\n", "no row"),
        ("model,x\na,3,4\n", "3 cells"),
    ],
)
def test_what_is_no_table_of_profiles_is_refused(write, text, expected):
    with pytest.raises(UserError, match=expected):
        read_profiles(write(text))


def test_a_benchmark_without_a_number_for_any_model_in_use_is_refused(write):
    with pytest.raises(UserError, match="gsm8k has no number for any model of the battles"):
        read_profiles(write(CSV.replace("NA", "7"))).facts(["b, c"])


@pytest.mark.parametrize("cell", ["1e300", "inf", "5%", "five"])
def test_a_benchmark_in_which_one_cell_is_no_number_is_an_error_that_names_the_cell(write, cell):
    with pytest.raises(UserError, match=f"has '{cell}' for b in x; expected a finite number, or an empty cell"):
        read_profiles(write(f"model,x,y\na,1,1\nb,{cell},2\n"))


@pytest.mark.parametrize("cell", ["", "NA", "nan", "null"])
def test_what_tables_write_for_a_missing_number_is_missing(write, cell):
    profiles = read_profiles(write(f"model,x,y\na,1,1\nb,{cell},2\n"))
    np.testing.assert_array_equal(profiles.of(["b"]), [[np.nan, 2]])


def test_a_new_models_own_file_may_lack_numbers(write):
    profiles = read_profiles(write("model,x,y\nnew,1,\n"))
    assert profiles.columns == ["x", "y"]
    np.testing.assert_array_equal(profiles.of(["new"]), [[1, np.nan]])
