"""Seconds and memory of a piece of work."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Measures what runs inside ``with meter.running():``, and leaves out what runs inside ``with meter.paused():`` within.

    Memory is what the operating system says of the whole process: on Linux the high-water mark of resident memory (VmHWM), set back at the
    beginning; elsewhere the mark since the process started (``ru_maxrss``), where an earlier piece of work may have set it. Memory of a GPU and of
    processes that the work starts is not in it.

    Attributes:
        seconds: on the wall clock.
        cpu_seconds: of the processor, all threads of this process together.
        peak: bytes; ``None`` where the system does not say.
        added: by how much the peak is above what the process held at the beginning; ``None`` where the system does not say.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.peak: int | None = None
        self.added: int | None = None
        self._active = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure."""
        held = self._begin()
        try:
            yield
        finally:
            self._end()
            self.added = None if self.peak is None or held is None else max(0, self.peak - held)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave this out, if anything is being measured."""
        if not self._active:
            yield
            return
        self._end()
        try:
            yield
        finally:
            self._begin()

    def _begin(self) -> int | None:
        held = _reset()
        self._active, self._wall, self._cpu = True, time.perf_counter(), time.process_time()
        return held

    def _end(self) -> None:
        self.seconds += time.perf_counter() - self._wall
        self.cpu_seconds += time.process_time() - self._cpu
        self._active, peak = False, _peak()
        self.peak = peak if self.peak is None or peak is None else max(self.peak, peak)


def _reset() -> int | None:
    """Set the high-water mark back to what the process holds, and say how much that is; ``None`` where that cannot be done."""
    try:
        _RESET.write_text("5")
        return _kilobytes("VmRSS")
    except OSError:
        return None


def _peak() -> int | None:
    try:
        return _kilobytes("VmHWM")
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _kilobytes(name: str) -> int | None:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    return None if found is None else 1024 * int(found[1])
