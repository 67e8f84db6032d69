"""Insert small faults into the code, one at a time, and check that a test notices.

    python -m tools.mutate                      # every fault in tools/faults/*.toml
    python -m tools.mutate --only=rl/ --jobs=2  # faults whose area/name matches
    python -m tools.mutate --check              # only check that every fault can be applied

This tool is for maintainers and not part of `make test`, because every fault starts pytest once. A
fault is an entry in a TOML file, whose name is the area of the fault:

    [[fault]]
    name = 'IQM rounds up'
    file = 'mi/report/statistics.py'
    old = 'n // 4'              # occurs in the file exactly once
    new = '-(-n // 4)'
    tests = ['tests/report/test_statistics.py', '-k', 'iqm']  # pytest arguments

Each job works in a copy of the tracked files. It applies a fault, runs its tests until the first
one fails, and reverts the fault. At the end, the tests that failed are run on the unchanged code,
where they must pass. The possible results are:

noticed    a test fails or crashes, or the run takes longer than --timeout (a hang)
survived   all tests pass
invalid    the result says nothing about the tests: the fault breaks an import, no test was
           selected, or the test that failed also fails without the fault

Results are stored in --results under a hash of the fault, its file and its tests. A killed run
therefore continues, and only changed faults run again. The exit code is 1 if fewer than --least
percent of the faults were noticed.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections.abc import Iterable, Sequence

ROOT = pathlib.Path(__file__).parents[1]
PYTEST = (sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '-p', 'no:xdist')
TESTS_FAILED = 1  # pytest's exit code; 2 and above: interrupted, internal, usage, no tests
FAILED = re.compile(r'^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$', re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A change to a file, and the tests that should fail with it.

    Attributes:
      area: name of the TOML file without its suffix.
      name: description of the fault.
      file: path of the changed file, relative to the root.
      old, new: text that occurs exactly once, and its replacement.
      tests: arguments for pytest.
    """

    area: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def label(self) -> str:
        return f'{self.area}/{self.name}'

    def mutate(self, source: str) -> str:
        """Return the source with the fault; raise ValueError if it cannot be applied."""
        num_occurrences = source.count(self.old)
        if num_occurrences != 1:
            raise ValueError(
                f'{self.label}: old text occurs {num_occurrences} times in {self.file}: expected '
                f'it once'
            )
        if self.old == self.new:
            raise ValueError(f'{self.label}: expected new text that differs from the old text')
        mutated_source = source.replace(self.old, self.new)
        if self.file.endswith('.py'):
            try:
                compile(mutated_source, self.file, 'exec')
            except SyntaxError as error:
                raise ValueError(f'{self.label}: {self.file} does not compile: {error}') from error
        return mutated_source

    def digest(self, root: pathlib.Path) -> str:
        """Return a hash of the fault, the file that it changes and its test files."""
        fault_hash = hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode())
        test_files = [argument.partition('::')[0] for argument in self.tests]
        for file_name in (self.file, *test_files):
            if (root / file_name).is_file():
                fault_hash.update((root / file_name).read_bytes())
        return fault_hash.hexdigest()


def load_faults(folder: pathlib.Path) -> list[Fault]:
    """Read all faults from the TOML files in a folder, in the order of the file names."""
    faults = []
    for toml_file in sorted(folder.glob('*.toml')):
        for fault_fields in tomllib.loads(toml_file.read_text())['fault']:
            test_arguments = tuple(fault_fields.pop('tests'))
            faults.append(Fault(area=toml_file.stem, tests=test_arguments, **fault_fields))
    return faults


def invalid_faults(faults: Iterable[Fault], root: pathlib.Path) -> list[str]:
    """Return a line for each fault that cannot be applied or names a missing test file."""
    problems = []
    label_counts: collections.Counter[str] = collections.Counter()
    for fault in faults:
        label_counts[fault.label] += 1
        if label_counts[fault.label] > 1:
            problems.append(f'{fault.label}: the name is taken')
        try:
            fault.mutate((root / fault.file).read_text())
        except (OSError, ValueError) as error:
            problems.append(str(error))
        for argument in fault.tests:
            test_file = argument.partition('::')[0]
            if test_file.startswith('tests/') and not (root / test_file).exists():
                problems.append(f'{fault.label}: {test_file} does not exist')
    return problems


def copy_tracked(root: pathlib.Path, target: pathlib.Path) -> None:
    """Copy the files that git tracks, with their content in the working tree."""
    command = ['git', '-C', str(root), 'ls-files', '-z']
    command += ['--cached', '--others', '--exclude-standard']
    for file_name in subprocess.run(command, check=True, capture_output=True).stdout.split(b'\0'):
        source_file = root / os.fsdecode(file_name)
        if file_name and source_file.is_file():
            target_file = target / os.fsdecode(file_name)
            target_file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source_file, target_file)


def run_tests(tree: pathlib.Path, tests: Sequence[str], timeout: float) -> tuple[int | None, str]:
    """Run pytest in a tree; return the exit code, or None after a timeout, and the output."""
    search_path = os.pathsep.join(filter(None, [str(tree), os.environ.get('PYTHONPATH')]))
    environment = os.environ | {'PYTHONPATH': search_path, 'PYTHONDONTWRITEBYTECODE': '1'}
    environment['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'  # a second per fault; no test needs one
    process = subprocess.Popen(
        [*PYTEST, *tests],
        cwd=tree,
        env=environment | {'COLUMNS': '1000'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what the tests started
        output, _ = process.communicate()
        return None, output
    return process.returncode, output


@dataclasses.dataclass
class Result:
    """The result for a fault: 'noticed', 'survived' or 'invalid', and the test that failed."""

    verdict: str
    test: str = ''


def try_fault(tree: pathlib.Path, fault: Fault, timeout: float) -> tuple[Result, str]:
    """Apply a fault to a tree and run its tests; return the result and the output of pytest."""
    mutated_file = tree / fault.file
    source = mutated_file.read_text()
    mutated_file.write_text(fault.mutate(source))
    try:
        exit_code, output = run_tests(tree, fault.tests, timeout)
    finally:
        mutated_file.write_text(source)
    if exit_code == 0:
        return Result('survived'), output
    if exit_code is None or exit_code < 0:  # a hang, or a crash of the interpreter
        return Result('noticed'), output
    failed_test = FAILED.search(output)
    if exit_code == TESTS_FAILED and failed_test:
        return Result('noticed', failed_test[1]), output
    return Result('invalid'), output


class Results:
    """The results by digest, stored in a JSON file that is updated after every fault."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._lock = threading.Lock()
        self._values: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, digest: str) -> Result | None:
        return Result(*self._values[digest]) if digest in self._values else None

    def add(self, digest: str, result: Result) -> None:
        with self._lock:
            self._values[digest] = [result.verdict, result.test]
            partial = self._path.with_suffix('.partial')
            partial.write_text(json.dumps(self._values, indent=0))
            os.replace(partial, self._path)


def run_faults(
    faults: Sequence[Fault], root: pathlib.Path, results: Results, jobs: int, timeout: float
) -> dict[Fault, Result]:
    """Return the result of each fault, and print a line as soon as it is known."""
    digests = {fault: fault.digest(root) for fault in faults}
    outcomes = {
        fault: known_result
        for fault in faults
        if (known_result := results.get(digests[fault])) is not None
    }
    pending_faults = [fault for fault in faults if fault not in outcomes]

    def work(worker_index: int) -> None:
        with tempfile.TemporaryDirectory(prefix='mutate') as temporary_dir:
            tree = pathlib.Path(temporary_dir)
            copy_tracked(root, tree)
            for fault in pending_faults[worker_index::jobs]:
                result, output = try_fault(tree, fault, timeout)
                outcomes[fault] = result
                if result.verdict == 'invalid':
                    print(output[-2000:], flush=True)
                else:
                    results.add(digests[fault], result)
                progress = f'{len(outcomes)}/{len(faults)}'
                print(f'{progress} {result.verdict:8} {fault.label}  {result.test}', flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as executor:
        for future in [executor.submit(work, worker_index) for worker_index in range(jobs)]:
            future.result()
    return outcomes


def discount_failing_tests(
    outcomes: dict[Fault, Result], root: pathlib.Path, timeout: float
) -> None:
    """Mark faults as invalid if the test that noticed them also fails on the unchanged code."""
    noticing_tests = sorted({result.test for result in outcomes.values() if result.test})
    failing_tests = set()
    while noticing_tests:
        exit_code, output = run_tests(root, noticing_tests, timeout * 10)
        failed_test = FAILED.search(output)
        if exit_code == 0:
            break
        if not failed_test:
            raise RuntimeError(f'the tests cannot run on the unchanged code:\n{output[-2000:]}')
        failing_tests.add(failed_test[1])
        noticing_tests = [test for test in noticing_tests if test not in failing_tests]
    for fault, result in outcomes.items():
        if result.test in failing_tests:
            outcomes[fault] = Result('invalid', result.test)


def table(outcomes: dict[Fault, Result]) -> str:
    """Return a Markdown table of results by area, and a list of faults that were not noticed."""
    table_lines = [
        '| area | faults | noticed | survived | invalid |',
        '| --- | ---: | ---: | ---: | ---: |',
    ]
    for area in [*sorted({fault.area for fault in outcomes}), 'all']:
        verdicts = [
            result.verdict for fault, result in outcomes.items() if area in ('all', fault.area)
        ]
        verdict_counts = [verdicts.count(verdict) for verdict in ('noticed', 'survived', 'invalid')]
        cells = [area, *map(str, [len(verdicts), *verdict_counts])]
        table_lines.append(f'| {" | ".join(cells)} |')
    missed_lines = [
        f'- {result.verdict}: {fault.label} ({fault.file})'
        for fault, result in outcomes.items()
        if result.verdict != 'noticed'
    ]
    return '\n'.join([*table_lines, '', *missed_lines])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--faults', type=pathlib.Path, default=ROOT / 'tools/faults')
    parser.add_argument('--root', type=pathlib.Path, default=ROOT)
    parser.add_argument('--only', default='', help='regular expression on area/name')
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--timeout', type=float, default=600, help='seconds per fault')
    parser.add_argument('--least', type=float, default=95, help='percent to be noticed')
    parser.add_argument('--results', type=pathlib.Path, default=ROOT / 'runs/mutate.json')
    parser.add_argument('--check', action='store_true', help='apply the faults, run nothing')
    options = parser.parse_args(argv)

    # Read the faults, and refuse those that cannot be applied.
    all_faults = load_faults(options.faults)
    faults = [fault for fault in all_faults if re.search(options.only, fault.label)]
    problems = invalid_faults(faults, options.root)
    if problems or not faults:
        print('\n'.join(problems) or 'no fault matches --only', file=sys.stderr)
        return 2
    if options.check:
        print(f'{len(faults)} faults can be applied')
        return 0

    # Run them, print the table, and compare with --least.
    options.results.parent.mkdir(parents=True, exist_ok=True)
    results = Results(options.results)
    outcomes = run_faults(faults, options.root, results, options.jobs, options.timeout)
    discount_failing_tests(outcomes, options.root, options.timeout)
    print(table(outcomes))
    num_noticed = sum(result.verdict == 'noticed' for result in outcomes.values())
    print(f'{num_noticed} of {len(outcomes)} noticed: {100 * num_noticed / len(outcomes):.1f} %')
    return int(100 * num_noticed < options.least * len(outcomes))


if __name__ == '__main__':
    sys.exit(main())
