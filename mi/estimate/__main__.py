"""Entry point of `python -m mi.estimate`."""

import sys

from mi.config import UserError
from mi.estimate import cli
from mi.training import host

host.set_xla_flags()  # compile as the trainers do
try:
    cli.main(sys.argv)
except UserError as error:
    sys.exit(f'error: {error}')
