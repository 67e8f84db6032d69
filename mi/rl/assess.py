"""A trained agent, looked at again: scores of every task, greedy and sampled, and videos."""

import functools
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import rich.console
import rich.table

from mi import precision
from mi.rl import (
    config as rl_config,
)
from mi.rl import (
    envs,
    factory,
    video,
)
from mi.rl.agent import Agent
from mi.rl.envs.spec import Spec
from mi.rl.evaluate import Evaluation
from mi.rl.play import Watched
from mi.training import checkpoint
from mi.training.io import write_json
from mi.training.run_config import merge_eval_config

OWN = ('eval', 'actors', 'tracker')
FIXED = ('task', 'env', 'model', 'seeds')


def assess(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Evaluates the newest checkpoint of a run directory and writes below its evaluation/.

        scores.json    by split ('eval', 'held_out'; greedy or not) and seed, as in metrics.jsonl
        TASK.gif       the greedy policy of the first seed

    Raises:
      UserError: if the directory has no whole checkpoint, or is of another config.
    """
    rl_config.validate(config)
    path = pathlib.Path(workdir)
    config = merge_eval_config(path, config, overridable=OWN, fixed=FIXED).unlock()
    config.eval.greedy = True
    scores: dict[str, Any] = {}
    keys = {'eval': 'env.name'}
    if config.eval.held_out:
        keys['held_out'] = 'eval.held_out'
    for split, key in keys.items():
        with precision.use_config(config), Evaluation(config, key) as evaluation:
            if split == 'eval':
                agent = factory.build_agent(config, evaluation.spec)
                params, step = _restored(config, agent, path)
            factory.check_held_out(config, agent.spec, evaluation.spec)
            for i, seed in enumerate(config.seeds):
                of_seed = jax.tree.map(lambda a, i=i: a[i], params)
                for policy, values in evaluation(agent, of_seed, step, seed).items():
                    scores.setdefault(split + policy, {})[str(seed)] = values
        _print(evaluation.spec, split, scores)
    folder = path / 'evaluation'
    folder.mkdir(exist_ok=True)
    write_json(folder / 'scores.json', {'step': step, **scores})
    first = jax.tree.map(lambda a: a[0], params)
    rows = max(config.actors.batch, len(agent.spec.tasks))
    name, options = factory.get_environment_args(config)
    pool = Watched(
        envs.pool(name, rows, config.seeds[0], options),
        config.actors.timeout,
        'config.actors.timeout',
    )
    try:
        action_key = jax.random.key(config.seeds[0])
        with precision.use_config(config):
            frames = video.episodes(pool, agent, first, action_key, greedy=True)
    finally:
        pool.close()
    for task, of_task in frames.items():
        name = task.replace(' ', '_').replace('/', '_')
        video.write(folder / f'{name}.gif', pool.spec, task, of_task)
    print(f'{folder}: scores.json and {len(frames)} videos')


def _restored(
    config: ml_collections.ConfigDict, agent: Agent, path: pathlib.Path
) -> tuple[Any, int]:
    """The parameters of all seeds, [S, …], whatever the topology and batch were; and their step."""
    saved = checkpoint.Checkpoints(path / 'checkpoints', config.train.keep)
    newest, meta = saved.newest()
    like: Any = jax.eval_shape(functools.partial(factory.init_params, agent), jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    fused = config.train.topology == 'fused'
    axes = (len(config.seeds),) if fused else ()
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(axes + a.shape, a.dtype, sharding=here), like
    )
    params = saved.restore_part(newest, 'learner.params' if fused else 'params', like)
    if not fused:
        params = jax.tree.map(lambda a: a[None], params)
    return params, meta['step']


def _print(spec: Spec, split: str, scores: dict[str, Any]) -> None:
    """A row for each task: mean over seeds of return and success, sampled and greedy.

    Where the environment has no notion of success, the greedy column has the return.
    """
    shown = 'success' if spec.has_success else 'return'
    columns = ['task', 'return', '± 2 s.e.', *(['success'] if spec.has_success else [])]
    table = rich.table.Table(*columns, f'greedy {shown}', title=split)

    def mean(policy: str, name: str) -> float:
        return float(np.mean([of[name] for of in scores[split + policy].values()]))

    def add_row(label: str, suffix: str, width: str) -> None:
        success = [f'{mean("", f"success{suffix}"):.2f}'] if spec.has_success else []
        greedy = f'{mean("_greedy", f"{shown}{suffix}"):.{2 if spec.has_success else 3}f}'
        table.add_row(label, f'{mean("", f"return{suffix}"):.3f}', width, *success, greedy)

    for task in spec.tasks:
        errors = [of.get(f'stderr/{task}', float('nan')) for of in scores[split].values()]
        width = 2 * np.sqrt(np.sum(np.square(errors))) / len(errors)
        add_row(task, f'/{task}', f'{width:.3f}')
    table.add_section()
    add_row('mean', '', '')
    rich.console.Console().print(table)
