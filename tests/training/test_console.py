"""What people read: the step line, its units, and outputs that fail."""

import errno
import io
import math
import re
import subprocess
import sys

import pytest

from fp8train.training.console import (
    Console,
    format_bytes,
    format_count,
    format_duration,
    format_percent,
    step_line,
)

METRICS = {
    "train/loss_mean": 4.12341,
    "optim/grad_norm": 1.2344,
    "optim/lr": 3e-4,
    "throughput/tokens_per_second_per_device": 12345.6,
    "throughput/tflops_per_device": 412.4,
    "throughput/mfu": 0.4169,
    "memory/peak_bytes": 41.2 * 2**30,
    "fp8/saturated": 0.00011,
    "fp8/flushed": 0.0123,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_whole_line() -> None:
    line = step_line(7, 2000, METRICS, mfu_peak="989 TFLOP/s (H100 SXM, BF16)", eta_s=3725)
    assert line == (
        "step    7/2000 | loss 4.1234 | grad norm 1.234 | lr 3.00e-04 | 12.3k tok/s/device | 412 TFLOP/s | "
        "MFU 41.7% of 989 TFLOP/s (H100 SXM, BF16) | mem 41.2 GiB | FP8 over 0.01% | under 1.23% | ETA 1h02m"
    )


def test_columns_without_a_number_are_left_out() -> None:
    assert (
        step_line(3, 10, {"train/loss_mean": 2.0, "fp8/flushed": 0.5})
        == "step  3/10 | loss 2.0000 | FP8 under 50.0%"
    )


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_non_finite_numbers_are_always_shown(value: float, shown: str) -> None:
    line = step_line(1, 1, {"train/loss_mean": value, "optim/grad_norm": value, "fp8/flushed": value})
    assert line == f"step 1/1 | loss {shown} | grad norm {shown} | FP8 under {shown}"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599.7, "1h00m"),
        (3725, "1h02m"),
        (183600, "2d03h"),
        (math.nan, "?"),
        (math.inf, "?"),
        (-1, "0s"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1.00k"),
        (12345, "12.3k"),
        (1.5e6, "1.50M"),
        (999_600, "1.00M"),
        (7e9, "7.00G"),
        (99_960, "100k"),
        (3.2e17, "320P"),
    ],
)
def test_counts(value: float, shown: str) -> None:
    assert format_count(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (512, "512 B"),
        (2048, "2.00 KiB"),
        (41.2 * 2**30, "41.2 GiB"),
        (1000 * 2**20, "0.98 GiB"),
        (2**53, "8192 TiB"),
    ],
)
def test_bytes(value: float, shown: str) -> None:
    assert format_bytes(value) == shown


@pytest.mark.parametrize(
    ("share", "shown"), [(0, "0.00%"), (1e-9, "<0.01%"), (0.0123, "1.23%"), (1.0, "100.0%")]
)
def test_percent(share: float, shown: str) -> None:
    assert format_percent(share) == shown


def printed(stream: io.StringIO) -> str:
    Console(enabled=True, total_steps=5, stream=stream).step(1, {"train/loss_mean": math.nan})
    return stream.getvalue()


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert printed(Terminal()) == "step 1/5 | \033[1;31mloss nan\033[0m\n"
    assert "\033" not in printed(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert "\033" not in printed(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in printed(Terminal())
    assert re.sub(r"\033\[[0-9;]*m", "", printed(Terminal())) == printed(Terminal())


def test_other_ranks_are_silent() -> None:
    stream = io.StringIO()
    Console(enabled=False, total_steps=5, stream=stream).say("text")
    assert stream.getvalue() == ""


def test_a_full_disk_costs_a_line_not_the_run() -> None:
    class Full(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    stream = Full()
    console = Console(enabled=True, total_steps=5, stream=stream)
    console.say("lost")
    stream.full = False
    console.say("shown")
    assert stream.getvalue() == "shown\n"


def test_a_closed_pipe_does_not_end_the_run() -> None:
    code = (
        "import sys\nfrom fp8train.training.console import Console\n"
        "console = Console(enabled=True, total_steps=1)\n"
        "sys.stdin.readline()\n"  # until the reader is gone
        "for _ in range(3): console.say('text')\n"
        "sys.exit(7)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, complaints = process.communicate(b"\n", timeout=60)
    assert process.returncode == 7
    assert complaints == b""
