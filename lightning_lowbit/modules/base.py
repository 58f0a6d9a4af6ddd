"""The seam: what a scheme answers, and what every low-bit module offers it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.graph.fold import fold_batch_norm
from lightning_lowbit.graph.plan import Plan, Site
from lightning_lowbit.modules.moments import Moment
from lightning_lowbit.modules.update import StepContext, UpdateRule, same

if TYPE_CHECKING:
    from lightning_lowbit.graph.network import Flow
    from lightning_lowbit.modules.lowering import Builder
    from lightning_lowbit.modules.quantizer import Quantizer
    from lightning_lowbit.numerics.observers import AllReduce

__all__ = [
    "LowBitModule", "Milestone", "Mode", "Moment", "Run", "Scheme", "Site", "StepContext", "Switch",
    "Tally", "UpdateRule", "float_mode", "low_bit_modules", "switch_of",
]  # fmt: skip


class Mode(Enum):
    """What all low-bit modules of a network do at present."""

    FLOAT = "float"  # exactly the float network
    FOLDED = "folded"  # float arithmetic on layers with their batch norms merged
    OBSERVE = "observe"  # the same, and quantizers watch
    LOWBIT = "lowbit"


@dataclass
class Tally:
    """Saturated and seen values per quantizer, by site key."""

    seen: dict[str, int] = field(default_factory=dict)
    saturated: dict[str, Tensor] = field(default_factory=dict)

    def count(self, quantizer: Quantizer, x: Tensor) -> None:
        if not quantizer.counts:
            return
        key = quantizer.site.key
        self.seen[key] = self.seen.get(key, 0) + x.numel()
        self.saturated[key] = self.saturated.get(key, torch.zeros((), device=x.device)) + quantizer.saturated(x)

    def share(self, key: str) -> float | None:
        """Saturated share of a site's values; None where it saw none, or cannot tell."""
        return float(self.saturated[key]) / self.seen[key] if self.seen.get(key) else None


@dataclass
class Run:
    """Where in a run, and in which of its processes, a batch is computed: what integer arithmetic depends on.

    Attributes:
        reduce_max, reduce_sum: over the processes of a run, of integer tensors; identity on one.
        rank, world: this process and how many there are; sample i of this rank is number i * world + rank of the
            batch that one process would have had.
        batch: training batches since the run began; with the scheme's seed it keys all random integers.
        blank: this rank's batch is one repeated sample, which counts for nothing.
        clamped: exponents that had to move into the range of float32 carriers, so far.
        float_errors: paths of modules that a float error has reached, so far.
        nonfinite: errors that held NaN or infinite values, since somebody took note.
        injected: gives the random integers in place of the counter-based generator, for comparisons with other code.
    """

    reduce_max: Callable[[Tensor], Tensor] = same
    reduce_sum: Callable[[Tensor], Tensor] = same
    rank: int = 0
    world: int = 1
    batch: int = 0
    blank: bool = False
    clamped: Tensor | int = 0
    float_errors: set[str] = field(default_factory=set)
    nonfinite: Tensor | int = 0
    injected: Callable[[str, str, int, int], Tensor] | None = None  # path, purpose, samples, per sample

    @property
    def error_bits(self) -> int:
        """log2 of the factor on all errors that the mean of float gradients over processes takes back.

        A power of two, so that any number of processes rounds the same codes.
        """
        return (self.world - 1).bit_length()


@dataclass
class Switch:
    """The one switch that all low-bit modules of a network share.

    Attributes:
        mode: what they do.
        started: whether quantization has begun; before, LOWBIT means float (warm-up).
        provisional: whether it began for an evaluation alone, of a network that was not trained in low bits.
        ran: paths of the layers that ran since the set was emptied; None when nobody asks.
        tally: counts saturated values per quantizer; None when nobody asks.
        managed: whether somebody applies the update rule; training without one warns once.
        conversion: the record of what was converted (modules.convert.Report).
        run: what integer arithmetic must know of the present batch.
    """

    mode: Mode = Mode.LOWBIT
    started: bool = False
    provisional: bool = False
    ran: set[str] | None = None
    tally: Tally | None = None
    managed: bool = False
    conversion: Any = None
    run: Run = field(default_factory=lambda: Run())

    @property
    def folding(self) -> bool:
        return self.mode in (Mode.OBSERVE, Mode.FOLDED) or (self.mode is Mode.LOWBIT and self.started)

    @property
    def quantizing(self) -> bool:
        return self.mode is Mode.LOWBIT and self.started


@dataclass(frozen=True)
class Milestone:
    """``what`` happens from the moment ``when`` on; asked of every low-bit module and of the update rule."""

    when: Moment | None
    what: str


class Scheme:
    """A published low-bit scheme; concrete schemes are frozen dataclasses whose fields are its options."""

    name: ClassVar[str] = ""
    carries_errors: ClassVar[bool] = False  # tensors and errors are carriers; training runs with autocast off
    runs_norms: ClassVar[bool] = False  # merged batch norms run in training as they are, synchronized ones too
    integer_kernels: ClassVar[bool] = False  # layers multiply by kernels, which compile their own loops
    reproducible: ClassVar[bool] = False  # the package's own sample order is used unless the user declines

    def replace(self, **options: Any) -> Self:
        """The same scheme with other options."""
        return dataclasses.replace(self, **options)  # type: ignore[type-var]  # concrete schemes are dataclasses

    def quantizer(self, site: Site) -> Quantizer | None:
        """The quantizer of one tensor; None leaves it as it is."""
        return None

    def batch_norm(self, site: Site, norm: nn.Module) -> str:
        """What becomes of a batch norm (``site`` is its output): keep | fold | quantize | island | fold_or_island.

        What is folded stands directly behind a layer; an island, where integers come in and go out, stands anywhere.
        """
        return "keep"

    def adapted_to(self, root: nn.Module, pretrained: bool) -> Self:
        """The scheme with what its user left open decided for one network, before that is converted.

        Args:
            root: the float network.
            pretrained: whether weights from elsewhere will be loaded into it.
        """
        return self

    def like(self, other: Scheme) -> Self:
        """The scheme with what its user left open decided as in ``other``, of a network that is converted."""
        return self

    def leaves_float(self, site: Site, module: nn.Module) -> str | None:
        """Why a layer (``site`` is its weight) that could be converted stays float under this scheme; None converts."""
        return None

    def tied(self, root: nn.Module, flow: Flow, plan: Plan) -> list[list[str]]:
        """Keys of sites whose quantizers are a tie: by default tensors that are added or joined, or one weight's."""
        return plan.ties

    def connect(self, root: nn.Module, flow: Flow, plan: Plan) -> list[str]:
        """Tell modules of each other, once all stand in their places.

        Returns:
            what a user should know of it, for the report.
        """
        return []

    def findings(self, root: nn.Module, flow: Flow, plan: Plan) -> list[str]:
        """What in a network will train badly under this scheme, by module, with the way out; ``root`` as converted."""
        return []

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """A converted layer's whole forward: by default operands and result quantized around ``compute``."""
        return layer.quantized(x)  # type: ignore[no-any-return]

    def functions(self) -> Mapping[Any, Callable[..., Any]]:
        """Functions of torch that are integer operations on a ``Carrier``; NotImplemented leaves a call to torch."""
        return {}

    def compute(self, layer: Any, *operands: Any, **settings: Any) -> Tensor:
        """The operation itself; for a layer the operands are input, weight and bias (None without)."""
        return layer.op(*operands, **settings)  # type: ignore[no-any-return]  # layers have op

    def lower(self, build: Builder, module: Any, *operands: Any, **settings: Any) -> Any:
        """Write what a module does in evaluation into an integer program: the twin of ``forward`` and ``compute``.

        Args:
            build: writes operations.
            module: a layer, a norm or an operation, calibrated, in evaluation mode.
            operands, settings: those of its call, tensors as ``Codes``.
        """
        return module.lower(build, *operands, **settings)

    def prepare(self, layer: nn.Module) -> None:
        """A last word on a converted layer before the run, e.g. weights moved onto their integer grid."""

    def merge(self, layer: Any, weight: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer with the batch norm behind it, by these statistics of its channels."""
        norm = layer.norm
        return fold_batch_norm(
            weight, layer.bias, norm.weight, norm.bias, mean, var, norm.eps, layer.out_axis, layer.groups
        )

    def refine(self, root: nn.Module, run: Callable[[], int], all_reduce: AllReduce) -> None:
        """Behind calibration, in evaluation mode: what can be set only now; ``run`` feeds the same batches again."""

    def update_rule(self, modules: dict[str, nn.Module]) -> UpdateRule | None:
        """What is updated outside the user's optimizer; ``modules`` are the low-bit modules by path."""
        return None

    def start(self, pretrained: bool) -> Moment:
        """When quantization begins if the user does not say: 0 = at once."""
        return 0

    def milestones(self) -> tuple[Milestone, ...]:
        """What changes over time, as plain data."""
        return ()

    def proves_sums(self, layer: Any) -> bool:
        """Whether a layer's sums are integers whatever its weights: a kernel adds them."""
        return self.carries_errors

    def reconstruction(self) -> dict[str, Any] | None:
        """Arguments of ``modules.reconstruct.reconstruct`` if fit reconstructs blocks without labels."""
        return None

    def activation_bits(self) -> int:
        """The widest training tensor in bits: above 8, low-bit layers leave autocast in training too."""
        return 8


class LowBitModule(nn.Module):
    """What converted layers, norms and ops have in common.

    Attributes:
        path: where it stands in the converted network.
        scheme, switch: shared by the whole network.
        pattern: what was merged, for the report.
        ungraded: names of parameters whose gradients DistributedDataParallel must not expect: the scheme updates them
            itself, or has their gradients from all processes already.
    """

    ungraded: tuple[str, ...] = ()
    path: str
    scheme: Scheme
    switch: Switch
    pattern: str

    def attach(self, path: str, scheme: Scheme, switch: Switch, pattern: str) -> None:
        self.path, self.scheme, self.switch, self.pattern = path, scheme, switch, pattern

    def milestone(self, what: str, reached: bool) -> None:
        """A scheduled event; modules ignore what is not theirs."""

    def integer_state(self) -> dict[str, Tensor]:
        """The integers that the module is trained to, by name; empty where its state is float."""
        found: dict[str, Tensor] = {}
        for slot, child in self.named_children():
            state: dict[str, Tensor] = getattr(child, "integer_state", dict)()
            found |= {f"{slot}.{name}": value for name, value in state.items()}
        return found

    def note_run(self) -> None:
        if self.switch.ran is not None:
            self.switch.ran.add(self.path)


def low_bit_modules(root: nn.Module) -> Iterator[tuple[str, LowBitModule]]:
    for path, module in root.named_modules():
        if isinstance(module, LowBitModule):
            yield path, module


def switch_of(root: nn.Module) -> Switch:
    """The switch of a converted network; ConfigError where nothing was converted."""
    for _, module in low_bit_modules(root):
        return module.switch
    raise ConfigError(
        f"{type(root).__name__}: no low-bit layer found. Convert it first: lightning_lowbit.convert(module, 'tqt'), "
        "or run it in a Trainer with QuantCallback(); at the command line: fit --quant.scheme tqt."
    )


@contextmanager
def mode(switches: Iterable[Switch], value: Mode) -> Iterator[None]:
    """Switch networks for the length of a with-block."""
    before = [(switch, switch.mode) for switch in switches]
    try:
        for switch, _ in before:
            switch.mode = value
        yield
    finally:
        for switch, old in before:
            switch.mode = old


@contextmanager
def float_mode(module: nn.Module) -> Iterator[None]:
    """Run a converted network as the float network that it was, batch norms in their own place.

    Args:
        module: a converted module; ConfigError if nothing in it was converted.
    """
    with mode([switch_of(module)], Mode.FLOAT):
        yield
