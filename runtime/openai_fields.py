"""OpenAI's body fields, row by row: which are used, which ignored, which refused. Each row has a test.

A field that is not here is refused by name. `null` counts as absent everywhere.
"""

import difflib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import InvalidRequest

Kind = Literal["chat", "completion"]
Treatment = Literal["used", "ignored", "refused"]

_BOTH: tuple[Kind, ...] = ("chat", "completion")


@dataclass(frozen=True, slots=True)
class FieldRule:
    """What happens to a body field. A refused one is let pass with a value of `harmless`, which asks for nothing."""

    name: str
    treatment: Treatment
    kinds: tuple[Kind, ...] = _BOTH
    harmless: tuple[Any, ...] = ()


FIELDS: tuple[FieldRule, ...] = (
    *(FieldRule(name, "used") for name in ("model", "stream", "stream_options", "max_tokens", "temperature", "top_p")),
    *(FieldRule(name, "used") for name in ("top_k", "min_p", "seed", "stop", "n", "logprobs", "logit_bias")),
    *(FieldRule(name, "used") for name in ("presence_penalty", "frequency_penalty", "ignore_eos")),
    *(FieldRule(name, "used") for name in ("grammar", "regex", "choice")),
    *(
        FieldRule(name, "used", ("chat",))
        for name in ("messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice")
    ),
    FieldRule("prompt", "used", ("completion",)),
    # These say who asks, what to keep or how to bill; no answer depends on them.
    *(FieldRule(name, "ignored") for name in ("user", "metadata", "store", "service_tier", "safety_identifier")),
    *(FieldRule(name, "ignored") for name in ("prompt_cache_key", "prompt_cache_retention")),
    FieldRule("parallel_tool_calls", "used", ("chat",)),
    FieldRule("functions", "refused", ("chat",), ([],)),
    FieldRule("function_call", "refused", ("chat",), ("none", "auto")),
    FieldRule("modalities", "refused", ("chat",), (["text"],)),
    *(FieldRule(name, "refused", ("chat",)) for name in ("audio", "prediction", "web_search_options", "verbosity")),
    FieldRule("reasoning_effort", "refused", ("chat",), ("none",)),
    FieldRule("cache_prompt", "refused", _BOTH, (True,)),
    FieldRule("echo", "refused", ("completion",), (False,)),
    FieldRule("suffix", "refused", ("completion",), ("",)),
    FieldRule("best_of", "refused", ("completion",), (1,)),
)

MESSAGE_FIELDS_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "name": (),
    "function_call": (),
    "audio": (),
    "refusal": (),
    "annotations": ([],),
}


def rules(kind: Kind) -> dict[str, FieldRule]:
    """The rows of FIELDS that hold for `kind`, by name."""
    return {rule.name: rule for rule in FIELDS if kind in rule.kinds}


def used_fields(kind: Kind, payload: object) -> dict[str, Any]:
    """What of a body is to be read. Raises InvalidRequest if it is no object, and for unknown and refused fields."""
    return read_fields(rules(kind), payload)


def read_fields(known: Mapping[str, FieldRule], payload: object) -> dict[str, Any]:
    """As `used_fields`, by the rows of any table."""
    if not isinstance(payload, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {reprlib.repr(payload)}")
    used = {}
    for name, value in payload.items():
        rule = known.get(name)
        if rule is None:
            near = difflib.get_close_matches(name[:64], known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidRequest(f"unknown field {reprlib.repr(name)}{hint}", param=name[:64], code="unknown_parameter")
        if value is None or rule.treatment == "ignored":
            continue
        if rule.treatment == "used":
            used[name] = value
        elif not any(type(value) is type(fine) and value == fine for fine in rule.harmless):
            allowed = " or ".join(["null", *(json.dumps(fine) for fine in rule.harmless)])
            message = f"{name!r} is not supported; only {allowed} is accepted, got {reprlib.repr(value)}"
            raise InvalidRequest(message, param=name, code="unsupported_parameter")
    return used
