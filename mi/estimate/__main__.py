"""Entry point of `python -m mi.estimate`."""

import sys

from mi.config import UserError
from mi.estimate import cli

try:
    cli.main(sys.argv)
except UserError as error:
    sys.exit(f'error: {error}')
