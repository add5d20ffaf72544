"""The next steps' input, made on a thread while this step runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

Key = TypeVar("Key")
Item = TypeVar("Item")


class Prefetcher(Generic[Key, Item], Iterator[Item]):
    """`map(make, keys)`, up to `ahead` (at least 1) items in advance. An error is raised where its item was due."""

    def __init__(self, make: Callable[[Key], Item], keys: Iterable[Key], ahead: int) -> None:
        self._made: SimpleQueue[tuple[Item | None, BaseException | None]] = SimpleQueue()
        self._room = threading.Semaphore(ahead)
        self._closed = False
        # A daemon, so that a read that hangs does not keep a process that is to end.
        self._thread = threading.Thread(target=self._work, args=(make, iter(keys)), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[Key], Item], keys: Iterator[Key]) -> None:
        try:
            while self._room.acquire() and not self._closed:
                self._made.put((make(next(keys)), None))
        except BaseException as error:  # noqa: BLE001 - raised again where its item is due
            self._made.put((None, error))

    def __next__(self) -> Item:
        item, error = self._made.get()
        if error is not None:
            self._made.put((None, error))
            raise error
        self._room.release()
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread; what it has made is dropped."""
        self._closed = True
        self._room.release()
        self._thread.join()
