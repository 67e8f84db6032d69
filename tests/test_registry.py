import pytest

from mi import registry
from mi.config import choice, suggest


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / 'my_package.py').write_text(
        'class Outer:\n    value = 3\ndef make():\n    return 4\nlower = {}\n'
    )
    (tmp_path / 'my_faulty.py').write_text('import a_package_that_is_missing\n')
    (tmp_path / 'my_raising.py').write_text('1 / 0\n')
    monkeypatch.syspath_prepend(tmp_path)


def make_registry():
    return registry.Registry(one=1, two=2)


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('a:b', True),
        ('a.b:C.d', True),
        ('a', False),
        ('a:', False),
        (':b', False),
        ('a/b:c', False),
        ('C:\\data', False),
        ('hub:owner/name', False),
        ('a:b:c', False),
        (3, False),
    ],
)
def test_a_reference_is_a_module_and_an_object(name, expected):
    assert registry.is_reference(name) is expected


def test_entries_are_those_of_a_dict():
    known = make_registry()
    assert known['one'] == 1 and 'one' in known and 'three' not in known
    assert list(known) == ['one', 'two'] and len(known) == 2
    with pytest.raises(KeyError, match='three'):
        known['three']


def test_references_are_imported_and_not_listed(package):
    known = make_registry()
    assert 'my_package:Outer.value' in known and known['my_package:Outer.value'] == 3
    assert known['my_package:make']() == 4
    assert list(known) == ['one', 'two']


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        ('my_missing:make', "importable module .*'my_missing'"),
        ('my_faulty:make', 'a_package_that_is_missing'),
        ('my_package:mak', "expected an object of the module .*'mak'"),
    ],
)
def test_a_reference_that_names_nothing_is_explained(package, name, reason):
    known = make_registry()
    assert name not in known
    with pytest.raises(ValueError, match=reason):
        known[name]
    with pytest.raises(AssertionError, match=reason):
        assert not choice(known)(name), choice(known)(name)


def test_an_error_inside_the_module_is_the_users_to_see(package):
    with pytest.raises(ZeroDivisionError):
        make_registry()['my_raising:make']


def test_rules_accept_references(package):
    assert choice(make_registry())('my_package:make') == ''
    assert choice(('one', 'two'))('my_package:make')
    assert 'did you mean' in suggest('tow', make_registry())
