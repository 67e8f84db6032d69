"""Costs of single instructions of optimized HLO: FLOPs of products and bytes of kernels."""

import math
import re
from typing import NamedTuple

from mi.estimate import hlo

NO_ESTIMATE = 2**63 - 1
SLICES = ('slice', 'dynamic-slice', 'gather')
# Custom calls that name memory and move nothing.
NO_TRAFFIC = {'AllocateBuffer', 'Sharding', 'SPMDFullToShardShape', 'SPMDShardToFullShape'}


def get_estimated_cycles(instruction: hlo.Instruction) -> int:
    """Return the cycles that a TPU compiler estimates for a kernel, or 0 if there is no estimate.

    The compiler writes the largest int64 for kernels without an estimate, such as those that a v6e
    offloads to its sparse cores.
    """
    match = re.search(r'"estimated_cycles":"?(\d+)', instruction.attributes)
    cycles = int(match[1]) if match else 0
    return 0 if cycles == NO_ESTIMATE else cycles


class Memory:
    """A counter of the main-memory bytes that a module's kernels read and write."""

    def __init__(self, module: hlo.Module) -> None:
        self.computations = module.computations

    def bytes_accessed(self, computation: hlo.Computation, kernel: hlo.Instruction) -> int:
        """Return the bytes that a kernel reads and writes."""
        if kernel.target in NO_TRAFFIC:
            return 0
        bytes_read = sum(
            self._read(computation, operand, kernel, position)
            for position, operand in enumerate(kernel.operands)
        )
        return bytes_read + self._written(computation, kernel)

    def _read(
        self, computation: hlo.Computation, operand: str, user: hlo.Instruction, position: int
    ) -> int:
        """Return the bytes that an instruction reads from one of its operands."""
        source = computation.instructions[operand]
        operand_bytes = _size(source.shapes)
        # Slices and updates touch a part of it, a fusion what its own instructions read.
        if user.opcode in SLICES:
            slice_bytes = _size(user.shapes, anywhere=True)
            return min(operand_bytes, slice_bytes) if position == 0 else operand_bytes
        if user.opcode in ('dynamic-update-slice', 'scatter'):
            return operand_bytes if position else 0  # updated in place
        if user.opcode in ('fusion', 'fusion-start'):
            (fused_name,) = user.called('calls')
            fused = self.computations[fused_name]
            return min(operand_bytes, self._read_parameter(fused, str(position)))
        return operand_bytes

    def _read_parameter(self, fused: hlo.Computation, parameter_number: str) -> int:
        """Return the bytes of a parameter that a fused computation reads."""
        for instruction in fused.instructions.values():
            if instruction.opcode == 'parameter' and instruction.arguments == parameter_number:
                return self._read_by_all(fused, instruction)
        return 0

    def _read_by_all(self, fused: hlo.Computation, source: hlo.Instruction) -> int:
        bytes_read = 0
        for user in fused.instructions.values():
            for position, operand in enumerate(user.operands):
                if operand == source.name:
                    passes_on = user.opcode in ('bitcast', 'get-tuple-element', 'tuple')
                    bytes_read += (
                        self._read_by_all(fused, user)
                        if passes_on
                        else self._read(fused, operand, user, position)
                    )
        return bytes_read

    def _written(self, computation: hlo.Computation, kernel: hlo.Instruction) -> int:
        """Return the number of bytes that an instruction writes."""
        if kernel.opcode in ('dynamic-update-slice', 'scatter'):
            update = -1 if kernel.opcode == 'scatter' else 1
            source = computation.instructions[kernel.operands[update]]
            return min(_size(kernel.shapes), _size(source.shapes, anywhere=True))
        if kernel.opcode in ('bitcast', 'tuple'):
            sources = (computation.instructions[operand] for operand in kernel.operands)
            return sum(self._written(computation, source) for source in sources)
        if kernel.opcode in ('fusion', 'fusion-start'):
            (fused_name,) = kernel.called('calls')
            fused = self.computations[fused_name]
            root = fused.instructions[fused.root]
            return min(_size(kernel.shapes), self._written(fused, root))
        return _size(kernel.shapes)


def _size(shapes: tuple[hlo.Shape, ...], anywhere: bool = False) -> int:
    """Return the total bytes of arrays in main memory, or in any memory if `anywhere` is True."""
    return sum(shape.bytes for shape in shapes if anywhere or shape.is_in_main_memory)


def count_product_flops(computation: hlo.Computation, instruction: hlo.Instruction) -> int | None:
    """Return the FLOPs of a dot, a convolution or a library call for one, or None for others."""
    operand_shapes = computation.operand_shapes(instruction)
    target = instruction.target
    if instruction.opcode == 'dot':
        contracted = instruction.dims('lhs_contracting_dims')
        return _matmul_flops(instruction, operand_shapes[0], contracted)
    if instruction.opcode == 'convolution':
        return _convolution_flops(instruction, operand_shapes[0], instruction.shapes[0])
    if target.startswith('__cublas$'):
        match = re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', instruction.attributes)
        if match is None:
            return None
        contracted = tuple(int(number) for number in re.findall(r'\d+', match[1]))
        return _matmul_flops(instruction, operand_shapes[0], contracted)
    if target.startswith('__cudnn$conv'):
        # Gradients have the labels and the window of the forward convolution.
        lhs, output = operand_shapes[0], instruction.shapes[0]
        if target == '__cudnn$convBackwardInput':
            lhs, output = output, lhs
        elif target == '__cudnn$convBackwardFilter':
            output = operand_shapes[1]
        return _convolution_flops(instruction, lhs, output)
    return None


def _matmul_flops(instruction: hlo.Instruction, lhs: hlo.Shape, contracted: tuple[int, ...]) -> int:
    """Return the FLOPs of a product that sums over the left operand's contracted axes."""
    return 2 * instruction.shapes[0].size * math.prod(lhs.dims[axis] for axis in contracted)


def _convolution_flops(instruction: hlo.Instruction, lhs: hlo.Shape, output: hlo.Shape) -> int:
    """Return the FLOPs of a convolution, not counting padding and the holes of dilation.

    A TPU represents matrix products as convolutions, with batch axes as dilated spatial axes.
    Counted this way, they have the FLOPs of the product.
    """
    dim_labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)
    if dim_labels is None:
        raise ValueError(
            f'convolution {instruction.label}: expected a dim_labels attribute, such as '
            'dim_labels=b01f_01io->b01f'
        )
    # Axes are named by letters: b and f for batch and features, digits for space.
    spatial = [label for label in dim_labels[3] if label.isdigit()]
    window = _window(instruction.attributes, len(spatial))

    # Pairs of an output and a position of the window that meet an entry of the input.
    num_pairs = 1
    for label in spatial:
        taps = window[int(label)]
        input_size = lhs.dims[dim_labels[1].index(label)]
        num_pairs *= taps.pairs(input_size, output.dims[dim_labels[3].index(label)])
    num_groups = int(instruction.option('feature_group_count') or 1)
    num_batch_groups = int(instruction.option('batch_group_count') or 1)
    batch_size = lhs.dims[dim_labels[1].index('b')] // num_batch_groups
    in_features = lhs.dims[dim_labels[1].index('f')] // num_groups
    out_features = output.dims[dim_labels[3].index('f')]
    return 2 * num_pairs * batch_size * in_features * out_features


class Taps(NamedTuple):
    """The window of a convolution along a single axis."""

    size: int = 1
    stride: int = 1
    pad: int = 0
    lhs_dilate: int = 1
    rhs_dilate: int = 1

    def pairs(self, inputs: int, outputs: int) -> int:
        """Count the pairs of an output and a tap that read an entry of the input."""
        return sum(self._outputs(tap, inputs, outputs) for tap in range(self.size))

    def _outputs(self, tap: int, inputs: int, outputs: int) -> int:
        """Count the outputs o where o·stride + shift = i·lhs_dilate for an input i in range."""
        shift = tap * self.rhs_dilate - self.pad
        divisor = math.gcd(self.stride, self.lhs_dilate)
        if shift % divisor:
            return 0
        # o ≡ remainder modulo period, and 0 ≤ o·stride + shift ≤ (inputs − 1)·lhs_dilate.
        period = self.lhs_dilate // divisor
        remainder = (-shift // divisor) * pow(self.stride // divisor, -1, period) % period
        first_output = max(0, -(shift // self.stride))
        last_output = min(outputs - 1, ((inputs - 1) * self.lhs_dilate - shift) // self.stride)
        first_output += (remainder - first_output) % period
        return max(0, (last_output - first_output) // period + 1)


def _window(attributes: str, rank: int) -> list[Taps]:
    """Parse window={size=3x3 stride=2x2 pad=1_1x1_1 lhs_dilate=… rhs_dilate=…}."""
    match = re.search(r'\bwindow=\{([^}]*)\}', attributes)
    fields = dict(field.split('=') for field in match[1].split()) if match else {}
    axis_values = {
        field_name: [int(axis_text.split('_')[0]) for axis_text in fields[field_name].split('x')]
        for field_name in Taps._fields
        if field_name in fields
    }
    return [
        Taps(**{name: numbers[axis] for name, numbers in axis_values.items()})
        for axis in range(rank)
    ]
