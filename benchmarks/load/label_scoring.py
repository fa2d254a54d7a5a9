"""How likely a model finds each label as its whole answer: exact log-probabilities, asked over HTTP.

Free text is no fair measure of a base model: one that begins its answer with an empty line has said nothing about which
label it finds likeliest. So every label is scored as it would be written, a space, the label and the end of the line,
and the likeliest is the answer. The end counts: without it `spam` would win over `spamassassin-talk` as its beginning.

A completion can be made to say a token by `logit_bias`, and tells its log-probability: forcing each token of each label
after the ones before it gives the label's, by the chain rule. This needs *our* server's semantics: it reports the
log-probability under the model's raw distribution, before the bias. Where the biased distribution is reported, every
forced token has probability 1; that is noticed and refused. Once the server answers `/v1/decisions` it does all this
in one request, and this file can go.
"""

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import httpx

from benchmarks.errors import ServerFailed

# An OpenAI server takes no larger bias. It wins unless a logit leads by more, which is noticed.
FORCING_BIAS = 100
# Tokenizers of the Gemma kind have a token of their own for several newlines: both end the line.
LINE_ENDS = ("\n", "\n\n")
# The sum over some tokens of one distribution is at most 1, give or take what the batch's shape does to logits.
MOST_PROBABILITY = 1.5
# 128 answers together: few enough for the server's queue, enough to fill its steps.
BRANCHES_PER_REQUEST = 8
REQUESTS_AT_ONCE = 16
ERROR_CHARS = 300

TokenIds = tuple[int, ...]
Paths = Mapping[str, Sequence[TokenIds]]


class ForcedToken(NamedTuple):
    """A token of the tree of labels, and the label tokens before it."""

    prefix: TokenIds
    token: int


def branches_of(tokens: TokenIds) -> Iterable[ForcedToken]:
    """Each token of a path with those before it."""
    return (ForcedToken(tokens[:place], token) for place, token in enumerate(tokens))


def disjoint(ways: Iterable[TokenIds]) -> list[TokenIds]:
    """Token paths none of which begins with an earlier one: such a one's probability is counted there already."""
    kept: list[TokenIds] = []
    for tokens in ways:
        if not any(tokens[: len(earlier)] == earlier for earlier in kept):
            kept.append(tokens)
    return kept


def requests_of(paths: Paths) -> list[list[ForcedToken]]:
    """Every branch of the tree once, those of one token together, as one bias serves them; a first token first."""
    unique = dict.fromkeys(branch for ways in paths.values() for tokens in ways for branch in branches_of(tokens))
    by_token: dict[int, list[ForcedToken]] = {}
    for branch in sorted(unique, key=lambda branch: len(branch.prefix)):
        by_token.setdefault(branch.token, []).append(branch)
    size = BRANCHES_PER_REQUEST
    return [same[start : start + size] for same in by_token.values() for start in range(0, len(same), size)]


def label_logprobs(paths: Paths, logprobs: Mapping[ForcedToken, float]) -> dict[str, float]:
    """Natural log of each label's probability: over a path's branches the product, over a label's paths the sum."""
    return {
        label: _log_sum([sum(logprobs[branch] for branch in branches_of(tokens)) for tokens in ways])
        for label, ways in paths.items()
    }


def _log_sum(logs: Sequence[float]) -> float:
    highest = max(logs)
    return highest + math.log(sum(math.exp(value - highest) for value in logs))


class LabelScorer:
    """Scores `labels` after prompts that end where the label's leading space would follow, at `base_url` (`…/v1`)."""

    def __init__(
        self, base_url: str, model: str, labels: Sequence[str], *, key: str | None = None, timeout_s: float = 300.0
    ) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        root = base_url.rstrip("/").removesuffix("/v1")
        self._http = httpx.AsyncClient(
            base_url=root, headers=headers, timeout=timeout_s, limits=limits, trust_env=False
        )
        self._model = model
        self._labels = tuple(labels)
        self._texts: dict[int, str] = {}
        self._turn = asyncio.Semaphore(REQUESTS_AT_ONCE)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def score(self, prompt: str) -> dict[str, float]:
        """Label -> its log-probability (natural) after `prompt`, in the order of the labels.

        Raises ServerFailed when a request fails, a forced token is not the one that came, a label's tokens do not
        follow the prompt's own, or the server reports log-probabilities after the bias.
        """
        prompt_tokens = await self._tokenize(prompt)
        ways = await asyncio.gather(*(self._ways(prompt, prompt_tokens, label) for label in self._labels))
        paths = dict(zip(self._labels, ways, strict=True))
        first, *others = requests_of(paths)
        # The first request computes the prompt, so that all the others find it in the cache.
        logprobs = await self._force(prompt_tokens, first)
        for found in await asyncio.gather(*(self._force(prompt_tokens, branches) for branches in others)):
            logprobs |= found
        _check_raw(logprobs)
        return label_logprobs(paths, logprobs)

    async def _ways(self, prompt: str, prompt_tokens: TokenIds, label: str) -> list[TokenIds]:
        """The tokens of the label's line, one path for each way in which the line may end."""
        ways = []
        for end in LINE_ENDS:
            tokens = await self._tokenize(f"{prompt} {label}{end}")
            if tokens[: len(prompt_tokens)] != prompt_tokens:
                raise ServerFailed(f"label {label!r} cannot be scored: its first token takes in the prompt's end")
            ways.append(tokens[len(prompt_tokens) :])
        return disjoint(ways)

    async def _force(self, prompt: TokenIds, branches: Sequence[ForcedToken]) -> dict[ForcedToken, float]:
        """The log-probabilities of branches that have the same token."""
        token = branches[0].token
        body = {
            "model": self._model,
            "prompt": [[*prompt, *branch.prefix] for branch in branches],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 0,
            "logit_bias": {str(token): FORCING_BIAS},
        }
        choices = await self._post("/v1/completions", body, "choices")
        text = await self._text_of(token)
        try:
            if other := [choice["text"] for choice in choices if choice["text"] != text]:
                raise ServerFailed(
                    f"token {token} ({text!r}) was forced and {other[0]!r} came: "
                    f"its logit is more than {FORCING_BIAS} below the highest"
                )
            logprobs = (float(choice["logprobs"]["token_logprobs"][0]) for choice in choices)
            return dict(zip(branches, logprobs, strict=True))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerFailed(f"/v1/completions gave no log-probability of a forced token: {error!r}") from error

    async def _tokenize(self, text: str) -> TokenIds:
        body = {"model": self._model, "content": text, "add_special": True}
        return tuple(await self._post("/tokenize", body, "tokens"))

    async def _text_of(self, token: int) -> str:
        if token not in self._texts:
            body = {"model": self._model, "tokens": [token]}
            self._texts[token] = str(await self._post("/detokenize", body, "content"))
        return self._texts[token]

    async def _post(self, path: str, body: Mapping[str, Any], field: str) -> Any:
        try:
            async with self._turn:
                response = await self._http.post(path, json=body)
            if response.status_code != 200:
                raise ServerFailed(f"{path}: HTTP {response.status_code}: {response.text[:ERROR_CHARS]}")
            return response.json()[field]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ServerFailed(f"{path} cannot be used: {type(error).__name__}: {error}"[:ERROR_CHARS]) from error


def _check_raw(logprobs: Mapping[ForcedToken, float]) -> None:
    """Raise ServerFailed if tokens after one prefix have more probability together than there is."""
    together: dict[TokenIds, float] = {}
    for branch, logprob in logprobs.items():
        together[branch.prefix] = together.get(branch.prefix, 0.0) + math.exp(logprob)
    if (most := max(together.values())) > MOST_PROBABILITY:
        raise ServerFailed(
            f"tokens of one distribution have probability {most:.2f} together: this server reports log-probabilities "
            "after logit_bias; labels can be scored with `deskside serve` only"
        )
