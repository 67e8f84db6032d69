"""Sweep that compares the read-outs of one agent with thirty goals.

The environment is xland (mi/rl/envs/jax/xland.py), as in experiments/rl_multitask.py, in which only
the index of the task identifies the goal. The core does not receive the index. Policy and value are
computed by a fusion of the core's output h with a context z, at the site `readout`. Arms differ in
the fusion and the context:

    MI, index            z is the index of the task, one-hot
    concat, index        z is the index of the task, one-hot
    single head          no context, so that the policy can only try all goals in turn
    multi-head           a separate read-out for each task
    MI, embedding        z is a vector of parameters for each task
    MI, learned context  z = relu(MLP(h)), which does not depend on the index

Five seeds are trained together.

    python -m launch.local --sweep=experiments/rl_readout.py --workdir=runs/rl_readout

The report also has rl_readout.png, .pdf and .md, with the learned embeddings of the tasks, and the
fraction of their variance that kind, color and shape explain.

Source: Jayakumar et al. (ICLR 2020), section on multi-task RL, recalled from memory, for the site
and the arms. They use DMLab-30, in which observations identify the level. The environment, agent
and sizes are ours. experiments/rl_dmlab30.py has the same arms on DMLab-30.
"""

import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from launch.sweep import Overrides
from mi.inspect import trained
from mi.report import plots, runs, statistics, tables
from mi.training.io import read_json

CONFIG = 'configs/rl.py'
TITLE = 'Thirty tasks of XLand: read-outs of the policy and the value'
METRIC = 'success'
SPLIT = 'eval'
CURVES = 'eval'
LOWER_IS_BETTER = False
BASELINE = 'concat, index'
NOTES = [
    'Equal environment steps; the column at equal time has the same wall time instead. 16 episodes '
    'of each task, sampled from the policy, on fresh layouts at every evaluation.',
    'Torso and LSTM are the same in all arms and never read the task, so that the arms differ in '
    'the parameters of their read-outs alone: see that column.',
    'single head and MI, learned context do not know the task: rewards alone tell it, at the end '
    'of an episode.',
]
ARMS: list[Overrides] = [
    {'label': label, 'model.fusion.name': fusion, 'model.source': source}
    for label, fusion, source in (
        ('MI, index', 'mi', 'task'),
        ('concat, index', 'concat', 'task'),
        ('single head', 'none', 'task'),
        ('multi-head', 'multi_head', 'task'),
        ('MI, embedding', 'mi', 'embedding'),
        ('MI, learned context', 'mi', 'state'),
    )
]
FACTORS = ('kind', 'color', 'shape')  # the words of a task's name
COLORS = {'red': plots.PALETTE[1], 'green': plots.PALETTE[2], 'blue': plots.PALETTE[0]}
SHAPES = {'ball': 'o', 'square': 's', 'pyramid': '^'}
MARKERS = ('o', 's', '^', 'D', 'v', 'P')


def sweep() -> list[Overrides]:
    common: Overrides = {'model.sites': ('readout',), 'seeds': (0, 1, 2, 3, 4)}
    return [arm | common for arm in ARMS]


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draw the learned embeddings of the tasks, and tabulate the variance that factors explain."""
    for arm in runs.read_sweep(workdir).arms:
        if arm.state != 'done' or arm.overrides.get('model.source') != 'embedding':
            continue
        names, embeddings = read_embeddings(workdir / _find_run(workdir, arm.label))
        _draw_embeddings(embeddings[0], names, f'seed {arm.seeds[0]}', out)
        by_seed = dict(zip(arm.seeds, embeddings, strict=True))
        (out / 'rl_readout.md').write_text(_tabulate_factors(by_seed, names), encoding='utf-8')


def read_embeddings(run_dir: pathlib.Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Read the names of a run's tasks, and their embeddings [S, tasks, m] for all seeds."""
    run = trained.load(run_dir)
    (site,) = (site for site in run.sites if site.name == 'readout')
    seed_params = [run.get_seed_params(i) for i in range(len(run.config.seeds))]
    contexts = [
        context for params in seed_params if (context := run.get_contexts(site, params)) is not None
    ]
    return contexts[0].names, np.array([context.z for context in contexts], np.float64)


def project(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project embeddings [tasks, m] onto their first two principal components.

    Returns:
      The coordinates [tasks, 2], and the fraction of the variance along each component.
    """
    centered = embeddings - embeddings.mean(0)
    left, singular_values, _ = np.linalg.svd(centered, full_matrices=False)
    shares = singular_values**2 / np.sum(singular_values**2)
    return (left * singular_values)[:, :2], shares[:2]


def explain_variance(embeddings: np.ndarray, groups: Sequence[str]) -> float:
    """Compute the fraction of the variance of embeddings [tasks, m] between groups of tasks.

    The result is 1 if all tasks in a group have the same embedding. For random groups, the mean is
    (groups − 1) / (tasks − 1).
    """
    centered = embeddings - embeddings.mean(0)
    labels = np.array(list(groups))
    between = sum(
        np.sum(labels == group) * np.sum(centered[labels == group].mean(0) ** 2)
        for group in set(groups)
    )
    return float(between / np.sum(centered**2))


def _find_run(workdir: pathlib.Path, label: str) -> str:
    """Find the run directory's name for an arm that has a single run."""
    members = read_json(workdir / 'sweep.json')['members']
    (name,) = (member['name'] for member in members if member['label'] == label)
    return str(name)


def _split_names(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Split the names of tasks into factors, such as the kind 'hold' of 'hold red ball'."""
    return dict(zip(FACTORS, zip(*map(str.split, names), strict=True), strict=True))


def _draw_embeddings(
    embeddings: np.ndarray, names: Sequence[str], title: str, out: pathlib.Path
) -> None:
    """Draw the principal components of embeddings [tasks, m], with a panel for each factor."""
    points, shares = project(embeddings)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 2.5), layout='constrained')
        panels = figure.subplots(1, len(FACTORS), sharex=True, sharey=True)
        for axes, (factor, groups) in zip(panels, _split_names(names).items(), strict=True):
            for index, group in enumerate(dict.fromkeys(groups)):
                x, y = points[[group == other for other in groups]].T
                color = COLORS.get(group, plots.PALETTE[index])
                marker = SHAPES.get(group, MARKERS[index])
                axes.plot(x, y, marker, ms=4, mew=0, color=color, label=group)
            axes.set_title(f'{title}, by {factor}')
            axes.legend(
                loc='upper center', bbox_to_anchor=(0.5, -0.22), ncols=3, frameon=False,
                handletextpad=0.1, columnspacing=0.8,
            )  # fmt: skip
        panels[0].set_ylabel(f'component 2 ({shares[1]:.0%} of the variance)')
        panels[1].set_xlabel(f'component 1 ({shares[0]:.0%} of the variance)')
        plots.save(figure, out, 'rl_readout')


def _tabulate_factors(embeddings: dict[int, np.ndarray], names: Sequence[str]) -> str:
    """Tabulate the fraction of variance that each factor explains, for {seed: [tasks, m]}."""
    table_rows = []
    for factor, groups in _split_names(names).items():
        shares = {seed: explain_variance(array, groups) for seed, array in embeddings.items()}
        by_chance = (len(set(groups)) - 1) / (len(groups) - 1)
        mean = tables.format_interval(statistics.estimate(shares, factor), 3)
        table_rows.append([factor, str(mean), f'{by_chance:.3f}'])
    header = ['groups of tasks by', 'share of the variance [95 %]', 'for random groups']
    table = tables.format_markdown(header, table_rows)
    return (
        f'Variance of the learned embeddings between groups of tasks, in all dimensions:\n\n'
        f'{table}\n'
    )
