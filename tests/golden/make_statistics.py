"""Writes statistics.json: intervals and tests of made scores, by libraries that are not ours.

python tests/golden/make_statistics.py, in an environment of its own, for rliable works with NumPy 1
alone: pip install --no-deps rliable; pip install absl-py 'arch<6' 'numpy<2' scipy statsmodels.
rliable's stratified bootstrap draws from NumPy's global generator, so that is what is seeded.
"""

import importlib.metadata
import json
import pathlib

import numpy as np
import scipy.stats
from arch.bootstrap import IIDBootstrap
from rliable import library, metrics
from statsmodels.stats.multitest import multipletests

SEEDS, TASKS, REPS = 10, 8, 50_000
AGGREGATES = {
    'mean': metrics.aggregate_mean,
    'median': metrics.aggregate_median,
    'iqm': metrics.aggregate_iqm,
}


def main() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0, 1, TASKS)
    # Every task has its level, every seed its luck, and an arm its gain.
    scores = {
        arm: np.round(
            difficulty + gain
            + rng.normal(0, 0.1, (SEEDS, 1)) + rng.normal(0, 0.2, (SEEDS, TASKS)), 2
        )
        for arm, gain in {'baseline': 0.0, 'better': 0.15, 'same': 0.0}.items()
    }  # fmt: skip
    record = {'scores': {arm: values.tolist() for arm, values in scores.items()}}

    np.random.seed(0)
    for arm, values in scores.items():
        found = {}
        for name, f in AGGREGATES.items():
            point, interval = library.get_interval_estimates(
                {arm: values}, lambda x, f=f: np.array([f(x)]), reps=REPS
            )
            found[name] = [float(point[arm][0]), *interval[arm][:, 0].tolist()]
        record.setdefault('over_runs', {})[arm] = found
        # Rows are drawn: whole seeds.
        whole = {
            name: [float(f(values)), *IIDBootstrap(values, seed=0).conf_int(
                lambda x, f=f: np.array([f(x)]), REPS, method='percentile')[:, 0].tolist()]
            for name, f in AGGREGATES.items()
        }  # fmt: skip
        record.setdefault('over_seeds', {})[arm] = whole
    for arm in ('better', 'same'):
        pair = {arm: (scores[arm], scores['baseline'])}
        point, interval = library.get_interval_estimates(
            pair, metrics.probability_of_improvement, reps=2000
        )
        values = [float(point[arm]), *np.ravel(interval[arm]).tolist()]
        record.setdefault('improvement', {})[arm] = values

    ps = []
    for arm in ('better', 'same'):
        differences = (scores[arm] - scores['baseline']).mean(1)
        test = scipy.stats.permutation_test(
            (differences,), np.mean, permutation_type='samples', n_resamples=np.inf
        )
        record.setdefault('sign_flips', {})[arm] = float(test.pvalue)
        ps.append(float(test.pvalue))
    many = [*ps, 0.004, 0.03, 0.2, 0.011, 0.03]
    record['holm'] = {'p': many, 'corrected': multipletests(many, method='holm')[1].tolist()}
    names = ('rliable', 'arch', 'scipy', 'statsmodels', 'numpy')
    record['versions'] = {name: importlib.metadata.version(name) for name in names}
    file = pathlib.Path(__file__).with_name('statistics.json')
    file.write_text(json.dumps(record) + '\n')


if __name__ == '__main__':
    main()
