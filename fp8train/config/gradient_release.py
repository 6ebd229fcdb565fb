"""What cannot be together with ``train.gradient_release``: whatever needs all gradients of a step at once.

Accumulation is refused where the number of ranks is known (:func:`fp8train.config.world.check_release`).
"""

from __future__ import annotations

from collections.abc import Iterator

from fp8train.config.all_sections import AllSections

KEY = "train.gradient_release"


def release_problems(config: AllSections) -> Iterator[tuple[str, tuple[str, str]]]:
    """Each problem that the file alone shows: the message, and the keys to change."""
    if not config.train.gradient_release:
        return
    for other, remedy, reason in _against(config):
        yield (
            f"{KEY}: true updates parameters, and forgets their gradients, during backward; {reason}: write "
            f"{other}: {remedy}, or {KEY}: false",
            (KEY, other),
        )


def _against(config: AllSections) -> Iterator[tuple[str, str, str]]:
    """(key, value that would do, reason) of every setting that stands against it."""
    gradient, clip = config.precision.gradient, config.optimizer.clip_grad_norm
    if clip:
        reason = f"optimizer.clip_grad_norm: {clip:g} needs the norm of all of them before the first update"
        yield "optimizer.clip_grad_norm", "0", reason
    if config.parallel.pp > 1:
        reason = f"with parallel.pp: {config.parallel.pp} they add up over the micro-batches of the pipeline"
        yield "parallel.pp", "1", reason
    if config.train.compile != "off":
        reason = "compiled blocks (train.compile: block) are told where each lies, alone"
        yield "train.compile", "off", reason
    if config.run.cuda_graphs:
        reason = "a CUDA graph (run.cuda_graphs) replays backward without the calls that update parameters"
        yield "run.cuda_graphs", "false", reason
    if config.spikes.action == "skip":
        yield "spikes.action", "rollback", "a spike is known when the update is done (spikes.action: skip)"
    if config.spikes.rerun:
        yield "spikes.rerun", "false", "the step cannot be run again (spikes.rerun: true)"
    if config.precision.guard.action == "recover":
        yield "precision.guard.action", "bf16", "the step cannot be skipped (precision.guard.action: recover)"
    if gradient.format == "high_precision":
        return
    if gradient.fp8.reduce == "exact":
        reason = "precision.gradient.fp8.reduce: exact runs a step again if some do not fit their grids"
        yield "precision.gradient.fp8.reduce", "exchange", reason
    if gradient.fp8.error_feedback:
        reason = "precision.gradient.fp8.error_feedback keeps what was lost of each, 4 bytes a parameter"
        yield "precision.gradient.fp8.error_feedback", "false", reason
