"""Sizes of the language models in `benchmarks.lm`, by set and name.

LSTM: V, E, H, T, B. Transformer: V, E = H, layers, heads, T, B.
"""

Sizes = dict[str, dict[str, tuple[int, ...]]]

CPU: Sizes = {
    'lstm': {
        'quickstart': (1024, 64, 256, 64, 32),
        'default': (256, 128, 512, 64, 32),
        'ptb': (10_000, 650, 650, 35, 20),
    },
    'transformer': {
        'small': (256, 128, 2, 4, 64, 16),
        'default': (256, 256, 4, 4, 64, 32),
        'long': (1024, 256, 4, 4, 256, 8),
    },
    'cells': {'default': (256, 128, 512, 64, 32)},
    'fusions': {site: (256, 128, 512, 64, 32) for site in ('encoder', 'decoder', 'both')},
    'loop': {'default': (256, 128, 512, 64, 32)},
}
GPU: Sizes = {
    'lstm': {
        'default': (256, 128, 512, 64, 32),
        'ptb': (10_000, 650, 650, 35, 128),
        'large': (256, 512, 2048, 128, 128),
    },
    'transformer': {
        'default': (256, 512, 8, 8, 256, 64),
        'long': (32_000, 1024, 12, 16, 1024, 16),
    },
    'cells': {'large': (256, 512, 2048, 64, 128)},
    'fusions': {site: (256, 128, 512, 64, 128) for site in ('encoder', 'decoder', 'both')},
    'loop': CPU['loop'],
}
