"""Examples as the model reads them: turns and control tokens written out, the answer included."""

from collections.abc import Mapping, Sequence

from models.common.chat_records import ChatRecord
from models.errors import BadExamples
from models.gguf.header import Header
from runtime.errors import RequestError
from runtime.llama.tokenizer import Tokenizer
from runtime.prompt.prompter import ANSWER_MARK, Prompter, input_text

from .template import END_OF_TURN_FIELD, TEMPLATE_FIELD

# Nothing is computed on these texts, so no context bounds them.
_ANY_LENGTH = 1 << 24


def prompts_of(
    header: Header, tokenizer: Tokenizer, records: Sequence[ChatRecord], prompt_template: str = "{text}"
) -> list[str]:
    """The records up to where the model answers, under the chat template that `header` names, if it does.

    Raises BadExamples naming the line that the template refuses.
    """
    field = header.fields.get(TEMPLATE_FIELD)
    template = field.value if field is not None and isinstance(field.value, str) else None
    prompter = Prompter(tokenizer, template, _ANY_LENGTH)
    prompts = []
    for record in records:
        said = messages_of(record, prompt_template)
        if template is None:
            prompts.append(input_text([(str(one["role"]), str(one["content"])) for one in said]) + ANSWER_MARK)
            continue
        try:
            prompts.append(prompter.render(said))
        except RequestError as error:
            raise BadExamples(f"line {record.line}: {error}") from error
    return prompts


def texts_of(
    header: Header, tokenizer: Tokenizer, records: Sequence[ChatRecord], prompt_template: str = "{text}"
) -> list[str]:
    """The records with their answers and what ends these. Raises BadExamples as `prompts_of`."""
    end = _end_mark(header)
    prompts = prompts_of(header, tokenizer, records, prompt_template)
    return [prompt + record.answer + end for prompt, record in zip(prompts, records, strict=True)]


def messages_of(record: ChatRecord, prompt_template: str = "{text}") -> list[Mapping[str, object]]:
    """The record's prompt as messages, the user's put where `prompt_template` says."""
    return [
        {
            "role": message.role,
            "content": prompt_template.replace("{text}", message.content)
            if message.role == "user"
            else message.content,
        }
        for message in record.prompt
    ]


def _end_mark(header: Header) -> str:
    field = header.fields.get(END_OF_TURN_FIELD)
    tokens = header.fields["tokenizer.ggml.tokens"].strings or []
    if field is None or not isinstance(field.value, int) or not 0 <= field.value < len(tokens):
        return ""
    return tokens[field.value].decode(errors="replace")
