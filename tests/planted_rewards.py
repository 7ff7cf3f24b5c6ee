"""A sound reward, and rewards that each have one fault of those that are met in this field, for tests/rewards/test_certify.py.

The sound one is a mean over the pixels with weights that come from the prompt: it sees both, in floats, each pair by itself.
Those that need torch or OpenCV import them: most of these are asked in new processes, too, which start much faster without.

Letters: B images, G images of a group.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any, ClassVar

import numpy as np


def weights_of(prompt: str) -> np.ndarray:
    """Three numbers in [-1, 1], of the prompt alone."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).uniform(-1, 1, 3)


def score_pair(image: np.ndarray, prompt: str) -> float:
    """Of an image [H, W, 3] or a video [T, H, W, 3] with any numbers."""
    return float(image.reshape(-1, image.shape[-1]).mean(0) @ weights_of(prompt))


def check_images(images: np.ndarray) -> None:
    """What a reward does that would make something else out of a wrong type."""
    if images.dtype != np.uint8 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"expected pixels, uint8 [..., 3], got {images.dtype} {images.shape}")


class Sound:
    """The twin without a fault. Those below differ from it in one thing."""

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> Any:
        return [score_pair(image, prompt) for image, prompt in zip(images, prompts)]


sound = Sound()


class SoundParts:
    """Sound as well: with parts, missing scores and a part that is missing elsewhere."""

    def __call__(self, images, prompts, **columns):
        scores = [None if "sign" in prompt else score for prompt, score in zip(prompts, sound(images, prompts))]
        return {"score": np.array(scores, dtype=object), "red": [image[..., :1].mean() for image in images]}


class SoundNetwork:
    """Sound as well: float32 in torch, with an answer that is a tensor."""

    def __call__(self, images, prompts, **columns):
        import torch

        weights = torch.tensor(np.array([weights_of(prompt) for prompt in prompts]).reshape(-1, 3), dtype=torch.float32)
        means = torch.from_numpy(images).float().flatten(1, -2).mean(1)
        return torch.einsum("bc,bc->b", means, weights)


class SoundGroup:
    """Sound and groupwise: how far each image's mean is from those of the others [G]."""

    groupwise = True
    uses_prompt = False

    def __call__(self, images, prompts, **columns):
        if len(images) < 2:
            return [None] * len(images)
        means = images.reshape(len(images), -1).mean(1)
        return [float(np.abs(means - mean).sum() / (len(means) - 1)) for mean in means]


class ArgumentsSwapped:
    def __call__(self, prompts, images, **columns):
        return sound(images, prompts)


class PromptsOfOtherRows:
    def __call__(self, images, prompts, **columns):
        return sound(images, prompts[::-1])


class FirstPromptForAll:
    def __call__(self, images, prompts, **columns):
        return sound(images, [prompts[0]] * len(images) if prompts else [])


class KeyedByPrompt:
    def __call__(self, images, prompts, **columns):
        found = dict(zip(prompts, sound(images, prompts)))
        return [found[prompt] for prompt in prompts]


class BatchMixedUp:
    def __call__(self, images, prompts, **columns):
        return np.roll(sound(images, prompts), 1)


class OrderLostUnderThreads:
    """A thread for each image; the results stand in the order in which they are done, darker images first."""

    def __call__(self, images, prompts, **columns):
        check_images(images)  # a thread that raises would leave the others waiting
        results, done = [], [threading.Event() for _ in images]
        turns = np.argsort([image.mean() for image in images], kind="stable").tolist()

        def score(turn):
            if turn:
                done[turn - 1].wait()
            results.append(score_pair(images[turns[turn]], prompts[turns[turn]]))
            done[turn].set()

        workers = [threading.Thread(target=score, args=(turn,)) for turn in range(len(turns))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return results


class MeanOverAllPrompts:
    """The matrix of all images and all prompts, and its mean in place of its diagonal."""

    def __call__(self, images, prompts, **columns):
        matrix = [[score_pair(image, prompt) for prompt in prompts] for image in images]
        return [float(np.mean(row)) for row in matrix]


class MeanOverAllImages:
    def __call__(self, images, prompts, **columns):
        return [float(np.mean([score_pair(image, prompt) for image in images])) for prompt in prompts]


class NotANumber:
    def __call__(self, images, prompts, **columns):
        return [float("nan")] * len(images)


class NotANumberOnBlack:
    def __call__(self, images, prompts, **columns):
        scores = np.array(sound(images, prompts))
        with np.errstate(invalid="ignore"):
            return scores / np.array([float(image.any()) for image in images])


class WrongLength:
    def __call__(self, images, prompts, **columns):
        return sound(images, prompts)[:-1]


class OneNumberForTheBatch:
    def __call__(self, images, prompts, **columns):
        return float(np.mean(sound(images, prompts) or [0.0]))


class NeverAScore:
    def __call__(self, images, prompts, **columns):
        return [None] * len(images)


class ZeroInPlaceOfErrors:
    """Catches what it raises itself; here all that ever happens is an error."""

    def __call__(self, images, prompts, **columns):
        try:
            return [image.no_such_method() for image in images]
        except AttributeError:
            return [0.0] * len(images)


class ZeroOnError:
    def __call__(self, images, prompts, **columns):
        scores = []
        for image, prompt in zip(images, prompts):
            try:
                if image.dtype != np.uint8 or image.shape[-1] != 3:
                    raise TypeError("no image")
                scores.append(score_pair(image, prompt))
            except TypeError:
                scores.append(0.0)
        return scores


class MinusOneOnError:
    def __call__(self, images, prompts, **columns):
        scores = ZeroOnError()(images, prompts)
        return [score or -1.0 for score in scores]


class ZeroOnLongPrompts:
    def __call__(self, images, prompts, **columns):
        return [0.0 if len(prompt) > 1000 else score for prompt, score in zip(prompts, sound(images, prompts))]


class ZeroForSomePrompts:
    """An exact 0 in place of an error, among scores that are real numbers."""

    def __call__(self, images, prompts, **columns):
        return [0.0 if " circle" in prompt else score for prompt, score in zip(prompts, sound(images, prompts))]


class ZeroForTallImages:
    def __call__(self, images, prompts, **columns):
        scores = sound(images, prompts)
        return [0.0 if images.shape[1] > images.shape[2] else score for score in scores]


class HalfForOddPrompts:
    """A middling score in place of an error."""

    def __call__(self, images, prompts, **columns):
        odd = [not prompt.strip() or len(prompt) > 1000 or not prompt.isascii() for prompt in prompts]
        return [0.5 if own else score for own, score in zip(odd, sound(images, prompts))]


class RaisesOnEmptyPrompts:
    def __call__(self, images, prompts, **columns):
        for prompt in prompts:
            prompt.split()[0]
        return sound(images, prompts)


class OddPromptSpoilsTheBatch:
    def __call__(self, images, prompts, **columns):
        return sound(images, prompts) if all(prompts) else [None] * len(images)


class ZeroWithoutFactor:
    """Needs a column."""

    def __call__(self, images, prompts, *, factor, **columns):
        return [score * (own or 0) for score, own in zip(sound(images, prompts), factor)]


class MinusOneWithoutFactor(ZeroWithoutFactor):
    def __call__(self, images, prompts, *, factor, **columns):
        scores = super().__call__(images, prompts, factor=factor)
        return [-1.0 if own is None else score for score, own in zip(scores, factor)]


class FactorIsOptional:
    """Sound: where a column has no value it takes 1, and for some that is what they have anyway."""

    def __call__(self, images, prompts, *, factor, **columns):
        return [score * (1 if own is None else own) for score, own in zip(sound(images, prompts), factor)]


class ReadsOnlyColumns:
    """Sound: the prompt plays no part, what it looks for stands in a column."""

    def __call__(self, images, prompts, *, thing, **columns):
        return sound(images, thing)


class BatchNorm:
    """Relative to the batch's mean."""

    def __call__(self, images, prompts, **columns):
        scores = np.array(sound(images, prompts))
        return scores - 0.1 * (scores.mean() if len(scores) else 0)


class DependsOnBatchSize:
    def __call__(self, images, prompts, **columns):
        return [score + (len(images) > 4) for score in sound(images, prompts)]


class FirstOfEqualsWins:
    """Ranks inside the group, where the first of two equal images ranks higher [G]."""

    groupwise = True
    uses_prompt = False

    def __call__(self, images, prompts, **columns):
        if len(images) < 2:
            return [None] * len(images)
        check_images(images)
        means = images.reshape(len(images), -1).mean(1)
        return np.argsort(np.argsort(means, kind="stable"), kind="stable").astype(float)


class NewNoiseEachCall:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __call__(self, images, prompts, **columns):
        return [score + self.rng.normal() for score in sound(images, prompts)]


class EachInstanceItsOwn:
    """Equal calls of one instance agree, those of two do not: a head that was never loaded."""

    count = itertools.count(1)

    def __init__(self) -> None:
        self.head = next(self.count)

    def __call__(self, images, prompts, **columns):
        return [self.head * score for score in sound(images, prompts)]


class IgnoresThePrompt:
    def __call__(self, images, prompts, **columns):
        return sound(images, ["one for all"] * len(images))


class SaysItIgnoresThePrompt(Sound):
    uses_prompt = False


class IgnoresTheImage:
    def __call__(self, images, prompts, **columns):
        return [float(weights_of(prompt)[0]) for prompt in prompts]


class RaisesOnNothing:
    def __call__(self, images, prompts, **columns):
        return np.array(sound(np.stack(list(images)), prompts))


class SquareOnly:
    def __call__(self, images, prompts, **columns):
        if len(images) and images.shape[1] != images.shape[2]:
            raise ValueError("no square")
        return sound(images, prompts)


class SaysItTakesVideos:
    video = True

    def __call__(self, images, prompts, **columns):
        if images.ndim != 4:
            raise ValueError("no images")
        return sound(images, prompts)


class MixesVideoFrames:
    """Was not made for videos: it gives numbers, but not one for each of them."""

    def __call__(self, images, prompts, **columns):
        return sound(images, prompts) if images.ndim == 4 else [0.0] * images.shape[0] * images.shape[1]


class SaysItMixesNoFrames(MixesVideoFrames):
    video = True


class LabOf8Bits:
    """Nothing is cut off, but OpenCV's Lab of uint8 has fewer dark levels than RGB."""

    def __call__(self, images, prompts, **columns):
        import cv2

        check_images(images)
        return sound([cv2.cvtColor(image, cv2.COLOR_RGB2LAB) for image in images], prompts)


class CutsOff:
    """Normalises, and comes back to 8 bits without rounding."""

    def __init__(self, dtype: str = "float32", mean: float = 0.5, std: float = 0.5, rounds: bool = False) -> None:
        self.dtype, self.mean, self.std, self.rounds = np.dtype(dtype).type, mean, std, rounds

    def __call__(self, images, prompts, **columns):
        check_images(images)
        one = self.dtype
        normal = (images.astype(one) / one(255) - one(self.mean)) / one(self.std)
        levels = (normal * one(self.std) + one(self.mean)) * one(255)
        return sound((np.rint(levels) if self.rounds else levels).clip(0, 255).astype(np.uint8), prompts)


class DividesBy256:
    def __call__(self, images, prompts, **columns):
        check_images(images)
        return sound((images / 256 * 255).astype(np.uint8), prompts)


class BeyondFloat32:
    def __call__(self, images, prompts, **columns):
        return [1e300 * score for score in sound(images, prompts)]


class WritesIntoImages:
    def __call__(self, images, prompts, **columns):
        scores = sound(images, prompts)
        images //= 2
        return scores


class SortsPrompts:
    def __call__(self, images, prompts, **columns):
        scores = sound(images, prompts)
        prompts.sort()
        return scores


class WithSideEffect:
    """Does something to the process in each call."""

    def __init__(self, effect: str) -> None:
        import torch

        self.effect = {
            "seeds torch": lambda: torch.manual_seed(0),
            "seeds numpy": lambda: np.random.seed(0),
            "seeds python": lambda: random.seed(0),
            "gradients off": lambda: torch.set_grad_enabled(False),
            "changes folder": lambda: os.chdir(".."),
            "double": lambda: torch.set_default_dtype(torch.float64),
            "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
            "precision": lambda: torch.set_float32_matmul_precision("high"),
            "precision by its new name": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
            "deterministic": lambda: torch.use_deterministic_algorithms(True),
            "benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
            "deterministic cudnn": lambda: setattr(torch.backends.cudnn, "deterministic", True),
            "tf32": lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
        }[effect]

    def __call__(self, images, prompts, **columns):
        self.effect()
        return sound(images, prompts)


class ThreadsInConstructor(Sound):
    def __init__(self) -> None:
        import torch

        torch.set_num_threads(torch.get_num_threads() + 1)


class GradientInScores:
    def __call__(self, images, prompts, **columns):
        import torch

        scale = torch.ones((), requires_grad=True)
        return scale * torch.tensor(sound(images, prompts))


class KeepsGraph:
    def __init__(self) -> None:
        import torch

        self.tensor, self.scale = torch.tensor, torch.ones((), requires_grad=True)
        self.history: list[torch.Tensor] = []

    def __call__(self, images, prompts, **columns):
        self.history.append(self.scale * self.tensor(sound(images, prompts)))
        return self.history[-1].tolist()


class SharedBetweenThreads:
    """Keeps the prompts of the call in the object, as some do that score from several methods."""

    def __call__(self, images, prompts, **columns):
        self.prompts = prompts
        scores = []
        for row, image in enumerate(images):
            time.sleep(1e-4)
            scores.append(score_pair(image, self.prompts[row]))
        return scores


class RaisesUnderThreads:
    """Not reentrant, and says so."""

    busy = False

    def __call__(self, images, prompts, **columns):
        if self.busy:
            raise RuntimeError("called twice at once")
        self.busy = True
        time.sleep(1e-3)
        self.busy = False
        return sound(images, prompts)


class ScoresALoneImage(SoundGroup):
    def __call__(self, images, prompts, **columns):
        return [0.5] if len(images) == 1 else super().__call__(images, prompts, **columns)


class OrderMattersInGroup(SoundGroup):
    def __call__(self, images, prompts, **columns):
        scores = super().__call__(images, prompts, **columns)
        return [score and score + 0.1 * place for place, score in enumerate(scores)]


class HashOfThePrompt:
    """Texts hash otherwise in each process."""

    def __call__(self, images, prompts, **columns):
        return [score + hash(prompt) % 1000 for score, prompt in zip(sound(images, prompts), prompts)]


class DependsOnTheHour:
    def __call__(self, images, prompts, **columns):
        return [score * (1 + time.localtime().tm_hour / 100) for score in sound(images, prompts)]


class DependsOnTheDate:
    def __call__(self, images, prompts, **columns):
        return [score * datetime.now().year for score in sound(images, prompts)]


class IgnoresItsColumn:
    """Requires a column and does not look at it."""

    def __call__(self, images, prompts, *, factor, **columns):
        return sound(images, prompts)


class CachesByFirstBytes:
    """Keeps scores by the prompt and the first 64 bytes of the picture."""

    def __init__(self) -> None:
        self.cache: dict[Any, float] = {}

    def __call__(self, images, prompts, **columns):
        return [self._score(image, prompt) for image, prompt in zip(images, prompts)]

    def _score(self, image, prompt):
        key = (image.shape, image.dtype, image.tobytes()[:64], prompt)
        if key not in self.cache:
            self.cache[key] = score_pair(image, prompt)
        return self.cache[key]


class CachesForAllInstances(CachesByFirstBytes):
    shared: ClassVar[dict[Any, float]] = {}

    def __init__(self) -> None:
        self.cache = self.shared


class CachesByPicture(CachesByFirstBytes):
    """Forgets that the prompt matters, for pictures that are bright at the top left."""

    def _score(self, image, prompt):
        own = score_pair(image, prompt)
        return self.cache.setdefault(image.tobytes(), own) if image[0, 0, 0] == 240 else own


class SeesTheTopLeft:
    def __call__(self, images, prompts, **columns):
        return sound(images[..., :64, :64, :], prompts)


class WrapsAround:
    def __call__(self, images, prompts, **columns):
        check_images(images)
        return sound(images * np.uint8(2), prompts)


class WrapsBelowZero:
    """How red a picture is, in uint8."""

    uses_prompt = False

    def __call__(self, images, prompts, **columns):
        check_images(images)
        return [float((image[..., 0] - image[..., 1]).mean()) for image in images]


class HeightAndWidthSwapped:
    """Sees a part of each picture that is not square."""

    def __call__(self, images, prompts, **columns):
        width, height = images.shape[-3:-1]
        return sound(images[..., :height, :width, :], prompts)


class ReadsWidthByHeight:
    """How much neighbours in a column differ, of pixels that are read in rows of the wrong length."""

    uses_prompt = False

    def __call__(self, images, prompts, **columns):
        check_images(images)
        count, height, width = images.shape[:3]
        pixels = images.reshape(count, width, height, 3).astype(float)
        return [float(np.abs(np.diff(image, axis=0)).mean() * image.mean() ** 0.5) for image in pixels]


class Saturates:
    def __call__(self, images, prompts, **columns):
        return np.clip(sound(images, prompts), -40, 40)


class ManyHaveTheHighest:
    uses_prompt = False

    def __call__(self, images, prompts, **columns):
        check_images(images)
        return [min(1.0, float(image.std()) / 73) for image in images]


class HasAQuota:
    """Answers 0 after 3,000 pictures."""

    shown = 0

    def __call__(self, images, prompts, **columns):
        self.shown += len(images)
        return [0.0] * len(images) if self.shown > 3000 else sound(images, prompts)


class FailsAfterItsQuota(HasAQuota):
    def __call__(self, images, prompts, **columns):
        self.shown += len(images)
        if self.shown > 3000:
            raise RuntimeError("quota exceeded")
        return sound(images, prompts)


class KeepsPictures:
    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def __call__(self, images, prompts, **columns):
        self.seen.append(images.copy())
        return sound(images, prompts)


class CountsThePromptsLength:
    def __call__(self, images, prompts, **columns):
        return [float(image.mean()) * (1 + len(prompt)) ** 0.5 for image, prompt in zip(images, prompts)]


class EndsElsewhere(Sound):
    """Cannot be made in another process than the one given."""

    def __init__(self, process: int) -> None:
        if os.getpid() != process:
            raise MemoryError("no room")


class Slow:
    def __call__(self, images, prompts, **columns):
        time.sleep(0.002 * len(images))
        return sound(images, prompts)
