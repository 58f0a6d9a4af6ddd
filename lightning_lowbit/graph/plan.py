"""What a plan consists of: sites that a scheme is asked about, layers, operations, and ties between sites."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from lightning_lowbit.graph.network import Call
from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.graph.trace import CallKey

__all__ = ["LayerPlan", "OpPlan", "Plan", "Site", "Union"]


@dataclass(frozen=True)
class Site:
    """One tensor that a scheme may quantize: the question put to ``Scheme.quantizer``.

    Attributes:
        path: module that owns the quantizer; its parameters live under ``{path}.{slot}``.
        role: input, weight, bias, accumulator, output, operand, error or weight_grad; result is an output that float
            code or nobody reads; sum is what an operation without
            weights has computed and not yet rounded; unit is what a layer's result counts in, where that is not 1.
        op: conv2d, linear, relu, add, cat, avg_pool, ...
        pattern: what was merged, e.g. ``conv2d+bn+relu``.
        signed: False behind a rectifier, True where negative values are sure, None = the data decide.
        first, last: the layer reads the network's input / no further layer reads its output. Of an output, last says
            that no layers but last ones multiply it.
        depthwise: one input channel per group.
        source: role of the quantizer that the tensor has passed already, None when it comes in as float.
        channels: of the tensor (of a weight: of the layer's result), None where the layers around do not tell.
        behind: how many axes lie behind that of the channels: 0 of a linear layer's features, 2 of images; None is all
            but the first two.
        multiplied: whether a converted layer reads it.
        read: whether a converted layer or a planned operation does.
        slot: name of the quantizer in its module.
        dropped: whether a dropout scales it between that quantizer and here.
        clips: between what a hardtanh clips its values, None of anything else.
        readers: paths of the converted layers that multiply it, through what only moves it and through concats.
        operations: paths of the sums, pools and norms that read it beside them.
        arrives: of an input, the site whose quantizer the tensor has passed already; of a concat the first one.
    """

    path: str
    role: str
    op: str
    pattern: str = ""
    signed: bool | None = True
    first: bool = False
    last: bool = False
    depthwise: bool = False
    source: str | None = None
    channels: int | None = None
    behind: int | None = None
    multiplied: bool = False
    read: bool = True
    slot: str = ""
    dropped: bool = False
    clips: tuple[float, float] | None = None
    readers: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    arrives: Site | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        return f"{self.path}.{self.slot or 'lowbit_' + self.role}"


@dataclass(frozen=True)
class LayerPlan:
    """A convolution or linear layer: its norm, and where the grid of its input is declared (a site key)."""

    path: str
    op: str
    pattern: str
    batch_norm: str | None
    first: bool
    last: bool
    depthwise: bool
    grid_of_input: str


@dataclass(frozen=True)
class OpPlan:
    """A functional call, or a parameterless module, that becomes a low-bit op under ``path``."""

    path: str
    owner: str
    key: CallKey
    kind: Kind
    in_place_of: str | None  # path of the module to replace; None: a call in the owner's forward
    call: Call
    overwrites: bool = False  # its first operand must hold the result afterwards


@dataclass
class Plan:
    layers: list[LayerPlan] = field(default_factory=list)
    ops: list[OpPlan] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    results: list[Site] = field(default_factory=list)  # of tensors that leave the converted part, role "result"
    ties: list[list[str]] = field(default_factory=list)  # site keys that share one step
    same_grid: set[str] = field(default_factory=set)  # of those, keys that share the sign too (concat)
    islands: list[str] = field(default_factory=list)  # batch norms that take and give integers
    operands: dict[str, list[str]] = field(default_factory=dict)  # op path -> keys that declare its operands' grids

    def joined(self) -> list[list[str]]:
        """Ties of what is concatenated alone: of schemes in which each tensor that is added has its own grid."""
        cats, union = {op.path for op in self.ops if op.kind is Kind.CAT}, Union()
        for path, keys in self.operands.items():
            if path in cats:
                union.join(keys)
        return union.groups({site.key: site for site in self.sites})


class Union:
    """Disjoint sets of site keys."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def find(self, key: str) -> str:
        while (parent := self.parent.setdefault(key, key)) != key:
            key = parent
        return key

    def join(self, keys: list[str]) -> None:
        for key in keys[1:]:
            self.parent[self.find(key)] = self.find(keys[0])

    def groups(self, sites: dict[str, Site]) -> list[list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for key in sites:
            if key in self.parent:
                found[self.find(key)].append(key)
        return [keys for keys in found.values() if len(keys) > 1]
