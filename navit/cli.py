"""The `navit` command: arguments in (`parser.py`), one-line errors out."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Sequence

from navit import libtpu, stopping
from navit.parser import make_parser

# Errors that users can cause and fix: one line, or a traceback with --debug.
_USER_ERRORS = (ValueError, OSError, FloatingPointError)

log = logging.getLogger("navit")


def console() -> int:
    """The `navit` command: runs `main` in a process of its own, and may end it.

    An interrupted command ends here, with 130.
    """
    stopping.watch()
    status = main()
    if status == stopping.EXIT_CODE:
        stopping.leave()
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status, 130 if it was interrupted."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print("navit: stopped", file=sys.stderr)
        return stopping.EXIT_CODE


def _run(argv: Sequence[str] | None) -> int:
    parser = make_parser()
    commands = parser.get_default("commands")
    words = [x for x in (sys.argv[1:] if argv is None else argv) if x[:1] != "-"]
    near = difflib.get_close_matches(words[0], commands, 1) if words else []
    if near and words[0] not in commands:
        parser.error(f"there is no command {words[0]!r}; did you mean {near[0]!r}?")
    args, rest = parser.parse_known_args(argv)
    # argparse rejects positionals that follow an option, but overrides may.
    if rest and hasattr(args, "overrides") and not any(x.startswith("-") for x in rest):
        args.overrides += rest
    elif rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)
    # jax[tpu] tries a TPU first, and libtpu complains at length if there is none.
    if "JAX_PLATFORMS" not in os.environ and not libtpu.tpu_is_attached():
        libtpu.quiet()
    from navit import commands as work  # late: --help and usage errors are fast

    try:
        return getattr(work, args.run)(args)
    except _USER_ERRORS as error:
        if args.debug:
            raise
        print(f"navit: {error}", file=sys.stderr)
        return args.failed
