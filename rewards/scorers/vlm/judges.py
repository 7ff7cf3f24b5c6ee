"""Vision-language models as judges, behind an OpenAI-compatible address: vLLM, sglang, a vendor.

========================  ===========================================================================================
`UnifiedReward`           pointwise: the published reward model's forms, 1 to 5
`RubricJudge`             pointwise: a rubric of one's own and the pattern that reads its score
`PairwiseJudge`           a group: which of two is better, and each image's win rate (Pref-GRPO, arXiv 2508.20751)
`GroupwiseJudge`          a group: all its images at once, a score for each or a ranking
========================  ===========================================================================================

`flowsteer.rewards.scorers.vlm.edit` has a judge of edits. All take ``endpoint``, the options of `ChatClient`, as a mapping::

    endpoint: {base_url: "http://localhost:8000/v1", model: CodeGoat24/UnifiedReward-7b-v1.5, concurrency: 16}

A judge that does not answer in time, answers with an error or says nothing readable leaves the score missing, never 0; the log
has how many, why, and the beginning of such replies. One that answers not one request of a call raises TimeoutError, one that
not one request reaches ConnectionError: then nothing more of that batch is asked. Published code fills these with 0
(Flow-GRPO) or with the mean of the batch (Pref-GRPO). The temperature is 0, which few servers make deterministic to the last
token.

A video is shown as all its frames, in order. Letters: B samples, G images of a group, T frames.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from flowsteer.rewards.scorers.batching import Fingerprint, check_images
from flowsteer.rewards.scorers.diversity import check_group
from flowsteer.rewards.scorers.vlm.client import ChatClient
from flowsteer.rewards.scorers.vlm.prompts import (
    AXES,
    AXIS_SCORES,
    BETTER_OF_TWO,
    BETTER_PATTERN,
    FINAL_SCORE,
    FINAL_SCORE_PATTERN,
    RANK_ALL,
    SCORE_EACH,
    SCORE_PATTERN,
    Part,
    compile_pattern,
    fill,
    labelled,
    read_axes,
    read_better,
    read_number,
    read_ranking,
    read_scores,
    text_part,
)
from flowsteer.rewards.types import Values

logger = logging.getLogger(__name__)


class UnifiedReward:
    """UnifiedReward's score of an image for its prompt, divided by 5 as published: 0.2 to 1.

    The model (Wang et al. 2025, arXiv 2503.05236) runs behind an address, for instance in vLLM. See
    `flowsteer.rewards.scorers.vlm.prompts` for its questions.

    Args:
        endpoint: options of `ChatClient`.
        form: ``final_score`` for UnifiedReward-7b and -7b-v1.5, one score; ``axes`` for UnifiedReward-2.0: the parts
            ``alignment``, ``coherence`` and ``style``, and as the score their mean.
        raw: True leaves scores 1 to 5.
        image_size: the longer side in pixels, by bicubic resize; Flow-GRPO shows 512 x 512. None: as it is.
        template: the question in other words, with ``{prompt}``; its answer has the same form.

    Raises:
        ValueError: another form, an endpoint or a template that cannot be.
    """

    video = True

    def __init__(
        self,
        endpoint: Mapping[str, Any],
        form: Literal["final_score", "axes"] = "final_score",
        raw: bool = False,
        image_size: int | None = 512,
        template: str | None = None,
    ) -> None:
        if form not in ("final_score", "axes"):
            raise ValueError(f"form must be final_score or axes, got {form!r}")
        self.form, self.raw, self.image_size = form, raw, check_size(image_size)
        self.template = check_template(template or (AXIS_SCORES if form == "axes" else FINAL_SCORE))
        self._client = ChatClient.of(endpoint)
        self._pattern = compile_pattern(FINAL_SCORE_PATTERN)
        self.fingerprint: Fingerprint = {
            "reward": "unified_reward",
            "version": "1",
            "form": form,
            "raw": raw,
            **shared_fingerprint(self._client, self.template, image_size),
        }

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> Mapping[str, Values]:
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB and B prompts to ``score`` and, of axes, each of them; B each."""
        check_images("unified_reward", images, prompts)
        answers = self._client.verdicts(
            _each_alone(self._client, images, prompts, self.template, self.image_size), self._read
        )
        names = ("score", *AXES) if self.form == "axes" else ("score",)
        return {name: [None if answer is None else answer[name] for answer in answers] for name in names}

    def _read(self, reply: str) -> Mapping[str, float]:
        if self.form == "axes":
            found = read_axes(reply)
            found = {"score": sum(found.values()) / len(found), **found}
        else:
            found = {"score": read_number(reply, self._pattern, 1, 5)}
        return {name: value if self.raw else value / 5 for name, value in found.items()}


class RubricJudge:
    """A score by a rubric of one's own: 0 where it is the lowest of the rubric, 1 where it is the highest.

    Args:
        endpoint: options of `ChatClient`.
        rubric: what the judge is asked, with ``{prompt}``, and how it shall answer.
        min_score, max_score: the rubric's range. A number outside leaves the score missing.
        pattern: regular expression whose one group is the score; the last that it finds in a reply counts. Without regard to
            upper and lower case.
        raw: True leaves scores as the judge gives them.
        image_size: the longer side in pixels, by bicubic resize. None: as it is.

    Raises:
        ValueError: an empty range, an endpoint or a pattern that cannot be.
    """

    video = True

    def __init__(
        self,
        endpoint: Mapping[str, Any],
        rubric: str,
        min_score: float,
        max_score: float,
        pattern: str = SCORE_PATTERN,
        raw: bool = False,
        image_size: int | None = None,
    ) -> None:
        if not -float("inf") < min_score < max_score < float("inf"):
            raise ValueError(f"min_score must be below max_score and both finite, got {min_score} and {max_score}")
        self.rubric, self.raw, self.image_size = check_template(rubric), raw, check_size(image_size)
        self.min_score, self.max_score = min_score, max_score
        self._pattern = compile_pattern(pattern)
        self._client = ChatClient.of(endpoint)
        self.fingerprint: Fingerprint = {
            "reward": "vlm_rubric",
            "version": "1",
            "range": f"{float(min_score)} to {float(max_score)}",
            "pattern": pattern,
            "raw": raw,
            **shared_fingerprint(self._client, rubric, image_size),
        }

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB and B prompts to B scores."""
        check_images("vlm_rubric", images, prompts)
        return self._client.verdicts(
            _each_alone(self._client, images, prompts, self.rubric, self.image_size), self._read
        )

    def _read(self, reply: str) -> float:
        score = read_number(reply, self._pattern, self.min_score, self.max_score)
        return score if self.raw else (score - self.min_score) / (self.max_score - self.min_score)


class PairwiseJudge:
    """The share of its group's other images that an image beats, by a judge that sees two at a time: 0 to 1.

    Pref-GRPO's reward (Wang et al. 2025, arXiv 2508.20751): wins count 1, ties 0.5. Which pairs are asked, and who stands
    first, follows from the images and the seed, not from their order in the group. An image that no readable verdict
    concerns has no score, and neither has one that is alone.

    Args:
        endpoint: options of `ChatClient`.
        both_orders: ask each pair twice, each image first once, and take the mean: a verdict that flips with the order counts
            half a win for each. False: once, at half the cost, with the judge's liking for a place left in; each image is first
            as often as second, up to one.
        max_opponents: of each image, at least 2; all have as many (one fewer where this and the size of the group are odd).
            None: all others.
        seed: of the choice of opponents, and of who stands first where that is asked once.
        template: the question, with ``{prompt}``; UnifiedReward-Think's own is on its card. The images stand before it.
        pattern: regular expression whose one group is ``1``, ``2`` or ``tie``; the last that it finds in a reply counts.
        image_size: the longer side in pixels, by bicubic resize. None: as it is.

    Raises:
        ValueError: fewer than 2 opponents, an endpoint or a pattern that cannot be.
    """

    groupwise = True
    video = True

    def __init__(
        self,
        endpoint: Mapping[str, Any],
        both_orders: bool = True,
        max_opponents: int | None = None,
        seed: int = 0,
        template: str = BETTER_OF_TWO,
        pattern: str = BETTER_PATTERN,
        image_size: int | None = None,
    ) -> None:
        if max_opponents is not None and max_opponents < 2:
            raise ValueError(f"max_opponents must be at least 2, or None for all others, got {max_opponents}")
        self.both_orders, self.max_opponents, self.seed = both_orders, max_opponents, seed
        self.template, self.image_size = check_template(template), check_size(image_size)
        self._pattern = compile_pattern(pattern)
        self._client = ChatClient.of(endpoint)
        self.fingerprint: Fingerprint = {
            "reward": "vlm_pairwise",
            "version": "1",
            "both_orders": both_orders,
            "max_opponents": max_opponents or "all",
            "seed": seed,
            "pattern": pattern,
            **shared_fingerprint(self._client, template, image_size),
        }

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """uint8 [G, H, W, 3] or [G, T, H, W, 3] in RGB of one prompt to G win rates."""
        check_group("vlm_pairwise", images, prompts)
        if len(images) < 2:
            return [None] * len(images)
        order = _order_by_content(images, self.seed)
        places = circulant_pairs(len(images), self.max_opponents or len(images))
        pairs = [(order[first], order[second]) for first, second in places]
        if self.both_orders:
            pairs += [(second, first) for first, second in pairs]
        shown = self._client.show(images, self.image_size)
        question = fill(self.template, prompt=prompts[0])
        questions = [labelled([shown[first], shown[second]], question) for first, second in pairs]
        verdicts = self._client.verdicts(questions, lambda reply: read_better(reply, self._pattern))
        return win_rates(len(images), {pair: won for pair, won in zip(pairs, verdicts) if won is not None})


class GroupwiseJudge:
    """A score for each image of a group, by a judge that sees all of them at once: 0 to 1.

    In which order they are shown follows from the images and the seed, not from their order in the group. A reply that does not
    speak of every image leaves the whole group without scores; an image that is alone has none.

    A group is one request, and groups are asked one after another: ``concurrency`` is of the requests within a call.

    Args:
        endpoint: options of `ChatClient`.
        answer: ``scores``, 0 to 10 for each image, divided by 10; ``ranking``, the share of the others that stand behind it.
        seed: of the order.
        template: the question in other words, with ``{prompt}`` and ``{count}``; the reply has the same form:
            ``Scores: 7, 4.5, 9`` in the order shown, or ``Ranking: 3 > 1 > 2``, the best first.
        image_size: the longer side in pixels, by bicubic resize. None: as it is.

    Raises:
        ValueError: another answer, an endpoint that cannot be.
    """

    groupwise = True
    video = True

    def __init__(
        self,
        endpoint: Mapping[str, Any],
        answer: Literal["scores", "ranking"] = "scores",
        seed: int = 0,
        template: str | None = None,
        image_size: int | None = None,
    ) -> None:
        if answer not in ("scores", "ranking"):
            raise ValueError(f"answer must be scores or ranking, got {answer!r}")
        self.answer, self.seed, self.image_size = answer, seed, check_size(image_size)
        self.template = check_template(template or (RANK_ALL if answer == "ranking" else SCORE_EACH))
        self._read = read_ranking if answer == "ranking" else read_scores
        self._client = ChatClient.of(endpoint)
        self.fingerprint: Fingerprint = {
            "reward": "vlm_groupwise",
            "version": "1",
            "answer": answer,
            "seed": seed,
            **shared_fingerprint(self._client, self.template, image_size),
        }

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """uint8 [G, H, W, 3] or [G, T, H, W, 3] in RGB of one prompt to G scores."""
        check_group("vlm_groupwise", images, prompts)
        count = len(images)
        if count < 2:
            return [None] * count
        order = _order_by_content(images, self.seed)
        shown = self._client.show(images[order], self.image_size)
        question = labelled(shown, fill(self.template, prompt=prompts[0], count=count))
        (found,) = self._client.verdicts([question], lambda reply: self._read(reply, count))
        if found is None:
            return [None] * count
        return [found[order.index(image)] for image in range(count)]


def circulant_pairs(size: int, opponents: int) -> list[tuple[int, int]]:
    """Pairs of 0..size-1, each once, so that all have as many opponents: at most ``opponents``, and at most all others.

    Each meets those 1, 2, ... places after it, so it is first of a pair as often as second; where their number is odd and the
    size even, also the one opposite. One fewer than asked for where both are odd.
    """
    opponents = min(opponents, size - 1)
    pairs = [(one, (one + step) % size) for step in range(1, opponents // 2 + 1) for one in range(size)]
    if opponents % 2 and size % 2 == 0:
        pairs += [(one, one + size // 2) for one in range(size // 2)]
    return pairs


def win_rates(size: int, won: Mapping[tuple[int, int], float]) -> list[float | None]:
    """The mean over its opponents of what each of ``size`` images wins against them; None of one that met nobody.

    Args:
        size: of the group.
        won: (first, second) as shown -> what the first won: 1, 0 or 0.5. Of a pair in both orders, the mean of the two.
    """
    against: list[dict[int, list[float]]] = [{} for _ in range(size)]  # image -> opponent -> what it won
    for (first, second), share in won.items():
        against[first].setdefault(second, []).append(share)
        against[second].setdefault(first, []).append(1 - share)
    means = [[sum(shares) / len(shares) for shares in opponents.values()] for opponents in against]
    return [sum(shares) / len(shares) if shares else None for shares in means]


def _each_alone(
    client: ChatClient, images: np.ndarray, prompts: Sequence[str], template: str, size: int | None
) -> list[list[Part]]:
    """B questions: the image, or the video's frames, and then the template with its prompt."""
    shown = client.show(images, size)
    return [[*parts, text_part(fill(template, prompt=prompt))] for parts, prompt in zip(shown, prompts)]


def _order_by_content(images: np.ndarray, seed: int) -> list[int]:
    """The rows in an order that looks random and is the same for the same images, however they come."""
    keys = [hashlib.sha256(f"{seed} ".encode() + image.tobytes()).digest() for image in images]
    return sorted(range(len(images)), key=keys.__getitem__)


def shared_fingerprint(client: ChatClient, template: str, image_size: int | None) -> Fingerprint:
    digest = hashlib.sha256(template.encode()).hexdigest()
    return {**client.fingerprint, "template_sha256": digest, "image_size": image_size or "as it is"}


def check_template(template: str) -> str:
    if "{prompt}" not in template:
        logger.warning("the judge's question has no {prompt}: it will not know what an image was asked to show")
    return template


def check_size(size: int | None) -> int | None:
    if size is not None and size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, or None for images as they are, got {size}")
    return size


__all__ = [
    "GroupwiseJudge",
    "PairwiseJudge",
    "RubricJudge",
    "UnifiedReward",
    "circulant_pairs",
    "win_rates",
]
