"""What happens to the gradients of a run: they grow, fall, jump, vanish and turn non-finite.

A step's loss is multiplied by ``loss``, the outputs of single modules by ``modules``: in the model under test
and in the true one alike, so that the true gradient is known. Factors are powers of two but for the spikes:
BF16 holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MLP, ATTENTION = "layers.1.mlp", "layers.0.attention"


@dataclass(frozen=True)
class Event:
    """One step.

    Attributes:
        what: for messages.
        loss: factor on the loss.
        modules: factor on a module's output, by path.
        bad: the last rank's loss becomes infinite, and its gradients with it: no update.
    """

    what: str = "plain"
    loss: float = 1.0
    modules: Mapping[str, float] = field(default_factory=dict)
    bad: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is an ordinary step, whatever came before."""
        return self.loss == 1.0 and not self.modules and not self.bad


PLAIN, BAD = Event(), Event("one rank's gradient is not finite", bad=True)


def _loss(what: str, factor: float) -> Event:
    return Event(what, loss=factor)


def _modules(what: str, **factors: float) -> Event:
    paths = {"mlp": MLP, "attention": ATTENTION}
    return Event(what, modules={paths[name]: factor for name, factor in factors.items()})


WILD: tuple[Event, ...] = (
    PLAIN,
    PLAIN,
    _modules("an MLP jumps", mlp=32.0),
    PLAIN,
    _modules("an MLP's weights get no gradient", mlp=0.0),
    _modules("an MLP almost vanishes", mlp=2.0**-10),
    PLAIN,
    _loss("all fall", 2.0**-6),
    _loss("and jump back", 1.0),
    BAD,
    PLAIN,
    _loss("a spike, clipped", 1e3),
    PLAIN,
    BAD,
    _loss("all vanish", 0.0),
    PLAIN,
    _loss("a large spike, clipped", 1e6),
    PLAIN,  # 18 steps: what a short run sees
    _modules("attention jumps", attention=8.0),
    *(_loss("all grow", 2.0**i) for i in range(1, 5)),
    *(_loss("all fall", 2.0**i) for i in (2, -1, -4, -8)),
    PLAIN,
    BAD,
    _loss("a spike after a skipped step", 1e3),
    BAD,
    _modules("nothing for an MLP after that", mlp=0.0, attention=2.0**-10),
    _modules("both jump", mlp=32.0, attention=32.0),
    PLAIN,
    _loss("all vanish", 0.0),
    _loss("and come back larger", 64.0),
    *(PLAIN,) * 4,
)
"""For scales that follow the tensor at hand."""
assert len(WILD) == 40
SHORT = 18

GENTLE: tuple[Event, ...] = (
    PLAIN,
    PLAIN,
    _loss("all grow", 2.0),
    PLAIN,
    _loss("all fall", 0.25),
    PLAIN,
    BAD,
    PLAIN,
    PLAIN,
    _loss("all grow", 2.0),
    _loss("all fall", 0.25),
    BAD,
    *(PLAIN, PLAIN, BAD, _loss("all grow", 2.0)) * 7,
)
"""For constant and delayed scales, which saturate or flush when a tensor leaves the range that they were made
for: that is their recipe, not a fault of what follows the GEMMs."""
assert len(GENTLE) == 40

ZERO_FIRST: tuple[Event, ...] = (_loss("the first batch has no gradient", 0.0), PLAIN, PLAIN, PLAIN)
BAD_FIRST: tuple[Event, ...] = (BAD, PLAIN, PLAIN, PLAIN)
MILLION: tuple[Event, ...] = (PLAIN, PLAIN, _loss("a large spike, clipped", 1e6), *(PLAIN,) * 6)
