"""An OpenAI-compatible server on this machine, for the tests of vision-language judges."""

import base64
import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


class Server:
    """An OpenAI-compatible server. ``answer(images, text, count)`` gives what it says: a text, (status, body), or None to hang.

    ``count`` is the number of requests before this one; ``seen`` holds (path, headers, body) of each.
    """

    def __init__(self, answer):
        self.answer, self.seen, self.released = answer, [], threading.Event()
        self.running = self.most_running = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    count = len(server.seen)
                    server.seen.append((self.path, dict(self.headers), body))
                    server.running += 1
                    server.most_running = max(server.most_running, server.running)
                try:
                    given = server.answer(*server.read(body), count)
                finally:
                    with server._lock:
                        server.running -= 1
                with contextlib.suppress(OSError):  # a client that has given up
                    server.send(self, given)

            def log_message(self, format, *args):
                pass

        class Listener(ThreadingHTTPServer):
            request_queue_size = 64  # a connection beyond the usual 5 waits for a second
            daemon_threads = True

        self._http = Listener(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    @staticmethod
    def read(body):
        """The images and the texts of a request, each in order."""
        (message,) = body["messages"]
        images, texts = [], []
        for part in message["content"]:
            if part["type"] == "image_url":
                kind, _, data = part["image_url"]["url"].partition(",")
                assert kind == "data:image/png;base64"
                images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True)))))
            else:
                texts.append(part["text"])
        return images, texts

    def send(self, handler, given):
        if given is None:
            self.released.wait(20)
            return
        if isinstance(given, str):
            given = (200, completion(given))
        status, data = given
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def close(self):
        self.released.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def completion(text, ended="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": ended}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
