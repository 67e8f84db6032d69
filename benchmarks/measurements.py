"""Measured speeds, read from the records in benchmarks/results."""

import json
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import lm_sizes, workloads
from configs import lm as lm_configs
from mi import counting

RESULTS = pathlib.Path(__file__).parent / 'results'

Seconds = Callable[[Sequence[counting.Product]], float]  # of products, at some bound


def read_record(file_name: str) -> dict[str, Any]:
    """Return the content of a file in benchmarks/results, or {} if it does not exist."""
    record_file = RESULTS / file_name
    return dict(json.loads(record_file.read_text())) if record_file.exists() else {}


def count_cores(record: Mapping[str, Any]) -> int:
    """Return the number of cores on the machine of a record."""
    return int(record['machine'].split(', ')[1].split()[0])


def core_flops() -> float:
    """Return the f32 FLOP/s per core, from the median peak in the record of benchmarks.layers."""
    layers = read_record('layers_cpu.json')
    peaks = [figure['peak_gflops'] for figure in layers['figures']]
    return 1e9 * statistics.median(peaks) / count_cores(layers)


def policy_call_seconds() -> float:
    """Return the host's overhead per policy call in seconds.

    This is the time of a call in Catch, whose policy computes next to nothing.
    """
    figures = read_record('actors_cpu.json')['figures']
    return min(figure['seconds']['act'] for figure in figures if figure['set'] == 'catch')


def lstm_share(record: Mapping[str, Any], seconds: Seconds) -> float:
    """Return the median fraction of a bound that training steps of the LSTM reach.

    Args:
      record: record of benchmarks.lm on a CPU.
      seconds: function from products to their time at the bound.
    """
    shares = []
    for figure in record['figures']:
        if figure.get('set', 'lstm') != 'lstm' or figure.get('side', 'mi') != 'mi':
            continue
        # Rebuild the config that was measured.
        config = lm_configs.get_config().unlock()
        sizes = lm_sizes.CPU['lstm'][figure['size']]
        vocabulary, embed_size, hidden_size, num_steps, batch_size = sizes
        config.model.update({'site': 'none', 'tied': False})
        config.model.update({'embed': embed_size, 'hidden': hidden_size})
        config.train.update({'length': num_steps, 'batch': batch_size})
        # Compare its rate with that at the bound.
        tokens_per_second = figure['mi'] if 'mi' in figure else figure['tokens_per_second']
        products = workloads.lm_work(config, vocabulary, batch_size, 'cpu').products
        shares.append(seconds(products) * tokens_per_second / (num_steps * batch_size))
    return statistics.median(shares)
