"""Rules for references to mutable arrays: creation, reads and writes."""

from mi.find.elementwise import add
from mi.find.interpreter import Interpreter
from mi.find.primitives import get_shape
from mi.find.records import Equation
from mi.find.shapes import look_up
from mi.find.values import Value, blend, unbind


def make_reference(interpreter: Interpreter, content: Value) -> Value:
    """Return a reference to a new mutable array with this content."""
    ref = interpreter.make_id()
    interpreter.contents[ref] = content
    return interpreter.make_constant(content.shape)._replace(ref=ref)


def access(interpreter: Interpreter, equation: Equation) -> list[Value]:
    """Create, read or write a reference."""
    name, inputs, shapes = equation.name, equation.inputs, equation.shapes
    if name in ('new_ref', 'empty_ref'):
        content = inputs[0] if inputs else interpreter.make_constant(shapes[0])
        return [make_reference(interpreter, content)]
    content = interpreter.contents[inputs[0].ref]
    if name == 'free_ref':
        return []
    if name == 'freeze':
        return [content]
    if name == 'get':
        return [_read(interpreter, equation, content, inputs[1:])]

    # A write, which returns the entries before it.
    ref, value, *indices = inputs
    writing = equation._replace(shapes=[value.shape])
    entries = _read(interpreter, writing, content, indices)
    if name == 'addupdate':
        value = add(interpreter, writing._replace(inputs=[entries, value]))
    interpreter.contents[ref.ref] = _write(interpreter, content, value, indices)
    return [entries] if equation.eqn.outvars else []


def _read(
    interpreter: Interpreter, equation: Equation, content: Value, indices: list[Value]
) -> Value:
    """Return entries of a reference."""
    shape = equation.shape
    if not indices and shape == content.shape:
        return content
    data = [index for index in indices if index.streams]
    if data and content.streams:
        return look_up(interpreter, equation, content, data)
    if data:
        chosen = interpreter.identify(blend([content, *data], shape))
        return chosen._replace(is_chosen=any(index.is_choice for index in data))
    place = str(equation.params) if not indices else interpreter.make_id()
    return content._replace(
        shape=shape,
        base=interpreter.intern('base', content.base, 'get', place),
        origin=interpreter.intern('origin', content.origin, 'get', place),
        features=drop_axes(content, shape),
        parts=(),
    )


def _write(interpreter: Interpreter, content: Value, value: Value, indices: list[Value]) -> Value:
    """Return the new content of a reference after a write."""
    if not indices and value.shape == content.shape:
        return value
    is_first = not (content.streams or content.has_params)
    if is_first and not any(index.streams for index in indices):
        return interpreter.identify(value._replace(shape=content.shape, parts=()))
    merged = blend([content, value, *unbind(indices)], content.shape, is_polynomial=True)
    return interpreter.identify(merged)._replace(
        products=content.products | value.products,
        mapped_products=content.mapped_products | value.mapped_products,
    )


def run_scoped(interpreter: Interpreter, equation: Equation) -> list[Value]:
    """Run a jaxpr with references that only exist within it."""
    jaxpr = equation.params['jaxpr']
    refs = [
        make_reference(interpreter, interpreter.make_constant(get_shape(var)))
        for var in jaxpr.invars
    ]
    return interpreter.run(jaxpr, refs, equation.enter(), consts=equation.inputs)


def drop_axes(value: Value, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the feature axes of a value after indexing has removed its leading axes."""
    num_dropped = len(value.shape) - len(shape)
    return tuple(axis - num_dropped for axis in value.features if axis >= num_dropped)
