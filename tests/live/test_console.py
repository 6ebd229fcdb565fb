"""What people read: the step line, its units, and outputs that fail."""

import errno
import io
import math
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fp8train.live.console import (
    LIVE_INTERVAL_S,
    Console,
    format_bytes,
    format_count,
    format_duration,
    format_percent,
    live_line,
    step_line,
)
from fp8train.live.reporter import Reporter

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
    console = Console(enabled=True, stream=stream)
    console.say(step_line(1, 5, {"train/loss_mean": math.nan}, colour=console.colour))
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


LIVE = "\nstep 2/5\033[A\r"
CLEAR = "\r\033[J"


def test_the_live_line_stands_below_an_empty_row_and_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    clock = [100.0]
    monkeypatch.setattr("fp8train.live.console.time.monotonic", lambda: clock[0])
    stream = Terminal()
    with Console(enabled=True, stream=stream) as console:
        console.live("step 2/5")
        assert not console.live_is_due()
        console.live("too soon")
        assert stream.getvalue() == LIVE
        console.say("text")
        console.say("more")
        assert stream.getvalue() == f"{LIVE}{CLEAR}text\nmore\n"
        clock[0] += LIVE_INTERVAL_S
        console.live("step 3/5" * 30)
        assert stream.getvalue() == f"{LIVE}{CLEAR}text\nmore\n\n{('step 3/5' * 10)[:79]}\033[A\r"
    assert stream.getvalue().endswith(f"\r{CLEAR}")


@pytest.mark.parametrize("kind", ["file", "dumb terminal", "other rank"])
def test_no_live_line_where_it_does_not_belong(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb" if kind == "dumb terminal" else "xterm")
    stream = io.StringIO() if kind == "file" else Terminal()
    console = Console(enabled=kind != "other rank", stream=stream)
    assert not console.live_is_due()
    console.live("step 2/5")
    console.clear()
    assert stream.getvalue() == ""


def test_the_text_of_a_live_line() -> None:
    numbers = {"loss": 4.12341, "tokens_per_second": 12345.6, "eta_s": 3725.0}
    assert live_line(7, 2000, loss_step=7, **numbers) == (
        "step    7/2000 | loss 4.1234 | 12.3k tok/s | ETA 1h02m"
    )
    assert live_line(7, 2000, loss_step=1, **numbers) == (
        "step    7/2000 | loss 4.1234 at step 1 | 12.3k tok/s | ETA 1h02m"
    )


@pytest.mark.parametrize(("device", "shown"), [("cpu", "loss 3.0000 |"), ("meta", "loss 4.0000 at step 5 |")])
def test_a_loss_on_a_device_is_not_waited_for(
    device: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor on the device "meta" has no value to be looked at."""
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    reporter: Any = SimpleNamespace(
        console=Console(enabled=True, stream=stream),
        config=SimpleNamespace(total_steps=9),
        throughput=SimpleNamespace(so_far=lambda steps, tokens, left: (tokens / steps, left)),
        _tokens=lambda done, steps: 100 * steps,
        _window_steps=2,
        _loss=(4.0, 5),
    )
    result = SimpleNamespace(loss=torch.full((), 3.0, device=device))
    Reporter._live(reporter, 7, cast(Any, result))
    assert f"step 7/9 | {shown} 100 tok/s | ETA 2s" in stream.getvalue()


def test_other_ranks_are_silent() -> None:
    stream = io.StringIO()
    Console(enabled=False, stream=stream).say("text")
    assert stream.getvalue() == ""


def test_a_full_disk_costs_a_line_not_the_run() -> None:
    class Full(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    stream = Full()
    console = Console(enabled=True, stream=stream)
    console.say("lost")
    stream.full = False
    console.say("shown")
    assert stream.getvalue() == "shown\n"


def test_a_closed_pipe_does_not_end_the_run() -> None:
    code = (
        "import sys\nfrom fp8train.live.console import Console\n"
        "console = Console(enabled=True)\n"
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
