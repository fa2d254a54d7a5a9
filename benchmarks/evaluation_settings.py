"""What `deskside eval` can be told, and the evaluation that becomes of it."""

from pathlib import Path

from pydantic import Field

from models.manifest import Prompt as ManifestPrompt
from models.store.store import Store

from .arms import base_arm, fine_tune_arm
from .evaluate import Task
from .plan import recipe_file
from .record import Noun
from .workload import read_prompt, template_prompt


class EvalSettings(Noun):
    """Without `prompt`, the model is asked through the chat endpoint as its manifest says."""

    examples: Path | None = Field(
        default=None, description="Labelled chat records (default: email-triage's test split)."
    )
    prompt: Path | None = Field(
        default=None, description="Prompt file with {mail} once, to be continued by a base model."
    )
    url: str | None = Field(default=None, description="A running server (…/v1), instead of one of our own.")
    concurrency: int = Field(default=8, ge=1, description="Requests at a time.")
    out: Path | None = Field(
        default=None, description="Keep each answer in this JSON file; a second run goes on from it."
    )


def make_task(model: str, settings: EvalSettings, store: Store) -> Task:
    """Look the model and the files up. Raises ModelNotFound, BadManifest, BadWorkload."""
    stored = store.resolve(model)
    if settings.prompt is None:
        template = (stored.manifest.prompt if stored.manifest else ManifestPrompt()).template
        arm = fine_tune_arm(stored, template_prompt("short prompt", template), settings.url)
    else:
        arm = base_arm(stored, read_prompt(settings.prompt), settings.url)
    examples = settings.examples or recipe_file("data", "test.jsonl.gz")
    return Task(arm, examples, settings.concurrency, settings.out)
