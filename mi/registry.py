"""Registries, which map a name in a config to an object of this package or of the user.

    FUSIONS['film']                      # an entry
    FUSIONS['my_fusion.layers:Gate2']    # any importable object, 'package.module:Object'

The second form lets a config name a user's own fusion, cell, core, environment, corpus, optimizer,
schedule or tracker without an entry here. It works in every trainer, sweep, launcher and report.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

Entry = TypeVar('Entry')


def is_reference(name: object) -> bool:
    """Return whether a name has the form 'package.module:Object'."""
    if not isinstance(name, str):
        return False
    module, colon, path = name.partition(':')
    return bool(colon) and all(
        part.isidentifier() for part in [*module.split('.'), *path.split('.')]
    )


def import_object(reference: str) -> Any:
    """Import the object named by 'package.module:Object', where Object can be a dotted path.

    Raises:
      ValueError: if the name does not have this form, its module cannot be imported, or the module
        has no such object. Other errors that the import raises propagate.
    """
    if not is_reference(reference):
        raise ValueError(f"{reference!r}: expected 'package.module:Object'")
    module, _, path = reference.partition(':')
    try:
        return functools.reduce(getattr, path.split('.'), importlib.import_module(module))
    except ImportError as error:
        raise ValueError(
            f'{reference!r}: expected an importable module ({error}). Try `pip install -e .` in '
            f'its directory'
        ) from error
    except AttributeError as error:
        raise ValueError(f'{reference!r}: expected an object of the module ({error})') from error


class Registry(dict[str, Entry]):
    """A dict from names to objects that also imports 'package.module:Object'.

    `in` and `[]` accept such references, whereas iteration and `len` only see the entries. The
    owner can set `refuse`, a function that returns why an imported object is unsuitable, or ''.
    """

    refuse: Callable[[Any], str] = staticmethod(lambda entry: '')

    def __missing__(self, name: str) -> Entry:
        if not is_reference(name):
            raise KeyError(name)
        entry: Entry = import_object(name)
        return entry

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name):
            return True
        return is_reference(name) and not self.explain(str(name))

    def explain(self, name: str) -> str:
        """Return why a reference cannot be used, or '' if it can be used or is an entry."""
        if super().__contains__(name):
            return ''
        try:
            return self.refuse(import_object(name))
        except ValueError as error:
            return str(error)
