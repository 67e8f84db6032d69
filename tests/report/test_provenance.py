"""The report names every difference between the environments of the arms."""

import json

from mi.report import notes, provenance, runs
from mi.report.analysis import compute_results
from tests.report.synthetic import CONCAT, MI, make_run, write_sweep

BASE = {'python': '3.11.7', 'jax': '0.10.1', 'mi': '0.1.0', 'device': 'cpu cpu', 'devices': 2}


def read(tmp_path, concat, mi):
    """A sweep of two arms with these environments; 'data' is the hash of the tokens."""
    for name, final, environment in (('concat', CONCAT, concat), ('mi', MI, mi)):
        make_run(tmp_path / name, name, final)
        versions = {key: value for key, value in environment.items() if key != 'data'}
        if versions:
            (tmp_path / name / 'versions.json').write_text(json.dumps(versions))
        if 'data' in environment:
            record = {'source': 'austen', 'sha256': environment['data']}
            (tmp_path / name / 'data.json').write_text(json.dumps(record))
    members = [{'name': name, 'label': name, 'overrides': {}} for name in ('concat', 'mi')]
    write_sweep(tmp_path, members)
    return runs.read_sweep(tmp_path)


def describe(*arguments):
    return provenance.describe(read(*arguments).arms)


def test_equal_environments_are_one_line(tmp_path):
    expected = ['Environment: Python 3.11.7, jax 0.10.1, mi 0.1.0, device cpu cpu.']
    assert describe(tmp_path, BASE, BASE) == expected


def test_runs_without_a_record_have_no_note(tmp_path):
    assert describe(tmp_path, {}, {}) == []


def test_every_difference_is_named_with_its_arms(tmp_path):
    other = BASE | {'jax': '0.12.0.1', 'dirty': True, 'data': 'b' * 64}
    common, warning = describe(tmp_path, BASE | {'dirty': False, 'data': 'a' * 64}, other)
    assert common == 'Environment: Python 3.11.7, mi 0.1.0, device cpu cpu.'
    assert warning.startswith('Warning: the runs have different environments')
    assert 'jax: 0.10.1 (concat), 0.12.0.1 (mi)' in warning
    assert 'uncommitted changes: no (concat), yes (mi)' in warning
    assert f'tokens, by SHA-256: {"a" * 12} (concat), {"b" * 12} (mi)' in warning


def test_the_last_start_of_a_continued_run_counts(tmp_path):
    continued = [
        {'step': 10, 'changed': {'jax': '0.11.0', 'device': 'gpu H100'}},
        {'step': 15, 'changed': {'jax': '0.12.0.1'}},
    ]
    newest = BASE | {'jax': '0.12.0.1', 'device': 'gpu H100'}
    assert len(describe(tmp_path, BASE | {'continued': continued}, newest)) == 1


def test_the_warning_is_among_the_notes_of_the_table(tmp_path):
    sweep = read(tmp_path, BASE | {'numpy': '2.4'}, BASE | {'numpy': '2.5'})
    assert 'numpy: 2.4 (concat), 2.5 (mi)' in notes.make_notes(sweep, compute_results(sweep))[-1]
