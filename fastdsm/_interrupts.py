"""Ctrl-C while the command line imports what it is made of, torch above all, ends it without a word.

Importing ``fastdsm`` elsewhere leaves signals as they are.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import PurePath
from typing import Any


def begin() -> None:
    """From here on an interrupt ends the process, if nobody else has a handler for it."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def over() -> None:
    """From here on it is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: Any) -> None:
    os._exit(128 + signal.SIGINT)  # at once: there is nothing to undo, and modules are half imported


def _is_command() -> bool:
    """Whether this process is ``fastdsm`` or ``python -m fastdsm``."""
    if sys.argv[:1] == ["-m"]:  # as long as the package of the module to run is imported
        return sys.orig_argv[sys.orig_argv.index("-m") :][1:2] == ["fastdsm"]
    return PurePath(*sys.argv[:1]).stem in ("fastdsm", "fastdsm-script")


if _is_command():
    begin()
