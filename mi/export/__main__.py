"""Export a trained run.

    python -m mi.export --workdir=runs/first --out=first.safetensors
    python -m mi.export --workdir=runs/first --program=first.stablehlo --platforms=cpu,cuda

The exit code is 0, or 1 with one line on stderr on an error.
"""

import argparse
import operator
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import ml_collections
from chex import ArrayTree

from mi import precision
from mi.config import UserError, name_output, suggest
from mi.export import program
from mi.export.parameters import save_params
from mi.lm import factory as lm
from mi.lm.restore import restore
from mi.rl import factory as rl
from mi.rl.restore import restore_params
from mi.training import sharding
from mi.training.host import set_xla_flags
from mi.training.run_config import read_config


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message}; see --help')


class Trained(NamedTuple):
    """A trained run.

    Attributes:
      config: config of the run.
      params: evaluated parameters of all seeds, [S, …].
      about: numbers for the metadata, see `mi.export.parameters.ExportedParams`.
      make_step: function that takes one seed's parameters and --length. It returns the model's
        step, and a function from the batch size to the step's arguments.
    """

    config: ml_collections.ConfigDict
    params: ArrayTree
    about: dict[str, int]
    make_step: Callable[[ArrayTree, int], tuple[program.Step, Callable[[int], Any]]]


def main(argv: Sequence[str]) -> None:
    """Write the files given by the flags.

    Raises:
      UserError: if the flags are invalid, or the run cannot be exported.
    """
    # Restore the run, and select a seed.
    options = _parse(argv)
    set_xla_flags()
    config = read_config(options.workdir)
    if config.get('task') not in RESTORE:
        raise UserError(
            f'--workdir={options.workdir}: expected a run with config.task = '
            f'{" or ".join(RESTORE)} (got {config.get("task")!r})'
        )
    for flag in ('out', 'program'):  # before the restore, which takes longer
        if file := getattr(options, flag):
            with name_output(flag, pathlib.Path(file)):
                pass
    trained = RESTORE[config.task](config, options.workdir)
    seeds = list(config.seeds)
    seed = seeds[0] if options.seed is None else options.seed
    if seed not in seeds:
        raise UserError(f'--seed={seed}: expected a seed of the run, one of {seeds}')
    params = jax.tree.map(operator.itemgetter(seeds.index(seed)), sharding.to_host(trained.params))

    # Write the files.
    if options.out:
        about = {'seed': seed, **trained.about}
        file = pathlib.Path(options.out)
        with name_output('out', file):
            save_params(file, params, trained.config.to_dict(), about)
        print(options.out)
    if options.program:
        with precision.use_config(trained.config):
            step, make_args = trained.make_step(params, options.length)
            exported = program.export_step(step, make_args, options.platforms, options.batch)
        file = pathlib.Path(options.program)
        with name_output('program', file):
            file.write_bytes(program.serialize(exported))
        print(options.program)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags.

    Raises:
      UserError: if no output file is given, or a flag has an invalid value.
    """
    parser = _Parser(
        prog='python -m mi.export', description='Export a trained run.', allow_abbrev=False
    )
    parser.add_argument('--workdir', required=True, help='run directory')
    parser.add_argument('--out', help='safetensors file for the parameters')
    parser.add_argument('--program', help="file for the model's step, exported with jax.export")
    parser.add_argument('--seed', type=int, help='seed to export (default: the first one)')
    parser.add_argument('--platforms', default='cpu,cuda,tpu', help='platforms of the program')
    parser.add_argument(
        '--length', type=int, default=1024, help='tokens that a Transformer can read'
    )
    parser.add_argument(
        '--batch', type=int, default=0, help='batch size of the program, or 0 for any'
    )
    options = parser.parse_args(argv)
    if options.length < 1 or options.batch < 0:
        raise UserError(
            f'--length={options.length}, --batch={options.batch}: expected a length of at '
            'least 1, and a batch of at least 0'
        )
    if not (options.out or options.program):
        raise UserError('no output file: expected --out=FILE.safetensors, --program=FILE, or both')
    options.platforms = tuple(options.platforms.split(','))
    for platform in options.platforms:
        if platform not in program.PLATFORMS:
            raise UserError(
                f'--platforms: {platform!r} is unknown; {suggest(platform, program.PLATFORMS)}'
            )
    return options


def _restore_lm(config: ml_collections.ConfigDict, workdir: str) -> Trained:
    """Restore a language model."""
    config, corpus, params, step, _ = restore(config, workdir)
    vocabulary, num_domains = corpus.sizes

    def make_step(params: ArrayTree, length: int) -> tuple[program.Step, Callable[[int], Any]]:
        if config.model.source == 'domain':
            raise UserError(
                "config.model.source = 'domain': --program does not support this context, "
                'because the exported step only takes tokens. Try --out alone'
            )
        model = lm.build_model(config, vocabulary, num_domains)
        return program.make_lm_step(lm.configure_sampling(model, config), params, length)

    about = {'step': step, 'vocabulary': vocabulary, 'domains': num_domains}
    return Trained(config, params, about, make_step)


def _restore_rl(config: ml_collections.ConfigDict, workdir: str) -> Trained:
    """Restore an agent for the environment of its run."""
    agent = rl.build_agent(config, rl.read_spec(config))
    params, step = restore_params(config, agent, pathlib.Path(workdir))

    def make_step(params: ArrayTree, _length: int) -> tuple[program.Step, Callable[[int], Any]]:
        return program.make_policy_step(agent, params)

    return Trained(config, params, {'step': step}, make_step)


RESTORE = {'lm': _restore_lm, 'rl': _restore_rl}

if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f'error: {error}')
