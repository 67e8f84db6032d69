"""Measured speeds, read from the records in benchmarks/results."""

import functools
import json
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import cluster, workloads
from benchmarks.cluster import Chip
from configs import lm as lm_configs
from mi import counting

RESULTS = pathlib.Path(__file__).parent / 'results'

# Sizes in benchmarks.lm, on a CPU and on a GPU. LSTM: V, E, H, T, B. Transformer: V, H, layers,
# heads, T, B.
LSTM_CPU = {
    'quickstart': (1024, 64, 256, 64, 32),
    'default': (256, 128, 512, 64, 32),
    'ptb': (10_000, 650, 650, 35, 20),
}
LSTM_GPU = {
    'default': (256, 128, 512, 64, 32),
    'ptb': (10_000, 650, 650, 35, 128),
    'large': (256, 512, 2048, 128, 128),
}
TRANSFORMER_GPU = {
    'default': (256, 512, 8, 8, 256, 64),
    'long': (32_000, 1024, 12, 16, 1024, 16),
}
Seconds = Callable[[Sequence[counting.Product]], float]  # of products, at some bound


class Share(NamedTuple):
    """The fraction of the roofline that products reach.

    Attributes:
      value: fraction in (0, 1].
      source: source of the value, as text.
    """

    value: float
    source: str


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


def lm_share(
    record: Mapping[str, Any], set_name: str, sizes: Mapping[str, tuple[int, ...]], seconds: Seconds
) -> float:
    """Return the median fraction of a bound that training steps reach, from benchmarks.lm.

    Args:
      record: record of benchmarks.lm.
      set_name: 'lstm' or 'transformer'.
      sizes: name → shapes of the set.
      seconds: function from products to their time at the bound.
    """
    shares = []
    for figure in record['figures']:
        if figure.get('set', 'lstm') != set_name or figure.get('side', 'mi') != 'mi':
            continue
        # Rebuild the config that was measured.
        config = lm_configs.get_config().unlock()
        vocabulary, *model_sizes, num_steps, batch_size = sizes[figure['size']]
        config.model.update({'site': 'none', 'tied': False})
        if set_name == 'lstm':
            config.model.update({'embed': model_sizes[0], 'hidden': model_sizes[1]})
        else:
            hidden_size, num_layers, num_heads = model_sizes
            config.model.update({'core': 'transformer', 'dtype': 'bfloat16'})
            config.model.update({'layers': num_layers, 'heads': num_heads})
            config.model.update({'embed': hidden_size, 'hidden': hidden_size})
            config.model.ffn = 4 * hidden_size
        config.train.update({'length': num_steps, 'batch': batch_size})
        # Compare its rate with that at the bound.
        tokens_per_second = figure['mi'] if 'mi' in figure else figure['tokens_per_second']
        products = workloads.lm_work(config, vocabulary, batch_size).products
        shares.append(seconds(products) * tokens_per_second / (num_steps * batch_size))
    return statistics.median(shares)


def roofline_shares(chip: Chip) -> dict[str, Share]:
    """Return kind of model → measured share of the roofline, or 1 if it was not measured."""
    datasheet_bound = Share(1.0, f'not measured on {chip.name}: datasheet roofline, a bound')
    shares = dict.fromkeys(('lstm', 'transformer', 'agent'), datasheet_bound)

    def seconds(f32: bool, products: Sequence[counting.Product]) -> float:
        return sum(cluster.estimate_roofline(products, chip, f32))

    # Language models.
    record = read_record('lm_gpu.json')
    if chip.name in record.get('machine', ''):
        source = f'lm_gpu.json, {record["machine"]}'
        f32_seconds, bf16_seconds = (functools.partial(seconds, f32) for f32 in (True, False))
        measured_sets = {figure['set'] for figure in record['figures']}
        if 'lstm' in measured_sets:
            shares['lstm'] = Share(lm_share(record, 'lstm', LSTM_GPU, f32_seconds), source)
        if 'transformer' in measured_sets:
            share = lm_share(record, 'transformer', TRANSFORMER_GPU, bf16_seconds)
            shares['transformer'] = Share(share, source)
    # Agents.
    record = read_record('rl_gpu.json')
    updates = [
        figure
        for figure in record.get('figures', [])
        if (figure['set'], figure['side']) == ('conv', 'update')
    ]
    if chip.name in record.get('machine', '') and updates:
        share = seconds(True, workloads.pong_update().products) / updates[0]['seconds']
        shares['agent'] = Share(share, f'rl_gpu.json, {record["machine"]}')
    return shares
