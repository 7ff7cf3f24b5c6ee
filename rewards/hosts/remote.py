"""A reward on another machine, or in a service of its own on this one: the same frames over HTTP.

`HTTPReward` asks what ``server.py`` serves. It is used as any reward:

==============================================  ======================================================================
over there                                      here
==============================================  ======================================================================
a score is None, NaN or infinite                None (and a warning with what it was)
the scorer raises, or gives nonsense            RuntimeError("TYPE: text"), never asked again
the deadline passes                             TimeoutError at that moment
refused, reset, unreachable, HTTP 502 or 503    three tries within the deadline; then ConnectionError. At the start as
                                                many as ``start_timeout_s`` allows, but three where nothing listens
                                                or the host's name is unknown
wrong token or certificate, another protocol    ConnectionError at once
==============================================  ======================================================================

`flowsteer.rewards.combine` makes the scores of a whole batch missing after a ConnectionError or TimeoutError.

Letters: B samples, T frames.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import logging
import os
import random
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowsteer.rewards.hosts.wire import (
    MAX_HEADER_BYTES,
    Hello,
    ProtocolError,
    check_seconds,
    read_hello,
    read_json,
    read_scores,
    score_request,
    seconds_left,
)
from flowsteer.rewards.types import Values

logger = logging.getLogger(__name__)

SERVER_FILE = Path(__file__).with_name("server.py")
TOKEN_VARIABLE = "FLOWSTEER_REWARD_TOKEN"
NUM_TRIES = 3
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0  # between tries: doubled each time, times a jitter of 0.5 to 1.5
BUSY = (502, 503)
NOBODY_THERE = (ConnectionRefusedError, socket.gaierror)  # at a run's start: most likely a wrong address

_jitter = random.Random()  # its own: the global generator belongs to the user


class HTTPReward:
    """A scorer on another machine, where ``server.py`` runs.

    The constructor asks for the handshake, and waits for a server that is busy or cannot be reached; where nothing listens
    at the address, or its host is unknown, it gives up after three tries, within seconds. A call ends within ``deadline_s +
    deadline_per_image_s * B`` seconds. Calls may be made from several threads; the server scores one batch at a time, so
    the deadline includes the time of the batches, of all its clients, that are before this one in its queue. A batch whose
    time is over before its turn is not scored.

    Args:
        url: ``http://host:port``, or https where a proxy before the server has a certificate. Over http the token can be
            read on the way: use it on this machine, through a tunnel, or in a network of your own.
        token_file: a file with the server's token; default the environment variable FLOWSTEER_REWARD_TOKEN.
        name: in messages; default the url.
        start_timeout_s: how long to wait for the handshake of a server that is busy or cannot be reached.

    Raises:
        ValueError: an address or a token that cannot be, or a number that cannot be.
        ConnectionError, TimeoutError: no handshake.
    """

    def __init__(
        self,
        url: str,
        *,
        token_file: str | None = None,
        name: str | None = None,
        start_timeout_s: float = 600.0,
        deadline_s: float = 30.0,
        deadline_per_image_s: float = 2.0,
    ) -> None:
        check_seconds(start_timeout_s, deadline_s, deadline_per_image_s)
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError(f"url must be like http://host:port, got {url!r}")
        self.name = name or url
        self._parts, self._port = parts, parts.port or (443 if parts.scheme == "https" else 80)
        self._token = _read_token(token_file)
        self._deadline = (deadline_s, deadline_per_image_s)
        self._numbers = itertools.count(1)
        deadline = time.monotonic() + start_timeout_s
        self.hello: Hello = self._persist(
            lambda: read_hello(self._request("GET", "hello", [], deadline)), deadline, num_tries=None
        )
        self.groupwise, self.video, self.uses_prompt = self.hello.groupwise, self.hello.video, self.hello.uses_prompt
        self.pictures = self.hello.pictures

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the scores: target, version, options, packages, platform, and the scorer's own fingerprint."""
        return self.hello.fingerprint

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]
    ) -> Values | Mapping[str, Values]:
        """Score uint8 [B, H, W, 3] or [B, T, H, W, 3].

        Raises:
            ValueError: a batch that cannot be sent.
            RuntimeError: what the scorer raised.
            ConnectionError, TimeoutError: no answer; see the module's text.
        """
        number, size = next(self._numbers), len(images)
        deadline = time.monotonic() + self._deadline[0] + self._deadline[1] * size

        def ask() -> Values | dict[str, Values]:
            left = seconds_left(deadline)  # of each try, for the server
            limit, pictures = self.hello.max_body_bytes, self.pictures
            head, body = score_request(images, prompts, columns, number, left, limit, pictures)
            return read_scores(self._request("POST", "score", [head, body], deadline), size, number, self.hello)

        return self._persist(ask, deadline, num_tries=NUM_TRIES)

    def _persist(self, ask: Callable[[], Any], deadline: float, num_tries: int | None) -> Any:
        """Ask again where the transport failed, with growing waits, until the tries or the time are used up."""
        before = ""
        for attempt in itertools.count(1):
            try:
                return ask()
            except ProtocolError as error:
                raise ProtocolError(f"reward {self.name!r}: {error}") from error
            except OSError as error:
                wait = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1.5)
                over = time.monotonic() + wait >= deadline
                if over and isinstance(error, TimeoutError):  # else it is the system's: packets that nobody answers
                    raise TimeoutError(f"reward {self.name!r}: no answer within the deadline{before}") from error
                nobody = num_tries is None and isinstance(error, NOBODY_THERE)
                if attempt == (NUM_TRIES if nobody else num_tries) or over:
                    hint = (
                        f"; start the server before the run, and look at the address {self._parts.netloc}"
                        if nobody
                        else ""
                    )
                    raise ConnectionError(f"reward {self.name!r} after {attempt} tries: {error}{hint}") from error
                logger.warning("reward %r: %s; it is asked again in %.1f s", self.name, error, wait)
                before = f"; the try before: {error}"
                time.sleep(wait)

    def _request(self, method: str, what: str, body: Sequence[Any], deadline: float) -> dict[str, Any]:
        """One HTTP request on a connection of its own.

        At the deadline the connection is shut down under whatever waits for it: time limits of a socket hold for each
        piece, and so never end for a server that sends a byte now and then.
        """
        secure, host = self._parts.scheme == "https", self._parts.hostname or ""
        with contextlib.ExitStack() as stack:
            plain = stack.enter_context(_connect(host, self._port, deadline))
            handle = stack.enter_context(plain.dup())  # of the same connection, for shutting down beneath TLS as well
            late = threading.Event()
            timer = threading.Timer(seconds_left(deadline), _shut_down, [handle, late])
            timer.daemon = True
            timer.start()
            stack.callback(timer.cancel)
            connection = http.client.HTTPConnection(host, self._port)
            stack.callback(connection.close)
            try:
                plain.settimeout(None)
                secured = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
                connection.sock = stack.enter_context(secured)
                headers = {"Authorization": b"Bearer " + self._token, "Content-Length": str(sum(map(len, body)))}
                connection.request(method, f"{self._parts.path.rstrip('/')}/v1/{what}", iter(body), headers)
                response = connection.getresponse()
                text = response.read(MAX_HEADER_BYTES + 1)
            except (OSError, http.client.HTTPException) as error:
                if late.is_set():
                    raise TimeoutError from error
                if isinstance(error, OSError) and not isinstance(error, ssl.SSLCertVerificationError):
                    raise
                raise ProtocolError(f"this is no server of rewards: {type(error).__name__}: {error}") from error
            if late.is_set():
                raise TimeoutError
        if response.status in BUSY:
            raise ConnectionError(f"the server answers {response.status} {response.reason}")
        if response.status != 200:
            hint = "; give the server's token in token_file or FLOWSTEER_REWARD_TOKEN" if response.status == 401 else ""
            raise ProtocolError(
                f"the server answers {response.status} {response.reason}: {text[:200].decode(errors='replace')}{hint}"
            )
        if len(text) > MAX_HEADER_BYTES:
            raise ProtocolError(f"the answer is longer than {MAX_HEADER_BYTES} bytes")
        return read_json(text)


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    """As ``socket.create_connection``, but its time limit holds for each of a host's addresses, this one for all."""
    failure = OSError(f"{host} has no address")
    for family, kind, proto, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, proto)
        try:
            connection.settimeout(seconds_left(deadline))
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


def _shut_down(connection: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):  # it ended by itself meanwhile
        connection.shutdown(socket.SHUT_RDWR)


def _read_token(path: str | None) -> bytes:
    """From a file or the environment, never from the configuration, which is saved beside the run."""
    text = Path(path).read_text(encoding="utf-8") if path is not None else os.environ.get(TOKEN_VARIABLE, "")
    token = text.strip()
    if not token or len(token.split()) > 1:
        raise ValueError(
            f"a token is one word: write the server's into the environment variable {TOKEN_VARIABLE}, or into a file and "
            f"give its path as token_file; got {'no' if not token else 'more than one'} word in {path or TOKEN_VARIABLE}"
        )
    return token.encode()


__all__ = ["HTTPReward"]
