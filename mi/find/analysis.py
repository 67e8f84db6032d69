"""The function `find`, which analyzes a function and its arguments and returns a report."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mi.config import suggest
from mi.find import motifs, rules
from mi.find.candidates import list_candidates
from mi.find.degree import Output
from mi.find.interpreter import Interpreter
from mi.find.records import Product, Scope
from mi.find.report import Interaction, Report
from mi.find.values import Value


def find(function: Callable[..., Any], params: Any, /, **streams: Any) -> Report:
    """Find all products in function(params, **streams) whose two factors both depend on data.

    The function is traced but not executed, so arrays can be `jax.ShapeDtypeStruct`s. It can be any
    JAX function: `module.apply` for Linen or Haiku, `lambda module, x: module(x)` for Equinox, or
    `lambda state, x: nnx.merge(graphdef, state)(x)` for NNX.

    Args:
      function: the function to analyze.
      params: its parameters, a tree of arrays. Other leaves, as in Equinox modules, are static.
      **streams: the inputs by name, each an array or a tree of arrays. Each name is a stream.

    Raises:
      ValueError: if a stream is not an argument of the function or contains no array, or the
        function cannot be traced.
    """
    name = _get_name(function)
    _check_streams(function, name, streams)
    params_leaves, restore_params = _split(params)
    split_streams = {stream: _split(tree) for stream, tree in streams.items()}
    for stream, (leaves, _) in split_streams.items():
        if not leaves:
            raise ValueError(
                f'stream {stream} = {streams[stream]!r}: expected an array or a tree of arrays. '
                'Try functools.partial to pass options'
            )

    # Trace with every array as an argument.
    def call(params_leaves: list[Any], stream_leaves: list[list[Any]]) -> Any:
        restored = {
            stream: restore(leaves)
            for (stream, (_, restore)), leaves in zip(
                split_streams.items(), stream_leaves, strict=True
            )
        }
        return function(restore_params(params_leaves), **restored)

    stream_leaves = [leaves for leaves, _ in split_streams.values()]
    closed, out_shapes = _trace(call, name, params_leaves, stream_leaves)

    # Interpret it.
    interpreter = Interpreter(len(streams), rules.interpret)
    arrays = [(leaf, 0) for leaf in params_leaves]
    arrays += [(leaf, 1 << bit) for bit, leaves in enumerate(stream_leaves) for leaf in leaves]
    inputs = [
        interpreter.make_value(np.shape(leaf), 0 if _is_key(leaf) else mask, has_params=not mask)
        for leaf, mask in arrays
    ]
    values = interpreter.run(closed, inputs, Scope())

    # Describe what was recorded.
    names = list(streams)
    describe = functools.partial(_list_streams, names)
    recorded = [product for product in interpreter.products if not product.is_absorbed]
    products = [_make_interaction(product, describe, interpreter.flops) for product in recorded]
    masks = {source.streams for m in interpreter.meetings for source in (m.left, m.right)}
    mask_names = {mask: ','.join(describe(mask)) for mask in masks}
    outputs = _list_outputs(out_shapes, values, names)
    return Report(
        name=name,
        streams={
            stream: tuple(np.shape(leaf) for leaf in leaves)
            for stream, (leaves, _) in split_streams.items()
        },
        interactions=tuple(p for p in products if p.motif != motifs.ACTIVATION),
        activations=tuple(p for p in products if p.motif == motifs.ACTIVATION),
        candidates=tuple(list_candidates(interpreter.meetings, recorded, mask_names)),
        outputs=tuple(outputs),
        flops=interpreter.flops,
        notes=tuple(_list_notes(interpreter, outputs, names)),
        call=(function, params, streams),
    )


def _check_streams(function: Callable[..., Any], name: str, streams: Mapping[str, Any]) -> None:
    """Raise ValueError if a stream is not in the signature of the function."""
    if not streams:
        raise ValueError('find requires at least one stream. Try find(function, params, x=x)')
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for stream in streams:
        if stream not in parameters:
            known = list(parameters)[1:]
            raise ValueError(f'{stream!r} is not an argument of {name}; {suggest(stream, known)}')


def _trace(
    call: Callable[..., Any], name: str, params_leaves: list[Any], stream_leaves: list[list[Any]]
) -> tuple[Any, Any]:
    """Trace a call, and return its jaxpr and the shapes of its outputs."""
    try:
        return jax.make_jaxpr(call, return_shape=True)(params_leaves, stream_leaves)
    except jax.errors.JAXTypeError as error:
        reason = str(error).strip().partition('\n')[0]
        raise ValueError(
            f'{name} cannot be traced: {reason} Try jax.numpy instead of numpy, and jax.lax '
            f'instead of if and while on arrays'
        ) from error
    except TypeError as error:
        message = str(error).strip().partition('\n')[0]
        if 'argument' not in message and 'valid JAX type' not in message:
            raise
        raise ValueError(f'{name} cannot be called with these streams: {message}') from error


def _split(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Return the arrays of a tree, and a function that replaces them with others."""
    leaves, treedef = jax.tree.flatten(tree)
    is_array = [_is_array(leaf) for leaf in leaves]

    def restore(arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        restored = [
            next(remaining) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)
        ]
        return jax.tree.unflatten(treedef, restored)

    return [leaf for leaf, array in zip(leaves, is_array, strict=True) if array], restore


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _is_key(leaf: Any) -> bool:
    """Return whether a leaf is a random key, which generates noise instead of data."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _get_name(function: Callable[..., Any]) -> str:
    """Return the name of a function, prefixed with the class for a bound method."""
    while isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, '__self__', None)
    name = getattr(function, '__name__', type(function).__name__)
    return f'{type(owner).__name__}.{name}' if owner is not None else name


def _list_streams(names: list[str], mask: int) -> tuple[str, ...]:
    return tuple(name for bit, name in enumerate(names) if mask >> bit & 1)


def _make_interaction(
    product: Product, describe: Callable[[int], tuple[str, ...]], total: int
) -> Interaction:
    flops = product.flops * product.scope.times
    return Interaction(
        motif=product.motif,
        primitive=product.primitive,
        left=describe(product.left.streams),
        right=describe(product.right.streams),
        left_shape=product.left.shape,
        right_shape=product.right.shape,
        shape=product.shape,
        path=product.scope.path,
        source=product.source,
        times=product.scope.known_times,
        flops=flops,
        share=flops / total if total else 0.0,
    )


def _list_outputs(out_shapes: Any, values: list[Value], names: list[str]) -> list[Output]:
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(out_shapes)
    ]
    return [
        Output(path, value.shape, dict(zip(names, value.degrees, strict=True)))
        for path, value in zip(paths, values, strict=True)
    ]


def _list_notes(interpreter: Interpreter, outputs: list[Output], names: list[str]) -> list[str]:
    unused = [name for name in names if not any(output.degrees[name] for output in outputs)]
    return [*interpreter.notes, *(f'no output depends on the stream {name}' for name in unused)]
