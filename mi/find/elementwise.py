"""Rules for elementwise primitives: sums, products, powers, selections, nonlinear functions."""

from mi.find import motifs
from mi.find.primitives import COMPARISONS, is_boolean, is_integer
from mi.find.records import Equation, Geometry
from mi.find.trace import Trace
from mi.find.values import (
    NO_IDS,
    Source,
    Value,
    add_degrees,
    blend,
    max_degrees,
    unbound_degrees,
    unite,
)

SQUASHES = {'logistic': 'sigmoid', 'tanh': 'tanh'}


def convert(trace: Trace, equation: Equation) -> list[Value]:
    """Return values with another dtype or placement.

    Conversions to integers round, and those to booleans compare with zero.
    """
    shapes = zip(equation.inputs, equation.shapes, strict=False)
    values = [value._replace(shape=shape) for value, shape in shapes]
    if equation.name != 'convert_element_type':
        return values
    if is_integer(equation.eqn.outvars[0]):
        return [value._replace(degrees=unbound_degrees([value])) for value in values]
    if is_boolean(equation.eqn.outvars[0]):
        return [_squash('ne', value) for value in values]
    return values


def negate(trace: Trace, equation: Equation) -> Value:
    """Return −x, which is never a mask or an exponential, even if x is."""
    return equation.inputs[0]._replace(is_mask=False, is_exp=False)


# --------------------------------------------------------------------------- sums


def add(trace: Trace, equation: Equation) -> Value:
    """Return x + y or x − y, and record a meeting if both are affine maps."""
    inputs, shape = equation.inputs, equation.shape
    left, right = inputs
    if not (left.streams and right.streams):
        return _shift(trace, equation)
    value = trace.inherit_identity(blend(inputs, shape, is_polynomial=True), inputs)
    linear: tuple[Source, ...] = ()
    if left.linear and right.linear:
        linear = tuple(dict.fromkeys((*left.linear, *right.linear)))
        geometry = Geometry(shape, features=(len(shape) - 1,) if shape else ())
        trace.record_meetings(equation, 'sum', (left.linear, right.linear), geometry)
    return value._replace(
        linear=linear,
        features=left.features if left.features == right.features else (),
        is_activation=left.is_activation and right.is_activation and value.base == left.base,
        is_shifted=bool(linear) and (left.is_shifted or right.is_shifted),
        reduced=left.reduced | right.reduced,
        products=left.products | right.products,
        mapped_products=left.mapped_products | right.mapped_products,
    )


def _shift(trace: Trace, equation: Equation) -> Value:
    """Return the sum of a value and a constant that does not depend on data."""
    left, right = equation.inputs
    value, constant = (left, right) if left.streams else (right, left)
    value = trace.broadcast(value, equation.shape)
    squash = value.squash
    if squash:  # (1 + tanh) / 2 is a sigmoid, and 1 − σ is one too
        squash = 'sigmoid' if not constant.has_params else ''
    return value._replace(
        has_params=value.has_params or constant.has_params,
        squash=squash,
        is_exp=False,
        is_softmax=False,
        is_carry=False,
        is_shifted=value.is_shifted or (bool(value.linear) and constant.is_literal),
        parts=(),
    )


# --------------------------------------------------------------------------- products


def multiply(trace: Trace, equation: Equation) -> Value:
    """Return x · y, x / y or x ** y, and record a product if both depend on data."""
    left, right = equation.inputs
    name = equation.name
    if name != 'mul' and right.streams and not left.streams:  # c / x, c ** x
        value = _squash(name, trace.broadcast(right, equation.shape))
        return value._replace(has_params=left.has_params or right.has_params)
    if name == 'pow' and not right.streams:
        return raise_power(trace, equation)
    if not (left.streams and right.streams):
        return _scale(trace, equation)
    return _multiply_data(trace, equation)


def _scale(trace: Trace, equation: Equation) -> Value:
    """Return the product of a value and a constant that does not depend on data."""
    left, right = equation.inputs
    value, constant = (left, right) if left.streams else (right, left)
    value = trace.broadcast(value, equation.shape)
    return value._replace(
        has_params=value.has_params or constant.has_params,
        squash='' if constant.has_params else value.squash,
    )


def _multiply_data(trace: Trace, equation: Equation) -> Value:
    """Return the product, quotient or power of two values that depend on data."""
    name, inputs = equation.name, equation.inputs
    left, right = inputs
    value = blend(inputs, equation.shape)
    if name == 'mul':
        value = value._replace(degrees=add_degrees(left, right))
    elif name == 'div':
        degrees = add_degrees(left, right._replace(degrees=unbound_degrees([right])))
        value = value._replace(degrees=degrees)

    # Elementwise functions of one array, masks, and normalizations.
    if left.base == right.base:
        activation = trace.inherit_identity(value, inputs)._replace(
            is_activation=any(side.linear or side.is_activation for side in inputs),
            reduced=left.reduced | right.reduced,
        )
        trace.record(equation, motifs.ACTIVATION)
        return activation
    if name != 'pow' and (left.is_mask or right.is_mask):
        operand = right if left.is_mask else left
        return trace.broadcast(operand, equation.shape)._replace(
            streams=value.streams, degrees=value.degrees, carried=value.carried,
            has_params=value.has_params, is_mask=left.is_mask and right.is_mask,
        )  # fmt: skip
    if left.origin in right.reduced or right.origin in left.reduced:
        return _normalize(trace, equation, value)
    if left.reduced & right.reduced:
        trace.record(equation, motifs.ACTIVATION)
        return trace.identify(value)._replace(reduced=left.reduced | right.reduced)
    return trace.record_product(equation, value)


def _normalize(trace: Trace, equation: Equation, value: Value) -> Value:
    """Return x · s or x / s, where s is a function of statistics of x."""
    left, right = equation.inputs
    normalized = left if left.origin in right.reduced else right
    result = value._replace(
        base=normalized.base, origin=normalized.origin, root=normalized.root,
        linear=(), features=normalized.features,
    )  # fmt: skip
    is_division = equation.name == 'div' and normalized is left
    if normalized.is_softmax:  # a softmax over fewer entries
        return result._replace(is_softmax=True, products=normalized.products,
                               mapped_products=normalized.mapped_products,
                               pending=normalized.pending)  # fmt: skip
    index = trace.record(equation, motifs.NORMALIZATION)
    if not (is_division and normalized.is_exp):
        return result
    return result._replace(
        is_softmax=True,
        pending=NO_IDS if index is None else frozenset([index]),
        products=normalized.products,
        mapped_products=normalized.mapped_products,
    )


def raise_power(trace: Trace, equation: Equation) -> Value:
    """Return xⁿ, and record a product of x with itself if n is an integer above 1."""
    name, value = equation.name, equation.inputs[0]
    power = 2 if name == 'square' else equation.params.get('y')
    result = _squash(name, value)
    if isinstance(power, int) and power >= 0:
        result = result._replace(degrees=tuple(power * degree for degree in value.degrees))
        if power > 1:
            trace.record(equation._replace(inputs=[value, value]), motifs.ACTIVATION)
    return result


# --------------------------------------------------------------------------- other functions


def select(trace: Trace, equation: Equation) -> Value:
    """Return one of several values, selected elementwise.

    Properties such as `squash` and `is_mask` are derived only from cases that depend on a stream.
    """
    inputs, is_nonlinear = equation.inputs, equation.name != 'select_n'
    predicates, cases = ([], inputs) if is_nonlinear else (inputs[:1], inputs[1:])
    candidates = [case for case in cases if case.streams]
    value = blend(inputs, equation.shape)
    if predicates:
        predicate = predicates[0]._replace(degrees=unbound_degrees(predicates))
        value = value._replace(degrees=max_degrees([*cases, predicate]))
    if not candidates:  # one-hot codes and masks
        return trace.identify(value)._replace(is_mask=True)

    # Properties that all candidates share, and records that any of them has.
    value = trace.inherit_identity(value, candidates)
    squashes = {case.squash for case in candidates}
    return value._replace(
        squash=squashes.pop() if len(squashes) == 1 else '',
        is_exp=all(case.is_exp for case in candidates) and not is_nonlinear,
        is_softmax=all(case.is_softmax for case in candidates) and not is_nonlinear,
        is_chosen=any(case.is_chosen for case in candidates),
        is_mask=all(case.is_mask for case in candidates),
        linear=() if is_nonlinear else candidates[0].linear,
        features=candidates[0].features,
        is_activation=any(
            case.is_activation or (is_nonlinear and bool(case.linear)) for case in candidates
        ),
        reduced=unite(candidates, 'reduced'),
        products=unite(candidates, 'products'),
        mapped_products=unite(candidates, 'mapped_products'),
        pending=unite(candidates, 'pending'),
    )


def apply_nonlinear(trace: Trace, equation: Equation) -> list[Value]:
    """Return the results of a function that is not a polynomial."""
    name, inputs, shapes = equation.name, equation.inputs, equation.shapes
    if len(inputs) == 1 and shapes == [inputs[0].shape]:
        return [_squash(name, inputs[0])]
    return [
        trace.inherit_identity(blend(inputs, shape), inputs)._replace(
            is_mask=name in COMPARISONS, reduced=unite(inputs, 'reduced')
        )
        for shape in shapes
    ]


def _squash(name: str, value: Value) -> Value:
    """Return the result of applying a nonlinear elementwise function to one value."""
    is_exp = name in ('exp', 'exp2')
    return value._replace(
        degrees=unbound_degrees([value]),
        squash=SQUASHES.get(name, ''),
        is_exp=is_exp,
        is_softmax=False,
        is_mask=name in COMPARISONS,
        is_activation=bool(value.linear) or value.is_activation,
        linear=(),
        is_shifted=False,
        is_carry=False,
        products=value.products if is_exp else NO_IDS,
        mapped_products=value.mapped_products if is_exp else NO_IDS,
    )
