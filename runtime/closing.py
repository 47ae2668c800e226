"""What its user closes, at the end of a with block or by hand; and models, which stay until their last user closes them."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """A context manager that closes itself."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class Shared(Closing):
    """Something of several users. lock: for what they may not do at once."""

    def __init__(self) -> None:
        self._users = 1
        self.lock = threading.RLock()

    def share(self) -> Self:
        """This one, for one more user: `close` then only counts, until the last one calls it."""
        with self.lock:
            self._users += 1
        return self

    def close(self) -> None:
        """Free it and all that is on it, unless others use it too: then those are for their owners to close. Closing twice is fine."""
        with self.lock:
            self._users = max(0, self._users - 1)
            if self._users:
                return
        self._release()

    @abstractmethod
    def _release(self) -> None:
        """Free what is held. The last user has gone, or closes once more."""
