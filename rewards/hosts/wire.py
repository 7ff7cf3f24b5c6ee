"""Our side of the protocol that a reward in another process speaks: frames, and what stands in them.

A frame is the magic number, the lengths of header and body (u32, u64, big-endian), a JSON header and raw bytes. Both
lengths are capped, and checked before anything is allocated. Nothing is pickled, and no JSON holds NaN. The other side is
``worker.py`` (over HTTP ``server.py``), which has its own copy of the frame, since it may import nothing of ours.

===========  ======================================  =================================================================
request      body                                    answer
===========  ======================================  =================================================================
``hello``    none                                    ``proto`` (lowest, highest), ``fingerprint``, ``identity`` (its
                                                     hash), ``max_body_bytes``, ``groupwise``, ``video``,
                                                     ``uses_prompt``, ``pictures`` (of the prompt file, which are
                                                     sent: column to kind)
``score``    uint8 pixels, shape in the header;      ``scores``: ``parts`` with B numbers or null each, ``errors`` (row
                                                     to text), ``identity``; or ``error``: what the scorer raised; or
                                                     ``expired``: its turn came after its ``seconds``
===========  ======================================  =================================================================

The pictures of a column stand behind the images, each different one once: the header's ``pictures`` has, by column, their
``shapes`` in order, and as ``rows`` which of them is each sample's, B numbers or null. All of it counts as the body.

Letters: B samples, T frames.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import struct
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowsteer.rewards.types import Values

logger = logging.getLogger(__name__)

PROTO = 1
MAGIC = b"FSR1"
PREFIX = struct.Struct("!4sIQ")  # magic, bytes of the header, bytes of the body
MAX_HEADER_BYTES = 16 * 2**20
MAX_BODY_BYTES = 2**30  # a default; the worker says what it accepts
LAYOUTS = {4: "NHWC", 5: "NTHWC"}


class ProtocolError(ConnectionError):
    """The other side says something that the protocol does not have. To ask again would not help."""


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What a worker says of itself."""

    fingerprint: dict[str, Any]  # names to texts and numbers: target, version, options, packages, the scorer's own
    identity: str  # hash of the fingerprint; comes with every answer
    max_body_bytes: int
    groupwise: bool
    video: bool
    uses_prompt: bool
    pictures: dict[str, Any]  # column -> kind, as `flowsteer.rewards.pictures` has them


def check_seconds(start_timeout_s: float, deadline_s: float, deadline_per_image_s: float) -> None:
    """Raise ValueError for limits of time that cannot be."""
    for name, seconds in {"start_timeout_s": start_timeout_s, "deadline_s": deadline_s}.items():
        if not 0 < seconds < math.inf:
            raise ValueError(f"{name} must be a number of seconds above 0, got {seconds}")
    if not 0 <= deadline_per_image_s < math.inf:
        raise ValueError(f"deadline_per_image_s must be a number of seconds from 0 up, got {deadline_per_image_s}")


def seconds_left(deadline: float) -> float:
    """Until a time of ``time.monotonic``. Raises TimeoutError where there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left


def frame_head(header: Mapping[str, Any], body_bytes: int) -> bytes:
    """What stands before the body. Raises ValueError where the header is too long or holds what JSON does not."""
    try:
        text = json.dumps(header, allow_nan=False).encode()  # ASCII, so that lone surrogates pass as well
    except (TypeError, ValueError) as error:
        raise ValueError(f"prompts and columns are sent as JSON, which cannot hold them: {error}") from error
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"prompts and columns take {len(text)} bytes, allowed are {MAX_HEADER_BYTES}; send fewer images"
        )
    return PREFIX.pack(MAGIC, len(text), body_bytes) + text


def exchange(connection: socket.socket, head: bytes, body: memoryview, deadline: float) -> dict[str, Any]:
    """Send a frame and read the header of the frame that answers, all before the deadline.

    Raises:
        TimeoutError: the deadline passed, however many bytes had come until then.
        ConnectionError: the other side is gone, or what it sends is no frame (ProtocolError).
    """
    for data in (head, body):
        connection.settimeout(seconds_left(deadline))  # the limit of all of sendall, not of each piece
        connection.sendall(data)
    magic, header_bytes, body_bytes = PREFIX.unpack(_receive(connection, PREFIX.size, deadline))
    if magic != MAGIC:
        raise ProtocolError(f"the answer begins with {magic!r}; a frame begins with {MAGIC!r}")
    if header_bytes > MAX_HEADER_BYTES or body_bytes:
        raise ProtocolError(
            f"the answer announces a header of {header_bytes} bytes and a body of {body_bytes}; allowed are "
            f"{MAX_HEADER_BYTES} and none"
        )
    return read_json(_receive(connection, header_bytes, deadline))


def _receive(connection: socket.socket, size: int, deadline: float) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        connection.settimeout(seconds_left(deadline))
        received = connection.recv_into(view)
        if not received:
            raise ConnectionResetError("the other side closed the connection")
        view = view[received:]
    return data


def read_json(text: bytes | bytearray) -> dict[str, Any]:
    """A JSON object without NaN. Raises ProtocolError."""
    try:
        header = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the answer is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise ProtocolError(f"the answer is a JSON {type(header).__name__}, expected an object")
    return header


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def score_request(
    images: np.ndarray,
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    number: int,
    seconds: float,
    limit: int,
    pictures: Collection[str] = (),
) -> tuple[bytes, memoryview]:
    """Head and body of the frame that asks for a batch's scores; the body is not copied where it is images alone.

    Args:
        images: uint8 [B, H, W, 3] or [B, T, H, W, 3].
        prompts: B texts.
        columns: B values each, which JSON can hold; a tuple arrives as a list.
        pictures: those of the columns that hold pixels, as uint8 arrays or None.
        number: comes back with the answer.
        seconds: how long the answer is waited for; a server that cannot begin by then need not.
        limit: bytes that the body may have.

    Raises:
        ValueError: images of another kind, another number of prompts, too many bytes, values that JSON does not have.
    """
    if images.dtype != np.uint8 or images.ndim not in LAYOUTS or images.shape[-1] != 3:
        raise ValueError(f"images are uint8 [B, H, W, 3] or [B, T, H, W, 3], got {images.dtype} {images.shape}")
    shown = {name: _different(name, columns[name]) for name in pictures if name in columns}
    size = images.nbytes + sum(array.nbytes for arrays, _ in shown.values() for array in arrays)
    if size > limit:
        raise ValueError(
            f"the images take {size} bytes, the worker accepts {limit}: raise its max_body_bytes or score fewer "
            "images at once"
        )
    for name, values in {"prompts": prompts, **columns}.items():
        if len(values) != len(images):
            raise ValueError(f"{name}: {len(values)} values for {len(images)} images")
    header = {
        "proto": PROTO,
        "op": "score",
        "id": number,
        "seconds": seconds,
        "dtype": "uint8",
        "layout": LAYOUTS[images.ndim],
        "shape": images.shape,
        "prompts": list(prompts),
        "columns": {name: list(values) for name, values in columns.items() if name not in shown},
        "pictures": {
            name: {"shapes": [array.shape for array in arrays], "rows": rows} for name, (arrays, rows) in shown.items()
        },
    }
    body = np.ascontiguousarray(images).reshape(-1)
    if shown:
        body = np.concatenate([body, *(array.reshape(-1) for arrays, _ in shown.values() for array in arrays)])
    return frame_head(header, size), body.data


def _different(name: str, pictures: Sequence[np.ndarray | None]) -> tuple[list[np.ndarray], list[int | None]]:
    """The arrays of a column, each once, and which of them each sample has. Raises ValueError for what are no pixels."""
    places: dict[int, int] = {}  # by object: samples that share a picture share its array
    arrays: list[np.ndarray] = []
    rows: list[int | None] = []
    for picture in pictures:
        if picture is None:
            rows.append(None)
            continue
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
            raise ValueError(
                f"the column {name!r} holds a {type(picture).__name__}; pictures are uint8 arrays, or None"
            )
        if id(picture) not in places:
            places[id(picture)] = len(arrays)
            arrays.append(picture)
        rows.append(places[id(picture)])
    return arrays, rows


def read_hello(answer: Mapping[str, Any]) -> Hello:
    """The handshake. Raises ProtocolError where the other side speaks another protocol."""
    proto = answer.get("proto")
    if answer.get("op") != "hello" or not isinstance(proto, list) or [type(part) for part in proto] != [int, int]:
        raise ProtocolError(f"the handshake was answered by {str(answer)[:200]}")
    low, high = proto
    if not low <= PROTO <= high:
        raise ProtocolError(
            f"the other side speaks the protocol {low} to {high}, this side {PROTO}; use the worker of this flowsteer"
        )
    fields = {
        "fingerprint": dict, "identity": str, "max_body_bytes": int, "groupwise": bool, "video": bool,
        "uses_prompt": bool, "pictures": dict,
    }  # fmt: skip
    answer = {"pictures": {}, **answer}  # a worker of before has none
    wrong = [name for name, kind in fields.items() if type(answer.get(name)) is not kind]
    if wrong:
        raise ProtocolError(f"the handshake lacks {', '.join(wrong)}")
    return Hello(**{name: answer[name] for name in fields})


def read_scores(answer: Mapping[str, Any], size: int, number: int, hello: Hello) -> Values | dict[str, Values]:
    """The scores of a batch of that size, as a reward gives them.

    A score that was not finite on the other side is None; what it was is logged.

    Raises:
        RuntimeError: the scorer raised; its exception's type and text are the message.
        TimeoutError: the batch's turn came too late.
        ProtocolError: the answer to another question, by another scorer, of another length, or none at all.
    """
    if answer.get("id") != number:
        raise ProtocolError(f"the answer belongs to the request {answer.get('id')!r}, expected {number}")
    if answer.get("op") == "error":
        raise RuntimeError(str(answer.get("error")))
    if answer.get("op") == "expired":
        raise TimeoutError("the batch's turn came after its time was over")
    if answer.get("identity") != hello.identity:
        raise ProtocolError(
            "another scorer answers than the one that introduced itself: weights, options or packages have changed, and "
            "its scores cannot be compared with those before"
        )
    parts = answer.get("parts")
    if answer.get("op") != "scores" or not isinstance(parts, dict) or "score" not in parts:
        raise ProtocolError(f"scores were asked for and answered by {str(answer)[:200]}")
    for name, values in parts.items():
        if not isinstance(values, list) or len(values) != size:
            got = len(values) if isinstance(values, list) else "no list of"
            raise ProtocolError(f"the answer has {got} values for {name!r}, expected {size}, one per image")
        if not all(value is None or (type(value) in (int, float) and math.isfinite(value)) for value in values):
            raise ProtocolError(f"the answer's {name!r} holds something that is no finite number: {str(values)[:200]}")
    if answer.get("errors"):
        logger.warning("the scorer of %s gave no finite score: %s", hello.fingerprint.get("target"), answer["errors"])
    return parts["score"] if len(parts) == 1 else parts


__all__ = [
    "Hello", "ProtocolError", "check_seconds", "exchange", "frame_head", "read_hello", "read_json", "read_scores",
    "score_request", "seconds_left",
]  # fmt: skip
