"""Progress bars do no harm: lines in a log, and no error of a stream ends a run."""

import io

from support.system import command_line
from support.system.command_line import progress_bar


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
