"""Reading again what runs and launchers wrote, also where a failure has left less of it."""

import json
import pathlib
from typing import Any

from mi.config import UserError


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object of a file that has to be whole.

    Raises:
      UserError: if it holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # also of bytes that are not text
        raise UserError(
            f'{path} is not JSON ({error}); restore it, or name another --workdir'
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f'{path} is no JSON object: expected {{…}}; restore it, or name another --workdir'
        )
    return value


def whole_lines(path: pathlib.Path) -> int:
    """Length of a file up to its last newline; who was killed may have left half a line after it.

    0 where there is no file.
    """
    return path.read_bytes().rfind(b'\n') + 1 if path.exists() else 0
