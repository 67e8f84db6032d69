"""The output folder of a report."""

import contextlib
import pathlib
from collections.abc import Iterator

from mi.config import UserError


@contextlib.contextmanager
def output_folder(folder: pathlib.Path) -> Iterator[None]:
    """Create a folder, and convert failures to write to it into errors about --out.

    Raises:
      UserError: if the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f'--out={folder}: {error.strerror}. Use another directory') from error
