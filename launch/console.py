"""Console scripts of an installation: `mi-train`, `mi-report`, `mi-sweep` and `mi-status`.

    mi-train  --config=configs/lm.py --workdir=runs/first      python -m mi.main …
    mi-report --workdir=runs/sweep                             python -m mi.report …
    mi-sweep slurm --sweep=sweep.py --workdir=runs/sweep       python -m launch.slurm …
    mi-status --workdir=runs/sweep                             python -m launch.status …

Each script runs the module on its right, with the same flags and exit codes. The engine of
`mi-sweep` is `local` unless its first argument names another one.
"""

import runpy
import sys

from mi.config import suggest, suggest_install

ENGINES = ('k8s', 'local', 'optuna', 'pbt', 'ray', 'slurm')
OWN_PACKAGES = ('mi', 'launch', 'configs', 'experiments')


def train() -> None:
    """Run `mi.main`."""
    _run_module('mi.main', 'train')


def report() -> None:
    """Run `mi.report`."""
    _run_module('mi.report', 'report')


def sweep() -> None:
    """Run `launch.ENGINE`, and exit with a message if the first argument is not an engine."""
    engine = 'local'
    if len(sys.argv) > 1 and not sys.argv[1].startswith('-'):
        engine = sys.argv.pop(1)
    if engine not in ENGINES:
        hint = suggest(engine, ENGINES)
        sys.exit(f'error: {engine!r}: expected an engine before the flags; {hint}')
    _run_module(f'launch.{engine}', 'sweep')


def status() -> None:
    """Run `launch.status`."""
    _run_module('launch.status', 'sweep')


def _run_module(module: str, extra: str) -> None:
    """Run a module like `python -m`, or exit with a message if a package is missing."""
    try:
        runpy.run_module(module, run_name='__main__', alter_sys=True)
    except ModuleNotFoundError as error:
        package = (error.name or '').partition('.')[0]
        if not package or package in OWN_PACKAGES:
            raise
        sys.exit(f'error: {package} is not installed. Try {suggest_install(extra)}')
