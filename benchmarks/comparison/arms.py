"""The arms of a comparison: the model, the prompt and the endpoint, and the facts known before it is measured."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.load.client import ApiTarget
from benchmarks.load.replay import load_recording, replaying
from benchmarks.load.servers import RunningServer, free_port, serve_command, serving
from benchmarks.load.workload import LabelledExample, PromptTemplate
from benchmarks.record import Arm
from models.common.files import sha256_file
from models.store.store import StoredModel

FINE_TUNE, BASE, HOSTED = "fine-tune", "base-few-shot", "hosted"
KEY_VARIABLE = "DESKSIDE_HOSTED_KEY"


@dataclass(frozen=True, slots=True)
class ArmPlan:
    """The plan of one arm. `start` opens its server; `facts` is the arm's record, still without samples.

    `chat` picks the endpoint; `fields` go into every request, `body` overrides them (a null removes a field).
    `limit_field` is the name that the server gives to an answer's length.
    """

    facts: Arm
    prompt: PromptTemplate
    start: Callable[[], AbstractContextManager[RunningServer]]
    chat: bool
    fields: Mapping[str, Any]
    key: str | None = field(default=None, repr=False)
    body: Mapping[str, Any] = field(default_factory=dict)
    limit_field: str = "max_tokens"

    def limited(self, max_tokens: int) -> "ArmPlan":
        """The same plan with answers of at most `max_tokens`."""
        facts = self.facts.model_copy(update={"max_tokens": max_tokens})
        return replace(self, facts=facts, fields={**self.fields, self.limit_field: max_tokens})

    def request(self, example: LabelledExample) -> tuple[str, Mapping[str, Any]]:
        """The prompt for an example, and the fields of its request."""
        before = self.prompt.said_before(example)
        if not before:
            return self.prompt.render(example.text), self.fields
        if self.chat:
            prompt = self.prompt.render(example.text)
            messages = [{"role": role, "content": text} for role, text in (*before, ("user", prompt))]
            return prompt, {**self.fields, "messages": messages}
        said = "\n\n".join(f"{role}: {text}" for role, text in before)
        return self.prompt.render(f"{said}\n\nuser: {example.text}"), self.fields

    def with_facts(self, facts: Arm) -> "ArmPlan":
        """The same plan with other facts."""
        return replace(self, facts=facts)

    def target(self, base_url: str) -> ApiTarget:
        """The arm's model at the server that `start` opened."""
        return ApiTarget(base_url, self.facts.model, self.key, self.body)


def fine_tune_arm(stored: StoredModel, prompt: PromptTemplate, url: str | None) -> ArmPlan:
    """The local fine-tune, asked as in training: chat endpoint, short prompt."""
    facts = _local_facts(FINE_TUNE, stored, prompt, "/v1/chat/completions", url)
    fields = {"temperature": 0}
    return ArmPlan(facts=facts, prompt=prompt, start=_local(stored, url), chat=True, fields=fields)


def base_arm(stored: StoredModel, prompt: PromptTemplate, url: str | None) -> ArmPlan:
    """The local base model. It is not tuned for chat, so it continues the few-shot prompt to the end of the line."""
    facts = _local_facts(BASE, stored, prompt, "/v1/completions", url)
    fields = {"temperature": 0, "stop": "\n"}
    return ArmPlan(facts=facts, prompt=prompt, start=_local(stored, url), chat=False, fields=fields)


def hosted_arm(url: str, model: str, prompt: PromptTemplate, key: str | None, body: Mapping[str, Any]) -> ArmPlan:
    """A real hosted API that gets the few-shot prompt as one user message."""
    facts = Arm(
        name=HOSTED,
        kind="measured",
        model=model,
        prompt=prompt.name,
        endpoint="/v1/chat/completions",
        source=f"measured at {url}",
    )
    fields = {"temperature": 0}

    def start() -> AbstractContextManager[RunningServer]:
        return nullcontext(RunningServer(url, 0.0))

    return ArmPlan(
        facts=facts,
        prompt=prompt,
        start=start,
        chat=True,
        fields=fields,
        key=key,
        body=body,
        limit_field="max_completion_tokens",
    )


def replayed_arm(prompt: PromptTemplate, seed: int) -> ArmPlan:
    """The stand-in for a hosted API: latencies drawn from a recording, accuracy not measured."""
    recording = load_recording()
    facts = Arm(
        name=f"{HOSTED} (replayed)",
        kind="replayed",
        model=recording.model,
        prompt=prompt.name,
        endpoint="/v1/chat/completions",
        source=(
            f"replayed: latencies drawn from recorded quantiles of {recording.model} at {recording.host}, "
            f"{recording.date}, {recording.workload}; {recording.source}"
        ),
        streams=False,
        measures_accuracy=False,
    )

    @contextmanager
    def start() -> Iterator[RunningServer]:
        with replaying(recording, seed) as (url, _):
            yield RunningServer(url, 0.0)

    return ArmPlan(facts=facts, prompt=prompt, start=start, chat=True, fields={})


def _local(stored: StoredModel, url: str | None) -> Callable[[], AbstractContextManager[RunningServer]]:
    def start() -> AbstractContextManager[RunningServer]:
        if url is not None:
            return nullcontext(RunningServer(url, 0.0))
        port = free_port()
        # By path: a folder outside the store may have the name of a model inside it.
        model = str(stored.folder if stored.manifest else stored.gguf)
        return serving(serve_command(model, port), port)

    return start


def _local_facts(name: str, stored: StoredModel, prompt: PromptTemplate, endpoint: str, url: str | None) -> Arm:
    artefact = stored.manifest.artefacts[0] if stored.manifest and stored.manifest.artefacts else None
    return Arm(
        name=name,
        kind="measured",
        model=stored.name,
        prompt=prompt.name,
        endpoint=endpoint,
        quantization=artefact.quantization if artefact else None,
        size_bytes=stored.gguf.stat().st_size,
        sha256=artefact.sha256 if artefact else sha256_file(stored.gguf),
        source=f"measured at {url}" if url else "measured: `deskside serve` started for this run, default settings",
    )
