"""The command line: one verb per stage. Only this package prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tersely.cli.arguments import _parser
from tersely.errors import TerselyError

__all__ = ["_parser", "main"]

_AGAIN = {
    "compress": "; what is finished is kept: start the same command with --resume",
    "evaluate": "; what is measured is kept: the same command continues",
    "blame": "; what is measured is kept: the same command continues",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.verb(options)
    except TerselyError as error:
        print(f"tersely: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        again = "" if getattr(options, "no_store", False) else _AGAIN.get(options.name, "")
        print(f"tersely: stopped{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return 0
