"""Names on the command line; progress bars that do no harm."""

import argparse
import io
import os
import warnings

import pytest

from support.system import command_line
from support.system.command_line import comma_separated, run_command
from support.system.errors import UserError
from support.system.progress import progress_bar


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_bar_in_a_log_is_lines_and_on_a_stream_that_fails_it_is_not_drawn(monkeypatch):
    log = io.StringIO()
    for stream in (log, Full(), None):
        monkeypatch.setattr(command_line.sys, "stderr", stream)
        with progress_bar("epoch 3", total=5) as bar:
            bar.start_t = 0.0  # the delay is over
            bar.update(2)
            bar.refresh()
    assert log.getvalue().startswith("epoch 3:  40%")
    assert log.getvalue().endswith("\n")
    assert "\r" not in log.getvalue()


def test_a_name_with_a_comma_is_quoted_as_in_csv():
    assert comma_separated("a, b") == ["a", "b"]
    assert comma_separated('"b, c",a,"say ""hi"""') == ["b, c", "a", 'say "hi"']
    for text in ("", ",", "a,,b"):
        with pytest.raises(argparse.ArgumentTypeError, match="names separated by commas"):
            comma_separated(text)


def test_warnings_of_libraries_do_not_stand_before_a_one_line_error(capsys):
    def command():
        warnings.warn("of a parser", SyntaxWarning, stacklevel=1)
        raise UserError("the file is damaged")

    with warnings.catch_warnings(record=True) as caught, pytest.raises(SystemExit):
        warnings.simplefilter("always")
        run_command(command)
    assert not caught
    assert capsys.readouterr().err == "error: the file is damaged\n"


def test_threads_that_wait_sleep_unless_the_user_says_otherwise(monkeypatch):
    for given, expected in ((None, "passive"), ("active", "active")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if given:
            monkeypatch.setenv("OMP_WAIT_POLICY", given)
        seen = []
        run_command(lambda seen=seen: seen.append(os.environ["OMP_WAIT_POLICY"]))
        assert seen == [expected]
