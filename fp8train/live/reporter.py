"""What a run tells about itself: console, metrics, events, cast statistics, trackers.

One object that the loop talks to; it keeps the clock of the throughput window, out of which evaluation and
saving are taken. Only rank 0 prints and writes.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fp8train import __version__
from fp8train.checkpoint.background import Written
from fp8train.config.length import beyond_the_end
from fp8train.config.schema import to_plain
from fp8train.config.threads import VARIABLE, threads_from_environment
from fp8train.data.loading import Data
from fp8train.evaluation.validation import Evaluation
from fp8train.live.console import Console, format_count, format_duration, live_line, step_line
from fp8train.live.describe import describe_layout, describe_precision, precision_warnings, stored_bytes
from fp8train.live.fp8_health import worst_casts
from fp8train.live.throughput import Throughput, memory_bytes
from fp8train.live.trackers import Trackers
from fp8train.run_dir.claim import HEARTBEATS_DIR
from fp8train.run_dir.directory import RunDir
from fp8train.run_dir.metrics import metrics_record, strict
from fp8train.step.base_trainer import BaseTrainer
from fp8train.step.result import StepEvent, StepResult
from fp8train.step.scale_events import SHOWN, event_metrics
from fp8train.watch.heartbeat import read
from fp8train.watch.stragglers import PATIENCE, Stragglers

_logger = logging.getLogger(__name__)


class Reporter:
    """Reports a run. Use as a context manager: it closes the trackers."""

    def __init__(self, run_dir: RunDir, data: Data, trainer: BaseTrainer, console: Console) -> None:
        """Report what ``trainer`` does with ``data``, in ``run_dir`` and on the console."""
        self.config, self.processes = config, processes = trainer.config, trainer.processes
        self.run_dir, self.data, self.trainer, self.console = run_dir, data, trainer, console
        self.throughput = Throughput(
            trainer.model.config,
            config.data.seq_length,
            processes.device,
            vocab_size=data.vocab_size,
            world_size=processes.world_size,
            fp8=trainer.built.fp8 is not None,
        )
        self.stragglers = Stragglers(trainer.progress, processes, counted=config.engine == "native")
        self.trackers = Trackers(
            config.logging,
            run_dir,
            self._tracker_failed,
            run_name=config.run.name,
            run_config=to_plain(config),
        )
        self._samples_before = data.train.samples_before  # a resumed run may have had other batches
        self._state = "failed"
        self._loss = (math.nan, 0)  # the last on the host, and its step
        self._window_steps = 0
        self._window_loss: torch.Tensor | float = 0.0
        self._data_seconds = 0.0
        self._skipped = 0
        self._casts: dict[str, float] = {}
        self._checkpoint: dict[str, float] = {}
        self._saved_at = time.monotonic()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *error: object) -> None:
        self.trackers.close(self._state)

    def _tracker_failed(self, kind: str, *, step: int, **fields: Any) -> None:
        self.event(kind, step=step, **fields)
        self.say(f"{fields['tracker']} stopped ({fields['problem']}); metrics.jsonl stays complete")

    def say(self, text: str) -> None:
        """A line for the person watching, and for the rank's log."""
        self.run_dir.log(text)
        self.console.say(text)

    def warn(self, text: str) -> None:
        """A line that must not be overlooked: on standard error, and in the rank's log."""
        _logger.warning("%s", text)

    def event(self, kind: str, *, step: int, **fields: Any) -> None:
        """A line of events.jsonl."""
        self.run_dir.log_event(kind, step=step, **fields)

    def header(self) -> None:
        """Say what is about to run: version, device, model, precision, data."""
        config, model = self.config, self.trainer.model
        device = self.processes.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        parameters = sum(p.numel() for p in self.trainer.outline.parameters())
        from_environment = config.run.threads is None and threads_from_environment(os.environ)
        source = f" ({VARIABLE})" if from_environment else ""
        threads = torch.get_num_threads()
        each = f"{threads} thread{'s' if threads > 1 else ''} each{source}"
        where = f"{self.processes.world_size} x {name}, {each}"
        self.say(
            f"fp8train {__version__}, torch {torch.__version__}, {where}; run directory {self.run_dir.path}"
        )
        self.say(
            f"model: {config.model.family}, {format_count(parameters)} parameters, {config.model.num_layers} "
            f"layers of {config.model.hidden_size}, vocabulary {model.config.vocab_size}"
        )
        if self.processes.world_size > 1:
            self.say(f"layout: {describe_layout(self.trainer)}")
        for line in describe_precision(self.trainer):
            self.say(line)
        for line in [*precision_warnings(self.trainer), *self.data.warnings()]:
            self.warn(line)
        for line in self.data.summary():
            self.say(f"data: {line}")
        for line in beyond_the_end(config):
            self.say(f"note: {line}")

    def begin(self, step: int) -> None:
        """The loop starts at ``step``: record what runs and start the clock."""
        fp8 = self.trainer.built.fp8
        self.event(
            "model",
            step=step,
            parameters=sum(p.numel() for p in self.trainer.outline.parameters()),
            hidden_linears=len(self.trainer.outline.linears()),
            hidden_parameters=sum(
                linear.weight.numel() for linear in self.trainer.outline.linears().values()
            ),
            fp8_linears=0 if fp8 is None else len(fp8.converted) + len(fp8.native),
            fp8_skipped={} if fp8 is None else fp8.skipped,
            bytes_per_parameter=stored_bytes(self.trainer).per_parameter(),
        )
        self.throughput.restart()

    def step(self, done: int, result: StepResult, *, data_seconds: float) -> None:
        """A step is done; on logged steps print and record it.

        ``train/loss`` is the loss of that step alone. ``train/loss_mean``, which the console shows, is the
        mean over the steps since the previous logged one (after a resume: since then): of one small batch,
        a loss says more about the batch than about the model.
        """
        self._window_steps += 1
        self._window_loss = self._window_loss + result.loss  # a device scalar: nothing waits for it here
        self._data_seconds += data_seconds
        self._skipped += not result.applied
        last = done == self.config.total_steps
        if done % self.config.logging.interval and done != 1 and not last and result.applied:
            self._live(done, result)
            return
        loss = float(result.loss)
        self._loss = (loss, done)
        steps, self._window_steps = self._window_steps, 0
        window_loss, self._window_loss = float(self._window_loss), 0.0
        metrics = {
            "train/loss": loss,
            "train/loss_mean": window_loss / steps,
            "optim/grad_norm": result.grad_norm,
            "optim/lr": result.lr,
        }
        metrics |= self.throughput.measure(steps, self._tokens(done, steps))
        metrics |= self._compare_ranks(done)
        metrics["data/wait_seconds"], self._data_seconds = self._data_seconds / steps, 0.0
        metrics["optim/skipped_steps"] = self._skipped
        sent = self.trainer.sent_bytes()
        metrics["comm/sent_bytes"] = sum(sent.values())
        metrics |= {f"comm/sent_bytes/{name}": count for name, count in sent.items()}
        metrics |= self.trainer.precision_metrics() | self._scale_events(done)
        metrics |= memory_bytes(self.processes.device) | self._casts
        metrics["checkpoint/age_seconds"] = time.monotonic() - self._saved_at
        metrics |= self._checkpoint
        self._checkpoint = {}
        self.record(done, metrics)
        peak = self.throughput.peak
        left = self.config.total_steps - done
        self.console.say(
            step_line(
                done,
                self.config.total_steps,
                metrics,
                mfu_peak=None if peak is None else peak.name,
                eta_s=self.throughput.eta_s(left),
                colour=self.console.colour,
            )
        )

    def skipped(self, done: int, result: StepResult) -> None:
        """A step was skipped, or taken partly: print and record why."""
        numbers = {"grad_norm": str(result.grad_norm), "loss": str(float(result.loss))}
        self.event("step_skipped", step=done, why=result.skipped, partly=result.partly, **numbers)
        said = {
            "no_targets": "not one target token in the global batch",
            "not_finite": f"loss or gradient is not finite (norm {result.grad_norm})",
            "spike": "skipped for its spike",
            "guard": "skipped by precision.guard",
        }[result.skipped]
        left = (
            "weights before that in backward are new, the others unchanged"
            if result.partly
            else "weights left unchanged"
        )
        self.say(f"step {done}: {said}; {left}")

    def stood_out(self, done: int, events: Iterable[StepEvent]) -> None:
        """Print and record what stood out in a step."""
        for event in events:
            self.event(event.kind, step=done, **event.fields)
            say = self.warn if event.kind == "corruption_suspected" else self.say
            say(f"step {done}: {event.text}")

    def rewound(self) -> None:
        """The run went back to an earlier step: what is measured over several steps begins anew."""
        self._window_steps, self._window_loss, self._data_seconds = 0, 0.0, 0.0
        self._casts = {}
        self.trackers.rewound()
        self.throughput.restart()

    def _live(self, done: int, result: StepResult) -> None:
        """Show how far the window is, from what the host knows: a loss that is still on its way from a device
        is not waited for."""
        if not self.console.live_is_due():
            return
        if result.loss.device.type == "cpu":
            self._loss = (float(result.loss), done)
        total, steps = self.config.total_steps, self._window_steps
        rate, eta_s = self.throughput.so_far(steps, self._tokens(done, steps), total - done)
        loss, at = self._loss
        self.console.live(
            live_line(done, total, loss=loss, loss_step=at, tokens_per_second=rate, eta_s=eta_s)
        )

    def _tokens(self, done: int, steps: int) -> int:
        """Training tokens of the last ``steps`` of ``done`` steps."""
        samples = self._samples_before(done) - self._samples_before(done - steps)
        return samples * self.config.data.seq_length

    def _compare_ranks(self, done: int) -> dict[str, float]:
        """Step times of all ranks; tells of ranks that stay slow. Collective."""
        metrics = self.stragglers.metrics()
        for slow in self.stragglers.newly_slow():
            beat = read(self.run_dir.path / HEARTBEATS_DIR, slow.rank)
            host = None if beat is None else beat.process.host
            self.event("slow_rank", step=done, rank=slow.rank, host=host, ratio=round(slow.ratio, 3))
            where = "" if host is None else f" on host {host}"
            self.warn(
                f"step {done}: rank {slow.rank}{where} is slow: its steps take {slow.ratio:.2f} times as "
                f"long as the median of its stage, waiting for others left out, since {PATIENCE} logged steps"
            )
        return metrics

    def _scale_events(self, done: int) -> dict[str, float]:
        """Metrics of amaxes that gave no delayed scale since the last logged step, and their names as one
        event if there are any."""
        events = self.trainer.new_scale_events()
        if events is None:
            return {}
        if events:
            shown = dict(itertools.islice(events.items(), SHOWN))
            self.event("scale_events", step=done, slots=shown, more=len(events) - len(shown))
        return event_metrics(events)

    def casts(
        self, step: int, rows: Mapping[str, Mapping[str, float]], optimizer: Mapping[str, float]
    ) -> None:
        """Statistics of a sampled step's casts: all of them to casts.jsonl, a summary to the metrics, where
        ``optimizer`` (metrics about the states it stored) joins it until the next sampled step."""
        for site, values in rows.items():
            self.run_dir.log_casts(step, site, {name: strict(value) for name, value in values.items()})
        snr = [values["snr_db"] for values in rows.values() if math.isfinite(values["snr_db"])]
        self._casts |= {
            "fp8/flushed": statistics.fmean(values["flushed"] for values in rows.values()),
            "fp8/saturated": statistics.fmean(values["saturated"] for values in rows.values()),
            "fp8/flushed_max": max((values["flushed"] for values in rows.values()), default=math.nan),
            "fp8/saturated_max": max((values["saturated"] for values in rows.values()), default=math.nan),
            "fp8/snr_db_min": min(snr, default=math.nan),
            "fp8/snr_db_median": statistics.median(snr) if snr else math.nan,
            "fp8/kurtosis_x_max": max(
                (values["kurtosis"] for site, values in rows.items() if site.endswith("/x")), default=math.nan
            ),
            **optimizer,
        }
        ill = worst_casts(rows)
        self._casts["fp8/non_finite_casts"] = float(ill.get("non_finite", 0))
        if ill:
            self.event("fp8_health", step=step, **ill)

    def monitor(self, metrics: Mapping[str, float]) -> None:
        """Metrics of a sampled step, logged with the following steps until the next sampled one."""
        self._casts |= metrics

    def evaluation(self, done: int, result: Evaluation) -> None:
        """Print and record an evaluation."""
        self.record(done, result.metrics())
        text = f"step {done}: validation loss {result.loss:.4f} nats/token"
        if result.bits_per_byte is not None:
            text += f", {result.bits_per_byte:.3f} bits/byte"
        self.say(f"{text} ({result.tokens:,} tokens)")

    def checkpoint(self, saved: Written, *, stall_seconds: float, asynchronous: bool) -> None:
        """A checkpoint is safe. Its numbers join the metrics of the next logged step, those of the last one
        stand in the event alone."""
        self._saved_at = time.monotonic()
        self._checkpoint = {
            "checkpoint/stall_seconds": stall_seconds,
            "checkpoint/write_seconds": saved.write_seconds,
            "checkpoint/bytes": saved.num_bytes,
        }
        self.event(
            "checkpoint",
            step=saved.step,
            path=str(saved.path),
            seconds=round(saved.write_seconds, 3),
            stall_seconds=round(stall_seconds, 3),
            bytes=saved.num_bytes,
        )
        text = f"step {saved.step}: saved {saved.path} in {_in_words(saved.write_seconds)}"
        if asynchronous:
            text += f" in the background; training stood still for {_in_words(stall_seconds)}"
        self.say(text)

    def checkpoint_waited(self, step: int, *, previous: int, seconds: float) -> None:
        """The save of ``step`` had to wait for the one in flight."""
        self.event("checkpoint_waited", step=step, previous=previous, seconds=round(seconds, 3))
        self.say(
            f"step {step}: waited {_in_words(seconds)} until the checkpoint of step {previous} was written; "
            "a longer checkpoint.interval avoids it"
        )

    def checkpoint_postponed(self, step: int, why: str) -> None:
        """The save that is due waits for a step that is applied."""
        self.event("checkpoint_postponed", step=step, why=why)
        self.say(f"step {step}: its checkpoint waits for a step that is not skipped")

    def checkpoint_not_finite(self, step: int, error: Exception, newest: Path | None) -> None:
        """What was to be saved is no state to continue from."""
        self.event("checkpoint_not_finite", step=step, error=str(error))
        left = "there is none before it" if newest is None else f"{newest} stays the newest"
        self.warn(f"CHECKPOINT OF STEP {step} NOT SAVED: {error}; {left}")

    def checkpoint_failed(self, step: int, error: Exception) -> None:
        """A checkpoint could not be saved, and the run goes on."""
        self.event("checkpoint_failed", step=step, error=str(error))
        age = _in_words(time.monotonic() - self._saved_at)
        self.warn(
            f"CHECKPOINT OF STEP {step} NOT SAVED: {error}\n"
            f"training goes on (checkpoint.on_failure: continue); a crash would lose the last {age}"
        )

    def end(self, state: str, reason: str, step: int) -> None:
        """The run is over."""
        self._state = state
        self.event(state, step=step, reason=reason)
        self.say(f"{state} at step {step}: {reason}")

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics to metrics.jsonl and to the trackers."""
        if self.processes.rank != 0:
            return
        tokens = self._samples_before(step) * self.config.data.seq_length
        self.run_dir.log_metrics(metrics_record(step, tokens, metrics))
        self.trackers.log(step, tokens, metrics)


def _in_words(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 1 else f"{seconds:.2f}s"
