"""When buckets are reduced: each as soon as its last gradient is in, and all in one order on every rank."""

from __future__ import annotations

import pytest

from fp8train.step.trainer import Trainer
from tests.training.tiny import VOCAB, alone, batches
from tests.truth.capture import grouped_store, watch_arrivals, watch_launches
from tests.truth.cases import Case

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = "precision.gradient.bucket_mib=0.003"  # about a matrix


@pytest.mark.parametrize("overrides", [(), (SMALL,)], ids=["large buckets", "small buckets"])
@pytest.mark.parametrize("reduce", ["exchange", "bf16", "shared_scale"])
def test_a_bucket_that_is_complete_waits_for_no_other(overrides: tuple[str, ...], reduce: str) -> None:
    """A bucket of norms, open from the head on, is complete at the end of backward only."""
    case = Case(("precision.level=O2", f"precision.gradient.fp8.reduce={reduce}", *overrides))
    trainer = Trainer(case.config(), alone(), vocab_size=VOCAB)
    arrived: list[str] = []
    launched: list[tuple[list[str], int]] = []
    watch_arrivals(trainer.store, arrived.clear, lambda fqn, gradient: arrived.append(fqn))
    watch_launches(trainer.store, lambda fqns: launched.append((fqns, len(arrived))))
    trainer.step(0, batches(case.config(), alone()).batch(0))
    assert sorted(fqn for fqns, _ in launched for fqn in fqns) == sorted(arrived)
    for fqns, at in launched:
        complete = max(arrived.index(fqn) for fqn in fqns) + 1
        assert at == complete, f"bucket of {fqns[0]}: complete after {complete} gradients, launched at {at}"
    before_the_end = sum(at < len(arrived) for _, at in launched)
    assert before_the_end >= len(launched) - 1 > 0


def test_buckets_of_a_lower_group_are_launched_first() -> None:
    """Pipeline stages of a rank: their backward ends in another order than the model's."""
    case = Case(("precision.level=O0", SMALL))
    trainer = Trainer(case.config(), alone(), vocab_size=VOCAB)
    groups = {"layers.1": 0, "embedding": 1, "layers.0": 1, "final_norm": 2, "head": 2}

    def group_of(fqn: str) -> int:
        return next(group for prefix, group in groups.items() if fqn.startswith(prefix))

    launched: list[int] = []
    store, model = grouped_store(trainer, group_of)
    watch_launches(store, lambda fqns: launched.extend({group_of(fqn) for fqn in fqns}))
    tokens = batches(case.config(), alone()).batch(0)[0]
    store.begin_step(1)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    store.finish()
    assert launched == sorted(launched) and set(launched) == {0, 1, 2}, launched
