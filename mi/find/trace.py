"""An abstract interpreter of jaxprs that records where two values that depend on data multiply.

Nothing is executed: the interpreter walks the equations once, into nested jaxprs too. The carry of
a loop is iterated to a fixed point with recording off; then the body is recorded once, with the
number of its iterations.

The file is long because it has one rule per kind of primitive, and all rules share the records.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from mi.find import kernels, motifs
from mi.find.motifs import Contraction
from mi.find.values import (
    NO_IDS,
    Source,
    Value,
    add_degrees,
    blend,
    get_sources,
    max_degrees,
    unbound_degrees,
)

# Primitives by what they do to a value. The others are nonlinear functions.
IDENTITIES = {
    *('convert_element_type', 'copy', 'copy_p', 'stop_gradient', 'reduce_precision'),
    *('real', 'imag', 'conj'),
    *('device_put', 'sharding_constraint', 'name', 'pvary', 'reshard', 'optimization_barrier'),
    *('layout_constraint', 'pcast', 'multiple_of'),
}
RESHAPES = {'reshape', 'transpose', 'broadcast_in_dim', 'squeeze', 'expand_dims', 'rev'}
SLICES = {'slice', 'split', 'dynamic_slice', 'pad', 'unstack'}
SUMS = {
    *('reduce_sum', 'cumsum', 'reduce_window_sum', 'add_any'),
    *('psum', 'psum_invariant', 'psum_scatter', 'reduce_scatter', 'pmean'),
}
REDUCTIONS = {
    *('reduce_max', 'reduce_min', 'reduce_and', 'reduce_or', 'pmax', 'pmin'),
    *('cummax', 'cummin', 'cumlogsumexp', 'reduce_window_max', 'reduce_window_min'),
}
REDUCTION_PRODUCTS = {'reduce_prod', 'cumprod'}
SCALED = {'scaled_matmul', 'scaled_matmul_wrapper'}
REDUCERS = {'reduce', 'reduce_window'}  # with a function of their own
MOVES = {'ppermute', 'pshuffle', 'all_to_all', 'all_gather', 'all_gather_invariant', 'pbroadcast'}
CHOICES = {'top_k', 'sort', 'argmax', 'argmin', 'approx_top_k'}
COMPARISONS = {'eq', 'ne', 'lt', 'le', 'gt', 'ge', 'is_finite', 'and', 'or', 'not', 'xor'}
SCATTERS = {'scatter', 'scatter-add', 'scatter_add', 'dynamic_update_slice'}
NOISE = {
    *('random_bits', 'random_wrap', 'random_unwrap', 'random_split', 'random_fold_in'),
    *('random_seed', 'random_gamma', 'random_clone', 'threefry2x32', 'rng_bit_generator'),
}
FREE = {*IDENTITIES, *RESHAPES, *SLICES, *SCATTERS, *MOVES, 'gather', 'concatenate', 'iota'}
CONTROL = {'cond', 'scan', 'while', 'pallas_call', 'run_scoped', 'custom_linear_solve'}
SQUASHES = {'logistic': 'sigmoid', 'tanh': 'tanh'}
OPAQUE = {'pure_callback', 'io_callback', 'ffi_call', 'custom_partitioning'}
LIBRARIES = ('/jax/', '/jaxlib/', '/flax/', '/haiku/', '/equinox/', '/mi/find/', '/contextlib.py')


class Scope(NamedTuple):
    """Where a jaxpr is.

    Attributes:
      path: the names of the enclosing modules.
      times: how often it runs; None if a while loop decides.
      frame: the source line of the outermost call without a line of its own.
      is_recording: whether products are recorded.
      num_devices: how many devices of a shard_map execute it.
    """

    path: str = ''
    times: int | None = 1
    frame: str = ''
    is_recording: bool = True
    num_devices: int = 1


@dataclasses.dataclass
class Product:
    """A recorded product.

    Attributes:
      primitive: name of the primitive.
      motif: from `mi.find.motifs`.
      left, right: its sides.
      shape: shape of the result.
      flops: of one execution.
      scope, source: where it is.
      count: how many equations make it, such as the terms of a convolution by shifts.
      is_absorbed: whether another product includes it.
      roots: ids of its results, one per equation, and of affine maps of them.
    """

    primitive: str
    motif: str
    left: Value
    right: Value
    shape: tuple[int, ...]
    flops: int
    scope: Scope
    source: str
    count: int = 1
    is_absorbed: bool = False
    roots: tuple[int, ...] = ()


@dataclasses.dataclass
class Meeting:
    """Two streams that are concatenated or added and then meet parameters.

    Attributes:
      kind: 'concatenation' or 'sum'.
      left, right: the arrays that meet.
      shape: shape of the affine map's result.
      features: number of its features.
      window: number of positions of a convolution's kernel.
      scope, source: where it is.
    """

    kind: str
    left: Source
    right: Source
    shape: tuple[int, ...]
    features: int
    window: int
    scope: Scope
    source: str


class Interpreter:
    """Interprets jaxprs abstractly and collects products, meetings, FLOPs and notes."""

    def __init__(self, num_streams: int):
        self.products: list[Product] = []
        self.meetings: list[Meeting] = []
        self.notes: dict[str, None] = {}
        self.flops = 0
        self._zeros = (0.0,) * num_streams
        self._ids = itertools.count(1)
        self._interned: dict[Hashable, int] = {}
        self._merged: dict[Hashable, int] = {}
        self._live: dict[int, list[core.JaxprEqn]] = {}
        self._contents: dict[int, Value] = {}  # of references, by id

    def make_value(self, shape: Sequence[int], streams: int, has_params: bool = False) -> Value:
        """Return an input of the function."""
        degrees = tuple(float(streams >> i & 1) for i in range(len(self._zeros)))
        return Value(tuple(shape), streams, has_params, degrees).identify(next(self._ids))

    def run(
        self,
        jaxpr: core.Jaxpr,
        consts: Iterable[Value],
        args: Iterable[Value],
        scope: Scope,
    ) -> list[Value]:
        """Return the outputs of a jaxpr."""
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Value:
            if isinstance(atom, core.Literal):
                shape = getattr(atom.aval, 'shape', ())
                return Value(shape, degrees=self._zeros, is_literal=not shape)
            return env[atom]

        for eqn in self._list_live(jaxpr):
            outputs = self._interpret(eqn, [read(atom) for atom in eqn.invars], scope)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _list_live(self, jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
        """Return the equations that an output needs, or that have side effects."""
        if id(jaxpr) not in self._live:
            needed = {var for var in jaxpr.outvars if not isinstance(var, core.Literal)}
            live = []
            for eqn in reversed(jaxpr.eqns):
                if eqn.effects or not needed.isdisjoint(eqn.outvars):
                    live.append(eqn)
                    needed |= {var for var in eqn.invars if not isinstance(var, core.Literal)}
            self._live[id(jaxpr)] = live[::-1]
        return self._live[id(jaxpr)]

    def run_closed(self, closed: Any, args: Iterable[Value], scope: Scope) -> list[Value]:
        """Return the outputs of a closed or open jaxpr; its constants do not depend on data."""
        jaxpr = getattr(closed, 'jaxpr', closed)
        shapes = [getattr(var.aval, 'shape', ()) for var in jaxpr.constvars]
        consts = [Value(tuple(shape), degrees=self._zeros) for shape in shapes]
        return self.run(jaxpr, consts, args, scope)

    # ------------------------------------------------------------------------- equations

    def _interpret(self, eqn: core.JaxprEqn, inputs: list[Value], scope: Scope) -> list[Value]:
        name = eqn.primitive.name
        if name in CONTROL:
            control: Callable[..., list[Value]] = getattr(self, f'_run_{name}')
            return control(eqn, inputs, self._enter(eqn, scope))
        if name in kernels.ACCESSES:
            return self._access(eqn, inputs, scope)
        inner = None if name in REDUCERS else _find_jaxpr(eqn)
        if inner is not None and name not in OPAQUE:
            return self._run_call(eqn, inner, inputs, scope)
        shapes = [_get_shape(var) for var in eqn.outvars]
        self._count_flops(eqn, inputs, shapes, scope)

        # What does not depend on data cannot interact; nor can noise.
        if name in NOISE or not any(value.streams for value in inputs):
            has_params = any(value.has_params for value in inputs)
            is_literal = all(value.is_literal for value in inputs) and name != 'iota'
            is_literal = is_literal and (bool(inputs) or name == 'broadcast_in_dim')
            return [Value(shape, 0, has_params, self._zeros, is_literal=is_literal)
                    for shape in shapes]  # fmt: skip
        if name in OPAQUE:
            return self._blur(eqn, inputs, shapes)
        return self._apply(eqn, inputs, shapes, scope)

    def _apply(
        self,
        eqn: core.JaxprEqn,
        inputs: list[Value],
        shapes: list[tuple[int, ...]],
        scope: Scope,
    ) -> list[Value]:
        """Return the outputs of an equation with data among its inputs."""
        # Primitives that move or rename elements.
        name, shape = eqn.primitive.name, shapes[0] if shapes else ()
        if name == 'optimization_barrier':
            return inputs
        if name in IDENTITIES:
            return [self._convert(eqn, inputs[0], shape)]
        if name in RESHAPES:
            return [self._reshape(eqn, inputs[0], shape)]
        if name in MOVES:  # between devices
            return [self._identify(value._replace(shape=out, features=(), parts=()))
                    for value, out in zip(inputs, shapes, strict=False)]  # fmt: skip
        if name in SLICES:
            return self._slice(eqn, inputs, shapes, scope)
        if name == 'concatenate':
            return [self._concatenate(eqn, inputs, shape)]
        if name == 'complex':
            return [self._map_linearly(name, inputs, shape)]

        # Elementwise arithmetic.
        if name in ('add', 'sub', 'add_any'):
            return [self._add(eqn, inputs, shape, scope)]
        if name == 'neg':
            return [inputs[0]._replace(is_mask=False, is_exp=False)]
        if name in ('mul', 'div', 'pow'):
            return [self._multiply(eqn, inputs, shape, scope)]
        if name in ('select_n', 'max', 'min', 'clamp', 'atan2', 'rem', 'nextafter'):
            return [self._select(name, inputs, shape)]
        if name in ('square', 'integer_pow'):
            return [self._raise_power(eqn, inputs[0], shape, scope)]

        # Products over axes, gathers and reductions.
        if name == 'gather':
            return [self._gather(eqn, inputs, shape, scope)]
        if 'dot' in name or name in SCALED:
            return [self._contract(eqn, inputs, shape, scope)]
        if name == 'conv_general_dilated':
            return [self._convolve(eqn, inputs, shape, scope)]
        if name in SCATTERS or name == 'fft':
            return [self._map_linearly(name, inputs, shape)]
        if name in SUMS or name in REDUCTIONS:
            return [self._reduce(eqn, value, out) for value, out in zip(inputs, shapes,
                                                                        strict=False)]  # fmt: skip
        if name in REDUCTION_PRODUCTS:
            return [self._reduce_product(eqn, inputs[0], shape, scope)]
        if name in REDUCERS:
            return self._reduce_by_function(eqn, inputs, shapes, scope)
        if name in CHOICES:
            return self._choose(eqn, inputs, shapes)
        if name == 'triangular_solve':
            return [self._solve(eqn, inputs, shape, scope)]

        # Anything else is a nonlinear function.
        if len(inputs) == 1 and shapes == [inputs[0].shape]:
            return [self._squash(name, inputs[0])]
        return [self._default(name, inputs, out) for out in shapes]

    def _default(self, name: str, inputs: list[Value], shape: tuple[int, ...]) -> Value:
        """Return the result of a nonlinear function of several inputs."""
        value = blend(inputs, shape)
        value = self._inherit_identity(value, inputs)
        return value._replace(
            is_mask=name in COMPARISONS,
            reduced=_unite(inputs, 'reduced'),
        )

    def _squash(self, name: str, value: Value) -> Value:
        """Return a nonlinear elementwise function of one value."""
        return value._replace(
            degrees=unbound_degrees([value]),
            squash=SQUASHES.get(name, ''),
            is_exp=name in ('exp', 'exp2'),
            is_softmax=False,
            is_mask=name in COMPARISONS,
            is_activation=bool(value.linear) or value.is_activation,
            linear=(),
            is_shifted=False,
            is_carry=False,
            products=value.products if name in ('exp', 'exp2') else NO_IDS,
            mapped_products=value.mapped_products if name in ('exp', 'exp2') else NO_IDS,
        )

    def _blur(
        self, eqn: core.JaxprEqn, inputs: list[Value], shapes: list[tuple[int, ...]]
    ) -> list[Value]:
        """Return conservative outputs of a call that cannot be read, and note it."""
        self.notes[f'{eqn.primitive.name}: its products cannot be read'] = None
        return [self._identify(blend(inputs, shape)) for shape in shapes]

    # ------------------------------------------------------------------------- elementwise

    def _convert(self, eqn: core.JaxprEqn, value: Value, shape: tuple[int, ...]) -> Value:
        if eqn.primitive.name == 'convert_element_type' and 'int' in str(eqn.params['new_dtype']):
            return value._replace(degrees=unbound_degrees([value]))
        return value._replace(shape=shape)

    def _add(
        self, eqn: core.JaxprEqn, inputs: list[Value], shape: tuple[int, ...], scope: Scope
    ) -> Value:
        left, right = inputs
        if not (left.streams and right.streams):
            return self._shift(left, right, shape)
        value = self._inherit_identity(blend(inputs, shape, is_polynomial=True), inputs)
        linear: tuple[Source, ...] = ()
        if left.linear and right.linear:
            linear = tuple(dict.fromkeys((*left.linear, *right.linear)))
            self._record_meetings('sum', left.linear, right.linear, (shape, shape[-1:], 1), eqn,
                                  scope)  # fmt: skip
        return value._replace(
            linear=linear,
            features=left.features if left.features == right.features else (),
            is_activation=left.is_activation and right.is_activation and value.base == left.base,
            is_shifted=bool(linear) and (left.is_shifted or right.is_shifted),
            reduced=left.reduced | right.reduced,
            products=left.products | right.products,
            mapped_products=left.mapped_products | right.mapped_products,
        )

    def _shift(self, left: Value, right: Value, shape: tuple[int, ...]) -> Value:
        """Return the sum of a value and of something that does not depend on data."""
        value, constant = (left, right) if left.streams else (right, left)
        value = self._broadcast(value, shape)
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

    def _scale(self, inputs: list[Value], shape: tuple[int, ...]) -> Value:
        """Return the product of a value and of something that does not depend on data."""
        left, right = inputs
        value, constant = (left, right) if left.streams else (right, left)
        value = self._broadcast(value, shape)
        return value._replace(
            has_params=value.has_params or constant.has_params,
            squash='' if constant.has_params else value.squash,
        )

    def _multiply(
        self, eqn: core.JaxprEqn, inputs: list[Value], shape: tuple[int, ...], scope: Scope
    ) -> Value:
        left, right = inputs
        name = eqn.primitive.name
        if name != 'mul' and right.streams and not left.streams:  # c / x, c ** x
            value = self._squash(name, self._broadcast(right, shape))
            return value._replace(has_params=left.has_params or right.has_params)
        if name == 'pow' and not right.streams:
            return self._raise_power(eqn, left, shape, scope)
        if not (left.streams and right.streams):
            return self._scale(inputs, shape)
        value = blend(inputs, shape)
        if name == 'mul':
            value = value._replace(degrees=add_degrees(left, right))
        elif name == 'div':
            degrees = add_degrees(left, right._replace(degrees=unbound_degrees([right])))
            value = value._replace(degrees=degrees)

        # Elementwise functions of one array, masks, and normalizations.
        if left.base == right.base:
            activation = self._inherit_identity(value, inputs)._replace(
                is_activation=any(side.linear or side.is_activation for side in inputs),
                reduced=left.reduced | right.reduced,
            )
            self._record(eqn, motifs.ACTIVATION, inputs, shape, scope)
            return activation
        if name != 'pow' and (left.is_mask or right.is_mask):
            operand = right if left.is_mask else left
            return self._broadcast(operand, shape)._replace(
                streams=value.streams, degrees=value.degrees, carried=value.carried,
                has_params=value.has_params, is_mask=left.is_mask and right.is_mask,
            )  # fmt: skip
        if left.origin in right.reduced or right.origin in left.reduced:
            return self._normalize(eqn, inputs, value, scope)
        if left.reduced & right.reduced:
            self._record(eqn, motifs.ACTIVATION, inputs, shape, scope)
            return self._identify(value)._replace(reduced=left.reduced | right.reduced)
        return self._record_product(eqn, inputs, value, None, scope)

    def _normalize(
        self, eqn: core.JaxprEqn, inputs: list[Value], value: Value, scope: Scope
    ) -> Value:
        """Return x · s, where s is a function of statistics of x."""
        left, right = inputs
        normalized = left if left.origin in right.reduced else right
        result = value._replace(
            base=normalized.base, origin=normalized.origin, root=normalized.root,
            linear=(), features=normalized.features,
        )  # fmt: skip
        is_division = eqn.primitive.name == 'div' and normalized is left
        if normalized.is_softmax:  # a softmax over fewer entries
            return result._replace(is_softmax=True, products=normalized.products,
                                   mapped_products=normalized.mapped_products,
                                   pending=normalized.pending)  # fmt: skip
        index = self._record(eqn, motifs.NORMALIZATION, inputs, value.shape, scope)
        if not (is_division and normalized.is_exp):
            return result
        return result._replace(
            is_softmax=True,
            pending=NO_IDS if index is None else frozenset([index]),
            products=normalized.products,
            mapped_products=normalized.mapped_products,
        )

    def _raise_power(
        self, eqn: core.JaxprEqn, value: Value, shape: tuple[int, ...], scope: Scope
    ) -> Value:
        power = 2 if eqn.primitive.name == 'square' else eqn.params.get('y')
        result = self._squash(eqn.primitive.name, value)
        if isinstance(power, int) and power >= 0:
            result = result._replace(degrees=tuple(power * d for d in value.degrees))
            if power > 1:
                self._record(eqn, motifs.ACTIVATION, [value, value], shape, scope)
        return result

    def _select(self, name: str, inputs: list[Value], shape: tuple[int, ...]) -> Value:
        """Return a selection among values; constants among them leave the tags of the rest."""
        predicates, cases = ([], inputs) if name != 'select_n' else (inputs[:1], inputs[1:])
        candidates = [case for case in cases if case.streams]
        value = blend(inputs, shape)
        if name == 'select_n':
            value = value._replace(degrees=max_degrees([
                *cases, predicates[0]._replace(degrees=unbound_degrees(predicates)),
            ]))  # fmt: skip
        if not candidates:  # one-hot codes and masks
            return self._identify(value)._replace(is_mask=True)
        first = candidates[0]
        value = self._inherit_identity(value, candidates)
        is_nonlinear = name != 'select_n'
        squashes = {case.squash for case in candidates}
        return value._replace(
            squash=squashes.pop() if len(squashes) == 1 else '',
            is_exp=all(case.is_exp for case in candidates) and not is_nonlinear,
            is_softmax=all(case.is_softmax for case in candidates) and not is_nonlinear,
            is_chosen=any(case.is_chosen for case in candidates),
            is_mask=all(case.is_mask for case in candidates),
            linear=() if is_nonlinear else first.linear,
            features=first.features,
            is_activation=any(
                case.is_activation or (is_nonlinear and bool(case.linear)) for case in candidates
            ),
            reduced=_unite(candidates, 'reduced'),
            products=_unite(candidates, 'products'),
            mapped_products=_unite(candidates, 'mapped_products'),
            pending=_unite(candidates, 'pending'),
        )

    # ------------------------------------------------------------------------- shapes

    def _reshape(self, eqn: core.JaxprEqn, value: Value, shape: tuple[int, ...]) -> Value:
        name = eqn.primitive.name
        if shape == value.shape and name != 'transpose' and name != 'rev':
            return value
        params = {key: str(param) for key, param in sorted(eqn.params.items()) if key != 'sharding'}
        base = self._intern('base', value.base, name, shape, tuple(params.items()))
        axis_map = _map_axes(eqn, value.shape, shape)
        features = tuple(sorted({out for axis in value.features for out in axis_map.get(axis, ())}))
        parts_axis = 0
        if value.parts:
            out = axis_map.get(len(value.shape) + value.parts_axis, ())
            parts_axis = out[0] - len(shape) if len(out) == 1 else 0
            if parts_axis and shape[parts_axis] != value.shape[value.parts_axis]:
                parts_axis = 0
        return value._replace(
            shape=shape, base=base, features=features, parts_axis=parts_axis,
            parts=value.parts if parts_axis else (),
        )  # fmt: skip

    def _broadcast(self, value: Value, shape: tuple[int, ...]) -> Value:
        if value.shape == shape:
            return value
        base = self._intern('base', value.base, 'broadcast', shape)
        return value._replace(shape=shape, base=base, parts=())

    def _slice(
        self,
        eqn: core.JaxprEqn,
        inputs: list[Value],
        shapes: list[tuple[int, ...]],
        scope: Scope,
    ) -> list[Value]:
        name, value = eqn.primitive.name, inputs[0]
        indices = [operand for operand in inputs[1:] if operand.streams]
        if name == 'dynamic_slice' and indices and value.streams:
            return [self._look_up(eqn, value, indices, shapes[0], scope)]
        outputs = []
        for index, shape in enumerate(shapes):
            params = tuple((key, str(param)) for key, param in sorted(eqn.params.items()))
            key = name, index, params
            if name == 'dynamic_slice':  # the indices are unknown
                key = name, next(self._ids), ()
            output = value._replace(
                shape=shape,
                base=self._intern('base', value.base, *key),
                origin=self._intern('origin', value.origin, *key),
                is_window=value.is_window or _is_window(name, value.shape, shape),
                parts=(),
            )
            if indices:
                output = output._replace(
                    streams=output.streams | blend(indices, ()).streams,
                    degrees=max_degrees([output, blend(indices, ())]),
                )
            outputs.append(output)
        return outputs

    def _concatenate(
        self, eqn: core.JaxprEqn, inputs: list[Value], shape: tuple[int, ...]
    ) -> Value:
        data = [value for value in inputs if value.streams]
        value = self._identify(blend(inputs, shape, is_polynomial=True))
        squashes = {operand.squash for operand in data}
        roots = {operand.root for operand in data}
        axis = eqn.params['dimension'] - len(shape)
        parts: list[Source] = []
        for operand in data:
            size, is_carried = operand.shape[axis], bool(operand.carried)
            undivided = (Source(operand.root, operand.streams, size, is_carried),)
            parts += operand.parts if operand.parts_axis == axis else undivided
        num_windows = sum(operand.is_window for operand in data)
        if len(roots) == 1:
            value = value._replace(root=data[0].root)
        return value._replace(
            squash=squashes.pop() if len(squashes) == 1 else '',
            linear=tuple(dict.fromkeys(s for operand in data for s in operand.linear))
            if all(operand.linear for operand in data)
            else (),
            features=data[0].features,
            is_activation=all(operand.is_activation for operand in data),
            num_windows=num_windows if len(roots) == 1 else 0,
            parts=tuple(parts),
            parts_axis=axis,
            products=_unite(data, 'products'),
            mapped_products=_unite(data, 'mapped_products'),
        )

    def _reduce(self, eqn: core.JaxprEqn, value: Value, shape: tuple[int, ...]) -> Value:
        name = eqn.primitive.name
        degrees = value.degrees if name in SUMS else unbound_degrees([value])
        axes = eqn.params.get('axes', ())
        kept_axes = [axis for axis in range(len(value.shape)) if axis not in axes]
        is_linear = name in SUMS and not name.startswith('cum')
        return self._identify(value)._replace(
            shape=shape,
            degrees=degrees,
            reduced=value.reduced | {value.origin},
            squash='',
            is_exp=False,
            is_softmax=False,
            linear=value.linear if is_linear else (),
            features=tuple(kept_axes.index(axis) for axis in value.features if axis in kept_axes),
            is_activation=False,
            is_window=False,
            is_carry=False,
            parts=(),
            pending=NO_IDS,
        )

    def _reduce_product(
        self, eqn: core.JaxprEqn, value: Value, shape: tuple[int, ...], scope: Scope
    ) -> Value:
        """Return products, or cumulative products, of the entries of an array along axes."""
        axes = eqn.params.get('axes', (eqn.params.get('axis', 0),))
        length = math.prod(value.shape[axis] for axis in axes)
        result = blend([value], shape)._replace(degrees=tuple(length * d for d in value.degrees))
        if length > 1 and not value.is_mask:
            entries = value._replace(is_softmax=False)
            others = self._identify(entries)
            result = self._record_product(eqn, [entries, others], result, None, scope)
        else:
            result = self._identify(result)._replace(is_mask=value.is_mask)
        return result._replace(reduced=value.reduced | {value.origin})

    def _reduce_by_function(
        self,
        eqn: core.JaxprEqn,
        inputs: list[Value],
        shapes: list[tuple[int, ...]],
        scope: Scope,
    ) -> list[Value]:
        """Return a reduction by a function of two entries, which runs once per entry."""
        reducer = _find_jaxpr(eqn)
        operands = inputs[: len(inputs) // 2]
        if reducer is None:
            return self._blur(eqn, inputs, shapes)
        others = [self._identify(value) for value in operands]
        window = eqn.params.get('window_dimensions')
        num_entries = math.prod((*shapes[0], *window) if window else operands[0].shape)
        times = None if scope.times is None else scope.times * num_entries
        inner_scope = self._enter_call(eqn, scope)._replace(times=times)
        outputs = self.run_closed(reducer, [*operands, *others], inner_scope)
        return [
            self._identify(blend([output, *inputs], shape))
            for output, shape in zip(outputs, shapes, strict=True)
        ]

    def _solve(
        self, eqn: core.JaxprEqn, inputs: list[Value], shape: tuple[int, ...], scope: Scope
    ) -> Value:
        """Return A⁻¹ B, a product if A and B both depend on data."""
        matrix, target = inputs
        inverse = matrix._replace(degrees=unbound_degrees([matrix]), linear=())
        value = blend(inputs, shape)._replace(degrees=add_degrees(inverse, target))
        if matrix.streams and target.streams:
            num_axes = len(shape)
            batch = tuple(range(num_axes - 2))
            contraction = Contraction((num_axes - 1,), (num_axes - 2,), batch, batch)
            return self._record_product(eqn, [inverse, target], value, contraction, scope)
        return self._identify(value)

    def _choose(
        self, eqn: core.JaxprEqn, inputs: list[Value], shapes: list[tuple[int, ...]]
    ) -> list[Value]:
        """Return the results of a top-k, a sort or an argmax: entries, and indices."""
        outputs = []
        for var, shape in zip(eqn.outvars, shapes, strict=True):
            value = self._identify(blend(inputs, shape))
            if 'int' in str(getattr(var.aval, 'dtype', '')):
                outputs.append(value._replace(is_choice=True))
            else:
                first = inputs[0]
                value = value._replace(is_choice=first.is_choice)
                outputs.append(value._replace(is_softmax=first.is_softmax, pending=first.pending,
                                              products=first.products))  # fmt: skip
        return outputs

    def _gather(
        self, eqn: core.JaxprEqn, inputs: list[Value], shape: tuple[int, ...], scope: Scope
    ) -> Value:
        value, indices = inputs
        numbers = eqn.params['dimension_numbers']
        if not indices.streams:
            key = 'gather', next(self._ids)
            return value._replace(
                shape=shape,
                base=self._intern('base', value.base, *key),
                origin=self._intern('origin', value.origin, *key),
                features=(),
                parts=(),
            )
        if value.streams:
            return self._look_up(eqn, value, [indices], shape, scope)
        # Rows of a table: a linear map of a one-hot code.
        result = self._identify(blend(inputs, shape))
        size = value.shape[numbers.start_index_map[0]] if numbers.start_index_map else 1
        return result._replace(
            linear=(Source(indices.root, indices.streams, size, bool(indices.carried)),),
            features=tuple(numbers.offset_dims),
            is_chosen=indices.is_choice,
        )

    def _look_up(
        self,
        eqn: core.JaxprEqn,
        value: Value,
        indices: list[Value],
        shape: tuple[int, ...],
        scope: Scope,
    ) -> Value:
        """Record and return entries of data that data selects."""
        chosen = self._identify(blend([value, *indices], shape))
        degrees = max_degrees([value, *(i._replace(degrees=unbound_degrees([i])) for i in indices)])
        self._record(eqn, motifs.ROUTING, [value, indices[0]], shape, scope)
        return chosen._replace(degrees=degrees)

    # ------------------------------------------------------------------------- products

    def _contract(
        self, eqn: core.JaxprEqn, inputs: list[Value], shape: tuple[int, ...], scope: Scope
    ) -> Value:
        left, right, *group_inputs = inputs
        (axes, batch) = _get_dimension_numbers(eqn, left, right)
        contraction = Contraction(*axes, *batch)
        sizes = [
            value for value in group_inputs if value.streams
        ]  # group sizes of a ragged product
        if not (left.streams or right.streams):  # only the group sizes depend on data
            return self._identify(blend(inputs, shape))
        if left.streams and not right.streams and sizes:
            right = blend([right, *sizes], right.shape)._replace(is_chosen=True)
        if left.streams and right.streams:
            value = blend([left, right, *group_inputs], shape)
            value = value._replace(degrees=add_degrees(left, right))
            is_inner = all(
                len(side.shape) == len(contracted) + len(shared)
                for side, contracted, shared in (
                    (left, contraction.left, contraction.left_batch),
                    (right, contraction.right, contraction.right_batch),
                )
            )
            if left.base == right.base and is_inner:  # a sum of squares
                self._record(eqn, motifs.ACTIVATION, [left, right], shape, scope)
                return self._identify(value)._replace(reduced=left.reduced | {left.origin})
            return self._record_product(eqn, [left, right], value, contraction, scope)

        # An affine map: its features come from the side without data.
        is_left = bool(left.streams)
        value, weights = (left, right) if is_left else (right, left)
        contracted = contraction.left if is_left else contraction.right
        used = (
            (*contraction.right, *contraction.right_batch)
            if is_left
            else (*contraction.left, *contraction.left_batch)
        )
        num_free = len(weights.shape) - len(used)
        first = len(shape) - num_free if is_left else len(contraction.left_batch)
        features = tuple(range(first, first + num_free))
        return self._map_affine(
            eqn, (value, weights), (shape, features, contracted, 1), scope
        )  # fmt: skip

    def _convolve(
        self, eqn: core.JaxprEqn, inputs: list[Value], shape: tuple[int, ...], scope: Scope
    ) -> Value:
        left, right = inputs
        if left.streams and right.streams:
            value = blend(inputs, shape)._replace(degrees=add_degrees(left, right))
            index = self._record(eqn, motifs.DYNAMIC_CONVOLUTION, inputs, shape, scope)
            return self._finish_product(value, index)
        numbers = eqn.params['dimension_numbers']
        value, spec = (left, numbers.lhs_spec) if left.streams else (right, numbers.rhs_spec)
        window = math.prod(right.shape[axis] for axis in numbers.rhs_spec[2:])
        return self._map_affine(
            eqn,
            (value, right if left.streams else left),
            (shape, (numbers.out_spec[1],), (spec[1],), window),
            scope,
        )

    def _map_affine(
        self,
        eqn: core.JaxprEqn,
        operands: tuple[Value, Value],
        geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int],
        scope: Scope,
    ) -> Value:
        """Return an affine map; geometry is (shape, feature axes, contracted axes, window)."""
        value, weights = operands
        shape, features, contracted, window = geometry
        size = math.prod(value.shape[axis] for axis in contracted) * window
        source = Source(value.root, value.streams, size, bool(value.carried))
        has_parts = bool(value.parts) and len(value.shape) + value.parts_axis in contracted
        if has_parts and weights.has_params:
            self._record_parts(eqn, value, (shape, features, window), scope)
        result = self._identify(blend([value, weights], shape, is_polynomial=True))
        for index in value.products | value.mapped_products:
            self.products[index].roots += (result.root,)
        return result._replace(
            linear=(source,),
            features=features,
            is_chosen=value.is_chosen or weights.is_chosen,
            mapped_products=value.products,
        )

    def _map_linearly(self, name: str, inputs: list[Value], shape: tuple[int, ...]) -> Value:
        """Return a Fourier transform, or a scattered update."""
        value = self._identify(blend(inputs, shape, is_polynomial=True))
        data = [operand for operand in inputs if operand.streams]
        sources = tuple(source for operand in data for source in get_sources(operand))
        is_overwritten = name in SCATTERS and 'add' not in name
        if is_overwritten and not all(operand.linear for operand in data):
            sources = ()
        return value._replace(linear=tuple(dict.fromkeys(sources)), features=(len(shape) - 1,))

    def _record_product(
        self,
        eqn: core.JaxprEqn,
        inputs: list[Value],
        value: Value,
        contraction: Contraction | None,
        scope: Scope,
    ) -> Value:
        """Name and record a product, name its logits, and return its result."""
        left, right = inputs
        motif = motifs.name_product(left, right, contraction)
        index = self._record(eqn, motif, inputs, value.shape, scope)
        for weights in inputs:
            if weights.is_softmax:
                for division in weights.pending:
                    self.products[division].is_absorbed = True
                if motif == motifs.MIX:
                    for scores in weights.products | weights.mapped_products:
                        self.products[scores].motif = motifs.SCORES
        return self._finish_product(value, index)

    def _finish_product(self, value: Value, index: int | None) -> Value:
        """Return the result of a product; its record gets the id of the result."""
        value = self._identify(value)
        if index is None:
            return value
        self.products[index].roots += (value.root,)
        return value._replace(products=frozenset([index]))

    def _record(
        self,
        eqn: core.JaxprEqn,
        motif: str,
        inputs: list[Value],
        shape: tuple[int, ...],
        scope: Scope,
    ) -> int | None:
        """Record a product and return its index; the same two arrays at one place count once."""
        is_index = 'int' in str(getattr(eqn.outvars[0].aval, 'dtype', ''))
        if not scope.is_recording or is_index or 0 in shape:
            return None
        left, right = inputs
        scope = self._enter(eqn, scope)
        flops = scope.num_devices * _count_product_flops(eqn, inputs, shape)
        key = motif, scope.path, scope.times, *sorted((left.root, right.root))
        index = self._merged.get(key)
        if index is not None and left.base != right.base and motif != motifs.ACTIVATION:
            product = self.products[index]
            product.count += 1
            product.flops += flops
            is_weighted = any(side.is_softmax or side.linear for side in inputs)
            if is_weighted and any(side.is_window for side in inputs):
                product.motif = motifs.DYNAMIC_CONVOLUTION
            return index
        self._merged[key] = len(self.products)
        source = _find_line(eqn) or scope.frame
        name = eqn.primitive.name
        self.products.append(Product(name, motif, left, right, shape, flops, scope, source))
        return len(self.products) - 1

    def _record_parts(
        self,
        eqn: core.JaxprEqn,
        value: Value,
        geometry: tuple[tuple[int, ...], tuple[int, ...], int],
        scope: Scope,
    ) -> None:
        """Record the pairs of concatenated arrays that an affine map takes."""
        shape, features, window = geometry
        sizes = tuple(shape[axis] for axis in features)
        for left, right in itertools.combinations(value.parts, 2):
            self._record_meetings('concatenation', (left,), (right,), (shape, sizes, window), eqn,
                                  scope)  # fmt: skip

    def _record_meetings(
        self,
        kind: str,
        left: tuple[Source, ...],
        right: tuple[Source, ...],
        geometry: tuple[tuple[int, ...], tuple[int, ...], int],
        eqn: core.JaxprEqn,
        scope: Scope,
    ) -> None:
        if not scope.is_recording:
            return
        shape, sizes, window = geometry
        is_residual = kind == 'sum' and len(left) + len(right) > 2
        pairs = set()
        for left_source, right_source in itertools.product(left, right):
            union = left_source.streams | right_source.streams
            is_nested = union in (left_source.streams, right_source.streams)
            is_carried = left_source.is_carried or right_source.is_carried
            is_equal = left_source.streams == right_source.streams or (is_residual and is_nested)
            if left_source.root == right_source.root or (is_equal and not is_carried):
                continue
            pair = frozenset((left_source.root, right_source.root))
            if pair in pairs:
                continue
            pairs.add(pair)
            place = self._enter(eqn, scope)
            source = _find_line(eqn) or scope.frame
            self.meetings.append(
                Meeting(kind, left_source, right_source, shape, math.prod(sizes), window, place,
                        source)
            )  # fmt: skip

    # ------------------------------------------------------------------------- calls and loops

    def _enter(self, eqn: core.JaxprEqn, scope: Scope) -> Scope:
        names = str(eqn.source_info.name_stack).split('/')
        names = [name for name in names if name and '->' not in name]  # jnp.einsum adds its own
        return scope._replace(path='/'.join(filter(None, [scope.path, *names])))

    def _enter_call(self, eqn: core.JaxprEqn, scope: Scope) -> Scope:
        return self._enter(eqn, scope)._replace(frame=_find_line(eqn) or scope.frame)

    def _run_call(
        self, eqn: core.JaxprEqn, inner: Any, inputs: list[Value], scope: Scope
    ) -> list[Value]:
        num_args = len(getattr(inner, 'jaxpr', inner).invars)
        shapes = [_get_shape(var) for var in eqn.outvars]
        if num_args != len(inputs):
            return self._blur(eqn, inputs, shapes)
        inner_scope = self._enter(eqn, scope)
        if scope.is_recording:
            inner_scope = self._enter_call(eqn, scope)
        if eqn.primitive.name == 'shard_map':  # its shapes are those of one device
            inputs = [
                value._replace(shape=_get_shape(var))
                for value, var in zip(inputs, getattr(inner, 'jaxpr', inner).invars, strict=True)
            ]
            num_devices = scope.num_devices * _count_devices(eqn)
            inner_scope = inner_scope._replace(num_devices=num_devices)
        outputs = self.run_closed(inner, inputs, inner_scope)
        return [output._replace(shape=shape) if len(output.shape) == len(shape) else output
                for output, shape in zip(outputs, shapes, strict=True)]  # fmt: skip

    def _run_cond(self, eqn: core.JaxprEqn, inputs: list[Value], scope: Scope) -> list[Value]:
        """Return what any branch may return; all branches are recorded, the costliest counted."""
        predicate, *operands = inputs
        start, costs, branches = self.flops, [], []
        old_contents, contents = self._contents, []
        for branch in eqn.params['branches']:
            self.flops, self._contents = 0, dict(old_contents)
            branches.append(self.run_closed(branch, operands, scope))
            costs.append(self.flops)
            contents.append(self._contents)
        self.flops = start + max(costs)
        self._contents = {
            ref: self._merge([branch_contents[ref] for branch_contents in contents], predicate)
            for ref in old_contents
        }
        return [self._merge(values, predicate) for values in zip(*branches, strict=True)]

    def _merge(self, values: Sequence[Value], predicate: Value) -> Value:
        """Return one of several values that a predicate chooses."""
        if all(value is values[0] for value in values):
            return values[0]
        chosen = predicate._replace(degrees=unbound_degrees([predicate]))
        merged = blend([*values, chosen], values[0].shape, is_polynomial=True)
        if not merged.streams:
            return merged
        has_one_base = len({value.base for value in values}) == 1
        if has_one_base and values[0].base:  # constants have none
            return values[0]._replace(streams=merged.streams, degrees=merged.degrees)
        return self._identify(merged)

    def _run_scan(self, eqn: core.JaxprEqn, inputs: list[Value], scope: Scope) -> list[Value]:
        num_consts, num_carry = _count_scan_inputs(eqn)
        length = eqn.params['length']
        consts, carry = inputs[:num_consts], inputs[num_consts : num_consts + num_carry]
        elements = [self._take_element(value) for value in inputs[num_consts + num_carry :]]
        body = eqn.params['jaxpr']
        times = None if scope.times is None else scope.times * length
        scope = scope._replace(times=times, frame=_find_line(eqn) or scope.frame)

        def step(carry: list[Value], scope: Scope) -> list[Value]:
            return self.run_closed(body, [*consts, *carry, *elements], scope)

        outputs = self._iterate(step, carry, scope)
        stacked = [
            output._replace(shape=(length, *output.shape),
                            features=tuple(axis + 1 for axis in output.features), parts=())
            for output in outputs[num_carry:]
        ]  # fmt: skip
        return [*outputs[:num_carry], *stacked]

    def _run_while(self, eqn: core.JaxprEqn, inputs: list[Value], scope: Scope) -> list[Value]:
        num_cond, num_body = eqn.params['cond_nconsts'], eqn.params['body_nconsts']
        cond_consts = inputs[:num_cond]
        body_consts, carry = inputs[num_cond : num_cond + num_body], inputs[num_cond + num_body :]
        cond, body = eqn.params['cond_jaxpr'], eqn.params['body_jaxpr']
        scope = scope._replace(times=None, frame=_find_line(eqn) or scope.frame)
        predicates: list[Value] = []

        def step(carry: list[Value], scope: Scope) -> list[Value]:
            predicates[:] = self.run_closed(cond, [*cond_consts, *carry], scope)
            return self.run_closed(body, [*body_consts, *carry], scope)

        # Every output depends on the number of iterations, which may be zero.
        outputs = self._iterate(step, carry, scope)
        return [
            self._merge([initial, output], predicates[0])
            for initial, output in zip(carry, outputs, strict=True)
        ]

    def _iterate(
        self,
        step: Callable[[list[Value], Scope], list[Value]],
        carry: list[Value],
        scope: Scope,
    ) -> list[Value]:
        """Iterate what the carry depends on to a fixed point, then record the body once.

        The contents of references that the body writes are carried too.
        """
        written = self._list_written(step, carry, scope)
        if not written:
            return self._iterate_carry(step, carry, scope)
        num_carry = len(carry)
        initial = [self._contents[ref] for ref in written]

        def step_with_contents(values: list[Value], scope: Scope) -> list[Value]:
            self._contents |= dict(zip(written, values[num_carry:], strict=True))
            outputs = step(values[:num_carry], scope)
            contents = [self._contents[ref] for ref in written]
            return [*outputs[:num_carry], *contents, *outputs[num_carry:]]

        outputs = self._iterate_carry(step_with_contents, [*carry, *initial], scope)
        finals = outputs[num_carry : num_carry + len(written)]
        for ref, first, final in zip(written, initial, finals, strict=True):
            last = self._contents[ref]
            if scope.times is None:  # perhaps never written
                streams, degrees = first.streams | final.streams, max_degrees([first, final])
                self._contents[ref] = final._replace(streams=streams, degrees=degrees)
            elif last.carried:
                self._contents[ref] = final
        return [*outputs[:num_carry], *outputs[num_carry + len(written) :]]

    def _list_written(
        self,
        step: Callable[[list[Value], Scope], list[Value]],
        carry: list[Value],
        scope: Scope,
    ) -> list[int]:
        """Return the references that the body of a loop writes."""
        if not self._contents:
            return []
        before, flops = dict(self._contents), self.flops
        step(carry, scope._replace(is_recording=False))
        written = [ref for ref, content in before.items() if self._contents[ref] is not content]
        self._contents, self.flops = before, flops
        return written

    def _iterate_carry(
        self,
        step: Callable[[list[Value], Scope], list[Value]],
        carry: list[Value],
        scope: Scope,
    ) -> list[Value]:
        loop = frozenset([next(self._ids)])
        silent, start = scope._replace(is_recording=False), self.flops
        while True:
            carry = [
                self._identify(blend([value], value.shape, is_polynomial=True))
                if value.streams or value.has_params
                else value._replace(is_literal=False)
                for value in carry
            ]
            outputs = step(_mark_carry(carry, loop), silent)
            widened = [
                self._widen(old, new) for old, new in zip(carry, outputs[: len(carry)], strict=True)
            ]
            is_fixed = all(
                (*old[1:4], old.is_choice) == (*new[1:4], new.is_choice)
                for old, new in zip(carry, widened, strict=True)
            )  # streams, has_params, degrees
            carry = widened
            if is_fixed:
                break
        self.flops = start
        outputs = step(_mark_carry(carry, loop), scope)
        finals = [
            self._identify(blend([new], new.shape, is_polynomial=True)) if new.streams else new
            for new in outputs[: len(carry)]
        ]
        return [
            value._replace(carried=value.carried - loop, is_carry=False)
            for value in (*finals, *outputs[len(carry) :])
        ]

    def _widen(self, old: Value, new: Value) -> Value:
        """Return what both allow; a degree that grows per iteration is unbounded."""
        degrees = tuple(
            old_degree
            if new_degree <= old_degree
            else (new_degree if old_degree == 0 and new_degree <= 1 else math.inf)
            for old_degree, new_degree in zip(old.degrees, new.degrees, strict=True)
        )
        return old._replace(
            streams=old.streams | new.streams,
            has_params=old.has_params or new.has_params,
            degrees=degrees,
            is_choice=old.is_choice or new.is_choice,
        )

    def _take_element(self, value: Value) -> Value:
        """Return the element of an array that one iteration of a scan sees."""
        features = tuple(axis - 1 for axis in value.features if axis > 0)
        element = value._replace(shape=value.shape[1:], features=features, parts=())
        return self._identify(element) if value.streams else element

    # ------------------------------------------------------------------------- references

    def _make_reference(self, content: Value) -> Value:
        """Return a reference to a new mutable array with this content."""
        ref = next(self._ids)
        self._contents[ref] = content
        return Value(content.shape, degrees=self._zeros, ref=ref)

    def _access(self, eqn: core.JaxprEqn, inputs: list[Value], scope: Scope) -> list[Value]:
        """Create, read or write a reference."""
        name = eqn.primitive.name
        shapes = [_get_shape(var) for var in eqn.outvars]
        if name in ('new_ref', 'empty_ref'):
            content = inputs[0] if inputs else Value(shapes[0], degrees=self._zeros)
            return [self._make_reference(content)]
        content = self._contents[inputs[0].ref]
        if name == 'free_ref':
            return []
        if name == 'freeze':
            return [content]
        if name == 'get':
            return [self._read(eqn, content, inputs[1:], shapes[0], scope)]
        _, value, *indices = inputs
        entries = self._read(eqn, content, indices, value.shape, scope)
        if name == 'addupdate':
            value = self._add(eqn, [entries, value], value.shape, scope)
        self._contents[inputs[0].ref] = self._write(content, value, indices)
        return [entries] if eqn.outvars else []

    def _read(
        self,
        eqn: core.JaxprEqn,
        content: Value,
        indices: list[Value],
        shape: tuple[int, ...],
        scope: Scope,
    ) -> Value:
        """Return entries of a reference."""
        if not indices and shape == content.shape:
            return content
        data = [index for index in indices if index.streams]
        if data and content.streams:
            return self._look_up(eqn, content, data, shape, scope)
        if data:
            chosen = self._identify(blend([content, *data], shape))
            return chosen._replace(is_chosen=any(index.is_choice for index in data))
        num_dropped = len(content.shape) - len(shape)
        features = (axis - num_dropped for axis in content.features)
        place = str(eqn.params) if not indices else next(self._ids)
        return content._replace(
            shape=shape,
            base=self._intern('base', content.base, 'get', place),
            origin=self._intern('origin', content.origin, 'get', place),
            features=tuple(axis for axis in features if axis >= 0),
            parts=(),
        )

    def _write(self, content: Value, value: Value, indices: list[Value]) -> Value:
        """Return the content of a reference after a write."""
        if not indices and value.shape == content.shape:
            return value
        unbound = [index._replace(degrees=unbound_degrees([index])) for index in indices]
        is_first = not (content.streams or content.has_params)
        if is_first and not any(index.streams for index in indices):
            return self._identify(value._replace(shape=content.shape, parts=()))
        merged = blend([content, value, *unbound], content.shape, is_polynomial=True)
        return self._identify(merged)._replace(
            products=content.products | value.products,
            mapped_products=content.mapped_products | value.mapped_products,
        )

    def _run_run_scoped(self, eqn: core.JaxprEqn, inputs: list[Value], scope: Scope) -> list[Value]:
        """Run a program with references that exist in it alone."""
        jaxpr = eqn.params['jaxpr']
        refs = [
            self._make_reference(Value(_get_shape(var), degrees=self._zeros))
            for var in jaxpr.invars
        ]
        return self.run(jaxpr, inputs, refs, scope)

    def _run_pallas_call(
        self, eqn: core.JaxprEqn, inputs: list[Value], scope: Scope
    ) -> list[Value]:
        """Run a kernel, a loop over its grid that reads and writes blocks."""
        kernel = kernels.read_kernel(eqn)
        shapes = [_get_shape(var) for var in eqn.outvars]
        operands = inputs[kernel.num_bounds :] if kernel else inputs
        chooses_blocks = kernel and any(v.streams for v in operands[: kernel.num_indices])
        if kernel is None or chooses_blocks or any(value.ref for value in inputs):
            return self._blur(eqn, inputs, shapes)

        # References to blocks of the operands, then to outputs and scratch.
        variables = kernel.jaxpr.invars
        blocks = [
            self._take_block(value, _get_shape(var))
            for value, var in zip(operands, variables, strict=False)
        ]
        blocks += [
            Value(_get_shape(var), degrees=self._zeros) for var in variables[len(operands) :]
        ]
        refs = [self._make_reference(block) for block in blocks]

        # One step of the grid needs no fixed point.
        def step(carry: list[Value], scope: Scope) -> list[Value]:
            return self.run(kernel.jaxpr, [], refs, scope)

        scope = scope._replace(frame=_find_line(eqn) or scope.frame)
        if kernel.num_steps == 1:
            step([], scope)
        else:
            is_unknown = scope.times is None or kernel.num_steps is None
            times = None if is_unknown else (scope.times or 1) * (kernel.num_steps or 1)
            self._iterate(step, [], scope._replace(times=times))
        outputs = [self._contents[ref.ref] for ref in refs[len(operands) :]]
        return [
            self._identify(output._replace(shape=shape, parts=(), features=()))
            for output, shape in zip(outputs, shapes, strict=False)
        ]

    def _take_block(self, value: Value, shape: tuple[int, ...]) -> Value:
        """Return the block of an operand that one step of a grid sees."""
        if shape == value.shape or not value.streams:
            return value._replace(shape=shape)
        num_dropped = len(value.shape) - len(shape)
        features = (axis - num_dropped for axis in value.features)
        block = value._replace(
            shape=shape, features=tuple(axis for axis in features if axis >= 0), parts=()
        )
        return self._identify(block)._replace(root=value.root)

    def _run_custom_linear_solve(
        self, eqn: core.JaxprEqn, inputs: list[Value], scope: Scope
    ) -> list[Value]:
        """Return A⁻¹ b, one product if A and b both depend on data, whatever the solver is."""
        lengths = eqn.params['const_lengths']
        consts, targets = inputs[: lengths.matvec], inputs[sum(lengths) :]
        start = lengths.matvec + lengths.vecmat
        solver_consts = inputs[start : start + lengths.solve]

        # The FLOPs are those of the solver.
        start_flops = self.flops
        self.run_closed(eqn.params['jaxprs'].solve, [*solver_consts, *targets],
                        scope._replace(is_recording=False))  # fmt: skip
        flops = (self.flops - start_flops) // (scope.times or 1)

        # The product.
        matrix = self._identify(blend(consts, consts[0].shape)) if consts else None
        outputs = []
        for target in targets:
            if matrix is None or not matrix.streams:
                outputs.append(self._identify(target._replace(linear=(), squash='')))
                continue
            value = blend([matrix, target], target.shape)
            value = value._replace(degrees=add_degrees(matrix, target))
            if target.streams:
                axes = Contraction((0,), (0,), (), ())
                value = self._record_product(eqn, [matrix, target], value, axes, scope)
                for index in value.products:
                    self.products[index].flops = flops
            outputs.append(self._identify(value) if not target.streams else value)
        return outputs

    # ------------------------------------------------------------------------- identities

    def _identify(self, value: Value) -> Value:
        return value.identify(next(self._ids))

    def _intern(self, *key: Hashable) -> int:
        if key not in self._interned:
            self._interned[key] = next(self._ids)
        return self._interned[key]

    def _inherit_identity(self, value: Value, inputs: Sequence[Value]) -> Value:
        """Give a value the identity of its input, if it is an elementwise function of one."""
        data = [operand for operand in inputs if operand.streams]
        first = data[0]
        for operand in data[1:]:
            if operand.base == first.base or first.origin in operand.reduced:
                continue
            if operand.origin in first.reduced:
                first = operand
            else:
                return self._identify(value)
        first = self._broadcast(first, value.shape)
        return value._replace(base=first.base, origin=first.origin, root=first.root)

    # ------------------------------------------------------------------------- costs

    def _count_flops(
        self,
        eqn: core.JaxprEqn,
        inputs: list[Value],
        shapes: list[tuple[int, ...]],
        scope: Scope,
    ) -> None:
        if eqn.primitive.name not in FREE and shapes:
            flops = scope.num_devices * _count_product_flops(eqn, inputs, shapes[0])
            self.flops += flops * (1 if scope.times is None else scope.times)


def _get_shape(var: Any) -> tuple[int, ...]:
    return tuple(getattr(var.aval, 'shape', ()))


def _unite(values: Iterable[Value], field: str) -> frozenset[int]:
    united: frozenset[int] = NO_IDS
    for value in values:
        united |= getattr(value, field)
    return united


def _find_jaxpr(eqn: core.JaxprEqn) -> Any:
    """Return the jaxpr that an equation calls; None if it calls none."""
    for name in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
        inner = eqn.params.get(name)
        if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
            return inner
    return None


def _mark_carry(carry: list[Value], loop: frozenset[int]) -> list[Value]:
    """Mark what the body of a loop carries."""
    return [
        value._replace(carried=value.carried | loop, is_carry=True) if value.streams else value
        for value in carry
    ]


def _count_devices(eqn: core.JaxprEqn) -> int:
    """Return the number of devices among which a shard_map divides its arrays."""
    mesh = eqn.params['mesh']
    axes = eqn.params.get('manual_axes', mesh.axis_names)
    return math.prod(mesh.shape[axis] for axis in axes)


def _count_scan_inputs(eqn: core.JaxprEqn) -> tuple[int, int]:
    """Return the number of constants and of carried arrays among the inputs of a scan."""
    if 'num_carry' in eqn.params:
        return eqn.params['num_consts'], eqn.params['num_carry']
    consts, carry, *_ = eqn.params['ft_in'].unpack()  # jax 0.12
    return len(list(consts)), len(list(carry))


def _find_line(eqn: core.JaxprEqn) -> str:
    """Return 'file.py:12' for the innermost line outside JAX and the libraries of modules."""
    traceback = eqn.source_info.traceback
    frames: Sequence[Any] = traceback.frames if traceback is not None else ()
    for frame in frames:
        if frame.file_name.startswith('<') or any(part in frame.file_name for part in LIBRARIES):
            continue
        return f'{frame.file_name}:{frame.line_num}'
    return ''


def _count_product_flops(eqn: core.JaxprEqn, inputs: list[Value], shape: tuple[int, ...]) -> int:
    """Count two FLOPs per multiplication with sum, and one per entry of an elementwise result."""
    name, size = eqn.primitive.name, math.prod(shape)
    if name == 'conv_general_dilated':
        kernel = inputs[1].shape
        return (
            2
            * size
            * math.prod(kernel)
            // max(1, kernel[eqn.params['dimension_numbers'].rhs_spec[0]])
        )
    if ('dot' in name or name in SCALED) and len(inputs) > 1:
        (left, _), _ = _get_dimension_numbers(eqn, inputs[0], inputs[1])
        return 2 * size * math.prod(inputs[0].shape[axis] for axis in left)
    if name == 'triangular_solve':  # one multiplication with sum per entry of half the matrix
        return size * inputs[0].shape[-1]
    if name.startswith('reduce') and inputs:
        return math.prod(inputs[0].shape)
    return size


def _get_dimension_numbers(
    eqn: core.JaxprEqn, left: Value, right: Value
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the contracted and the shared axes of both sides of a product."""
    numbers = eqn.params.get('dimension_numbers')
    if numbers is None:
        numbers = eqn.params.get('ragged_dot_dimension_numbers')
        numbers = getattr(numbers, 'dot_dimension_numbers', numbers)
    if eqn.primitive.name in SCALED:  # [B, M, K] · [B, N, K]
        return ((2,), (2,)), ((0,), (0,))
    if numbers is None:  # the last axis of the left, and the last but one of the right
        numbers = (((len(left.shape) - 1,), (max(0, len(right.shape) - 2),)), ((), ()))
    (a, b), (c, d) = numbers
    return (tuple(a), tuple(b)), (tuple(c), tuple(d))


def _is_window(name: str, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> bool:
    """Return whether a slice takes most of an axis, so that several of them overlap."""
    if name not in ('slice', 'dynamic_slice') or len(in_shape) != len(out_shape):
        return False
    pairs = zip(in_shape, out_shape, strict=True)
    return any(length < full and 2 * length > full for full, length in pairs)


def _map_axes(
    eqn: core.JaxprEqn, in_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> dict[int, tuple[int, ...]]:
    """Return for each axis of an operand the axes of the result that it becomes."""
    name, params = eqn.primitive.name, eqn.params
    if name == 'transpose':
        return {axis: (i,) for i, axis in enumerate(params['permutation'])}
    if name == 'broadcast_in_dim':
        return {i: (axis,) for i, axis in enumerate(params['broadcast_dimensions'])}
    if name == 'rev':
        return {axis: (axis,) for axis in range(len(in_shape))}
    return {
        axis: tuple(out for out in outs if out_shape[out] > 1)
        for axes, outs in _group_axes(in_shape, out_shape)
        for axis in axes
        if in_shape[axis] > 1
    }


def _group_axes(
    in_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the smallest groups of axes of a reshape that have equal sizes."""
    i = j = 0
    while i < len(in_shape) and j < len(out_shape):
        axes, outs = [i], [j]
        size, out_size = in_shape[i], out_shape[j]
        i, j = i + 1, j + 1
        while size != out_size:
            if size < out_size and i < len(in_shape):
                size, i, axes = size * in_shape[i], i + 1, [*axes, i]
            elif j < len(out_shape):
                out_size, j, outs = out_size * out_shape[j], j + 1, [*outs, j]
            else:
                return
        yield axes, outs
