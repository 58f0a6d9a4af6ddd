"""Static buffers for the values of a network: those that are never alive together share their bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lightning_lowbit.export.c99_graph import Step, elements
from lightning_lowbit.export.c99_kernels import ctype
from lightning_lowbit.export.runtime import Value

__all__ = ["Plan", "arena", "planned", "storage_of"]

_ALWAYS = 1 << 30


@dataclass(frozen=True)
class Plan:
    """Where values lie.

    Args:
        places: expression of C for the first element of each value.
        arenas: elements of each static array, by the signed type that it is declared with.
    """

    places: Mapping[str, str]
    arenas: Mapping[str, int]

    @property
    def ram(self) -> int:
        """Bytes of the static arrays."""
        return sum(size * _width(dtype) // 8 for dtype, size in self.arenas.items())


@dataclass
class _Buffer:
    """One stretch of an arena, and the steps from which to which its values are needed."""

    dtype: str
    size: int
    first: int
    last: int
    start: int = 0


def _width(dtype: str) -> int:
    return int(dtype.removeprefix("u")[3:])


def planned(
    steps: Sequence[Step],
    values: Mapping[str, Value],
    given: Mapping[str, str],
    held: Collection[str],
    outputs: Collection[str],
) -> Plan:
    """Place every value that a step makes; the largest first, each in the tightest gap that it fits.

    A reshape is another name for its input. An elementwise step writes over an input that nobody reads afterwards.

    Args:
        given: values that the caller brings, with their expressions; nothing is written over them.
        held: those of them that need a place of their own as well, called ``<name>`` with ``:held`` behind it.
        outputs: needed when the last step is done.
    """
    last = {name: k for k, step in enumerate(steps) for name in step.inputs}
    last.update(dict.fromkeys(outputs, _ALWAYS))
    for step in reversed(steps):
        if _renames(step):
            last[step.inputs[0]] = max(last[step.inputs[0]], last.get(step.output, -1))
    owners: dict[str, _Buffer | str] = dict(given)
    buffers: list[_Buffer] = []

    def new(name: str, first: int, end: int) -> _Buffer:
        value = values[name]
        buffers.append(_Buffer(f"int{_width(storage_of(value))}", elements(value.shape), first, end))
        return buffers[-1]

    extra = {f"{name}:held": new(name, -1, last.get(name, -1)) for name in held}
    for k, step in enumerate(steps):
        output, end = step.output, last.get(step.output, k)
        buffer = owners[step.inputs[0]] if _renames(step) else _overwritten(step, values, owners, k)
        if buffer is None:
            buffer = new(output, k, end)
        if isinstance(buffer, _Buffer):
            buffer.last = max(buffer.last, end)
        owners[output] = buffer
    arenas = {dtype: _packed([b for b in buffers if b.dtype == dtype]) for dtype in sorted({b.dtype for b in buffers})}
    places = {}
    for name, owner in {**owners, **extra}.items():
        if isinstance(owner, str):
            places[name] = owner
        else:
            storage = storage_of(values[name.removesuffix(":held")])
            # Signed and unsigned integers of one width may be read as each other, so they share an arena.
            cast = "" if storage == owner.dtype else f"({ctype(storage)} *)"
            places[name] = f"({cast}{arena(owner.dtype)} + {owner.start})"
    return Plan(places, arenas)


def storage_of(value: Value) -> str:
    """The type of the elements: that of the codes, or int64 for the indices of argmax."""
    return "int64" if value.dtype == "int64" else value.storage


def arena(dtype: str) -> str:
    """The name of the static array for a type.

    >>> arena("uint8")
    'arena_8'
    """
    return f"arena_{_width(dtype)}"


def _renames(step: Step) -> bool:
    return step.base is not None and step.base.kind == "reshape"


def _overwritten(
    step: Step, values: Mapping[str, Value], owners: Mapping[str, _Buffer | str], now: int
) -> _Buffer | str | None:
    """The buffer of an input that the step may write over, element by element.

    Another input in the same buffer has as many elements, hence reads the very element that is written.
    """
    if step.base is not None and step.base.kind not in ("add", "divide"):
        return None
    output = values[step.output]
    for name in step.inputs:
        owner, value = owners[name], values[name]
        same = value.shape == output.shape and _width(value.storage) == _width(output.storage)
        if same and isinstance(owner, _Buffer) and owner.last == now:
            return owner
    return None


def _packed(buffers: Sequence[_Buffer]) -> int:
    """Give each buffer its start; returns the length of the arena."""
    placed: list[_Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.first)):
        gaps, free = [], 0
        for other in sorted(placed, key=lambda b: b.start):
            if other.last < buffer.first or buffer.last < other.first:
                continue
            if other.start - free >= buffer.size:
                gaps.append((other.start - free, free))
            free = max(free, other.start + other.size)
        buffer.start = min(gaps)[1] if gaps else free
        placed.append(buffer)
    return max((b.start + b.size for b in placed), default=0)
