"""The tables of an inspection as CSV files, in full precision."""

import csv
import io
from collections.abc import Iterable, Iterator

import numpy as np

from mi.inspect.layers import Layer
from mi.unify.spectrum import compute_effective_rank

Row = dict[str, object]


def make_tables(layers: list[Layer]) -> dict[str, str]:
    """Return the CSV tables by file name.

    spectrum.csv         effective and stable rank of each unfolding
    singular_values.csv  singular values of each unfolding
    outputs.csv          norm, effective rank and largest eigenvalue of each output
    contexts.csv         norm of the weights that each context generates
    similarity.csv       cosine and angle of each pair of contexts
    """
    tables = {
        'spectrum.csv': _list_ranks(layers),
        'singular_values.csv': _list_singular_values(layers),
        'outputs.csv': _list_outputs(layers),
        'contexts.csv': _list_contexts(layers),
        'similarity.csv': _list_pairs(layers),
    }
    texts = {file_name: _to_csv(rows) for file_name, rows in tables.items()}
    return {file_name: text for file_name, text in texts.items() if text}


def _list_ranks(layers: Iterable[Layer]) -> Iterator[Row]:
    for layer in layers:
        for state, weights in layer.states.items():
            m, n, k = weights.shape
            for unfolding in weights.unfoldings:
                yield _identify(layer, state) | {
                    'm': m,
                    'n': n,
                    'k': k,
                    'norm_W': weights.norm,
                    'norm_V': weights.shared_norm,
                    'unfolding': unfolding.stream,
                    'full_rank': unfolding.full_rank,
                    'effective_rank': unfolding.effective_rank,
                    'stable_rank': unfolding.stable_rank,
                }


def _list_singular_values(layers: Iterable[Layer]) -> Iterator[Row]:
    for layer in layers:
        for state, weights in layer.states.items():
            for unfolding in weights.unfoldings:
                for index, sigma in enumerate(unfolding.singular_values):
                    yield _identify(layer, state) | {
                        'unfolding': unfolding.stream,
                        'index': index,
                        'singular_value': sigma,
                    }


def _list_outputs(layers: Iterable[Layer]) -> Iterator[Row]:
    """List the outputs. The norm of a slice is √2 times the norm of its eigenvalues ±σ/2."""
    for layer in layers:
        for state, weights in layer.states.items():
            for output, eigenvalues in enumerate(weights.eigenvalues):
                yield _identify(layer, state) | {
                    'output': output,
                    'norm': np.sqrt(2) * np.linalg.norm(eigenvalues),
                    'effective_rank': compute_effective_rank(2 * eigenvalues),
                    'largest_eigenvalue': np.max(eigenvalues),
                }


def _list_contexts(layers: Iterable[Layer]) -> Iterator[Row]:
    for layer in layers:
        for state, weights in layer.states.items():
            if weights.contexts is None or weights.generated is None:
                continue
            for index, name in enumerate(layer.names):
                yield _identify(layer, state) | {
                    'context': name,
                    'norm_zW': weights.contexts.norms[index],
                    'norm_generated': weights.generated.norms[index],
                }


def _list_pairs(layers: Iterable[Layer]) -> Iterator[Row]:
    for layer in layers:
        for state, weights in layer.states.items():
            if weights.contexts is None or weights.generated is None:
                continue
            for first, second in zip(*np.triu_indices(len(layer.names), 1), strict=True):
                yield _identify(layer, state) | {
                    'context': layer.names[first],
                    'other': layer.names[second],
                    'cosine_zW': weights.contexts.cosines[first, second],
                    'angle_zW': weights.contexts.angles[first, second],
                    'cosine_generated': weights.generated.cosines[first, second],
                    'angle_generated': weights.generated.angles[first, second],
                }


def _identify(layer: Layer, state: str) -> Row:
    return {'layer': layer.name, 'seed': layer.seed, 'state': state}


def _to_csv(rows: Iterable[Row]) -> str:
    """Format rows with equal keys as CSV, or return '' if there are no rows."""
    buffer = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(buffer, list(row), lineterminator='\n')
            writer.writeheader()
        writer.writerow(row)
    return buffer.getvalue()
