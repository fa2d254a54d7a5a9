"""Labels scored through a stand-in server whose distribution is known: the sums come out exactly, or it is an error."""

import asyncio
import json
import math
import random
from collections.abc import MutableMapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison.arms import ArmPlan
from benchmarks.comparison.evaluate import Evaluation, EvaluationTask, evaluate, load_evaluation, save_evaluation
from benchmarks.errors import ServerFailed
from benchmarks.load.client import ApiTarget
from benchmarks.load.label_scoring import ForcedToken, LabelScorer, disjoint, label_logprobs, requests_of
from benchmarks.load.servers import RunningServer
from benchmarks.load.workload import PromptTemplate
from benchmarks.record import Arm, save_json
from tests.support.benchmarks.stand_in import Send, read_json, running

PIECES = ("<bos>", " spam", "assassin", " exmh", "-users", "-workers", "\n", "\n\n", "= ", *map(chr, range(32, 127)))
LABELS = ("spam", "spamassassin", "exmh-users", "exmh-workers")


def encode(text: str) -> list[int]:
    """Longest piece first, after a token that begins every text."""
    tokens = [0]
    while text:
        piece = max((piece for piece in PIECES if text.startswith(piece)), key=len)
        tokens.append(PIECES.index(piece))
        text = text[len(piece) :]
    return tokens


class ToyModel:
    """A server with our semantics over a made-up distribution, the same for the same tokens.

    `lead` is added to one piece's logit; `biased` reports the log-probability after the bias, as other servers may.
    """

    def __init__(self, lead: tuple[str, float] | None = None, *, biased: bool = False) -> None:
        self.lead = lead
        self.biased = biased
        self.asked: list[tuple[tuple[int, ...], int]] = []

    def logits(self, tokens: Sequence[int]) -> list[float]:
        """One logit for each piece."""
        draw = random.Random(str(list(tokens)))
        logits = [draw.gauss(0, 3) for _ in PIECES]
        if self.lead:
            logits[PIECES.index(self.lead[0])] += self.lead[1]
        return logits

    def logprob(self, tokens: Sequence[int], token: int) -> float:
        """Of `token` after `tokens`."""
        logits = self.logits(tokens)
        return logits[token] - math.log(sum(map(math.exp, logits)))

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The forced token of each prompt, if its bias suffices, and its log-probability."""
        assert (body["max_tokens"], body["temperature"], body["logprobs"]) == (1, 0, 0)
        ((forced, bias),) = body["logit_bias"].items()
        choices = []
        for prompt in body["prompt"]:
            self.asked.append((tuple(prompt), int(forced)))
            logits = self.logits(prompt)
            logits[int(forced)] += bias
            token = logits.index(max(logits))
            logprob = 0.0 if self.biased else self.logprob(prompt, token)
            choices.append({"text": PIECES[token], "logprobs": {"token_logprobs": [logprob]}})
        return {"choices": choices}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> None:
        """Answer one request."""
        body = await read_json(receive)
        assert body["model"] == "toy"
        if scope["path"] == "/tokenize":
            assert body["add_special"] is True
            answer: dict[str, Any] = {"tokens": encode(body["content"])}
        elif scope["path"] == "/detokenize":
            answer = {"content": "".join(PIECES[token] for token in body["tokens"])}
        else:
            assert scope["path"] == "/v1/completions"
            answer = self.complete(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


def score(app: Any, prompt: str, labels: Sequence[str] = LABELS) -> dict[str, float]:
    with running(app) as url:

        async def once() -> dict[str, float]:
            scorer = LabelScorer(ApiTarget(url, "toy"), labels, timeout_s=20)
            try:
                return await scorer.score(prompt)
            finally:
                await scorer.close()

        return asyncio.run(once())


def expected(app: ToyModel, prompt: str, label: str) -> float:
    """By the chain rule, text by text: the label's line ends with one newline or with two."""
    total = 0.0
    for end in ("\n", "\n\n"):
        tokens, start = encode(f"{prompt} {label}{end}"), len(encode(prompt))
        total += math.exp(sum(app.logprob(tokens[:i], tokens[i]) for i in range(start, len(tokens))))
    return math.log(total)


def test_the_scores_are_the_models_own_and_a_shared_branch_is_asked_once() -> None:
    app = ToyModel()
    found = score(app, "Mail:\nhello\nList:")
    assert list(found) == list(LABELS)
    assert found == pytest.approx({label: expected(app, "Mail:\nhello\nList:", label) for label in LABELS}, abs=1e-9)
    # spam, assassin, exmh, two ends of it, and two line ends for each of four labels.
    assert len(app.asked) == len(set(app.asked)) == 5 + 2 * 4
    assert app.asked[0] == (tuple(encode("Mail:\nhello\nList:")), PIECES.index(" spam"))


def test_a_label_is_not_likelier_for_being_the_beginning_of_another() -> None:
    """After `spam`, nearly all goes to `assassin`: as bare tokens, `spam` could not lose."""

    class Certain(ToyModel):
        def logits(self, tokens: Sequence[int]) -> list[float]:
            flat = [0.0] * len(PIECES)
            after = {" spam": "assassin", "assassin": "\n"}.get(PIECES[tokens[-1]], " spam")
            flat[PIECES.index(after)] = 20.0
            return flat

    found = score(Certain(), "List:")
    assert found["spamassassin"] == pytest.approx(0.0, abs=1e-5)
    assert found["spam"] < -19


def test_a_token_that_could_not_be_forced_is_an_error() -> None:
    with pytest.raises(ServerFailed, match=r"token 1 \(' spam'\) was forced and 'x' came: .* more than 100"):
        score(ToyModel(lead=("x", 130.0)), "List:", ["spam", "spamassassin"])
    assert score(ToyModel(lead=("x", 80.0)), "List:")["spam"] < -140


def test_a_server_that_reports_biased_probabilities_is_refused() -> None:
    with pytest.raises(ServerFailed, match=r"have probability 3\.00 together: .* after logit_bias"):
        score(ToyModel(biased=True), "List:")


def test_a_prompt_whose_last_token_takes_in_the_labels_space_is_refused() -> None:
    with pytest.raises(ServerFailed, match="label 'spam' cannot be scored"):
        score(ToyModel(), "list=", ["spam"])


def test_a_refusal_and_an_answer_without_log_probabilities_say_so() -> None:
    class Mute(ToyModel):
        def complete(self, body: dict[str, Any]) -> dict[str, Any]:
            return {"choices": [choice | {"logprobs": None} for choice in super().complete(body)["choices"]]}

    async def full(scope: MutableMapping[str, Any], receive: Any, send: Send) -> None:
        await send({"type": "http.response.start", "status": 429, "headers": []})
        await send({"type": "http.response.body", "body": b"the queue is full"})

    with pytest.raises(ServerFailed, match="no log-probability of a forced token"):
        score(Mute(), "List:")
    with pytest.raises(ServerFailed, match="/tokenize: HTTP 429: the queue is full"):
        score(full, "List:")


def test_two_newlines_count_once_where_they_are_two_tokens() -> None:
    assert disjoint([(5, 1), (5, 1, 1)]) == [(5, 1)]
    assert disjoint([(5, 1), (5, 2)]) == [(5, 1), (5, 2)]


def test_many_branches_of_one_token_are_asked_in_parts() -> None:
    paths = {str(i): [(i, 99)] for i in range(20)}
    requests = requests_of(paths)
    assert [len(request) for request in requests if request[0].token == 99] == [8, 8, 4]
    assert requests[0] == [ForcedToken((), 0)]
    logprobs = {branch: -1.0 for request in requests for branch in request}
    assert len(logprobs) == 40
    assert label_logprobs(paths, logprobs) == {label: pytest.approx(-2.0) for label in paths}


def evaluation(app: ToyModel, folder: Path) -> Evaluation:
    """Six mails, scored by `app`, with the answers kept in `folder`."""
    lines = []
    for i in range(6):
        messages = [{"role": "user", "content": f"mail {i}"}, {"role": "assistant", "content": LABELS[i % 4]}]
        lines.append(json.dumps({"id": str(i), "messages": messages}))
    (folder / "mails.jsonl").write_text("\n".join(lines))
    facts = Arm(name="base", kind="measured", model="toy", prompt="zero_shot", endpoint="/v1/completions")
    with running(app) as url:
        plan = ArmPlan(
            facts,
            PromptTemplate("zero_shot", "Mail:\n", "\nList:"),
            lambda: nullcontext(RunningServer(url, 0.0)),
            False,
            {},
        )
        task = EvaluationTask(plan, folder / "mails.jsonl", 4, folder / "scored.json", "labels scored")
        return evaluate(task, lambda what, done, total: None)


def test_an_evaluation_by_scores_keeps_them_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    app = ToyModel()
    made = evaluation(app, tmp_path)
    assert made.labels == tuple(sorted(LABELS))
    for i, item in enumerate(made.predictions):
        logprobs = {label: expected(app, f"Mail:\nmail {i}\nList:", label) for label in made.labels}
        assert item.label_logprobs == pytest.approx(tuple(logprobs.values()), abs=1e-4)
        assert item.prediction == max(logprobs, key=logprobs.__getitem__)
    assert load_evaluation(tmp_path / "scored.json") == made
    kept = json.loads((tmp_path / "scored.json").read_text())
    save_json(tmp_path / "scored.json", kept | {"predictions": kept["predictions"][:4]})
    again = ToyModel()
    assert evaluation(again, tmp_path) == made
    assert len(again.asked) == 2 * 13


def test_answers_that_were_written_are_not_taken_for_scored_ones(tmp_path: Path) -> None:
    made = evaluation(ToyModel(), tmp_path)
    assert made.source is not None
    written = made.model_copy(update={"source": made.source.model_copy(update={"scoring": "greedy text"})})
    save_evaluation(tmp_path / "scored.json", written)
    again = ToyModel()
    evaluation(again, tmp_path)
    assert len(again.asked) == 6 * 13


def test_a_failure_names_the_mail(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match=r"'toy' could not answer '\d+': token . .* was forced"):
        evaluation(ToyModel(lead=("x", 130.0)), tmp_path)
