"""Costs of single instructions of optimized HLO: FLOPs of products, bytes of kernels."""

import math
import re
from typing import NamedTuple

from mi.estimate import hlo

SLICES = ('slice', 'dynamic-slice', 'gather')
# Custom calls that name memory and move nothing.
NO_TRAFFIC = {'AllocateBuffer', 'Sharding', 'SPMDFullToShardShape', 'SPMDShardToFullShape'}


def estimated_cycles(instruction: hlo.Instruction) -> int:
    """Return the cycles that a TPU's compiler estimates for a kernel; 0 without an estimate."""
    match = re.search(r'"estimated_cycles":"?(\d+)', instruction.attributes)
    return int(match[1]) if match else 0


class Memory:
    """Counter of the main-memory bytes that a module's kernels read and write."""

    def __init__(self, module: hlo.Module) -> None:
        self.computations = module.computations

    def bytes_accessed(self, computation: hlo.Computation, kernel: hlo.Instruction) -> int:
        """Return the bytes that a kernel reads and writes."""
        if kernel.target in NO_TRAFFIC:
            return 0
        read = sum(
            self._read(computation, operand, kernel, position)
            for position, operand in enumerate(kernel.operands)
        )
        return read + self._written(computation, kernel)

    def _read(
        self, computation: hlo.Computation, operand: str, user: hlo.Instruction, position: int
    ) -> int:
        """Return the bytes of an operand that one of its users reads."""
        source = computation.instructions[operand]
        size = _size(source.shapes)
        if user.opcode in SLICES:
            return min(size, _size(user.shapes, anywhere=True)) if position == 0 else size
        if user.opcode in ('dynamic-update-slice', 'scatter'):
            return size if position else 0  # updated in place
        if user.opcode in ('fusion', 'fusion-start'):
            (name,) = user.called('calls')
            fused = self.computations[name]
            return min(size, self._read_parameter(fused, str(position)))
        return size

    def _read_parameter(self, fused: hlo.Computation, number: str) -> int:
        """Return the bytes of a parameter that a fused computation reads."""
        for instruction in fused.instructions.values():
            if instruction.opcode == 'parameter' and instruction.arguments == number:
                return self._read_by_all(fused, instruction)
        return 0

    def _read_by_all(self, fused: hlo.Computation, source: hlo.Instruction) -> int:
        total = 0
        for user in fused.instructions.values():
            for position, operand in enumerate(user.operands):
                if operand == source.name:
                    passes_on = user.opcode in ('bitcast', 'get-tuple-element', 'tuple')
                    total += (
                        self._read_by_all(fused, user)
                        if passes_on
                        else self._read(fused, operand, user, position)
                    )
        return total

    def _written(self, computation: hlo.Computation, kernel: hlo.Instruction) -> int:
        """Return the bytes of the result that an instruction writes."""
        if kernel.opcode in ('dynamic-update-slice', 'scatter'):
            update = -1 if kernel.opcode == 'scatter' else 1
            source = computation.instructions[kernel.operands[update]]
            return min(_size(kernel.shapes), _size(source.shapes, anywhere=True))
        if kernel.opcode in ('bitcast', 'tuple'):
            sources = (computation.instructions[operand] for operand in kernel.operands)
            return sum(self._written(computation, source) for source in sources)
        if kernel.opcode in ('fusion', 'fusion-start'):
            (name,) = kernel.called('calls')
            fused = self.computations[name]
            root = fused.instructions[fused.root]
            return min(_size(kernel.shapes), self._written(fused, root))
        return _size(kernel.shapes)


def _size(shapes: tuple[hlo.Shape, ...], anywhere: bool = False) -> int:
    """Return the bytes of arrays in main memory, or `anywhere`."""
    return sum(shape.bytes for shape in shapes if anywhere or shape.is_in_main_memory)


def product_flops(computation: hlo.Computation, instruction: hlo.Instruction) -> int | None:
    """Return the FLOPs of a dot, a convolution or its library call; None for other calls."""
    shapes = computation.operand_shapes(instruction)
    target = instruction.target
    if instruction.opcode == 'dot':
        contracted = instruction.dims('lhs_contracting_dims')
        return 2 * instruction.shapes[0].size * math.prod(shapes[0].dims[i] for i in contracted)
    if instruction.opcode == 'convolution':
        return _convolution_flops(instruction, shapes[0], instruction.shapes[0])
    if target.startswith('__cublas$'):
        match = re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', instruction.attributes)
        if match is None:
            return None
        contracted = tuple(int(number) for number in re.findall(r'\d+', match[1]))
        return 2 * instruction.shapes[0].size * math.prod(shapes[0].dims[i] for i in contracted)
    if target.startswith('__cudnn$conv'):
        # Gradients have the labels and the window of the forward convolution.
        lhs, out = shapes[0], instruction.shapes[0]
        if target == '__cudnn$convBackwardInput':
            lhs, out = out, lhs
        elif target == '__cudnn$convBackwardFilter':
            out = shapes[1]
        return _convolution_flops(instruction, lhs, out)
    return None


def _convolution_flops(instruction: hlo.Instruction, lhs: hlo.Shape, out: hlo.Shape) -> int:
    """Return the FLOPs of a convolution, without padding and the holes of dilation.

    A TPU writes products as convolutions, with batch axes as dilated spatial ones; so counted they
    have the FLOPs of the product.
    """
    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)
    if labels is None:
        raise ValueError('convolution: expected dim_labels')
    spatial = [label for label in labels[3] if label.isdigit()]
    window = _window(instruction.attributes, len(spatial))

    # Pairs of an output and a position of the window that meet an entry of the input.
    pairs = 1
    for label in spatial:
        taps = window[int(label)]
        size = lhs.dims[labels[1].index(label)]
        pairs *= taps.pairs(size, out.dims[labels[3].index(label)])
    groups = int(instruction.option('feature_group_count') or 1)
    batch_groups = int(instruction.option('batch_group_count') or 1)
    batch = lhs.dims[labels[1].index('b')] // batch_groups
    in_features = lhs.dims[labels[1].index('f')] // groups
    out_features = out.dims[labels[3].index('f')]
    return 2 * pairs * batch * in_features * out_features


class Taps(NamedTuple):
    """The window of a convolution along one axis."""

    size: int = 1
    stride: int = 1
    pad: int = 0
    lhs_dilate: int = 1
    rhs_dilate: int = 1

    def pairs(self, inputs: int, outputs: int) -> int:
        """Count the pairs of an output and a tap that read an entry of the input."""
        return sum(self._outputs(tap, inputs, outputs) for tap in range(self.size))

    def _outputs(self, tap: int, inputs: int, outputs: int) -> int:
        """Count the outputs o with o·stride + shift = i·lhs_dilate for an input i in range."""
        shift = tap * self.rhs_dilate - self.pad
        common = math.gcd(self.stride, self.lhs_dilate)
        if shift % common:
            return 0
        # o ≡ first modulo period, and 0 ≤ o·stride + shift ≤ (inputs − 1)·lhs_dilate.
        period = self.lhs_dilate // common
        first = (-shift // common) * pow(self.stride // common, -1, period) % period
        low = max(0, -(shift // self.stride))
        high = min(outputs - 1, ((inputs - 1) * self.lhs_dilate - shift) // self.stride)
        low += (first - low) % period
        return max(0, (high - low) // period + 1)


def _window(attributes: str, rank: int) -> list[Taps]:
    """Parse window={size=3x3 stride=2x2 pad=1_1x1_1 lhs_dilate=… rhs_dilate=…}."""
    match = re.search(r'\bwindow=\{([^}]*)\}', attributes)
    fields = dict(field.split('=') for field in match[1].split()) if match else {}
    columns = {
        name: [int(part.split('_')[0]) for part in fields[name].split('x')]
        for name in Taps._fields
        if name in fields
    }
    return [
        Taps(**{name: column[axis] for name, column in columns.items()}) for axis in range(rank)
    ]
