"""What `/v1/models` says that a model can do is what it then does."""

from typing import Any

import pytest

from models.manifest import Manifest
from runtime.server.models import capabilities
from tests.support.runtime import tool_templates as templates
from tests.support.runtime.fakes import FAKE_TEMPLATE, FakeLlama
from tests.support.runtime.serving import serving

USER: Any = {"role": "user", "content": "hi"}
TOOL: Any = {"type": "function", "function": {"name": "f"}}
QUESTION: Any = {"type": "predicate", "instructions": "It is red."}
WRITER = Manifest(name="toy", licence="none", task="write")
SORTER = Manifest(name="toy", licence="none", task="classify", labels=("a", "b"))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("", []),
        ("{% broken", []),
        (FAKE_TEMPLATE, ["chat"]),
        (templates.NO_TOOLS, ["chat"]),
        (templates.XML, ["chat"]),
        ("{{ tools }}{% if messages[1] %}{{ raise_exception('no calls') }}{% endif %}", ["chat"]),
        *((template, ["chat", "tools"]) for template in templates.TWO_CALLS),
    ],
)
def test_a_template_shows_whether_a_model_chats_and_calls(template: str, expected: list[str]) -> None:
    assert capabilities(None, template) == ["completion", *expected, "decisions", "embeddings"]


def test_a_fine_tune_without_labels_answers_no_questions() -> None:
    assert "decisions" not in capabilities(WRITER, FAKE_TEMPLATE)
    assert "decisions" in capabilities(SORTER, FAKE_TEMPLATE)


@pytest.mark.parametrize("template", [FAKE_TEMPLATE, templates.HERMES], ids=["chat", "tools"])
@pytest.mark.parametrize("manifest", [None, WRITER], ids=["general", "writer"])
def test_a_listed_capability_is_answered_and_another_is_refused(template: str, manifest: Manifest | None) -> None:
    with serving(FakeLlama(n_ctx=1024, script="ok", template=template), manifest=manifest) as toy:
        (listed,) = toy.http.get("/v1/models").json()["data"]
        assert listed["max_model_len"] == 1024
        asked = {
            "chat": ("/v1/chat/completions", {"messages": [USER], "max_tokens": 1}),
            "tools": ("/v1/chat/completions", {"messages": [USER], "max_tokens": 1, "tools": [TOOL]}),
            "decisions": ("/v1/decisions", {"input": "x", "questions": [QUESTION]}),
            "embeddings": ("/v1/embeddings", {"input": "x"}),
            "completion": ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
        }
        for capability, (path, body) in asked.items():
            assert toy.http.post(path, json=body).is_success == (capability in listed["capabilities"]), capability
