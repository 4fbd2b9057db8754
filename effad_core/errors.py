"""The two errors of bad input, and how commands and messages show them."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text: str) -> str:
    """Text as one line that every terminal can show.

    Line breaks, control characters and bytes that are no UTF-8, all of which file names may hold,
    become backslash escapes.
    """
    return UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def not_installed(what: str, package: str, extra: str) -> str:
    """The sentence on a package that `pip install .` leaves out, with the extra that brings it.

    Args:
        what: what needs the package.
        package: its name.
        extra: the extra of pyproject.toml that installs it.

    Example:
        >>> not_installed("the export to ONNX", "onnx", "export")
        'the export to ONNX needs the package onnx: run `pip install "effad-core[export]"`'
    """
    return f'{what} needs the package {package}: run `pip install "effad-core[{extra}]"`'


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the remedy in one sentence."""

    def __str__(self) -> str:
        return printable(super().__str__())


class RunError(ValueError):
    """A run's folder or one of its files cannot be used; the message names it and the remedy."""


@contextmanager
def command_errors(interrupted: str = "the same command goes on from here") -> Iterator[None]:
    """Print errors of input and files as one message and exit with 2; exit with 130 on Ctrl-C.

    Args:
        interrupted: what holds after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nInterrupted: {interrupted}.", file=sys.stderr)
        sys.exit(130)
    except (DataError, RunError, ValueError, OSError) as error:
        print(printable(str(error)), file=sys.stderr)
        sys.exit(2)
