"""A worker that breaks the protocol: run as ``worker.py`` is, with the fault in place of the scorer.

The handshake is as it should be, unless that is the fault; what follows a request is not.
"""

import json
import socket
import struct
import sys
import time

PREFIX = struct.Struct("!4sIQ")
HELLO = {
    "op": "hello", "proto": [1, 1], "fingerprint": {"target": "faulty"}, "identity": "i", "max_body_bytes": 2**20,
    "groupwise": False, "video": False, "uses_prompt": True,
}  # fmt: skip


def frame(answer):
    """The frame of an answer; bytes are taken as they are."""
    text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return PREFIX.pack(b"FSR1", len(text), 0) + text


def scores(number, parts, **other):
    """A right answer, but for what is given."""
    return frame({"op": "scores", "id": number, "identity": "i", "parts": parts, "errors": {}, **other})


FAULTS = {
    "garbage": lambda number: b"HTTP/1.1 200 OK\r\n\r\n",
    "oversize header": lambda number: PREFIX.pack(b"FSR1", 2**32 - 1, 0),
    "oversize body": lambda number: PREFIX.pack(b"FSR1", 2, 2**63),
    "short": lambda number: scores(number, {"score": [1.0]}),
    "long": lambda number: scores(number, {"score": [1.0, 2.0, 3.0]}),
    "no list": lambda number: scores(number, {"score": 1.0}),
    "no score": lambda number: scores(number, {"other": [1.0, 2.0]}),
    "short part": lambda number: scores(number, {"score": [1.0, 2.0], "other": [1.0]}),
    "nan": lambda number: scores(number, {"score": [1.0, float("nan")]}),
    "infinite": lambda number: frame(
        b'{"op": "scores", "id": %d, "identity": "i", "parts": {"score": [1.0, 1e999]}}' % number
    ),
    "text": lambda number: scores(number, {"score": [1.0, "2.0"]}),
    "truth": lambda number: scores(number, {"score": [1.0, True]}),
    "another request": lambda number: scores(number - 1, {"score": [1.0, 2.0]}),
    "another scorer": lambda number: scores(number, {"score": [1.0, 2.0]}, identity="j"),
    "no json": lambda number: frame(b"{"),
    "deep json": lambda number: frame(b"[" * 100000),
    "no object": lambda number: frame(b"[1.0, 2.0]"),
}


def receive(connection):
    """The header of the next frame, or None at the end."""
    prefix = connection.recv(PREFIX.size, socket.MSG_WAITALL)
    if len(prefix) < PREFIX.size:
        return None
    _, header_bytes, body_bytes = PREFIX.unpack(prefix)
    header = connection.recv(header_bytes, socket.MSG_WAITALL)
    if body_bytes:
        connection.recv(body_bytes, socket.MSG_WAITALL)
    return json.loads(header)


def main():
    """Answer until the other side closes."""
    fault = sys.argv[1]
    connection = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
    while True:
        header = receive(connection)
        if header is None:
            return
        if header["op"] == "hello":
            proto = [7, 9] if fault == "another protocol" else [1, 1]
            connection.sendall(frame({"op": "hello"} if fault == "half a hello" else dict(HELLO, proto=proto)))
        elif fault == "half a frame":
            connection.sendall(scores(header["id"], {"score": [1.0, 2.0]})[:-5])
            time.sleep(600)
        elif fault == "trickle":
            for byte in scores(header["id"], {"score": [1.0, 2.0]}):
                connection.sendall(bytes([byte]))
                time.sleep(0.1)
        else:
            connection.sendall(FAULTS[fault](header["id"]))


if __name__ == "__main__":
    main()
