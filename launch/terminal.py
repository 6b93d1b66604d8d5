"""A terminal that may be closed while a run writes to it: what is said then is lost, and nothing else."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO


class Terminal:
    """A text stream on a terminal. Once that is gone (EIO), what is written goes to /dev/null instead of ending the writer."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream's."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._gone(error)
            return len(text)

    def flush(self) -> None:
        """As the stream's."""
        try:
            self._stream.flush()
        except OSError as error:
            self._gone(error)

    def _gone(self, error: OSError) -> None:
        if error.errno != errno.EIO:
            raise error
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive() -> None:
    """Let this process, and those forked from it, outlive the terminal they write to. A file or a pipe is left as it is."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Terminal) and stream.isatty():
            setattr(sys, name, Terminal(stream))
