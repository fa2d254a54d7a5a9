"""Exact log-probabilities of each label as the whole answer, computed over HTTP.

Free text is no fair measure of a base model: an answer that begins with an empty line does not show which label the
model prefers. So every label is scored as the model would write it (a space, the label, the end of the
line), and the likeliest is the answer. The line end matters: without it `spam`, as the beginning of
`spamassassin-talk`, would win over it.

`logit_bias` forces a completion to write a token, and the response has the token's log-probability. By the chain rule,
forcing each token of a label after its predecessors gives the label's log-probability. This needs *our* server's
semantics: log-probabilities of the model's raw distribution, before the bias. Under the biased distribution every
forced token has probability 1; such a server is detected and refused.
"""

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import httpx

from benchmarks.errors import ServerFailed

from .client import ERROR_CHARS, ApiTarget

# The largest bias that OpenAI allows. A logit that leads by more wins against it, which raises ServerFailed.
FORCING_BIAS = 100
# Gemma's tokenizer has a token for two newlines: both end the line.
LINE_ENDS = ("\n", "\n\n")
# Probabilities of tokens after one prefix sum to at most 1, up to the batch shape's effect on logits.
MOST_PROBABILITY = 1.5
# 128 answers at once: they fit into the server's queue and fill its steps.
TOKENS_PER_REQUEST = 8
REQUESTS_AT_ONCE = 16

TokenIds = tuple[int, ...]
Paths = Mapping[str, Sequence[TokenIds]]


class ForcedToken(NamedTuple):
    """A token of the tree of labels with the label tokens before it."""

    prefix: TokenIds
    token: int


def forced_tokens(tokens: TokenIds) -> Iterable[ForcedToken]:
    """Each token of a path with its prefix."""
    return (ForcedToken(tokens[:place], token) for place, token in enumerate(tokens))


def disjoint(ways: Iterable[TokenIds]) -> list[TokenIds]:
    """Drop token paths that begin with an earlier one: its probability includes theirs."""
    kept: list[TokenIds] = []
    for tokens in ways:
        if not any(tokens[: len(earlier)] == earlier for earlier in kept):
            kept.append(tokens)
    return kept


def requests_of(paths: Paths) -> list[list[ForcedToken]]:
    """Each forced token of the tree once, grouped by token since they share a bias, shortest prefix first."""
    unique = dict.fromkeys(item for ways in paths.values() for tokens in ways for item in forced_tokens(tokens))
    by_token: dict[int, list[ForcedToken]] = {}
    for item in sorted(unique, key=lambda item: len(item.prefix)):
        by_token.setdefault(item.token, []).append(item)
    size = TOKENS_PER_REQUEST
    return [same[start : start + size] for same in by_token.values() for start in range(0, len(same), size)]


def label_logprobs(paths: Paths, logprobs: Mapping[ForcedToken, float]) -> dict[str, float]:
    """Natural log of each label's probability: the product along a path, summed over the label's paths."""
    return {
        label: _log_sum([sum(logprobs[item] for item in forced_tokens(tokens)) for tokens in ways])
        for label, ways in paths.items()
    }


class LabelScorer:
    """Scores `labels` after prompts that end where the label's leading space follows."""

    def __init__(self, target: ApiTarget, labels: Sequence[str], *, timeout_s: float = 300.0) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(
            base_url=target.base_url.rstrip("/").removesuffix("/v1"),
            headers=target.headers,
            timeout=timeout_s,
            limits=limits,
            trust_env=False,
            verify=target.uses_tls,
        )
        self._model = target.model
        self._labels = tuple(labels)
        self._texts: dict[int, str] = {}
        self._slots = asyncio.Semaphore(REQUESTS_AT_ONCE)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def score(self, prompt: str) -> dict[str, float]:
        """Label -> its natural log-probability after `prompt`, in the order of the labels.

        Raises ServerFailed when a request fails, the model writes another token than the forced one, a label changes
        the tokens of the prompt, or the server reports log-probabilities after the bias.
        """
        prompt_tokens = await self._tokenize(prompt)
        ways = await asyncio.gather(*(self._ways(prompt, prompt_tokens, label) for label in self._labels))
        paths = dict(zip(self._labels, ways, strict=True))
        first, *others = requests_of(paths)
        # The first request prefills the prompt; the others find it in the prefix cache.
        logprobs = await self._force(prompt_tokens, first)
        for found in await asyncio.gather(*(self._force(prompt_tokens, forced) for forced in others)):
            logprobs |= found
        _check_raw(logprobs)
        return label_logprobs(paths, logprobs)

    async def _ways(self, prompt: str, prompt_tokens: TokenIds, label: str) -> list[TokenIds]:
        """Token paths of the label's line, one per line end."""
        ways = []
        for end in LINE_ENDS:
            tokens = await self._tokenize(f"{prompt} {label}{end}")
            if tokens[: len(prompt_tokens)] != prompt_tokens:
                raise ServerFailed(f"label {label!r} cannot be scored: its first token takes in the prompt's end")
            ways.append(tokens[len(prompt_tokens) :])
        return disjoint(ways)

    async def _force(self, prompt: TokenIds, forced: Sequence[ForcedToken]) -> dict[ForcedToken, float]:
        """The log-probabilities of `forced`, which all force the same token."""
        token = forced[0].token
        body: dict[str, Any] = {"model": self._model, "prompt": [[*prompt, *item.prefix] for item in forced]}
        body |= {"max_tokens": 1, "temperature": 0, "logprobs": 0, "logit_bias": {str(token): FORCING_BIAS}}
        choices = await self._post("/v1/completions", body, "choices")
        text = await self._text_of(token)
        try:
            if other := [choice["text"] for choice in choices if choice["text"] != text]:
                raise ServerFailed(
                    f"token {token} ({text!r}) was forced and {other[0]!r} came: "
                    f"its logit is more than {FORCING_BIAS} below the highest"
                )
            logprobs = (float(choice["logprobs"]["token_logprobs"][0]) for choice in choices)
            return dict(zip(forced, logprobs, strict=True))
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
            async with self._slots:
                response = await self._http.post(path, json=body)
            if response.status_code != 200:
                raise ServerFailed(f"{path}: HTTP {response.status_code}: {response.text[:ERROR_CHARS]}")
            return response.json()[field]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ServerFailed(f"{path} cannot be used: {type(error).__name__}: {error}"[:ERROR_CHARS]) from error


def _check_raw(logprobs: Mapping[ForcedToken, float]) -> None:
    """Raise ServerFailed if the probabilities of tokens after one prefix sum to more than 1."""
    together: dict[TokenIds, float] = {}
    for item, logprob in logprobs.items():
        together[item.prefix] = together.get(item.prefix, 0.0) + math.exp(logprob)
    if (most := max(together.values())) > MOST_PROBABILITY:
        raise ServerFailed(
            f"tokens of one distribution have probability {most:.2f} together: this server reports log-probabilities "
            "after logit_bias; labels can be scored with `deskside serve` only"
        )


def _log_sum(logs: Sequence[float]) -> float:
    highest = max(logs)
    return highest + math.log(sum(math.exp(value - highest) for value in logs))
