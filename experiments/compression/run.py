"""Comparison of a trained and compressed full MI with a low-rank MI trained from scratch.

A trained run with a full MI yields three arms for each rank, which are evaluated like the run:

compressed     the compressed layers of the run
fine-tuned     the compressed layers after a few hundred more steps
from scratch   the compressed form with new initial parameters, trained for as many steps as the run
               and the fine-tuning together

Two references have the full MI: the run itself, and the run trained on for as many steps as the
fine-tuning, in the same way. The latter shows what the additional steps do without compression.

    python -m mi.main --config=configs/lm.py:quickstart --config.model.fusion.name=mi \
        --workdir=runs/lm
    python -m experiments.compression --workdir=runs/lm --out=runs/lm_compression \
        --ranks=1,2,4,8,16,32 --steps=300 --calibration=4096

--config.KEY=VALUE overrides the config of the fine-tuning, as in --config.optim.learning_rate=1e-4.
--steps has the unit of config.train.steps: updates of a language model, or environment steps of an
agent. The command skips runs that are done, so that it can resume an interrupted experiment.
OUT/report has compression.csv, compression.md, and the figure as compression.png, .pdf and .svg.

Source: the question is ours.
"""

import csv
import io
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import ml_collections
from matplotlib.figure import Figure

from experiments.figures import panels
from mi import overrides
from mi.compress.forms import Form
from mi.compress.runs import change_config, compress_run, copy_run, make_config
from mi.config import UserError
from mi.inspect.trained import load
from mi.report import plots, statistics
from mi.report.records import read_metrics
from mi.training.io import read_json
from mi.training.run_config import read_config, record_config

ARMS = ('compressed', 'fine-tuned', 'from scratch')
REFERENCES = ('full', 'full, trained on')
COMPARED = (
    ('compressed', 'from scratch'),
    ('fine-tuned', 'from scratch'),
    ('fine-tuned', 'full, trained on'),
)
"""Arms whose values are subtracted seed by seed."""
START_FILES = {'checkpoints', 'compressed.json'}  # of a run before its config.json
MEASURES = {
    'lm': ('valid', ('bits_per_byte', 'nats_per_token')),
    'rl': ('eval', ('success', 'return')),
}
"""Task → (split, metrics). The first metric that the run records is used."""

Values = dict[str, dict[float, dict[int, float]]]  # arm → rank → seed → value


class Settings(NamedTuple):
    """Options of the experiment.

    Attributes:
      workdir: run directory of the full MI.
      out: directory for the runs of this experiment.
      form: compressed form of the layers.
      steps: number of steps of the fine-tuning.
      calibration: number of inputs at which outputs are fitted, or 0 to approximate W itself.
      changes: config overrides for the fine-tuning.
    """

    workdir: pathlib.Path
    out: pathlib.Path
    form: Form
    steps: int
    calibration: int = 0
    changes: tuple[overrides.Override, ...] = ()


def run(settings: Settings, ranks: Sequence[int]) -> Values:
    """Run all arms that are not done yet, and return the values of all arms."""
    trained = load(settings.workdir)
    metric = find_metric(settings.workdir)
    total_steps = trained.config.train.steps + settings.steps
    total = [overrides.Override('train.steps', str(total_steps))]
    tuning = [overrides.Override('train.steps', str(settings.steps)), *settings.changes]
    values: Values = {arm: {} for arm in ARMS}

    # The arms of each rank.
    for rank in ranks:
        tuned, scratch = (
            settings.out / f'{name}_{settings.form}_{rank}' for name in ('tuned', 'scratch')
        )
        if not _is_started(tuned, make_config(trained, settings.form, rank, tuning)):
            compress_run(settings.workdir, tuned, settings.form, rank, tuning, settings.calibration)
        _check_calibration(tuned, settings.calibration)
        scratch_config = make_config(trained, settings.form, rank, total)
        if not _is_started(scratch, scratch_config):
            scratch.mkdir(parents=True)
            record_config(scratch / 'config.json', scratch_config)
        for path in (tuned, scratch):
            train(path)
        values['compressed'][rank] = read_values(tuned, metric, is_last=False)
        values['fine-tuned'][rank] = read_values(tuned, metric, is_last=True)
        values['from scratch'][rank] = read_values(scratch, metric, is_last=True)

    # The references, whose values are the same for all ranks.
    trained_on = settings.out / 'full'
    if not _is_started(trained_on, change_config(trained.config, tuning)):
        copy_run(settings.workdir, trained_on, tuning)
    train(trained_on)
    for name, path in zip(REFERENCES, (settings.workdir, trained_on), strict=True):
        values[name] = dict.fromkeys(ranks, read_values(path, metric, is_last=True))
    return values


def _is_started(path: pathlib.Path, config: ml_collections.ConfigDict) -> bool:
    """Return whether a run exists, after removing what a killed command left of its start.

    Raises:
      UserError: if the run has another config, or the directory has files of something else.
    """
    if (path / 'config.json').exists():
        record_config(path / 'config.json', config, flag='--out')
        return True
    if path.exists():
        others = {entry.name for entry in path.iterdir()} - START_FILES
        if others:
            raise UserError(
                f'{path}: expected a run or an empty directory, got {", ".join(sorted(others))}. '
                f'Use another --out'
            )
        shutil.rmtree(path)
    return False


def _check_calibration(path: pathlib.Path, calibration: int) -> None:
    recorded = read_json(path / 'compressed.json')['calibration']
    if recorded != calibration:
        raise UserError(
            f'{path} was compressed with --calibration={recorded}, not {calibration}. Use another '
            f'--out'
        )


def train(run_path: pathlib.Path) -> None:
    """Train a run to its end, unless it is done.

    Raises:
      UserError: if the run fails.
    """
    if read_json(run_path / 'status.json', missing={}).get('state') == 'done':
        return
    command = [sys.executable, '-m', 'mi.main', f'--workdir={run_path}']
    if exit_code := subprocess.run(command, check=False).returncode:
        raise UserError(f'{run_path} failed with exit code {exit_code}. See the messages above')


def find_metric(run_path: pathlib.Path) -> tuple[str, str]:
    """Return the split and the metric for comparing runs."""
    split, metrics = MEASURES[read_config(run_path).task]
    records = [r for r in _read_records(run_path) if r['split'] == split]
    for metric in metrics:
        if records and records[-1].get(metric) is not None:
            return split, metric
    raise UserError(
        f'{run_path}: expected {" or ".join(metrics)} in the split {split}, but found neither'
    )


def read_values(run_path: pathlib.Path, metric: tuple[str, str], is_last: bool) -> dict[int, float]:
    """Return the metric of each seed at the last or the first evaluation of a run."""
    split, name = metric
    records = [r for r in _read_records(run_path) if r['split'] == split]
    steps = [record['step'] for record in records]
    if not steps or (not is_last and min(steps) != 0):
        suffix = '' if is_last else ' at step 0'
        raise UserError(
            f'{run_path}/metrics.jsonl: expected an evaluation of the split {split!r}{suffix}, but '
            f'found none. Try another directory for --out'
        )
    step = max(steps) if is_last else 0
    return {record['seed']: float(record[name]) for record in records if record['step'] == step}


def _read_records(run_path: pathlib.Path) -> list[dict[str, Any]]:
    return read_metrics(run_path / 'metrics.jsonl', is_done=False, warnings=[])


def describe_cost(settings: Settings, rank: float) -> tuple[int, float]:
    """Return the number of parameters of a compressed model, and the mean error of its layers."""
    tuned = settings.out / f'tuned_{settings.form}_{rank}'
    errors = [layer['error'] for layer in read_json(tuned / 'compressed.json')['errors']]
    return read_json(tuned / 'cost.json')['parameters']['model'], sum(errors) / len(errors)


def write_report(settings: Settings, values: Values, metric: tuple[str, str]) -> pathlib.Path:
    """Write the figure, and the table as CSV and Markdown, and return their directory."""
    report_path = settings.out / 'report'
    report_path.mkdir(parents=True, exist_ok=True)
    header = ['rank', 'parameters', 'error', *ARMS, *REFERENCES]
    header += [f'{arm} − {other}' for arm, other in COMPARED]
    rows = []
    for rank in values[REFERENCES[0]]:
        parameters, error = describe_cost(settings, rank)
        cells = [_format(values[arm][rank], arm) for arm in (*ARMS, *REFERENCES)]
        for arm, other in COMPARED:
            others = values[other][rank]
            differences = {seed: value - others[seed] for seed, value in values[arm][rank].items()}
            cells.append(_format(differences, arm))
        rows.append([str(rank), f'{parameters}', f'{error:.4f}', *cells])
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator='\n').writerows(_list_values(values))
    (report_path / 'compression.csv').write_text(buffer.getvalue())
    lines = [f'| {" | ".join(cells)} |' for cells in (header, ['---:'] * len(header), *rows)]
    (report_path / 'compression.md').write_text('\n'.join(lines) + '\n')
    with matplotlib.rc_context(plots.STYLE):
        plots.save(draw(values, metric[1], settings.form), report_path, 'compression')
    (report_path / 'settings.json').write_text(json.dumps(describe(settings), indent=2) + '\n')
    return report_path


def describe(settings: Settings) -> dict[str, Any]:
    """Convert the settings to a JSON object."""
    changes = {change.key: change.text for change in settings.changes}
    return settings._asdict() | {
        'workdir': str(settings.workdir),
        'out': str(settings.out),
        'changes': changes,
    }


def draw(values: Values, metric: str, form: str) -> Figure:
    """Draw the metric against the rank, with a line for each arm."""
    figure = Figure(figsize=(5, 3.4), layout='constrained')
    axes = figure.subplots()
    styles = panels.assign_styles(ARMS, grey=REFERENCES)
    for arm in (*ARMS, *REFERENCES):
        panels.draw_line(axes, values[arm], arm, styles[arm])
    axes.set_xscale('log', base=2)
    ranks = list(values[REFERENCES[0]])
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set_xlabel('blocks' if form == 'block' else f'rank of the form {form}')
    axes.set_ylabel(metric.replace('_', ' '))
    axes.legend(frameon=False)
    return figure


def _list_values(values: Mapping[str, Mapping[float, Mapping[int, float]]]) -> list[list[Any]]:
    rows: list[list[Any]] = [['arm', 'rank', 'seed', 'value']]
    for arm, by_rank in values.items():
        for rank, by_seed in by_rank.items():
            rows += [[arm, rank, seed, value] for seed, value in by_seed.items()]
    return rows


def _format(by_seed: Mapping[int, float], arm: str) -> str:
    """Format a mean with its 95 % interval."""
    estimate = statistics.estimate(by_seed, arm)
    if estimate.low is None or estimate.high is None:
        return f'{estimate.mean:.4f}'
    return f'{estimate.mean:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]'
