"""A scorer over HTTP, for runs on other machines: the answers of ``worker.py``, its neighbour.

    python server.py TARGET --port 8700     # asked by flowsteer.rewards.hosts.remote.HTTPReward

It is run by its path as ``worker.py`` is, with the same arguments, by any Python from 3.8 to 3.13 with the standard library
alone. GET /v1/hello and POST /v1/score, whose body is the frame, are answered in JSON, with ``Authorization: Bearer TOKEN``.
Nothing is encrypted: use a tunnel beyond this machine.
"""

from __future__ import annotations

import hmac
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Not left to Python, which knows this folder only in the process that was started with this file, and not in one that a
# scorer spawns. Nor does the name stay: a scorer may have a module of its own that is called worker.
sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import worker

worker.hide_folder()
del sys.modules["worker"]

TOKEN_VARIABLE = "FLOWSTEER_REWARD_TOKEN"
HTTP_IDLE_S = 60  # a peer that sends nothing for so long is dropped
WAITING_CONNECTIONS = 128  # as many processes of a run may ask at once


def make_handler(answerer: worker.Answerer, token: str) -> type:
    """The class whose instances answer one HTTP request each."""
    expected = b"Bearer " + token.encode()

    class Handler(BaseHTTPRequestHandler):
        timeout = HTTP_IDLE_S

        def do_GET(self) -> None:
            if self.allowed("/v1/hello"):
                self.reply(200, answerer.hello)

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not self.allowed("/v1/score"):
                return None
            if not length.isdecimal() or len(length) > 18:
                return self.refuse(411, "Content-Length must say how long the frame is")
            if int(length) > worker.PREFIX.size + worker.MAX_HEADER_BYTES + answerer.max_body_bytes:
                return self.refuse(413, f"{length} bytes are too many; bodies have up to {answerer.max_body_bytes}")
            begin = time.monotonic()
            try:
                header, body = worker.read_frame(self.rfile.readinto, answerer.max_body_bytes, int(length))
                answer = answerer.answer(header, body, begin)
            except EOFError:
                return None
            except worker.Refused as error:
                return self.refuse(400, str(error))
            return self.reply(200, answer)

        def allowed(self, path: str) -> bool:
            """The token comes first: a stranger learns nothing, and nothing that it sends is read."""
            given = self.headers.get("Authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, expected):
                self.refuse(401, "the token is wrong")
                return False
            if self.path != path:
                self.refuse(404, "there are GET /v1/hello and POST /v1/score")
                return False
            return True

        def refuse(self, status: int, text: str) -> None:
            self.reply(status, {"op": "refused", "error": text})

        def reply(self, status: int, answer: Mapping[str, Any]) -> None:
            text = worker.to_json(answer)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    return Handler


def read_token(path: str | None) -> str:
    """From a file or the environment. Raises ValueError where it is empty."""
    token = (os.environ.get(TOKEN_VARIABLE, "") if path is None else pathlib.Path(path).read_text("utf-8")).strip()
    if not token:
        raise ValueError(f"a server needs a token: write one into a file (--token-file) or into {TOKEN_VARIABLE}")
    return token


def main() -> None:
    """Load the scorer that the command line names, and serve it."""
    parser = worker.make_parser()
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=8700, help="0 for any that is free")
    parser.add_argument("--token-file", help=f"else the token is in {TOKEN_VARIABLE}")
    args = parser.parse_args()
    token = read_token(args.token_file)  # before the weights are loaded
    answerer = worker.Answerer(args.target, args.options, args.max_body_bytes)
    server = ThreadingHTTPServer((args.host, args.port), make_handler(answerer, token))
    server.socket.listen(WAITING_CONNECTIONS)
    print("listening on http://{}:{}".format(*server.server_address[:2]), file=sys.stderr, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
