"""Reading what a run of mi.fit wrote."""

import json
import pathlib


def records(path, split):
    """The records of one split, in order."""
    lines = (pathlib.Path(path) / 'metrics.jsonl').read_text().splitlines()
    return [r for r in map(json.loads, lines) if r['split'] == split]


def finals(path, metric, split):
    """{seed: the last value}."""
    return {r['seed']: r[metric] for r in records(path, split)}


def edited(config, **changes):
    """A config with other values, for a toy: `seeds`, and dotted keys."""
    config = config.unlock()
    config.update_from_flattened_dict(changes)
    return config
