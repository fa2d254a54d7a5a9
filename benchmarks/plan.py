"""From what the user asked for to a run that can start: every fault in it is found before a server starts."""

import json
import os
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field

from models.common.files import sha256_file
from models.manifest import Prompt as ManifestPrompt
from models.store.store import Store

from .arms import BASE, FINE_TUNE, HOSTED, ArmPlan, base_arm, fine_tune_arm, hosted_arm, replayed_arm
from .errors import BadWorkload
from .record import Noun, Workload
from .run import RunPlan
from .workload import Prompt, draw, labels_of, read_examples, read_prompt, template_prompt

WARMUP = 2
QUICK = {"requests": 6, "concurrency": "1,4"}
KEY_VARIABLE = "DESKSIDE_HOSTED_KEY"


class Settings(Noun):
    """What `deskside bench` can be told. `quick` changes the defaults that make a run long."""

    model: str = Field(default="email-triage", description="The fine-tune: a model of the store, or a path.")
    base: str = Field(default="gemma-3-270m", description="The base model that gets the few-shot prompt.")
    examples: Path | None = Field(
        default=None, description="Labelled chat records, .jsonl or .jsonl.gz (default: test split)."
    )
    few_shot: Path | None = Field(default=None, description="Prompt file with {mail} once (default: the model's own).")
    requests: int = Field(default=64, ge=1, description="Requests per arm and level; a p90 needs 64.")
    concurrency: str = Field(default="1,4,16", description="Levels of the closed loop, users at a time.")
    arms: str = Field(default=f"{FINE_TUNE},{BASE},{HOSTED}", description="Which arms to run.")
    url: str | None = Field(
        default=None, description="A server (…/v1) that has the fine-tune, instead of one of our own."
    )
    base_url: str | None = Field(default=None, description="A server (…/v1) that has the base model.")
    hosted_url: str | None = Field(default=None, description="A hosted API (…/v1) to measure instead of the replay.")
    hosted_model: str | None = Field(default=None, description=f"Its model. The key is read from ${KEY_VARIABLE}.")
    hosted_body: str = Field(default="{}", description="JSON merged over each hosted request; a null removes a field.")
    quick: bool = Field(
        default=False, description="A few requests only: shows that everything works, measures nothing well."
    )
    seed: int = Field(default=0, description="Which examples each level gets, and the replayed latencies.")
    out: Path | None = Field(default=None, description="Where the JSON goes (default: results/bench-<time>.json).")


def recipe_file(*parts: str) -> Path:
    """A file of the default model's folder in the `models` package."""
    return Path(str(resources.files("models"))).joinpath("email_triage", *parts)


def make_plan(settings: Settings, store: Store) -> RunPlan:
    """Read the examples and prompts, look the models up, and draw who gets what.

    Raises BadWorkload, ModelNotFound and BadManifest.
    """
    if settings.quick:
        given = settings.model_fields_set
        settings = settings.model_copy(update={name: value for name, value in QUICK.items() if name not in given})
    path = settings.examples or recipe_file("data", "test.jsonl.gz")
    examples = read_examples(path)
    levels = _integers(settings.concurrency)
    drawn = draw(examples, levels, settings.requests, WARMUP, settings.seed)
    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    workload = Workload(
        examples=path.name,
        sha256=sha256_file(path),
        available=len(examples),
        requests_per_level=settings.requests,
        concurrency=tuple(levels),
        seed=settings.seed,
        labels=labels_of(examples),
    )
    few_shot = read_prompt(settings.few_shot or recipe_file("prompts", "few_shot.txt"), "few-shot prompt")
    arms = []
    for name in settings.arms.split(","):
        arm = _arm(name.strip(), settings, few_shot, store)
        share = arm.prompt.shared_share(examples)
        arms.append(arm.with_facts(arm.facts.model_copy(update={"shared_share": share})))
    return RunPlan(arms, workload, drawn, settings.out or Path("results") / f"bench-{started}.json")


def _arm(name: str, settings: Settings, few_shot: Prompt, store: Store) -> ArmPlan:
    if name == FINE_TUNE:
        stored = store.resolve(settings.model)
        template = (stored.manifest.prompt if stored.manifest else ManifestPrompt()).template
        return fine_tune_arm(stored, template_prompt("short prompt", template), settings.url)
    if name == BASE:
        return base_arm(store.resolve(settings.base), few_shot, settings.base_url)
    if name != HOSTED:
        raise BadWorkload(f"no arm is called {name!r}; there are {FINE_TUNE!r}, {BASE!r} and {HOSTED!r}")
    if settings.hosted_url is None:
        return replayed_arm(few_shot, settings.seed)
    if settings.hosted_model is None:
        raise BadWorkload("--hosted-url needs --hosted-model")
    key = os.environ.get(KEY_VARIABLE)
    return hosted_arm(settings.hosted_url, settings.hosted_model, few_shot, key, _body(settings.hosted_body))


def _body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise BadWorkload(f"--hosted-body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadWorkload(f"--hosted-body must be a JSON object, got {text!r}")
    return body


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadWorkload(f"--concurrency must be whole numbers with commas between, got {text!r}") from error
