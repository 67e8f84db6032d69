"""Install every extra in new environments with pip and with uv, with and without the lock file.

    python -m tools.extras                     # resolve all extras, but install nothing
    python -m tools.extras --install           # also install them, with downloads of about 20 GB
    python -m tools.extras --only=sweep,ray --installers=uv --install

After an installation, the installer checks all requirements. The layers and the modules that need
the extra are then imported from the environment, outside of the clone. The output is a table of
durations in seconds; --jobs cells run at a time. If a cell fails, its output is printed below the
table, and the exit code is 1.
"""

import argparse
import concurrent.futures
import itertools
import pathlib
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[1]
LOCK = 'requirements/lock.txt'
INSTALLERS = ('pip', 'uv')
MODULES = {
    'train': ['mi.main', 'mi.lm.train', 'mi.rl.train', 'mi.fit.train'],
    'report': ['mi.report', 'matplotlib', 'scipy'],
    'sweep': ['launch.local', 'yaml'],
    'lm': ['mi.lm.train', 'datasets'],
    'rl': ['mi.rl.train', 'envpool', 'gymnasium'],
    'all': ['launch.local', 'datasets', 'envpool', 'gymnasium'],
    'cuda': ['jax_cuda13_plugin'],
    'tpu': ['libtpu'],
    'compress': ['mi.compress', 'scipy', 'tensorly'],
    'hub': ['datasets'],
    'digits': ['sklearn.datasets'],
    'envpool': ['envpool'],
    'gym': ['gymnasium'],
    'vizdoom': ['vizdoom'],
    'export': ['mi.export', 'flatbuffers', 'safetensors'],
    'ray': ['ray'],
    'optuna': ['launch.optuna', 'optuna'],
    'trackio': ['trackio'],
    'wandb': ['wandb'],
    'benchmark': ['ray.rllib', 'torch', 'xminigrid'],
    'docs': ['mkdocs', 'material', 'mkdocstrings', 'ipykernel', 'nbclient', 'nbconvert'],
    'test': ['pytest', 'xdist', 'haiku', 'equinox', 'minigrid', 'kubernetes_validate'],
}
"""Extra → modules that need it, ours and those of its packages."""


def read_extras() -> dict[str, list[str]]:
    """Return the requirements of each extra in pyproject.toml."""
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    extras: dict[str, list[str]] = project['optional-dependencies']
    return extras


def make_commands(
    installer: str, environment: pathlib.Path, extra: str, *, locked: bool, dry: bool
) -> list[list[str]]:
    """Return the commands that make an environment and install or only resolve an extra."""
    python = str(environment / 'bin/python')
    options = ['--quiet', *(['--dry-run'] if dry else []), *(['-c', LOCK] if locked else [])]
    target = f'.[{extra}]'
    if installer == 'pip':
        make = [sys.executable, '-m', 'venv', str(environment)]
        install = [python, '-m', 'pip', 'install', *options, target]
        check = [python, '-m', 'pip', 'check']
    else:
        uv = [sys.executable, '-m', 'uv']  # of the extra test, which need not be on PATH
        make = [*uv, 'venv', '--quiet', '--python', sys.executable, str(environment)]
        install = [*uv, 'pip', 'install', '--python', python, *options, target]
        check = [*uv, 'pip', 'check', '--quiet', '--python', python]
    if dry:
        return [make, install]
    modules = ['mi.layers', *MODULES[extra]]
    return [make, install, check, [python, '-c', f'import {", ".join(modules)}']]


def try_extra(installer: str, extra: str, *, locked: bool, dry: bool) -> tuple[float, str]:
    """Return the seconds that an extra took, and the output of a failed command or ''."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        environment = pathlib.Path(folder) / 'environment'
        for command in make_commands(installer, environment, extra, locked=locked, dry=dry):
            # In the clone, Python would import our modules from there instead.
            cwd = pathlib.Path(folder) if command[1] == '-c' else ROOT
            done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
            if done.returncode:
                return time.monotonic() - start, done.stdout + done.stderr
    return time.monotonic() - start, ''


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; exit with 1 if an extra cannot be installed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--only', default=','.join(read_extras()), help='extras, by commas')
    parser.add_argument('--installers', default=','.join(INSTALLERS), help='pip, uv or both')
    parser.add_argument('--jobs', type=int, default=4, help='installations at a time')
    parser.add_argument('--install', action='store_true', help='install, do not only resolve')
    options = parser.parse_args(arguments)
    names = options.only.split(',')
    for flag, chosen, known in [
        ('only', names, read_extras()),
        ('installers', options.installers.split(','), INSTALLERS),
    ]:
        for name in chosen:
            if name not in known:
                parser.error(f'--{flag}={name} is unknown; known: {", ".join(known)}')
    columns = [(name, locked) for name in options.installers.split(',') for locked in (False, True)]
    headings = [f'{name}, lock' if locked else name for name, locked in columns]
    print(f'{"extra":12}' + ''.join(f'{heading:>12}' for heading in headings), flush=True)
    failures: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(
            lambda cell: try_extra(cell[1][0], cell[0], locked=cell[1][1], dry=not options.install),
            itertools.product(names, columns),
        )
        for extra in names:
            print(f'{extra:12}', end='')
            for heading, (seconds, output) in zip(headings, results, strict=False):
                print(f'{"FAILED" if output else f"{seconds:.1f} s":>12}', end='', flush=True)
                if output:
                    failures.append(f'[{extra}] by {heading}:\n{output[-2000:]}')
            print()
    if failures:
        sys.exit('\n\n'.join(failures))


if __name__ == '__main__':
    main()
