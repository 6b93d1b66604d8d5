"""Output streams that survive the loss of their terminal."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO


class TerminalStream:
    """A text stream on a terminal; if the terminal is closed (EIO), further output is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, or drop it if the terminal is closed."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop_output(error)
            return len(text)

    def flush(self) -> None:
        """Flush the output, or drop it if the terminal is closed."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop_output(error)

    def _drop_output(self, error: OSError) -> None:
        if error.errno != errno.EIO:
            raise error
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def survive_hangup() -> None:
    """Let this process and those forked from it continue after their terminal is closed.

    Files and pipes are left unchanged.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, TerminalStream) and stream.isatty():
            setattr(sys, name, TerminalStream(stream))
