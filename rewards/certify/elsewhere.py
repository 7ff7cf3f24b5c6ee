"""The process in which a certificate asks a reward again, started by ``process.py`` as ``elsewhere.py REQUEST ANSWER SHIFT``.

It is run as a file, outside its package, and so imports only what the reward needs: torch takes longer than most rewards that
have no network.
"""

from __future__ import annotations

import datetime
import json
import pickle
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def shift_clock(seconds: float) -> None:
    """Let Python's clocks be later, for what is imported after this: time.time and its kin, datetime.now and today."""
    now, now_ns, local, utc, text = time.time, time.time_ns, time.localtime, time.gmtime, time.strftime

    class Kind(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, cls.__mro__[1])

    class Later(datetime.datetime, metaclass=Kind):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return super().fromtimestamp(time.time(), tz)

        @classmethod
        def utcnow(cls) -> Any:
            return super().fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)

        @classmethod
        def today(cls) -> Any:
            return cls.now()

    class LaterDate(datetime.date, metaclass=Kind):
        @classmethod
        def today(cls) -> Any:
            return super().fromtimestamp(time.time())

    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)
    time.localtime = lambda at=None: local(time.time() if at is None else at)
    time.gmtime = lambda at=None: utc(time.time() if at is None else at)
    time.strftime = lambda form, at=None: text(form, time.localtime() if at is None else at)
    time.ctime = lambda at=None: time.asctime(time.localtime(at))
    module: Any = datetime
    module.datetime, module.date = Later, LaterDate


def main(request: str, answer: str, shift: str) -> None:
    """Answer the calls of a request file: ``scores``, or ``raised`` or ``absent`` with the reason."""
    if float(shift):
        shift_clock(float(shift))
    try:
        make, calls = pickle.loads(Path(request).read_bytes())
    except (ImportError, AttributeError) as error:
        said: dict[str, Any] = {"absent": f"cannot be imported: {type(error).__name__}: {error}"}
    else:
        try:
            reward = make()
            said = {"scores": [_plain(reward(images, prompts, **columns)) for images, prompts, columns in calls]}
            getattr(reward, "close", lambda: None)()
        except Exception as error:  # the plug-in of somebody else
            said = {"raised": f"raised {type(error).__name__}: {error}"}
    temporary = Path(f"{answer}.new")
    temporary.write_text(json.dumps(said), encoding="utf-8")
    temporary.rename(answer)


def _plain(given: Any) -> list[float | None]:
    """The scores of an answer that has kept the contract in the first process, as JSON has them."""
    values: Sequence[Any] = given["score"] if hasattr(given, "keys") else given
    return [None if value is None else float(value) for value in values]


if __name__ == "__main__":
    main(*sys.argv[1:])


__all__ = ["shift_clock"]
