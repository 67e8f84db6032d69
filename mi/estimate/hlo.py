"""A parser for optimized HLO, as in `compiled.as_text()`, which also finds loop trip counts."""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

DTYPE_BITS = {'pred': 8, 'token': 0, 'opaque': 0, 'c64': 64, 'c128': 128}
ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?')
INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (.*)')
COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
OPERAND = re.compile(r'%([\w.\-]+)')


class Shape(NamedTuple):
    """An array. On a TPU, `space` is 0 for main memory and 1 for the core's vector memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def is_in_main_memory(self) -> bool:
        return self.space == 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        # f8e4m3fn, s4, bf16: the digits after the letters are the bits.
        bits = DTYPE_BITS.get(self.dtype)
        if bits is None:
            digits = re.match(r'[a-z]+(\d+)', self.dtype)
            bits = int(digits[1]) if digits else 0
        return -(-self.size * bits // 8)


class Instruction(NamedTuple):
    """An instruction, one line of a computation.

    Attributes:
      name: name of the instruction, unique in its computation.
      result: the result type as HLO text, in parentheses if it is a tuple.
      opcode: 'dot', 'fusion', 'all-gather-start', …
      operands: names of the operands.
      arguments: the text between the parentheses, used for constants and parameters.
      attributes: the text after the closing parenthesis.
    """

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Return the arrays of the result.

        The result of an asynchronous start may also hold its operands, which are omitted.
        """
        result = self.result
        if self.opcode == 'copy-start':
            result = split_tuple(result)[0]
        elif self.opcode.endswith('-start') and self.opcode != 'all-reduce-start':
            result = split_tuple(result)[1]
        return parse_shapes(result)

    @property
    def target(self) -> str:
        """Return the target of a custom call."""
        return self.option('custom_call_target')

    @property
    def operation(self) -> str | None:
        """Return the JAX operation and its modules, as 'jit(step)/core/dot_general', or None."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else None

    @property
    def label(self) -> str:
        """Return the name and, if known, the JAX operation."""
        return self.name if self.operation is None else f'{self.name} ({self.operation})'

    def called(self, attribute: str) -> tuple[str, ...]:
        """Return the computations in an attribute, as in branch_computations={%b, %c}."""
        match = re.search(rf'\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)', self.attributes)
        return tuple(re.findall(r'[\w.\-]+', match[1])) if match else ()

    def branches(self) -> tuple[str, ...]:
        """Return a conditional's computations, in the order of its operands."""
        return self.called('branch_computations') or (
            *self.called('true_computation'),
            *self.called('false_computation'),
        )

    def option(self, attribute: str) -> str:
        """Return the value of an attribute, such as direction=LT or index=3, or '' if absent."""
        match = re.search(rf'\b{attribute}="?([^,"\s]*)', self.attributes)
        return match[1] if match else ''

    def dims(self, attribute: str) -> tuple[int, ...]:
        """Return the numbers in an attribute such as lhs_contracting_dims={1,2}."""
        match = re.search(rf'\b{attribute}=\{{([\d,]*)\}}', self.attributes)
        return _integers(match[1]) if match else ()


class Computation(NamedTuple):
    """A function of a module, with its instructions in order and the name of its result, `root`."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """Return the arrays of all operands."""
        operands = (self.instructions[operand_name] for operand_name in instruction.operands)
        return [shape for operand in operands for shape in operand.shapes]


class Module(NamedTuple):
    """An HLO module: the program that each device runs.

    Attributes:
      computations: the computations by name.
      entry: name of the entry computation.
      num_devices: number of devices that run the program (partitions × replicas).
    """

    computations: dict[str, Computation]
    entry: str
    num_devices: int


def parse(hlo_text: str) -> Module:
    """Parse the text of an optimized module.

    Raises:
      ValueError: if the text has no entry computation.
    """
    # The header has the devices that run the module.
    header = hlo_text[: hlo_text.find('\n')]
    device_counts = {unit: int(count) for unit, count in re.findall(r'num_(\w+)=(\d+)', header)}

    # A line opens a computation, closes it, or is one of its instructions.
    computations: dict[str, Computation] = {}
    entry_name = computation_name = root_name = ''
    instructions: dict[str, Instruction] | None = None
    for line in hlo_text.splitlines():
        if instructions is None:
            if line.endswith('{') and (match := COMPUTATION.match(line)):
                computation_name, root_name, instructions = match[2], '', {}
                entry_name = computation_name if match[1] else entry_name
        elif line.startswith('}'):
            computations[computation_name] = Computation(computation_name, instructions, root_name)
            instructions = None
        elif match := INSTRUCTION.match(line):
            instruction = _parse_instruction(match[2], match[3])
            instructions[instruction.name] = instruction
            root_name = instruction.name if match[1] or not root_name else root_name
    if not entry_name:
        raise ValueError(
            'the HLO text has no ENTRY computation: expected an optimized module. Try '
            'compiled.as_text()'
        )
    num_devices = device_counts.get('partitions', 1) * device_counts.get('replicas', 1)
    return Module(computations, entry_name, num_devices)


def _parse_instruction(name: str, text: str) -> Instruction:
    # result opcode(arguments), attributes
    result_end = _closing(text, 0) if text.startswith('(') else text.find(' ')
    result, call = text[:result_end], text[result_end:].lstrip()
    opening = call.find('(')
    call_end = _closing(call, opening)
    arguments = call[opening + 1 : call_end - 1]
    operands = tuple(OPERAND.findall(arguments))
    return Instruction(name, result, call[:opening], operands, arguments, call[call_end:])


def _closing(text: str, start: int) -> int:
    """Return the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile('[()]').finditer(text, start):
        depth += 1 if match[0] == '(' else -1
        if depth == 0:
            return match.end()
    return len(text)


def split_tuple(text: str) -> list[str]:
    """Split the text of a tuple, such as '((f32[2], s32[]), f32[3,4])', into its elements."""
    if not text.startswith('('):
        return [text]
    elements, depth = [''], 0
    for character in text[1:-1]:
        depth += (character in '([{') - (character in ')]}')
        if character == ',' and depth == 0:
            elements.append('')
        else:
            elements[-1] += character
    return [re.sub(r'/\*.*?\*/', '', element).strip() for element in elements]


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Return the arrays in a type's text, with dynamic sizes replaced by their bounds."""
    shapes = []
    for dtype, dims, layout in ARRAY.findall(text):
        space = re.search(r'S\((\d+)\)', layout)
        shapes.append(Shape(dtype, _integers(dims), int(space[1]) if space else 0))
    return tuple(shapes)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r'\d+', text))


@dataclasses.dataclass(frozen=True)
class Counter:
    """A scalar in a loop: element `index` of the state that its body receives, plus `offset`."""

    index: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A predicate on two scalars."""

    direction: str
    lhs: 'Value'
    rhs: 'Value'


# What is known of a result before the program runs: a number, a tuple of values, or nothing.
Value = int | Counter | Comparison | tuple['Value', ...] | None

PASSED_ON = {'copy', 'bitcast', 'copy-start', 'copy-done', 'convert', 'optimization-barrier'}


class Constants:
    """An evaluator of scalar integers that do not depend on data."""

    def __init__(self, module: Module) -> None:
        self.computations = module.computations
        self.values: dict[tuple[str, str, tuple[Value, ...]], Value] = {}

    def result(self, computation_name: str, arguments: Iterable[Value]) -> Value:
        """Return the result of a computation for these arguments."""
        computation = self.computations[computation_name]
        return self.value(computation, computation.root, tuple(arguments))

    def value(
        self, computation: Computation, instruction_name: str, arguments: tuple[Value, ...]
    ) -> Value:
        """Return the result of an instruction in a computation called with `arguments`."""
        call_key = computation.name, instruction_name, arguments
        if call_key not in self.values:
            instruction = computation.instructions[instruction_name]
            self.values[call_key] = self._evaluate(computation, instruction, arguments)
        return self.values[call_key]

    def _evaluate(
        self, computation: Computation, instruction: Instruction, arguments: tuple[Value, ...]
    ) -> Value:
        opcode, result = instruction.opcode, instruction.result
        # Arrays are data; of scalars and tuples, some instructions are known.
        if not result.startswith('(') and '[]' not in result:
            return None
        if opcode == 'parameter':
            index = int(instruction.arguments)
            return arguments[index] if index < len(arguments) else None
        if opcode == 'constant':
            is_integer = re.fullmatch(r'-?\d+', instruction.arguments)
            return int(instruction.arguments) if is_integer else None

        # The result follows from what is known of the operands.
        operands = [self.value(computation, name, arguments) for name in instruction.operands]
        if opcode in PASSED_ON:
            return operands[0]
        if opcode == 'tuple':
            return tuple(operands)
        if opcode == 'get-tuple-element':
            index = int(instruction.option('index'))
            return operands[0][index] if isinstance(operands[0], tuple) else None
        if opcode in ('add', 'subtract'):
            return _add(operands[0], operands[1], 1 if opcode == 'add' else -1)
        if opcode == 'compare':
            return Comparison(instruction.option('direction'), operands[0], operands[1])

        # Other computations are evaluated for these operands.
        if opcode in ('fusion', 'call'):
            called = instruction.called('calls' if opcode == 'fusion' else 'to_apply')
            return self.result(called[0], operands)
        if opcode == 'while':
            return self.invariants(instruction, operands[0])
        return None

    def invariants(self, loop: Instruction, state: Value) -> Value:
        """Return the state of a loop without the elements that its body changes."""
        if not isinstance(state, tuple):
            return None
        counters, following = self._step(loop, len(state))
        if not isinstance(following, tuple):
            return None
        pairs = zip(state, counters, following, strict=True)
        return tuple(value if update == counter else None for value, counter, update in pairs)

    def trip_count(self, loop: Instruction, state: Value) -> int | None:
        """Return how often the body of a `while` runs, or None if this depends on data.

        This uses the compiler's own count if the text has one. Otherwise the condition must compare
        a counter with a bound, both with known initial values.
        """
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(match[1])
        if not isinstance(state, tuple):
            return None

        # The condition sees the state of one iteration, whose scalars are counters.
        counters, following = self._step(loop, len(state))
        condition = self.result(loop.called('condition')[0], [counters])
        if not isinstance(condition, Comparison) or not isinstance(following, tuple):
            return None

        # Both sides grow linearly, so their difference does too.
        lhs, rhs = (_progress(value, state, following) for value in (condition.lhs, condition.rhs))
        if lhs is None or rhs is None:
            return None
        return _iterations(condition.direction, lhs[0] - rhs[0], lhs[1] - rhs[1])

    def _step(self, loop: Instruction, size: int) -> tuple[tuple[Value, ...], Value]:
        """Return a loop's state as counters, and the state after one iteration in terms of them."""
        counters = tuple(Counter(index, 0) for index in range(size))
        return counters, self.result(loop.called('body')[0], [counters])


def _progress(
    value: Value, state: tuple[Value, ...], following: tuple[Value, ...]
) -> tuple[int, int] | None:
    """Return the first value that a condition reads, and its increment per iteration."""
    if isinstance(value, int):
        return value, 0
    if not isinstance(value, Counter):
        return None
    start, update = state[value.index], following[value.index]
    if not isinstance(start, int) or not isinstance(update, Counter) or update.index != value.index:
        return None
    return start + value.offset, update.offset


def _add(left: Value, right: Value, sign: int = 1) -> Value:
    if isinstance(left, int) and isinstance(right, int):
        return left + sign * right
    if isinstance(left, Counter) and isinstance(right, int):
        return Counter(left.index, left.offset + sign * right)
    if isinstance(left, int) and isinstance(right, Counter) and sign == 1:
        return Counter(right.index, right.offset + left)
    return None


def _iterations(direction: str, difference: int, step: int) -> int | None:
    """Count the iterations for which `difference`, growing by `step`, compares true with 0."""
    # Turn each direction into LT or NE.
    if direction in ('GT', 'GE'):
        direction = {'GT': 'LT', 'GE': 'LE'}[direction]
        difference, step = -difference, -step
    if direction == 'LE':
        direction, difference = 'LT', difference - 1
    if direction == 'NE' and step and difference % step == 0:
        return -difference // step if -difference // step >= 0 else None
    if direction == 'LT':
        if difference >= 0:
            return 0
        return -(difference // step) if step > 0 else None
    return None
