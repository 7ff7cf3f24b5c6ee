"""Scorers for the tests of workers: with the standard library alone, for every Python from 3.8 on."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time


def digest(data):
    """48 bits of a hash, which a float holds exactly."""
    return int.from_bytes(hashlib.sha256(data).digest()[:6], "big")


def digests(images, prompts, **columns):
    """Of every image, prompt and row of the columns. Works without numpy too, where images is a memoryview."""
    data, size = images.tobytes(), len(prompts)
    step = len(data) // size if size else 0
    rows = [{name: values[row] for name, values in columns.items()} for row in range(size)]
    return {
        "score": [digest(data[row * step : (row + 1) * step]) for row in range(size)],
        "prompt": [digest(prompt.encode("utf-8", "surrogatepass")) for prompt in prompts],
        "columns": [digest(json.dumps(row, sort_keys=True).encode()) for row in rows],
        "frames": [images.shape[1] if len(images.shape) == 5 else 0] * size,
    }


class Described:
    """Says of itself what a scorer can say."""

    groupwise = True
    video = True
    uses_prompt = False
    version = "7"

    def __init__(self, factor):
        self.factor = factor
        self.fingerprint = {"weights_sha256": "ab" * 32, "antialias": False}

    def __call__(self, images, prompts, **columns):
        return [self.factor * row for row in range(len(prompts))]


class Undescribed:
    """Has no fingerprint to tell, and says so."""

    fingerprint = None

    def __call__(self, images, prompts, **columns):
        return [1.0] * len(prompts)


def of_trl(prompts, completions, **columns):
    """Takes what a reward function of TRL takes."""
    return [float(len(prompt)) for prompt in prompts]


class OfTRL:
    """The same as an object."""

    def __call__(self, completions, **columns):
        return [1.0] * len(completions)


def constants(images, prompts, values=(), **columns):
    """What it is told to say."""
    if not isinstance(values, list):
        return values
    return [float(value) if value in ("nan", "inf") else value for value in values]


def environment(images, prompts, **columns):
    """The process itself: its id, and 1 for each variable that the prompts name and it sees."""
    return {"score": [float(prompt in os.environ) for prompt in prompts], "pid": [os.getpid()] * len(prompts)}


def paths(images, prompts, **columns):
    """1 where a module with the prompt's name can be imported."""
    from importlib.util import find_spec

    return [float(find_spec(prompt) is not None) for prompt in prompts]


def spawned_paths(images, prompts, **columns):
    """The same in a spawned process, which loads the program's file again."""
    import worker_scorers  # by a name that the other process can import

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(worker_scorers.paths, [None, prompts])


def prints(images, prompts, **columns):
    """Writes to the standard output, through Python and beneath it."""
    print("a progress bar" * 1000)
    os.write(1, b"FSR1 from below\n")
    return [1.0] * len(prompts)


def raises(images, prompts, **columns):
    """Fails on an image of which the prompt says so."""
    for prompt in prompts:
        if "bad" in prompt:
            raise KeyError("cannot read " + prompt)
    return [float(len(prompt)) for prompt in prompts]


class Unready:
    """Never ready."""

    def __init__(self):
        print("loading the model")
        time.sleep(600)


class Unloadable:
    """Fails while it loads."""

    def __init__(self):
        raise OSError("no weights at hand")


class Waits:
    """Writes its process's id into a file and waits for a time, the first time; is quick if the file is there."""

    def __init__(self, file, seconds=600.0):
        self.file, self.seconds = file, seconds

    def __call__(self, images, prompts, **columns):
        if not os.path.exists(self.file):
            with open(self.file + ".part", "w") as file:
                file.write(str(os.getpid()))
            os.rename(self.file + ".part", self.file)
            time.sleep(self.seconds)
        return [float(image[0][0][0]) for image in images]


def help_out(ready):
    """What a process of ``Helped`` does."""
    ready.set()
    time.sleep(600)


class Helped:
    """Writes its process's id into a file and waits for another; then says by what a process that it ends was ended."""

    def __init__(self, file):
        self.file = file

    def __call__(self, images, prompts, **columns):
        with open(self.file + ".part", "w") as file:
            file.write(str(os.getpid()))
        os.rename(self.file + ".part", self.file)
        while not os.path.exists(self.file + ".go"):
            time.sleep(0.02)
        context = multiprocessing.get_context("fork")
        ready = context.Event()
        helper = context.Process(target=help_out, args=[ready])
        helper.start()
        ready.wait()
        helper.terminate()
        helper.join()
        return [helper.exitcode] * len(prompts)


class Notes:
    """Writes the prompts of every call into a file."""

    def __init__(self, file):
        self.file = file

    def __call__(self, images, prompts, **columns):
        with open(self.file, "a") as file:
            file.write(" ".join(prompts) + "\n")
        return [1.0] * len(prompts)


class Alone:
    """1 where no other call is under way."""

    def __init__(self):
        self.inside = 0

    def __call__(self, images, prompts, **columns):
        self.inside += 1
        time.sleep(0.1)
        alone = self.inside == 1
        self.inside -= 1
        return [float(alone)] * len(prompts)


class Dies:
    """Kills its process at every call, after it has written a line."""

    def __call__(self, images, prompts, **columns):
        print("about to die")
        os.kill(os.getpid(), signal.SIGKILL)


class Parent:
    """Starts a process of its own that would live for ten minutes, writes both ids into a file, and hangs."""

    def __init__(self, file):
        self.file = file

    def __call__(self, images, prompts, **columns):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
        with open(self.file + ".part", "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        os.rename(self.file + ".part", self.file)
        time.sleep(600)


class PictureDigests:
    """Of every image and of its pictures; ``area`` is what their sizes come to. Works without numpy too."""

    pictures = {"source": "image", "mask": "mask"}  # noqa: RUF012

    def __init__(self, hide_numpy=False):
        if hide_numpy:
            sys.modules["__main__"].numpy = None

    def __call__(self, images, prompts, source=None, mask=None, **columns):
        data, size = images.tobytes(), len(prompts)
        step = len(data) // size if size else 0
        columns = {"source": source or [None] * size, "mask": mask or [None] * size}
        found = {
            name: [None if own is None else digest(own.tobytes()) for own in values] for name, values in columns.items()
        }
        area = [sum(own.shape[0] * own.shape[1] for own in row if own is not None) for row in zip(*columns.values())]
        return {"score": [digest(data[row * step : (row + 1) * step]) for row in range(size)], "area": area, **found}
