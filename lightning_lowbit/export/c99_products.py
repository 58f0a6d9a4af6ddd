"""Convolutions, linear layers and pools in C: the functions, and calls of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.export.c99_graph import Step, elements
from lightning_lowbit.export.c99_kernels import Source, Stage, ctype, literal, tag
from lightning_lowbit.export.c99_stages import passed, sum_type
from lightning_lowbit.export.runtime import Op, Value

__all__ = ["PRODUCTS", "scratch"]

# A row of sums at a time: the inner loop runs along the image, so that a compiler can make vectors of it, and padding
# costs no comparison there. What divides or compares stands outside of the loop over channels.
_CONV = """
static void $name(const $X *restrict x, const $W *restrict w, const $A *restrict bias, $Y *restrict y,
    $A *restrict row, const struct window *g$parameters)
{
    const int32_t inputs = g->inputs / g->groups, outputs = g->outputs / g->groups;
    const int32_t length = g->out[2], taps = g->kernel[0] * g->kernel[1] * g->kernel[2];
    const int32_t plane = g->in[0] * g->in[1] * g->in[2];
    for (int32_t n = 0; n < g->batch; ++n) {
        for (int32_t c = 0; c < g->outputs; ++c) {
            const int32_t from = n * g->inputs + c / outputs * inputs;
            $prepare
            for (int32_t at = 0; at < g->out[0] * g->out[1]; ++at) {
                const int32_t o0 = at / g->out[1], o1 = at % g->out[1];
                for (int32_t i = 0; i < length; ++i) {
                    row[i] = bias ? bias[c] : 0;
                }
                for (int32_t k0 = 0; k0 < g->kernel[0]; ++k0) {
                    for (int32_t k1 = 0; k1 < g->kernel[1]; ++k1) {
                        $locate
                        if (i0 < 0 || i0 >= g->in[0] || i1 < 0 || i1 >= g->in[1]) {
                            continue;
                        }
                        for (int32_t k2 = 0; k2 < g->kernel[2]; ++k2) {
                            const int32_t tap = (k0 * g->kernel[1] + k1) * g->kernel[2] + k2;
                            const int32_t line = ((from * g->in[0] + i0) * g->in[1] + i1) * g->in[2];
                            const int32_t offset = k2 * g->dilation[2] - g->before[2];
                            $inner
                        }
                    }
                }
                const int32_t store = ((n * g->outputs + c) * g->out[0] * g->out[1] + at) * length;
                for (int32_t i = 0; i < length; ++i) {
                    const $A v0 = row[i];
                    $stages
                    y[store + i] = ($Y)$result;
                }
            }
        }
    }
}
"""

_FORWARD = """
const int32_t i0 = o0 * g->stride[0] + k0 * g->dilation[0] - g->before[0];
const int32_t i1 = o1 * g->stride[1] + k1 * g->dilation[1] - g->before[1];
"""

_FORWARD_INNER = """
const int32_t stride = g->stride[2], reach = g->in[2] - 1 - offset;
const int32_t first = offset < 0 ? (stride - 1 - offset) / stride : 0;
const int32_t most = reach < 0 ? 0 : reach / stride + 1, last = most < length ? most : length;
for (int32_t k = 0; k < inputs; ++k) {
    const $A weight = w[(c * inputs + k) * taps + tap];
    const int32_t start = line + k * plane + offset;
    if (stride == 1) {
        for (int32_t i = first; i < last; ++i) {
            row[i] += weight * ($A)x[start + i];
        }
    } else {
        for (int32_t i = first; i < last; ++i) {
            row[i] += weight * ($A)x[start + i * stride];
        }
    }
}
"""

_BACKWARD = """
const int32_t at0 = o0 + g->before[0] - k0 * g->dilation[0], i0 = at0 % g->stride[0] == 0 ? at0 / g->stride[0] : -1;
const int32_t at1 = o1 + g->before[1] - k1 * g->dilation[1], i1 = at1 % g->stride[1] == 0 ? at1 / g->stride[1] : -1;
"""

_BACKWARD_INNER = """
for (int32_t k = 0; k < inputs; ++k) {
    const $A weight = w[((c / outputs * inputs + k) * outputs + c % outputs) * taps + tap];
    for (int32_t i = 0; i < g->in[2]; ++i) {
        const int32_t j = i * g->stride[2] + offset;
        if (j >= 0 && j < length) {
            row[j] += weight * ($A)x[line + k * plane + i];
        }
    }
}
"""

_LINEAR = """
static void $name(const $X *restrict x, const $W *restrict w, const $A *restrict bias, $Y *restrict y,
    int32_t rows, int32_t inputs, int32_t outputs$parameters)
{
    for (int32_t row = 0; row < rows; ++row) {
        for (int32_t c = 0; c < outputs; ++c) {
            $A v0 = bias ? bias[c] : 0;
            $prepare
            for (int32_t i = 0; i < inputs; ++i) {
                v0 += ($A)x[row * inputs + i] * ($A)w[c * inputs + i];
            }
            $stages
            y[row * outputs + c] = ($Y)$result;
        }
    }
}
"""

_POOL = """
static void $name(const $X *restrict x, $Y *restrict y, $A start, const struct window *g$parameters)
{
    const int32_t taps = g->kernel[0] * g->kernel[1] * g->kernel[2];
    const int32_t size = g->out[0] * g->out[1] * g->out[2];
    for (int32_t plane = 0; plane < g->batch * g->inputs; ++plane) {
        $channel
        $prepare
        for (int32_t at = 0; at < size; ++at) {
            const int32_t top[3] = {at / g->out[2] / g->out[1], at / g->out[2] % g->out[1], at % g->out[2]};
            $A v0 = start;
            for (int32_t k = 0; k < taps; ++k) {
                const int32_t head = k / g->kernel[2];
                const int32_t place[3] = {head / g->kernel[1], head % g->kernel[1], k % g->kernel[2]};
                int32_t line = plane;
                int32_t inside = 1;
                for (int32_t axis = 0; axis < 3; ++axis) {
                    const int32_t i = top[axis] * g->stride[axis] + place[axis] * g->dilation[axis] - g->before[axis];
                    inside &= i >= 0 && i < g->in[axis];
                    line = line * g->in[axis] + i;
                }
                if (inside) {
                    const $A v = ($A)x[line];
                    $combine
                }
            }
            $stages
            y[plane * size + at] = ($Y)$result;
        }
    }
}
"""


def _triple(op: Op, numbers: Sequence[int] | None, fill: int, axes: int) -> list[int]:
    """One number for each of three axes; the missing ones stand first."""
    given = [fill] * axes if numbers is None else [int(n) for n in numbers]
    if axes > 3 or len(given) != axes:
        raise UnsupportedModelError(
            f"{op.path}: {op.kind} over {axes} axes with {len(given)} numbers for them; C has 1 to 3 spatial axes."
        )
    return [fill] * (3 - axes) + given


def _window(op: Op, x: Value, y: Value, kernel: Sequence[int], source: Source, groups: int = 1) -> str:
    a, axes = op.attributes, len(x.shape) - 2
    before = [p[0] if isinstance(p, (list, tuple)) else p for p in a["padding"]]
    return source.window(
        [
            [x.shape[0], x.shape[1], y.shape[1], groups],
            _triple(op, x.shape[2:], 1, axes),
            _triple(op, y.shape[2:], 1, axes),
            _triple(op, kernel, 1, axes),
            _triple(op, a["stride"], 1, axes),
            _triple(op, before, 0, axes),
            _triple(op, a.get("dilation"), 1, axes),
        ]
    )


def _operands(op: Op, sums: str, source: Source) -> tuple[str, str, str]:
    """The type of the weights, their table and that of the biases, in the type of the sums."""
    weight, bias = op.constants["weight"], op.constants.get("bias")
    return weight.dtype.name, source.table(weight), "NULL" if bias is None else source.table(bias, sums)


def scratch(step: Step, values: Mapping[str, Value]) -> tuple[str, int] | None:
    """The row of sums that a convolution needs beside its input and output: type and length."""
    if step.base is None or step.base.kind not in ("conv", "conv_transpose"):
        return None
    sums = values[step.base.output]
    return sum_type(sums.low, sums.high), sums.shape[-1]


def _shared(
    step: Step, values: Mapping[str, Value], source: Source
) -> tuple[Op, tuple[str, str, str, str], dict[str, str], str]:
    """Of a product: its operation, the types of input, weight, sums and result, and its weight and bias as C."""
    op = step.base
    assert op is not None
    x, sums, stored = values[op.inputs[0]], values[op.output], values[step.output].storage
    a = sum_type(sums.low, sums.high)
    w, weight, bias = _operands(op, a, source)
    types = {"X": ctype(x.storage), "W": ctype(w), "A": ctype(a), "Y": ctype(stored)}
    return op, (x.storage, w, a, stored), types, f"{weight}, {bias}"


def _convolution(step: Step, values: Mapping[str, Value], stages: Sequence[Stage], source: Source) -> str:
    op, storages, types, operands = _shared(step, values, source)
    x, sums = values[op.inputs[0]], values[op.output]
    forward = op.kind == "conv"
    blocks = {"locate": _FORWARD if forward else _BACKWARD, "inner": _FORWARD_INNER if forward else _BACKWARD_INNER}
    name = source.function(op.kind, storages, _CONV, types, stages, blocks)
    window = _window(op, x, sums, op.constants["weight"].shape[2:], source, int(op.attributes["groups"]))
    return f"{name}({{x}}, {operands}, {{y}}, row_{tag(storages[2])}, &{window}{passed(stages)});"


def _linear(step: Step, values: Mapping[str, Value], stages: Sequence[Stage], source: Source) -> str:
    op, storages, types, operands = _shared(step, values, source)
    name = source.function("linear", storages, _LINEAR, types, stages)
    outputs, inputs = op.constants["weight"].shape
    rows = elements(values[op.inputs[0]].shape[:-1])
    return f"{name}({{x}}, {operands}, {{y}}, {rows}, {inputs}, {outputs}{passed(stages)});"


def _pool(step: Step, values: Mapping[str, Value], stages: Sequence[Stage], source: Source) -> str:
    op = step.base
    assert op is not None
    x, sums, stored = values[op.inputs[0]], values[op.output], values[step.output].storage
    largest = op.kind == "max_pool"
    a = sum_type(min(x.low, sums.low), max(x.high, sums.high))
    combine = "v0 = v > v0 ? v : v0;" if largest else "v0 += v;"
    types = {"X": ctype(x.storage), "A": ctype(a), "Y": ctype(stored), "combine": combine}
    blocks = {"channel": "const int32_t c = plane % g->inputs;"}
    name = source.function(op.kind, (x.storage, a, stored), _POOL, types, stages, blocks)
    window = _window(op, x, sums, op.attributes["kernel"], source)
    start = literal(x.low) if largest else "0"
    return f"{name}({{x}}, {{y}}, {start}, &{window}{passed(stages)});"


_Call = Callable[[Step, Mapping[str, Value], Sequence[Stage], Source], str]
PRODUCTS: dict[str, _Call] = {
    "conv": _convolution,
    "conv_transpose": _convolution,
    "linear": _linear,
    "max_pool": _pool,
    "sum_pool": _pool,
}
