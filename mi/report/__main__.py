"""Command line for the report on one sweep, or for the comparison of two sweeps.

python -m mi.report --workdir=runs/quickstart [--out=DIR]: see mi.report.write
python -m mi.report --baseline=runs/before --candidate=runs/after [--fail_on_worse] [--out=DIR]:
    see mi.report.compare; with --fail_on_worse, the exit code is 1 if an arm is worse, has lost
    its values, or has values in both sweeps but no verdict
"""

import sys

from absl import app, flags

from mi import report
from mi.config import UserError
from mi.report import compare

WORKDIR = flags.DEFINE_string('workdir', None, 'Sweep or run directory.')
BASELINE = flags.DEFINE_string('baseline', None, 'Sweep or run directory to compare with.')
CANDIDATE = flags.DEFINE_string('candidate', None, 'Sweep or run directory to compare.')
FAIL_ON_WORSE = flags.DEFINE_bool(
    'fail_on_worse',
    False,
    'Exit with 1 if an arm of the candidate is worse than the baseline, or cannot be judged.',
)
OUT = flags.DEFINE_string('out', None, 'Output directory; DIRECTORY/report by default.')


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f'error: unknown argument {argv[1]!r}; flags are --NAME=VALUE, see --help')
    workdir, baseline, candidate = WORKDIR.value, BASELINE.value, CANDIDATE.value
    try:
        if workdir and not baseline and not candidate:
            report.write(workdir, OUT.value)
        elif baseline and candidate and not workdir:
            comparisons = compare.compare_sweeps(baseline, candidate, OUT.value)
            if FAIL_ON_WORSE.value:
                _exit_if_worse(comparisons)
        else:
            sys.exit(
                'error: expected --workdir=DIRECTORY, or --baseline=DIRECTORY and '
                '--candidate=DIRECTORY'
            )
    except UserError as error:
        sys.exit(f'error: {error}')


def _exit_if_worse(comparisons: list[compare.ArmComparison]) -> None:
    """Exit with an error if an arm is worse, or if it cannot be judged."""
    # Collect every reason, so that one run of the command shows them all.
    errors = []
    if worse := [comparison.label for comparison in comparisons if compare.is_worse(comparison)]:
        errors.append(f'worse or lost: {", ".join(worse)}')
    unjudged = [
        f'{comparison.label} ({reason})'
        for comparison in comparisons
        if (reason := compare.explain_missing_verdict(comparison))
    ]
    if unjudged:
        errors.append(
            f'cannot be judged: {", ".join(unjudged)}; expected the same tasks, and at least two '
            'seeds that both have'
        )
    if not errors and not any(comparison.verdict for comparison in comparisons):
        errors.append(
            'nothing could be compared: no arm of the baseline has values. See their states'
        )
    if errors:
        sys.exit(f'error: {"; ".join(errors)}')


if __name__ == '__main__':
    app.run(main)
