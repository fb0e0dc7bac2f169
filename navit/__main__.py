"""`python -m navit`: the `navit` command."""

import sys

from navit.cli import console

sys.exit(console())
