"""The far side of a reward that lives elsewhere: loads one scorer and answers for it, over a socket.

    python worker.py TARGET --fd 5          # started by flowsteer.rewards.hosts.child.WorkerReward

The python of another environment runs this file by its path, so it needs the standard library alone (Python 3.8 to 3.13).
TARGET is ``module:attribute`` or ``path/to/file.py:attribute``: a function, or a class that is made with the JSON object
``--options``. The scorer is called as every reward is, ``(images, prompts, **columns)``, one call at a time. ``images`` is
a numpy array, uint8 [B, H, W, 3] or [B, T, H, W, 3]; without numpy a memoryview of that shape. It returns B numbers or None,
or a mapping of such parts, one of them called "score". Optional attributes of the scorer: ``fingerprint`` (what else decides
its scores: a hash of the weights, preprocessing), ``version``, ``groupwise``, ``video``, ``uses_prompt``, and ``pictures``, as
in ``{"source": "image", "mask": "mask"}``: these columns hold pixels of the same type as the images, or None.

The protocol is described in ``wire.py``; ``server.py`` speaks it over HTTP.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import pathlib
import platform
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

numpy: Any = None
with contextlib.suppress(ImportError):
    import numpy

PROTO_RANGE = (1, 1)  # lowest and highest that this file speaks
MAGIC = b"FSR1"
PREFIX = struct.Struct("!4sIQ")  # magic, bytes of the header, bytes of the body
MAX_HEADER_BYTES = 16 * 2**20
MAX_BODY_BYTES = 2**30  # default of --max-body-bytes
MAX_ERROR_CHARACTERS = 4000
LAYOUTS = {4: "NHWC", 5: "NTHWC"}
PACKAGES = ("torch", "torchvision", "transformers", "numpy", "pillow")  # whose versions change scores


class Refused(Exception):
    """A request that the protocol does not have."""


def read_frame(
    read_into: Callable[[memoryview], int | None], max_body_bytes: int, length: int | None = None
) -> tuple[dict[str, Any], bytearray]:
    """Header and body of the next frame, of ``length`` bytes in all where that is known. Raises EOFError, Refused."""
    magic, header_bytes, body_bytes = PREFIX.unpack(_read(read_into, PREFIX.size))
    if magic != MAGIC:
        raise Refused(f"this is no frame: it begins with {magic!r}")
    if header_bytes > MAX_HEADER_BYTES or body_bytes > max_body_bytes:
        raise Refused(
            f"a frame with a header of {header_bytes} bytes and a body of {body_bytes} is larger than the allowed "
            f"{MAX_HEADER_BYTES} and {max_body_bytes}"
        )
    if length is not None and length != PREFIX.size + header_bytes + body_bytes:
        raise Refused(f"Content-Length is {length}, the frame has {PREFIX.size + header_bytes + body_bytes} bytes")
    try:
        header = json.loads(_read(read_into, header_bytes))
    except (ValueError, RecursionError) as error:
        raise Refused(f"the header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise Refused("the header is no JSON object")
    return header, _read(read_into, body_bytes)


def _read(read_into: Callable[[memoryview], int | None], size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        received = read_into(view)
        if not received:
            raise EOFError
        view = view[received:]
    return data


def to_json(answer: Mapping[str, Any]) -> bytes:
    """As sorted ASCII: lone surrogates in a text pass, and NaN does not."""
    return json.dumps(answer, allow_nan=False, sort_keys=True).encode()


class Answerer:
    """Answers requests with one scorer, one at a time."""

    def __init__(self, target: str, options: dict[str, Any], max_body_bytes: int) -> None:
        found: Any = load_target(target)
        is_class = inspect.isclass(found)
        scorer: Any = found(**options) if is_class else found
        check_takes_images(target, scorer)
        self._score = scorer if is_class else functools.partial(found, **options)
        self._lock = threading.Lock()
        self.max_body_bytes = max_body_bytes
        fingerprint = {
            "target": os.path.basename(target),  # wherever the file lies; its hash is the version
            "version": getattr(scorer, "version", None) or source_hash(found),
            "options": json.dumps(options, sort_keys=True),
            **package_versions(),
            **(getattr(scorer, "fingerprint", None) or {}),
        }
        self.identity = hashlib.sha256(to_json(fingerprint)).hexdigest()  # without the platform: a server may move
        self.hello = {
            "op": "hello",
            "proto": PROTO_RANGE,
            "fingerprint": dict(fingerprint, platform=platform.platform()),
            "identity": self.identity,
            "max_body_bytes": max_body_bytes,
            "groupwise": bool(getattr(scorer, "groupwise", False)),
            "video": bool(getattr(scorer, "video", False)),
            "uses_prompt": bool(getattr(scorer, "uses_prompt", True)),
            "pictures": dict(getattr(scorer, "pictures", None) or {}),
        }

    def answer(self, header: Mapping[str, Any], body: bytearray, begin: float) -> dict[str, Any]:
        """The answer to a frame that began to arrive then. What the scorer raises is an answer too. Raises Refused."""
        if header.get("op") == "hello":
            return self.hello
        check_request(header, len(body))
        size = header["shape"][0]
        reply: dict[str, Any] = {"id": header.get("id")}
        try:
            with self._lock:
                if time.monotonic() - begin > header["seconds"]:  # nobody waits for it any more, and others do
                    return dict(reply, op="expired")
                images, pictures = as_pixels(body, header)
                given = self._score(images, header["prompts"], **header["columns"], **pictures)
            parts, errors = read_parts(given, size)
        except Exception as error:  # whatever it is, the other side is told, and this process lives on
            traceback.print_exc()
            return dict(reply, op="error", error=f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARACTERS])
        return dict(reply, op="scores", parts=parts, errors=errors, identity=self.identity)


def load_target(target: str) -> Any:
    """What stands at ``module:attribute`` (installed, or in the current folder) or ``file.py:attribute``."""
    place, _, attribute = target.rpartition(":")
    if not place or not attribute:
        raise ValueError(f"{target!r} is no place of a scorer; write module:attribute or path/to/file.py:attribute")
    if place.endswith(".py"):
        sys.path.append(os.path.dirname(os.path.abspath(place)))  # it may import its neighbours
        name = "scorer_" + os.path.splitext(os.path.basename(place))[0]  # hides no package of the file's name
        spec = importlib.util.spec_from_file_location(name, place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    else:
        sys.path.append(os.getcwd())
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            hidden = what_hides(place, error)
            if hidden:
                raise ValueError(f"scorer {target}: {hidden}") from error
            raise
    return functools.reduce(getattr, attribute.split("."), module)


def what_hides(place: str, error: ModuleNotFoundError) -> str | None:
    """Why a part of a package is not found: a folder without ``__init__.py`` that has the package's name; else None."""
    package = place.partition(".")[0]
    found = sys.modules.get(package)
    if found is None or getattr(found, "__file__", None) or (error.name or "").rpartition(".")[0] != package:
        return None
    folders = ", ".join(dict.fromkeys(map(str, found.__path__)))
    return (
        f"there is no {error.name}: Python takes the folder {folders} for the package {package}; install {package} for "
        f"{sys.executable}, or start in a folder that has none called {package}"
    )


def check_takes_images(target: str, scorer: Any) -> None:
    """Raise ValueError for what would take the images for something else: it is called by position."""
    parameters = list(inspect.signature(scorer).parameters)
    if parameters[:1] != ["images"]:
        raise ValueError(
            f"the scorer {target} takes ({', '.join(parameters)}); here it must take (images, prompts, **columns), the "
            "images first. Functions as TRL knows them, (prompts, completions, **columns), run in the trainer's process only"
        )


def source_hash(found: Any) -> str | None:
    """The hash of the file that the scorer is written in, which stands for a version."""
    path = None
    with contextlib.suppress(TypeError):  # a built-in, or an object
        path = inspect.getsourcefile(found)
    return path and "sha256:" + hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def package_versions() -> dict[str, str]:
    """Of what besides the scorer's own code decides its scores. Not Python's patch version, which decides none."""
    versions = {"python": "{}.{}".format(*sys.version_info)}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def check_request(header: Mapping[str, Any], body_bytes: int) -> None:
    """Hold a request to the protocol before a scorer sees it."""
    if header.get("op") != "score":
        raise Refused("there is no request {!r}; there are hello and score".format(header.get("op")))
    proto, (low, high) = header.get("proto"), PROTO_RANGE
    if type(proto) is not int or not low <= proto <= high:
        raise Refused(f"this side speaks the protocol {low} to {high}, the other side {proto!r}")
    shape, prompts, columns = header.get("shape"), header.get("prompts"), header.get("columns")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise Refused(f"the shape {shape!r} is no list of sizes")
    if type(header.get("id")) is not int:
        raise Refused("id is no number: {!r}".format(header.get("id")))
    layout = (header.get("dtype"), header.get("layout"), shape[-1:])
    rest = check_pictures(header.get("pictures", {}), shape[:1], columns)
    if layout != ("uint8", LAYOUTS.get(len(shape), ""), [3]) or math.prod(shape) + rest != body_bytes:
        raise Refused("{} {} of the shape {} in {} bytes are no images".format(*layout[:2], shape, body_bytes - rest))
    seconds = header.get("seconds")
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise Refused(f"seconds is {seconds!r}, expected a number above 0")
    if not isinstance(columns, dict):
        raise Refused("columns are no JSON object")
    for name, values in [("prompts", prompts), *columns.items()]:
        if not isinstance(values, list) or len(values) != shape[0]:
            raise Refused(f"{name} is no list of {shape[0]} values")


def check_pictures(pictures: Any, size: list[int], columns: Any) -> int:
    """How many bytes the pictures of a request take. Raises Refused for what is no ``{column: {shapes, rows}}``."""
    if not isinstance(pictures, dict):
        raise Refused("pictures are no JSON object")
    total = 0
    for name, given in pictures.items():
        shapes, rows = (given.get(key) for key in ("shapes", "rows")) if isinstance(given, dict) else (None, None)
        if not isinstance(shapes, list) or not isinstance(rows, list) or [len(rows)] != size:
            raise Refused(f"the pictures {name!r} are no shapes and {size} rows")
        for shape in shapes:
            if not isinstance(shape, list) or not all(type(side) is int and side > 0 for side in shape):
                raise Refused(f"the shape {shape!r} of a picture {name!r} is no list of sizes")
            total += math.prod(shape)
        if not all(row is None or (type(row) is int and 0 <= row < len(shapes)) for row in rows):
            raise Refused(f"the rows of the pictures {name!r} are no numbers below {len(shapes)}")
        if isinstance(columns, dict) and name in columns:
            raise Refused(f"{name!r} is among the columns and the pictures")
    return total


def as_pixels(body: bytearray, header: Mapping[str, Any]) -> tuple[Any, dict[str, list[Any]]]:
    """The images, and the pictures of each sample by column (None where it has none), without a copy."""
    place = math.prod(header["shape"])
    images, pictures = as_array(body, 0, header["shape"]), {}
    for name, given in header.get("pictures", {}).items():
        arrays = []
        for shape in given["shapes"]:
            arrays.append(as_array(body, place, shape))
            place += math.prod(shape)
        pictures[name] = [None if row is None else arrays[row] for row in given["rows"]]
    return images, pictures


def as_array(body: bytearray, begin: int, shape: list[int]) -> Any:
    """A part of the body as uint8 of that shape, without a copy."""
    size = math.prod(shape)
    if numpy is not None:
        return numpy.frombuffer(body, dtype=numpy.uint8, count=size, offset=begin).reshape(shape)
    part = memoryview(body)[begin : begin + size]
    return part.cast("B", shape) if size else part


def read_parts(given: Any, size: int) -> tuple[dict[str, list[float | None]], dict[str, str]]:
    """A scorer's answer as numbers or None by part; and by row, what was there in place of a finite number."""
    if not isinstance(given, Mapping):
        given = {"score": given}
    if "score" not in given:
        raise ValueError(f"the scorer gave the parts {list(given)}; one of them must be called 'score'")
    parts: dict[str, list[float | None]] = {}
    errors: dict[str, str] = {}
    for name, values in given.items():
        if isinstance(values, (str, bytes, Mapping)):
            raise ValueError(f"the scorer gave a {type(values).__name__} for {name!r}, expected {size} numbers")
        values = list(values)
        if len(values) != size:
            raise ValueError(f"the scorer gave {len(values)} values for {name!r}, expected {size}, one per image")
        parts[name] = []
        for row, value in enumerate(values):
            if isinstance(value, (str, bytes)):
                raise ValueError(f"the scorer gave {value!r} for image {row}, expected a number or None")
            number = None if value is None else float(value)
            if number is not None and not math.isfinite(number):
                number, errors[str(row)] = None, f"{name} is {number}"
            parts[name].append(number)
    return parts, errors


def run(answerer: Answerer, connection: socket.socket) -> None:
    """Answer frames until the other side closes. A frame that is none ends the process: what follows it means nothing."""
    while True:
        try:
            header, body = read_frame(connection.recv_into, answerer.max_body_bytes)
        except EOFError:
            return
        text = to_json(answerer.answer(header, body, time.monotonic()))
        del header, body  # not held while waiting for the next
        connection.sendall(PREFIX.pack(MAGIC, len(text), 0) + text)


def end_with_parent(connection: socket.socket) -> None:
    """End this process group as soon as the other end of the socket is gone, even in the middle of a batch."""
    # not Linux's parent-death signal: it is sent when the *thread* that started us ends, and not to the scorer's children
    poll = select.poll()
    poll.register(connection, 0)  # only what is always reported: hang-up and errors
    poll.poll()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def outlive_signals() -> None:
    """Ignore the signals by which a scheduler ends all processes of a job: the trainer still needs its step's scores.

    `end_with_parent` ends this process. The scorer's children keep the default handlers, since multiprocessing ends them with
    SIGTERM: hence a handler here and not SIG_IGN, which children inherit.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.signal(number, lambda *_: None)
        os.register_at_fork(after_in_child=functools.partial(signal.signal, number, before))


def make_parser() -> argparse.ArgumentParser:
    """The arguments that ``server.py`` takes as well."""
    parser = argparse.ArgumentParser(description="Load one scorer and answer for it.")
    parser.add_argument("target", help="module:attribute or path/to/file.py:attribute")
    parser.add_argument("--options", type=json.loads, default={}, help="a JSON object of constructor arguments")
    parser.add_argument("--max-body-bytes", type=int, default=MAX_BODY_BYTES)
    return parser


def hide_folder() -> None:
    """A scorer's imports must not find our modules."""
    folder = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != folder]


def main() -> None:
    """Load the scorer that the command line names, and answer for it."""
    parser = make_parser()
    parser.add_argument("--fd", type=int, required=True, help="the number of an open socket")
    args = parser.parse_args()
    hide_folder()
    outlive_signals()
    connection = socket.socket(fileno=args.fd)
    connection.set_inheritable(False)
    threading.Thread(target=end_with_parent, args=[connection], daemon=True).start()
    run(Answerer(args.target, args.options, args.max_body_bytes), connection)


if __name__ == "__main__":
    main()
