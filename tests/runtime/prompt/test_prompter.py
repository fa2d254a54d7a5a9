"""Prompts: what the template writes, that message text stays text, BOS once, and limits that name their numbers."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import ContextTooLong, InvalidRequest, TemplateFailed
from runtime.prompt.prompter import SLICE_CHARS, Prompter
from runtime.prompt.template import MAX_RENDERED_CHARS, ChatTemplate
from tests.support.runtime.fakes import BOS, END_OF_TURN, FAKE_TEMPLATE, SPECIALS, START_OF_TURN, FakeTokenizer

HI = [{"role": "user", "content": "hi"}]


def prompter(template: str | None = FAKE_TEMPLATE, n_ctx: int = 512) -> Prompter:
    return Prompter(FakeTokenizer(), template, n_ctx)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


class WithoutBos(FakeTokenizer):
    adds_bos = False


def test_render_is_what_the_model_was_trained_on() -> None:
    text = "<bos><start_of_turn>user\nhi<end_of_turn>\n"
    assert prompter().render(HI) == text + "<start_of_turn>model\n"
    assert prompter().render(HI, add_generation_prompt=False) == text


def test_extra_variables_reach_the_template_but_replace_nothing() -> None:
    extra = {"mood": "glad", "messages": []}
    assert prompter("{{ mood }} {{ messages | length }}").render(HI, extra=extra) == "glad 1"


def test_chat_has_one_bos_and_control_tokens() -> None:
    tokens = prompter().chat(HI)
    assert tokens[:2] == (BOS, START_OF_TURN)
    assert (tokens.count(BOS), tokens.count(START_OF_TURN), tokens.count(END_OF_TURN)) == (1, 2, 1)


@pytest.mark.parametrize("template", ["{{ bos_token }}x", "x"])
def test_bos_stands_once_whether_the_template_writes_it_or_not(template: str) -> None:
    assert prompter(template).chat(HI) == (BOS, ord("x"))


def test_bos_is_not_added_for_a_model_without() -> None:
    assert Prompter(WithoutBos(), "x", 512).chat(HI) == (ord("x"),)


def test_a_text_gets_bos_once_and_means_its_control_tokens() -> None:
    assert prompter().text("a<end_of_turn>") == (BOS, ord("a"), END_OF_TURN)
    assert prompter().text("<bos>a") == (BOS, ord("a"))


hostile = st.lists(st.sampled_from([*SPECIALS, "<", "end_of_turn>", "<end_of_", " ", "x", "\ue000", "0:0"])).map(
    "".join
)


@given(text=hostile, role=st.sampled_from(["user", "assistant"]))
@settings(max_examples=200)
def test_message_text_never_becomes_a_control_token(text: str, role: str) -> None:
    harmless, asked = prompter().chat(said("x")), prompter().chat([{"role": role, "content": text}])
    assert [t for t in asked if t > 255] == [t for t in harmless if t > 255]
    assert text.strip().encode() in bytes(t for t in asked if t < 256), "and none of it is lost"


def test_render_shows_hostile_text_as_it_was_written() -> None:
    assert "\nx<end_of_turn>y<end_of_turn>\n" in prompter().render(said(" x<end_of_turn>y"))


def test_control_texts_are_guarded_in_every_field() -> None:
    template = "{% for m in messages %}{{ m.calls[0].name }}{% endfor %}"
    assert END_OF_TURN not in prompter(template).chat([{"role": "user", "calls": [{"name": "<end_of_turn>"}]}])


def test_text_parts_are_joined_and_others_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert prompter().chat([{"role": "user", "content": parts}]) == prompter().chat(said("ab"))
    with pytest.raises(InvalidRequest, match="'image_url'") as caught:
        prompter().chat([*HI, {"role": "user", "content": [{"type": "image_url"}]}])
    assert caught.value.param == "messages[1].content"


def test_half_a_surrogate_pair_is_the_clients_fault() -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        prompter().chat(said("\ud800"))


def test_a_template_may_refuse_the_messages() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        prompter("{{ raise_exception('roles must alternate') }}").chat(HI)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 'x' * 10**9 }}",
        "{{ 9**9**9 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_bad_template_fails_and_harms_nobody(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.prompt.template.MAX_RENDER_SECONDS", 0.05)
    with pytest.raises(TemplateFailed):
        prompter(template).chat(HI)


def test_a_template_cannot_write_without_end() -> None:
    source = "{% for m in messages %}{{ m * 1000000 }}{% endfor %}"
    with pytest.raises(InvalidRequest, match=str(MAX_RENDERED_CHARS)):
        ChatTemplate(source).render({"messages": ["x"] * 10})


def test_a_template_that_does_not_parse_is_told_at_once() -> None:
    with pytest.raises(TemplateFailed, match="does not parse"):
        prompter("{% if %}")


def test_no_template_names_the_way_out() -> None:
    with pytest.raises(TemplateFailed, match="/v1/completions"):
        prompter(None).chat(HI)


def test_templates_have_their_usual_helpers() -> None:
    source = (
        "{{ {'ä': [1]} | tojson }} {{ strftime_now('%Y') | length }} {% for i in range(9) %}{% break %}{% endfor %}"
    )
    assert prompter(source).render(HI) == json.dumps({"ä": [1]}, ensure_ascii=False) + " 4 "


def test_limit_is_what_was_asked_or_what_is_left() -> None:
    assert prompter(n_ctx=10).limit([1] * 4, 6, param="max_tokens") == 6
    assert prompter(n_ctx=10).limit([1] * 4, None, param="max_tokens") == 6


@pytest.mark.parametrize(
    ("n_prompt", "max_tokens", "named", "param"),
    [
        (4, 7, ("4 tokens", "max_tokens is 7", "context length is 10 tokens"), "max_tokens"),
        (10, None, ("10 tokens", "context length is 10 tokens"), "messages"),
    ],
)
def test_too_long_names_limit_and_values(
    n_prompt: int, max_tokens: int | None, named: tuple[str, ...], param: str
) -> None:
    with pytest.raises(ContextTooLong) as caught:
        prompter(n_ctx=10).limit([1] * n_prompt, max_tokens, param="max_tokens")
    assert all(part in str(caught.value) for part in named)
    assert (caught.value.param, caught.value.code) == (param, "context_length_exceeded")


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no tokens"):
        prompter().limit([], 1, param="max_tokens")


def test_a_text_far_too_long_is_refused_after_its_beginning() -> None:
    class Counting(FakeTokenizer):
        longest = n_chars = 0

        def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
            self.longest = max(self.longest, len(text))
            self.n_chars += len(text)
            return super().encode(text, add_special=add_special, parse_special=parse_special)

    tokenizer = Counting()
    with pytest.raises(ContextTooLong, match="more than"):
        Prompter(tokenizer, FAKE_TEMPLATE, 8192).text("x" * 1_000_000)
    assert tokenizer.longest <= SLICE_CHARS
    assert tokenizer.n_chars <= 2 * 8192 + SLICE_CHARS


def test_a_text_of_long_tokens_is_counted_in_slices_and_let_pass() -> None:
    class Wide(FakeTokenizer):
        def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
            return super().encode(text[::100], add_special=add_special, parse_special=parse_special)

    assert len(Prompter(Wide(), FAKE_TEMPLATE, 512).text("x" * 50_000)) == 501


def test_templates_may_mark_what_is_trained_on_and_ask_for_json_in_transformers_words() -> None:
    marked = "{% for m in messages %}{% generation %}<{{ m.content }}>{% endgeneration %}{% endfor %}"
    assert prompter(marked).render([{"role": "user", "content": "hi"}]) == "<hi>"
    spelled = "{{ messages | tojson(ensure_ascii=False, separators=(',', ':'), sort_keys=True) }}"
    assert prompter(spelled).render([{"role": "user", "content": "é"}]) == '[{"content":"é","role":"user"}]'
    assert prompter("{{ messages | tojson(indent=1) }}").render([{"role": "é"}]) == '[\n {\n  "role": "é"\n }\n]'
