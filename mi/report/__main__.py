"""What a sweep showed, or how two differ.

python -m mi.report --workdir=runs/quickstart [--out=DIR]: see mi.report.write
python -m mi.report --baseline=runs/before --candidate=runs/after [--fail_on_worse] [--out=DIR]:
    see mi.report.compare; exit code 1 if --fail_on_worse is given and an arm is worse, or lost, or
    has values on both sides and no verdict
"""

import sys

from absl import app, flags

from mi import report
from mi.config import UserError
from mi.report import compare

WORKDIR = flags.DEFINE_string('workdir', None, 'Sweep or run directory.')
BASELINE = flags.DEFINE_string('baseline', None, 'Sweep or run directory that is compared with.')
CANDIDATE = flags.DEFINE_string('candidate', None, 'Sweep or run directory that is compared.')
FAIL_ON_WORSE = flags.DEFINE_bool(
    'fail_on_worse',
    False,
    'Exit with 1 if an arm of the candidate is worse than the baseline, or cannot be judged.',
)
OUT = flags.DEFINE_string('out', None, 'Where to write; DIRECTORY/report unless given.')


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f'error: unknown argument {argv[1]!r}; flags are --NAME=VALUE, see --help')
    workdir, baseline, candidate = WORKDIR.value, BASELINE.value, CANDIDATE.value
    try:
        if workdir and not baseline and not candidate:
            report.write(workdir, OUT.value)
        elif baseline and candidate and not workdir:
            found = compare.compare(baseline, candidate, OUT.value)
            if FAIL_ON_WORSE.value:
                _fail(found)
        else:
            sys.exit(
                'error: --workdir=DIRECTORY of a sweep or a run is needed, or --baseline=DIRECTORY '
                'and --candidate=DIRECTORY'
            )
    except UserError as error:
        sys.exit(f'error: {error}')


def _fail(found: list[compare.Pair]) -> None:
    """Exits if an arm is worse, or there is no telling: what is not judged has not passed."""
    worse = [pair.label for pair in found if compare.is_worse(pair)]
    unknown = [f'{pair.label} ({why})' for pair in found if (why := compare.why_not(pair))]
    said = [f'worse or lost: {", ".join(worse)}'] if worse else []
    if unknown:
        said.append(
            f'cannot be judged: {", ".join(unknown)}; expected the same tasks, and two seeds or '
            f'more that both have'
        )
    if not said and not any(pair.verdict for pair in found):
        said.append('nothing could be compared: no arm of the baseline has values; see its states')
    if said:
        sys.exit(f'error: {"; ".join(said)}')


if __name__ == '__main__':
    app.run(main)
