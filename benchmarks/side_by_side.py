"""Runs beside each other and beside a busy process: `python -m benchmarks.side_by_side`.

Nothing else should run on the machine meanwhile: whole runs of the demo are timed, in turn, each stage by itself.
"""

import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, print_header, report, seconds
from support.system.command_line import OneLineParser, run_command, whole_number

# What is timed, by flags; queries are cached unless they are encoded.
STAGES = {
    "towers": ["--baselines", "none"],
    "all baselines": ["--epochs", "1", "--baselines", "all"],
    "encoding": ["--epochs", "1", "--baselines", "none", "--no_cache"],
    "finetuning": [
        "--epochs",
        "1",
        "--tower_epochs",
        "0",
        "--finetune_encoder",
        "--limit",
        "800",
        "--baselines",
        "none",
    ],
}


def start(work: Path, name: str, flags: list[str]) -> subprocess.Popen:
    """A run of the demo, in a process of its own."""
    same = ["--demo", "--demo_dir", work / "demo", "--cache_dir", work / "cache", "--overwrite"]
    command = [sys.executable, "train.py", *same, "--output_dir", work / name, *flags]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(runs: list[subprocess.Popen]) -> None:
    """Wait for runs. Raises where one failed."""
    for run in runs:
        if run.wait():
            raise subprocess.CalledProcessError(run.returncode, run.args)


def measure(work: Path, flags: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of a run alone, of two at once, and of one beside a process that keeps a core busy, by round."""
    times = {"alone": [], "two at once": [], "beside a busy process": []}
    for _ in range(rounds):
        times["alone"].append(seconds(lambda: finish([start(work, "a", flags)])))
        times["two at once"].append(seconds(lambda: finish([start(work, name, flags) for name in "ab"])))
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            times["beside a busy process"].append(seconds(lambda: finish([start(work, "a", flags)])))
        finally:
            busy.kill()
            busy.wait()
    return times


def main(argv: list[str] | None = None) -> None:
    """Time the stages and print the table."""
    parser = OneLineParser("Measure what runs cost each other, as ratios to a run alone, side by side.")
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="of each comparison")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which to time")
    more = "further flags of train.py in one word: --flags='--data_path FILE --model_path FOLDER' instead of the demo's"
    parser.add_argument("--flags", type=shlex.split, default=[], help=more)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        finish(
            [start(work, "a", ["--epochs", "1", "--baselines", "none", *args.flags])]
        )  # writes the demo and the cache
        print_header()
        for stage in args.stages:
            times = measure(work, STAGES[stage] + args.flags, args.rounds)
            alone = statistics.median(times["alone"])
            for other, target in (("two at once", "<= 1.25 x"), ("beside a busy process", "<= 2.2 x")):
                ratio = statistics.median(b / a for a, b in zip(times["alone"], times[other], strict=True))
                report(f"{stage}, {other}", f"alone, {alone:.1f} s", f"{ratio:.2f} x", target)


if __name__ == "__main__":
    run_command(main)
