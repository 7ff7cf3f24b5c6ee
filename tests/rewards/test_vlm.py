"""Judges behind a real HTTP server on this machine: it decodes the PNGs and answers by their brightness."""

import itertools
import json
import logging
import random
import re
import socket
import time

import numpy as np
import pytest
import torch
from chat_server import Server, completion
from PIL import Image

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.registry import load_reward
from flowsteer.rewards.scorers.vlm.edit import EditJudge
from flowsteer.rewards.scorers.vlm.judges import (
    GroupwiseJudge,
    PairwiseJudge,
    RubricJudge,
    UnifiedReward,
    circulant_pairs,
    win_rates,
)
from flowsteer.rewards.scorers.vlm.prompts import AXIS_SCORES, fill, read_number, read_ranking, read_scores

KEY = "sk-do-not-print-me"
RUBRIC = "Rate it for: {prompt}\nEnd with 'Score: X', 0 to 255."


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def endpoint(server, **options):
    return {"base_url": server.url, "model": "tiny", "retry_wait_s": 0.001, "timeout_s": 10, **options}


def rubric(server, *, image_size=None, raw=False, **options):
    return RubricJudge(endpoint(server, **options), RUBRIC, 0, 255, image_size=image_size, raw=raw)


def levels(*values):
    """Grey images of these levels, uint8 [B, 4, 6, 3]."""
    return np.stack([np.full((4, 6, 3), value, np.uint8) for value in values])


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def mean_of_first(images, texts, count):
    return f"I would say Score: 3 at first, but then\n**Score:** {images[0].mean():.4f}"


def brighter(images, texts, count):
    first, second = (image.mean() for image in images)
    return "<answer>Tie</answer>" if first == second else f"<answer>Image {1 + (second > first)} is better</answer>"


class TestClient:
    def test_pixels_and_order_survive_the_way_to_the_judge(self, serve):
        images, prompts = noise(24, 5, 7, 3), [f"prompt {row}" for row in range(24)]

        def slow_for_the_first(images, texts, count):
            time.sleep(0.05 * (count < 4))  # so that answers come in another order than questions
            return mean_of_first(images, texts, count)

        server = serve(slow_for_the_first)
        scores = rubric(server, concurrency=6, raw=True)(images, prompts)
        assert scores == pytest.approx(images.mean((1, 2, 3)).tolist(), abs=1e-4)  # the judge gives four digits
        assert 1 < server.most_running <= 6
        shown = {texts[0]: seen for (seen,), texts in (server.read(body) for _, _, body in server.seen)}
        for image, prompt in zip(images, prompts):
            np.testing.assert_array_equal(shown[RUBRIC.replace("{prompt}", prompt)], image)

    def test_the_request_is_that_of_the_protocol(self, serve):
        server = serve(mean_of_first)
        extra = {"top_k": 1, "temperature": None}
        assert rubric(server, extra_body=extra, max_tokens=99)(levels(51), ["a"]) == [51 / 255]
        ((path, headers, body),) = server.seen
        assert path == "/v1/chat/completions"
        assert headers["Content-Type"] == "application/json"
        assert "Authorization" not in headers
        assert {name: value for name, value in body.items() if name != "messages"} == {
            "model": "tiny",
            "max_tokens": 99,
            "top_k": 1,
        }
        rubric(server)(levels(51), ["a"])
        assert server.seen[1][2]["temperature"] == 0

    def test_a_size_is_that_of_the_longer_side(self, serve):
        image = noise(1, 8, 12, 3)
        server = serve(mean_of_first)
        rubric(server, image_size=6)(image, ["a"])
        rubric(server, image_size=24)(image, ["a"])
        for (_, _, body), size in zip(server.seen, [(6, 4), (24, 16)]):
            expected = Image.fromarray(image[0]).resize(size, Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(server.read(body)[0][0], np.asarray(expected))

    def test_a_video_is_shown_as_its_frames(self, serve):
        video = noise(2, 3, 4, 6, 3)
        server = serve(lambda images, texts, count: f"Score: {np.mean(images):.4f}")
        scores = rubric(server, raw=True)(video, ["a", "b"])
        assert scores == pytest.approx(video.mean((1, 2, 3, 4)).tolist(), abs=1e-4)

    def test_no_images_are_no_requests(self, serve):
        server = serve(mean_of_first)
        assert rubric(server)(levels(1)[:0], []) == []
        assert server.seen == []

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_a_passing_error_is_tried_again(self, serve, status):
        server = serve(lambda images, texts, count: (status, b"busy") if count < 2 else mean_of_first(images, texts, 0))
        state = random.getstate()
        assert rubric(server, num_retries=2)(levels(255), ["a"]) == [1.0]
        assert len(server.seen) == 3
        assert random.getstate() == state

    def test_retries_end(self, serve, caplog):
        server = serve(lambda images, texts, count: (502, b"bad gateway"))
        assert rubric(server, num_retries=2)(levels(255), ["a"]) == [None]
        assert len(server.seen) == 3
        assert "1 of 1 requests to the judge gave no verdict: 1 x HTTP 502: 'bad gateway'" in caplog.text

    def test_retries_do_not_outlast_the_deadline(self, serve):
        server = serve(lambda images, texts, count: (500, b"busy"))
        start = time.monotonic()
        assert rubric(server, retry_wait_s=8, timeout_s=2)(levels(255), ["a"]) == [None]
        assert time.monotonic() - start < 2  # a wait of at least half of 8 s would end beyond it
        assert len(server.seen) == 1

    def test_a_reply_that_breaks_off_is_tried_again(self, serve):
        server = serve(mean_of_first)
        send = server.send

        def break_off(handler, given):
            if len(server.seen) > 1:
                return send(handler, given)
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(completion("Score: 2")[:50])

        server.send = break_off
        assert rubric(server)(levels(255), ["a"]) == [1.0]
        assert len(server.seen) == 2

    @pytest.mark.parametrize("status", [400, 401, 404, 302])
    def test_a_lasting_error_is_not_tried_again(self, serve, status, caplog):
        server = serve(lambda images, texts, count: (status, b"no such model"))
        assert rubric(server)(levels(0, 255), ["a", "b"]) == [None, None]
        assert len(server.seen) == 2
        assert f"2 x HTTP {status}: 'no such model'" in caplog.text

    def test_a_judge_that_hangs_costs_its_deadline_and_only_the_scores_that_it_hangs_on(self, serve, caplog):
        server = serve(lambda images, texts, count: None if images[0].mean() == 7 else mean_of_first(images, texts, 0))
        start = time.monotonic()
        assert rubric(server, timeout_s=0.5)(levels(0, 7, 255), ["a", "b", "c"]) == [0.0, None, 1.0]
        assert 0.5 <= time.monotonic() - start < 3  # the rest is room for a busy machine
        assert "1 of 3 requests to the judge gave no verdict: 1 x no answer within 0.5 s" in caplog.text
        assert len(server.seen) == 3

    def test_a_judge_that_trickles_is_ended_too(self, serve):
        server = serve(mean_of_first)

        def trickle(handler, given):
            for _ in range(100):  # 5 s in all; each byte is well within a limit per operation
                server.released.wait(0.05)
                handler.wfile.write(b"H")

        server.send = trickle
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"answered none of 1 requests: no answer within 0\.4 s"):
            rubric(server, timeout_s=0.4)(levels(255), ["a"])
        assert 0.4 <= time.monotonic() - start < 3

    def test_a_judge_that_hangs_on_everything_costs_no_more_with_more_images(self, serve):
        server = serve(lambda images, texts, count: None)
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"answered none of 40 requests: no answer within 0\.5 s"):
            rubric(server, timeout_s=0.5, concurrency=4)(levels(*range(40)), ["a"] * 40)
        assert time.monotonic() - start < 4  # ten times 0.5 s without giving up
        assert 4 <= len(server.seen) < 8  # when the fourth has ended, up to three others are on their way again

    def test_requests_that_are_not_sent_are_counted(self, serve, caplog):
        """The first four hang, but one that was on its way beside them gets its answer."""
        server = serve(lambda images, texts, count: None if images[0].mean() else mean_of_first(images, texts, 0))
        scores = rubric(server, timeout_s=0.5, concurrency=4)(levels(*range(40)), ["a"] * 40)
        assert scores == [0.0] + [None] * 39
        assert f"{40 - len(server.seen)} x not sent, since 4 in a row got no answer" in caplog.text

    def test_a_judge_that_hangs_costs_one_group_of_a_batch(self, serve):
        server = serve(lambda images, texts, count: None)
        judge = GroupwiseJudge(endpoint(server, timeout_s=0.3))
        images, groups = (
            torch.arange(12.0).reshape(12, 1, 1, 1).expand(-1, 3, 4, 4) / 12,
            [row // 2 for row in range(12)],
        )
        scores = RewardSet([("judge", judge, 1.0)]).score(images, [f"{group}" for group in groups], group=groups)
        assert scores.missing.all()
        assert "TimeoutError: the judge at" in scores.failures[11]
        assert len(server.seen) == 1

    def test_a_refused_connection_ends_the_call(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = {"base_url": f"http://127.0.0.1:{port}/v1", "model": "tiny", "retry_wait_s": 0.001}
        judge = RubricJudge(options, RUBRIC, 0, 255)
        with pytest.raises(ConnectionError, match=f"the judge at 127.0.0.1:{port} cannot be reached: no connection"):
            judge(levels(*range(20)), ["a"] * 20)
        scores = RewardSet([("judge", judge, 1.0)]).score(torch.zeros(2, 3, 4, 4), ["a", "b"])
        assert scores.missing.all()
        assert "ConnectionError: the judge at" in scores.failures[1]

    @pytest.mark.parametrize(
        ("reply", "reason"),
        [
            ("It is lovely.", "a reply without a verdict (the answer is not in the form that was asked for)"),
            ("Score: 256", "a reply without a verdict (256 is outside 0 to 255)"),
            ("Score: -1", "a reply without a verdict (-1 is outside 0 to 255)"),
            ((200, completion("Score: 25", "length")), "a reply cut off at max_tokens = 1024: 'Score: 25'"),
            ((200, completion(None, "content_filter")), "a completion without text, which ended by 'content_filter'"),
            ((200, b"<html>"), "no chat completion: '<html>'"),
            ((200, b'{"choices": []}'), "no chat completion"),
            ((200, b"[]"), "no chat completion"),
        ],
    )
    def test_what_cannot_be_read_is_missing_and_logged(self, serve, caplog, reply, reason):
        server = serve(lambda images, texts, count: reply if images[0].mean() == 7 else mean_of_first(images, texts, 0))
        assert rubric(server)(levels(0, 7, 255), ["a", "b", "c"]) == [0.0, None, 1.0]
        assert len(server.seen) == 3  # asking again would get the same
        assert f"1 of 3 requests to the judge gave no verdict: 1 x {reason}" in caplog.text

    def test_the_key_comes_from_the_environment_and_stays_secret(self, serve, caplog, monkeypatch):
        caplog.set_level(logging.DEBUG)
        monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
        server = serve(lambda images, texts, count: (401, f"Incorrect key {KEY}".encode()))
        judge = rubric(server, api_key_env="JUDGE_KEY")
        assert judge(levels(0), ["a"]) == [None]
        assert server.seen[0][1]["Authorization"] == f"Bearer {KEY}"
        assert "HTTP 401: 'Incorrect key ***'" in caplog.text
        assert KEY not in caplog.text
        assert KEY not in json.dumps(judge.fingerprint)
        assert "JUDGE_KEY" not in json.dumps(judge.fingerprint)
        with pytest.raises(ValueError, match="variable 'NOT_THERE', which is not set"):
            rubric(server, api_key_env="NOT_THERE")
        monkeypatch.setenv("JUDGE_KEY", f"{KEY}\r\nX: y")
        with pytest.raises(ValueError, match="characters that an API key cannot have") as error:
            rubric(server, api_key_env="JUDGE_KEY")
        assert KEY not in str(error.value)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"base_url": "localhost:8000/v1"}, "must be like http://localhost:8000/v1, got 'localhost:8000/v1'"),
            ({"base_url": "http://host:port/v1"}, "base_url is no address: Port"),
            ({"base_url": f"http://me:{KEY}@host/v1"}, "belongs into api_key_env's variable"),
            ({"base_url": f"me:{KEY}@host/v1"}, "belongs into api_key_env's variable"),
            ({"base_url": f"http://host/v1?key={KEY}"}, "belongs into api_key_env's variable"),
            ({"modell": "x"}, r"no option 'modell'; did you mean 'model'\? It accepts: base_url, model, "),
            ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
            ({"num_retries": -1}, "num_retries must be at least 0, got -1"),
            ({"timeout_s": 0}, "timeout_s must be a number above 0"),
            ({"extra_body": {"model": "other"}}, "extra_body may not hold model"),
        ],
    )
    def test_an_endpoint_that_cannot_be(self, options, message):
        with pytest.raises(ValueError, match=message) as error:
            RubricJudge({"base_url": "http://localhost:1/v1", "model": "tiny", **options}, RUBRIC, 0, 255)
        assert KEY not in str(error.value)

    def test_an_endpoint_that_lacks_its_model(self):
        with pytest.raises(ValueError, match="endpoint lacks model"):
            UnifiedReward({"base_url": "http://localhost:1/v1"})

    def test_the_registry_makes_a_judge(self, serve):
        server = serve(mean_of_first)
        judge = load_reward(
            "flowsteer.rewards.scorers.vlm.judges:RubricJudge",
            endpoint=endpoint(server),
            rubric=RUBRIC,
            min_score=0,
            max_score=255,
        )
        assert judge(levels(51), ["a"]) == [0.2]


class TestFingerprint:
    def test_it_says_what_the_score_depends_on_and_nothing_of_the_host(self):
        first = {"base_url": "http://one:1/v1", "model": "tiny", "concurrency": 2, "timeout_s": 3}
        second = {"base_url": "https://two.example/v1/", "model": "tiny"}
        assert UnifiedReward(first).fingerprint == UnifiedReward(second).fingerprint
        assert UnifiedReward(first).fingerprint["endpoint"] == "/v1/chat/completions"

    @pytest.mark.parametrize(
        ("judge", "options"),
        [
            (UnifiedReward, {"form": "axes"}),
            (UnifiedReward, {"raw": True}),
            (UnifiedReward, {"image_size": None}),
            (UnifiedReward, {"template": "{prompt}?"}),
            (RubricJudge, {"rubric": "Another {prompt}"}),
            (RubricJudge, {"min_score": 1}),
            (RubricJudge, {"pattern": r"Total: (\d+)"}),
            (RubricJudge, {"raw": True}),
            (EditJudge, {"template": "Another {prompt}"}),
            (EditJudge, {"image_size": None}),
            (PairwiseJudge, {"both_orders": False}),
            (PairwiseJudge, {"max_opponents": 2}),
            (PairwiseJudge, {"seed": 1}),
            (PairwiseJudge, {"pattern": r"(1|2)"}),
            (GroupwiseJudge, {"answer": "ranking"}),
            (GroupwiseJudge, {"seed": 1}),
            (GroupwiseJudge, {"image_size": 64}),
            (GroupwiseJudge, {"endpoint": {"model": "other"}}),
            (GroupwiseJudge, {"endpoint": {"max_tokens": 5}}),
            (GroupwiseJudge, {"endpoint": {"extra_body": {"top_k": 1}}}),
        ],
    )
    def test_every_option_that_changes_a_score_changes_it(self, judge, options):
        usual = {"endpoint": {"base_url": "http://localhost:1/v1", "model": "tiny"}}
        if judge is RubricJudge:
            usual |= {"rubric": RUBRIC, "min_score": 0, "max_score": 10}
        changed = usual | options | {"endpoint": usual["endpoint"] | options.get("endpoint", {})}
        before, after = judge(**usual).fingerprint, judge(**changed).fingerprint
        assert before != after
        assert all(isinstance(value, str | int | float | bool) for value in (*before.values(), *after.values()))


class TestUnifiedReward:
    @pytest.mark.parametrize("raw", [False, True])
    def test_a_final_score_is_divided_by_five(self, serve, raw):
        server = serve(lambda images, texts, count: f"Clear.\nFinal Score: {1 + 4 * images[0].mean() / 255:.2f}")
        scores = UnifiedReward(endpoint(server), raw=raw)(levels(0, 255, 51), ["a", "b", "c"])
        assert scores == {"score": pytest.approx([1, 5, 1.8] if raw else [0.2, 1, 0.36])}
        (image,), (question,) = server.read(server.seen[0][2])
        assert image.shape == (341, 512, 3)  # 4 x 6 pixels by their longer side
        assert re.search(r"'Final Score:'.*Text Caption: \[[abc]\]$", question, re.DOTALL)

    def test_three_axes(self, serve):
        def answer(images, texts, count):
            level = images[0].mean()
            style = "" if level == 7 else f"Style Score (1-5): {9 if level == 8 else 4.5}"
            return f"Alignment Score (1-5): 3\n**Coherence Score (1-5):** 2.25\n{style}"

        server = serve(answer)
        scores = UnifiedReward(endpoint(server), form="axes")(levels(0, 7, 8), ["a", "b", "c"])
        assert scores == {
            "score": [pytest.approx((3 + 2.25 + 4.5) / 3 / 5), None, None],
            "alignment": [0.6, None, None],
            "coherence": [0.45, None, None],
            "style": [0.9, None, None],
        }

    @pytest.mark.parametrize("reply", ["Final Score: 0", "Final Score: 5.5", "Final Score: 10", "Final Score: X", "4"])
    def test_what_is_no_score_is_missing(self, serve, reply):
        server = serve(lambda images, texts, count: reply)
        assert UnifiedReward(endpoint(server))(levels(9), ["a"]) == {"score": [None]}

    def test_a_template_of_ones_own_and_forms_that_are_not_there(self, serve):
        server = serve(lambda images, texts, count: "Final Score: 4")
        UnifiedReward(endpoint(server), template='{"caption": "{prompt}"}')(levels(9), ["a {prompt} \\1"])
        assert server.read(server.seen[0][2])[1] == ['{"caption": "a {prompt} \\1"}']
        with pytest.raises(ValueError, match="form must be final_score or axes, got 'parts'"):
            UnifiedReward(endpoint(server), form="parts")
        with pytest.raises(ValueError, match="image_size must be at least 1 pixel"):
            UnifiedReward(endpoint(server), image_size=0)

    def test_images_of_another_kind_are_refused(self, serve):
        with pytest.raises(ValueError, match="unified_reward scores uint8 images"):
            UnifiedReward(endpoint(serve(mean_of_first)))(np.zeros((2, 4, 4, 3)), ["a", "b"])


class TestRubricJudge:
    def test_the_range_is_mapped_to_zero_and_one(self, serve):
        server = serve(lambda images, texts, count: f"total = {images[0].mean():g} of 20")
        options = {"rubric": "{prompt}", "min_score": -5, "max_score": 20, "pattern": r"total = (-?[\d.]+)"}
        assert RubricJudge(endpoint(server), **options)(levels(0, 20, 21), ["a"] * 3) == [0.2, 1.0, None]
        assert RubricJudge(endpoint(server), **options, raw=True)(levels(0, 20, 21), ["a"] * 3) == [0.0, 20.0, None]

    def test_a_rubric_that_does_not_name_the_prompt_is_warned_of(self, serve, caplog):
        RubricJudge(endpoint(serve(mean_of_first)), "How pretty? {promt}", 0, 1)
        assert "the judge's question has no {prompt}" in caplog.text

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"pattern": "Score: (.*"}, "is no regular expression"),
            ({"pattern": "Score: .*"}, "has 0 groups; it needs exactly one"),
            ({"pattern": r"(a|b): (\d)"}, "has 2 groups; it needs exactly one"),
            ({"min_score": 5, "max_score": 5}, "min_score must be below max_score"),
            ({"max_score": float("inf")}, "both finite"),
        ],
    )
    def test_options_that_cannot_be(self, options, message):
        with pytest.raises(ValueError, match=message):
            RubricJudge(
                {"base_url": "http://localhost:1/v1", "model": "tiny"},
                **{"rubric": "{prompt}", "min_score": 0, "max_score": 1, **options},
            )


class TestEditJudge:
    def test_source_and_result_are_shown_and_the_smaller_score_counts(self, serve):
        def answer(images, texts, count):
            source, result = (image.mean() / 25.5 for image in images)
            return f"The sky is blue now.\n**Instruction Score:** {result:.4f}\nPreservation Score: {source:.4f}"

        server = serve(answer)
        images, source = noise(3, 5, 7, 3), noise(9, 4, 3)[::-1]
        judge = EditJudge(endpoint(server), image_size=None)
        scores = judge(images, ["make the sky blue", "b", "c"], source=[source, None, images[1]])
        instruction = [float(image.mean()) / 255 for image in images]
        preservation = [float(source.mean()) / 255, None, float(images[1].mean()) / 255]
        assert scores["instruction"] == pytest.approx([instruction[0], None, instruction[2]], abs=1e-5)
        assert scores["preservation"] == pytest.approx([preservation[0], None, preservation[2]], abs=1e-5)
        smaller = [min(instruction[row], preservation[row]) for row in (0, 2)]
        assert scores["score"] == pytest.approx([smaller[0], None, smaller[1]], abs=1e-5)
        assert len(server.seen) == 2
        (body,) = (body for _, _, body in server.seen if "make the sky blue" in json.dumps(body))
        shown, texts = server.read(body)
        np.testing.assert_array_equal(shown[0], source)
        np.testing.assert_array_equal(shown[1], images[0])
        assert texts[:2] == ["Source:", "Result:"]
        assert re.search(r"Instruction Score: X\nPreservation Score: Y\nInstruction: \[make the sky blue\]$", texts[2])

    def test_both_are_resized(self, serve):
        server = serve(lambda images, texts, count: "Instruction Score: 5\nPreservation Score: 10")
        scores = EditJudge(endpoint(server), image_size=6)(noise(1, 12, 8, 3), ["a"], source=[noise(24, 36, 3)])
        assert scores == {"score": [0.5], "instruction": [0.5], "preservation": [1.0]}
        assert [image.shape for image in server.read(server.seen[0][2])[0]] == [(4, 6, 3), (6, 4, 3)]

    @pytest.mark.parametrize(
        "reply", ["Instruction Score: 5", "Preservation Score: 5", "Instruction Score: 11\nPreservation Score: 5", "5"]
    )
    def test_what_is_no_pair_of_scores_is_missing(self, serve, reply):
        server = serve(lambda images, texts, count: reply)
        scores = EditJudge(endpoint(server))(levels(9), ["a"], source=[levels(8)[0]])
        assert scores == {"score": [None], "instruction": [None], "preservation": [None]}

    def test_without_a_source_nothing_is_asked(self, serve):
        server = serve(mean_of_first)
        assert EditJudge(endpoint(server))(levels(9), ["a"], source=[None])["score"] == [None]
        assert server.seen == []


class TestPairwiseJudge:
    @pytest.mark.parametrize("both_orders", [True, False])
    @pytest.mark.parametrize("size", [2, 5, 6])
    def test_a_transitive_judge_gives_the_rank(self, serve, size, both_orders):
        values = np.random.default_rng(size).permutation(size)
        server = serve(brighter)
        rates = PairwiseJudge(endpoint(server), both_orders)(levels(*values * 10), ["a"] * size)
        assert rates == pytest.approx((values / (size - 1)).tolist())  # wins against all that are darker
        assert len(server.seen) == size * (size - 1) // (1 if both_orders else 2)

    def test_equal_images_share_their_win(self, serve):
        rates = PairwiseJudge(endpoint(serve(brighter)))(levels(0, 9, 9), ["a"] * 3)
        assert rates == [0.0, 0.75, 0.75]

    def test_a_judge_that_only_likes_a_place_says_nothing(self, serve):
        server = serve(lambda images, texts, count: "<answer>Image 1 is better</answer>")
        assert PairwiseJudge(endpoint(server))(noise(4, 4, 4, 3), ["a"] * 4) == [0.5] * 4
        # Asked once, with each image first as often as second, its liking is spread evenly, but over single pairs only
        assert PairwiseJudge(endpoint(server), both_orders=False)(noise(5, 4, 4, 3), ["a"] * 5) == [0.5] * 5
        assert sorted(PairwiseJudge(endpoint(server), both_orders=False)(levels(1, 2), ["a"] * 2)) == [0.0, 1.0]

    def test_the_question_names_both_images_and_the_caption(self, serve):
        server = serve(brighter)
        PairwiseJudge(endpoint(server), both_orders=False)(levels(1, 2), ["a red {prompt}"] * 2)
        parts = server.seen[0][2]["messages"][0]["content"]
        assert [part["type"] for part in parts] == ["text", "image_url", "text", "image_url", "text"]
        assert [parts[0]["text"], parts[2]["text"]] == ["Image 1:", "Image 2:"]
        assert parts[4]["text"].endswith("Text Caption: [a red {prompt}]")

    def test_unreadable_verdicts_count_for_nobody(self, serve, caplog):
        def answer(images, texts, count):
            dark = min(image.mean() for image in images)
            return "Neither." if dark == 0 else "<answer>Image 3</answer>" if dark == 10 else brighter(images, texts, 0)

        rates = PairwiseJudge(endpoint(serve(answer)))(levels(0, 10, 20, 30), ["a"] * 4)
        assert rates == [None, None, 0.0, 1.0]
        assert "10 of 12 requests to the judge gave no verdict" in caplog.text

    def test_one_readable_order_of_two_counts_alone(self):
        assert win_rates(2, {(0, 1): 1.0}) == [1.0, 0.0]
        assert win_rates(2, {(0, 1): 1.0, (1, 0): 0.5}) == [0.75, 0.25]
        assert win_rates(3, {(0, 1): 1.0, (1, 2): 0.5, (2, 1): 0.5}) == [1.0, 0.25, 0.5]

    @pytest.mark.parametrize(("size", "opponents"), itertools.product(range(2, 10), range(2, 10)))
    def test_all_have_as_many_opponents(self, size, opponents):
        pairs = circulant_pairs(size, opponents)
        assert len({frozenset(pair) for pair in pairs}) == len(pairs)
        assert all(first != second for first, second in pairs)
        expected = min(opponents, size - 1)
        expected -= expected * size % 2  # handshakes: the sum over all is twice the number of pairs
        flat = [image for pair in pairs for image in pair]
        assert [flat.count(image) for image in range(size)] == [expected] * size
        firsts = [first for first, _ in pairs]
        assert all(abs(2 * firsts.count(image) - expected) <= 1 for image in range(size))

    def test_opponents_follow_from_the_images_and_the_seed_and_not_from_their_order(self, serve):
        server = serve(lambda images, texts, count: f"<answer>{1 + (images[0][0, 0, 0] % 3 == 0)}</answer>")
        images, permutation = levels(*range(9)), [4, 2, 7, 0, 8, 1, 6, 3, 5]

        def rates(seed, order):
            judge = PairwiseJudge(endpoint(server), False, max_opponents=2, seed=seed)
            return np.array(judge(images[order], ["a"] * 9))

        usual = rates(0, list(range(9)))
        assert len(server.seen) == 9
        np.testing.assert_array_equal(rates(0, permutation), usual[permutation])
        met = [
            {frozenset(image[0, 0, 0] for image in server.read(body)[0]) for _, _, body in server.seen[i : i + 9]}
            for i in (0, 9)
        ]
        assert met[0] == met[1]
        rates(1, list(range(9)))
        assert met[0] != {
            frozenset(image[0, 0, 0] for image in server.read(body)[0]) for _, _, body in server.seen[18:]
        }

    def test_what_is_no_group(self, serve):
        server = serve(brighter)
        judge = PairwiseJudge(endpoint(server))
        assert judge(levels(1), ["a"]) == [None]
        assert judge(levels(1)[:0], []) == []
        assert server.seen == []
        with pytest.raises(ValueError, match="compares the images of one prompt, got 2 prompts"):
            judge(levels(1, 2), ["a", "b"])
        with pytest.raises(ValueError, match="max_opponents must be at least 2, or None for all others, got 1"):
            PairwiseJudge(endpoint(server), max_opponents=1)


class TestGroupwiseJudge:
    @pytest.mark.parametrize("seed", range(3))
    def test_scores_come_back_to_their_images(self, serve, seed):
        server = serve(
            lambda images, texts, count: "Scores: " + ", ".join(f"{image.mean() / 25.5:.3f}" for image in images)
        )
        images = noise(6, 4, 4, 3)
        scores = GroupwiseJudge(endpoint(server), seed=seed)(images, ["a"] * 6)
        assert scores == pytest.approx((images.mean((1, 2, 3)) / 255).tolist(), abs=1e-3 / 10)
        ((_, _, body),) = server.seen
        shown, texts = server.read(body)
        assert texts[:-1] == [f"Image {number}:" for number in range(1, 7)]
        assert texts[-1].startswith("These 6 images")
        assert {image.tobytes() for image in shown} == {image.tobytes() for image in images}

    def test_a_ranking_gives_the_share_of_those_behind(self, serve):
        def rank(images, texts, count):
            order = sorted(range(len(images)), key=lambda row: -images[row].mean())
            return "Ranking: " + " > ".join(f"Image {row + 1}" for row in order)

        values = [50, 10, 40, 20, 30]
        scores = GroupwiseJudge(endpoint(serve(rank)), "ranking")(levels(*values), ["a"] * 5)
        assert scores == [(value / 10 - 1) / 4 for value in values]

    def test_the_order_shown_follows_from_the_images(self, serve):
        server = serve(
            lambda images, texts, count: "Scores: 1, 2, 3, 4"
        )  # it likes the last place, whatever stands there
        images = noise(4, 4, 4, 3)
        judge = GroupwiseJudge(endpoint(server))
        assert judge(images[::-1], ["a"] * 4) == judge(images, ["a"] * 4)[::-1]
        assert len({tuple(GroupwiseJudge(endpoint(server), seed=seed)(images, ["a"] * 4)) for seed in range(5)}) > 1

    @pytest.mark.parametrize(
        "reply", ["Scores: 1, 2", "Scores: 1, 2, 11", "Scores: none", "1, 2, 3", "Ranking: 1 > 2 > 3", "Scores: 1 2 3"]
    )
    def test_a_reply_that_does_not_fit_leaves_the_group_without_scores(self, serve, reply):
        server = serve(lambda images, texts, count: reply)
        assert GroupwiseJudge(endpoint(server))(levels(1, 2, 3), ["a"] * 3) == [None] * 3

    def test_what_is_no_group(self, serve):
        server = serve(mean_of_first)
        judge = GroupwiseJudge(endpoint(server))
        assert judge(levels(1), ["a"]) == [None]
        assert server.seen == []
        with pytest.raises(ValueError, match="got 2 prompts"):
            judge(levels(1, 2), ["a", "b"])
        with pytest.raises(ValueError, match="answer must be scores or ranking, got 'rank'"):
            GroupwiseJudge(endpoint(server), "rank")


class TestReading:
    def test_the_last_answer_counts(self):
        assert read_number("Score: 1 or Score: 2", re.compile(r"Score: (\d)"), 0, 5) == 2
        assert read_scores("Scores: 1, 1\nscores: **10, 5**", 2) == [1, 0.5]

    @pytest.mark.parametrize(
        "line",
        ["7, 4.5", "**7**, **4.5**", "[7, 4.5]", "(7,4.5).", "7, 4.5.", "**[7, 4.5]**", "<7>, <4.5>", "\n7 , 4.5 "],
    )
    def test_scores_may_be_dressed(self, line):
        assert read_scores(f"Scores: {line}\nThat is all.", 2) == [0.7, 0.45]

    @pytest.mark.parametrize(
        "line",
        ["Image 1: 7\nImage 2: 9", "8/10", "7 9", "7, nine", "7-9", "7; 9", "1. 7, 9", "7, 9 of 10", "Image 1: 7, 9"],
    )
    def test_other_numbers_are_no_scores(self, line):
        with pytest.raises(ValueError, match="is not 2 numbers with commas between them"):
            read_scores(f"Scores: {line}", 2)

    @pytest.mark.parametrize("reply", ["Ranking: 1 > 2", "Ranking: 1 > 2 > 2", "Ranking: 0 > 1 > 2", "2 > 1 > 3"])
    def test_a_ranking_names_each_image_once(self, reply):
        with pytest.raises(ValueError, match=r"names?|form"):
            read_ranking(reply, 3)

    def test_a_pattern_that_takes_no_number(self):
        with pytest.raises(ValueError, match="'high' is no number"):
            read_number("Score: high", re.compile(r"Score: (\w+)"), 0, 5)
        with pytest.raises(ValueError, match="nan is outside"):
            read_number("Score: nan", re.compile(r"Score: (\w+)"), 0, 5)

    def test_filling_leaves_other_braces(self):
        assert fill('{"score": {x}} {prompt} {count}', prompt="{count}", count=3) == '{"score": {x}} {count} 3'
        assert "{prompt}" not in fill(AXIS_SCORES, prompt="a")
