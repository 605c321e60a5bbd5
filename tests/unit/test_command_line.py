"""Progress bars do no harm: lines in a log, and no error of a stream ends a run."""

import io

import pytest

from support.system import command_line
from support.system.command_line import progress_bar


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def draw(monkeypatch, stream):
    monkeypatch.setattr(command_line.sys, "stderr", stream)
    with progress_bar("epoch 3", total=5) as bar:
        bar.start_t = 0.0  # the delay is over
        bar.update(2)
        bar.refresh()


def test_a_bar_in_a_log_is_lines(monkeypatch):
    log = io.StringIO()
    draw(monkeypatch, log)
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("epoch 3:  40%")
    assert log.getvalue().endswith("\n")
    assert "\r" not in log.getvalue()


@pytest.mark.parametrize("stream", [Full(), None])
def test_a_bar_on_a_stream_that_fails_is_not_drawn(monkeypatch, stream):
    draw(monkeypatch, stream)
