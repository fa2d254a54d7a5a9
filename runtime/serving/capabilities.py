"""The endpoints and features of a model, known from its manifest and chat template before it is loaded."""

from functools import lru_cache

from models.manifest import Manifest
from runtime.errors import InvalidRequest, TemplateFailed
from runtime.openai.tool_calls import probe, recognise
from runtime.prompt.template import ChatTemplate


def capabilities(manifest: Manifest | None, template: str) -> list[str]:
    """The endpoints and features that a model answers; `template` is its chat template, empty if it has none."""
    unlabelled = manifest is not None and manifest.fine_tuned and not manifest.labels
    return ["completion", *_of_template(template), *(() if unlabelled else ("decisions",)), "embeddings"]


@lru_cache(maxsize=64)
def _of_template(source: str) -> tuple[str, ...]:
    if not source:
        return ()
    try:
        template = ChatTemplate(source)
    except TemplateFailed:
        return ()
    return ("chat", "tools") if _calls_tools(template) else ("chat",)


def _calls_tools(template: ChatTemplate) -> bool:
    """True if the template reads tools, and writes calls in a known format."""
    if "tools" not in template.variables:
        return False
    turns, tools = probe()
    shared = {"tools": tools, "bos_token": "", "eos_token": ""}
    try:
        before = template.render({**shared, "messages": turns[:1], "add_generation_prompt": True})
        whole = template.render({**shared, "messages": turns, "add_generation_prompt": False})
    except (InvalidRequest, TemplateFailed):
        before = whole = ""
    return recognise(whole, whole.removeprefix(before.rstrip()), template.written) is not None
