"""The client of a judge behind an OpenAI-compatible address: several requests at a time, deadlines, retries, replies in order.

The standard library's HTTP is all that it needs. Letters: B samples, T frames.
"""

from __future__ import annotations

import contextlib
import http.client
import inspect
import json
import logging
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import numpy as np

from flowsteer.rewards.registry import refuse_unknown
from flowsteer.rewards.scorers.batching import Fingerprint
from flowsteer.rewards.scorers.vlm.prompts import Part, image_part

logger = logging.getLogger(__name__)

Given = TypeVar("Given")
Made = TypeVar("Made")

LONGEST_REPLY = 4_000_000  # bytes
EXCERPT = 160  # characters of a reply in the log


class Reply(NamedTuple):
    """What came of one request. ``stage`` is how far it got: no connection, no answer, an answer of whatever kind."""

    text: str | None
    problem: str = ""
    stage: Literal["unreached", "silent", "answered"] = "answered"


class ChatClient:
    """Asks one model, several requests at a time. No proxy: it goes straight to the address.

    Args:
        base_url: up to and without ``/chat/completions``, such as ``http://localhost:8000/v1``.
        model: as the server names it.
        api_key_env: name of the environment variable that holds the API key. The key itself has no place in a configuration.
        timeout_s: of one request, all its retries included, from when it is sent.
        num_retries: where the connection fails or breaks, of 429 and of 5xx; of nothing else.
        retry_wait_s: before the first retry, doubled for each further one, times 0.5 to 1.5 by chance.
        concurrency: requests at a time. Where so many in a row (and at least 4) get no answer at all, the rest of the call is
            not sent: a judge that hangs costs at most two ``timeout_s``, whatever the batch.
        max_tokens: of a reply. A reply that is cut off there is not read.
        extra_body: further fields of each request, as ``{"chat_template_kwargs": {"enable_thinking": False}}``; null leaves
            one out that is otherwise there, as ``{"temperature": None}`` for a model that refuses it.

    Raises:
        ValueError: an address that is none or holds a password or query, a number out of its range, no such variable.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        timeout_s: float = 60.0,
        num_retries: int = 3,
        retry_wait_s: float = 1.0,
        concurrency: int = 8,
        max_tokens: int = 1024,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value, least in (
            ("concurrency", concurrency, 1),
            ("max_tokens", max_tokens, 1),
            ("num_retries", num_retries, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not (0 < timeout_s < float("inf") and retry_wait_s >= 0):
            raise ValueError(
                f"timeout_s must be a number above 0 and retry_wait_s not below 0, got {timeout_s} and {retry_wait_s}"
            )
        if reserved := {"model", "messages"} & set(extra_body or {}):
            raise ValueError(f"extra_body may not hold {' and '.join(sorted(reserved))}, which the judge itself sets")
        self._secure, self._host, self._port, self._path = _address(base_url)
        self._key = _api_key(api_key_env)
        self.timeout_s, self.num_retries, self.retry_wait_s = timeout_s, num_retries, retry_wait_s
        self.concurrency = concurrency
        self._chance = random.Random()  # its own: the training beside it depends on the usual one
        fields = {"temperature": 0, "max_tokens": max_tokens, **(extra_body or {})}
        self._body = {"model": model} | {name: value for name, value in fields.items() if value is not None}
        # Not the host: the same model on another machine gives the same scores, and a host may be nobody's business.
        self.fingerprint: Fingerprint = {
            "model": model,
            "endpoint": self._path,
            "request": json.dumps(fields, sort_keys=True),
        }

    @classmethod
    def of(cls, endpoint: Mapping[str, Any]) -> ChatClient:
        """A client of these options. Raises ValueError, with what is accepted, for an unknown one or one that lacks."""
        accepted = inspect.signature(cls).parameters
        refuse_unknown("endpoint", endpoint, list(accepted))
        lacking = [key for key, one in accepted.items() if one.default is one.empty and key not in endpoint]
        if lacking:
            raise ValueError(f"endpoint lacks {' and '.join(lacking)}. It accepts: {', '.join(accepted)}")
        return cls(**endpoint)

    def show(self, images: np.ndarray, size: int | None) -> list[list[Part]]:
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] as the parts of a message: B times 1 or T images."""
        videos = images if images.ndim == 5 else images[:, None]
        return self._map(lambda frames: [image_part(frame, size) for frame in frames], videos)

    def verdicts(self, questions: Sequence[Sequence[Part]], read: Callable[[str], Made]) -> list[Made | None]:
        """What each question's reply says, in order; None where there is no reply, or none that ``read`` can read.

        Args:
            questions: the parts of one message each.
            read: a reply to what it says; raises ValueError where it does not say it.

        Raises:
            ConnectionError: not one of the requests reached the server.
            TimeoutError: some did, and not one got an answer.
        """
        replies = self._ask(questions)
        stages = {reply.stage for reply in replies}
        if stages == {"unreached"}:
            raise ConnectionError(f"the judge at {self._host}:{self._port} cannot be reached: {replies[0].problem}")
        if stages and "answered" not in stages:
            problem = next(reply.problem for reply in replies if reply.stage == "silent")
            raise TimeoutError(
                f"the judge at {self._host}:{self._port} answered none of {len(replies)} requests: {problem}"
            )
        made: list[Made | None] = []
        problems = Counter[str]()
        for reply in replies:
            problem, value = reply.problem, None
            if reply.text is not None:
                try:
                    value = read(reply.text)
                except ValueError as error:
                    problem = f"a reply without a verdict ({error}): {self._excerpt(reply.text)}"
            if problem:
                problems[problem] += 1
            made.append(value)
        if problems:
            text = "; ".join(f"{count} x {problem}" for problem, count in problems.most_common(5))
            others = f"; and {len(problems) - 5} other problems" if len(problems) > 5 else ""
            failed = sum(problems.values())
            logger.warning("%d of %d requests to the judge gave no verdict: %s%s", failed, len(made), text, others)
        return made

    def _map(self, function: Callable[[Given], Made], items: Iterable[Given]) -> list[Made]:
        with ThreadPoolExecutor(self.concurrency, "flowsteer-judge") as pool:
            return list(pool.map(function, items))

    def _ask(self, questions: Sequence[Sequence[Part]]) -> list[Reply]:
        done: list[Reply] = []  # in the order in which they end
        patience = max(self.concurrency, 4)

        def ask(question: Sequence[Part]) -> Reply:
            last = done[-patience:]
            if len(last) == patience and all(reply.stage != "answered" for reply in last):
                return Reply(None, f"not sent, since {patience} in a row got no answer", last[0].stage)
            reply = self._ask_one(question)
            done.append(reply)
            return reply

        return self._map(ask, questions)

    def _ask_one(self, question: Sequence[Part]) -> Reply:
        deadline = time.monotonic() + self.timeout_s
        body = json.dumps(self._body | {"messages": [{"role": "user", "content": list(question)}]}).encode()
        attempt = 0
        while True:
            reply, again = self._attempt(body, deadline)
            wait = self.retry_wait_s * 2**attempt * self._chance.uniform(0.5, 1.5)
            if not again or attempt == self.num_retries or time.monotonic() + wait >= deadline:
                return reply
            time.sleep(wait)
            attempt += 1

    def _attempt(self, body: bytes, deadline: float) -> tuple[Reply, bool]:
        """One exchange, and whether another could end better."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=max(deadline - time.monotonic(), 1e-3))
        try:
            connection.connect()
        except OSError as error:
            return Reply(None, f"no connection ({_text(error)})", "unreached"), True
        try:
            with _cut_off(connection.sock, deadline):
                status, data = self._exchange(connection, body)
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() >= deadline:
                return Reply(None, f"no answer within {self.timeout_s:g} s", "silent"), False
            return Reply(None, f"the connection broke ({_text(error)})", "silent"), True
        finally:
            connection.close()
        if status == 200:
            return self._completion(data), False
        problem = f"HTTP {status}: {self._excerpt(data.decode(errors='replace'))}"
        return Reply(None, problem), status == 429 or status >= 500

    def _exchange(self, connection: http.client.HTTPConnection, body: bytes) -> tuple[int, bytes]:
        authorisation = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        connection.request("POST", self._path, body, {"Content-Type": "application/json", **authorisation})
        response = connection.getresponse()
        data = response.read(LONGEST_REPLY)
        if response.length and len(data) < LONGEST_REPLY:  # what is still owed; reading a part does not notice the end
            raise http.client.IncompleteRead(data, response.length)
        return response.status, data

    def _completion(self, data: bytes) -> Reply:
        """The text of a chat completion."""
        try:
            choice = json.loads(data)["choices"][0]
            text, ended = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            return Reply(None, f"no chat completion: {self._excerpt(data.decode(errors='replace'))}")
        if not isinstance(text, str):
            return Reply(None, f"a completion without text, which ended by {ended!r}")
        if ended == "length":  # half a number is another number
            return Reply(None, f"a reply cut off at max_tokens = {self._body.get('max_tokens')}: {self._excerpt(text)}")
        return Reply(text)

    def _excerpt(self, text: str) -> str:
        """The beginning, without the key, which some servers repeat."""
        return repr((text.replace(self._key, "***") if self._key else text)[:EXCERPT])


def _address(base_url: str) -> tuple[bool, str, int, str]:
    """Whether it is https, host, port and the path of chat completions."""
    if any(sign in base_url for sign in "@?#"):  # not repeated: it may hold a secret
        raise ValueError(
            "the judge's base_url holds a user, a query or a fragment; a secret belongs into api_key_env's variable"
        )
    try:
        url = urlsplit(base_url)
        host, port = url.hostname, url.port
    except ValueError as error:
        raise ValueError(f"the judge's base_url is no address: {error}") from None
    if url.scheme not in ("http", "https") or not host or not base_url.isascii():
        raise ValueError(f"the judge's base_url must be like http://localhost:8000/v1, got {base_url!r}")
    secure = url.scheme == "https"
    return secure, host, port or (443 if secure else 80), url.path.rstrip("/") + "/chat/completions"


def _api_key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"api_key_env names the environment variable {variable!r}, which is not set here")
    if not (key.isascii() and key.isprintable()):  # http.client would refuse it with the key in its message
        raise ValueError(f"the environment variable {variable!r} holds characters that an API key cannot have")
    return key


@contextlib.contextmanager
def _cut_off(connection: socket.socket, deadline: float) -> Iterator[None]:
    """End the connection at the deadline. A socket's own limit is per operation: a server that trickles would escape it."""

    def end() -> None:
        with contextlib.suppress(OSError):  # already closed
            # The plain socket's method for TLS too, whose own would take the encryption away under the reader
            socket.socket.shutdown(connection, socket.SHUT_RDWR)

    timer = threading.Timer(max(deadline - time.monotonic(), 0), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


__all__ = ["ChatClient", "Reply"]
