"""Preparation of `/v1/decisions`: a body becomes one scoring request, with a prompt for each question."""

import secrets
from collections.abc import Sequence

from models.manifest import Manifest
from runtime.errors import ContextTooLong, InvalidRequest
from runtime.openai.answer import WholeAnswer
from runtime.openai.decisions import Choice, ParsedDecision, Question, options, parse_decision, to_decision
from runtime.prompt.prompter import ANSWER_MARK, input_text, question_text
from runtime.requests import Scored, Scoring, ScoringPrompt

from .call import Call
from .chat import require_model
from .model import ServedModel

# Of all questions of a call together: bounds the memory that waiting calls take.
MAX_PROMPT_TOKENS = 1 << 19


def prepare_decision(payload: object, model: ServedModel) -> Call:
    """Prepare a body of `/v1/decisions`.

    Raises InvalidRequest, ModelUnknown, ContextTooLong, TokenizeFailed or TemplateFailed.
    """
    body = parse_decision(payload)
    require_model(body.model, model.name)
    prompts: list[ScoringPrompt] = []
    n_tokens = 0
    for place in range(len(body.questions)):
        prompts.append(_scoring_prompt(body, place, model))
        n_tokens += len(prompts[-1].prompt)
        if n_tokens > MAX_PROMPT_TOKENS:
            message = f"the first {place + 1} questions have {n_tokens} prompt tokens, limit {MAX_PROMPT_TOKENS} a call"
            raise ContextTooLong(f"{message}; ask fewer at once", param="questions", code="context_length_exceeded")
    scoring = Scoring(f"decision-{secrets.token_hex(12)}", tuple(prompts), model.adapter)

    def answer() -> WholeAnswer[Scored]:
        return WholeAnswer(Scored, lambda scored: to_decision(model.name, body.questions, scored))

    return Call(scoring.id, (scoring,), answer)


def _scoring_prompt(body: ParsedDecision, place: int, model: ServedModel) -> ScoringPrompt:
    question = body.questions[place]
    texts = [text for text, _ in options(question)]
    prompt, answers, ends = _prompt(body, question, texts, model)
    encode = model.tokenizer.encode
    choices = tuple(tuple(encode(text, add_special=False, parse_special=False)) for text in answers)
    param = f"questions[{place}]"
    if len(set(choices)) < len(choices):
        raise InvalidRequest(f"{param}: two of the choices are the same tokens to this model", param=param)
    longest, n_ctx = max(map(len, choices)), model.prompter.n_ctx
    if len(prompt) + longest > n_ctx:
        message = f"{param}: the prompt has {len(prompt)} tokens and the longest choice {longest}"
        message += f"; the context holds {n_ctx} tokens"
        raise ContextTooLong(message, param="input", code="context_length_exceeded")
    return ScoringPrompt(prompt, choices, ends)


def _prompt(
    body: ParsedDecision, question: Question, texts: Sequence[str], model: ServedModel
) -> tuple[tuple[int, ...], Sequence[str], tuple[int, ...]]:
    """The prompt of a question, the texts that answer it, and the tokens that end an answer."""
    about = input_text([(message.role, message.content) for message in body.input])
    ends = model.tokenizer.end_tokens
    if (trained := _trained_prompt(question, model.manifest)) is not None:
        asked = trained.replace("{text}", about)
    else:
        asked = question_text(question.type, about, question.instructions, options(question))
    if model.info.chat_template is not None and ends:
        return model.prompter.chat([{"role": "user", "content": asked}], param="input"), texts, ends
    # A base model has learnt no end of a turn: a new line ends its answer too.
    new_line = model.tokenizer.encode("\n", add_special=False, parse_special=False)
    prompt = model.prompter.literal(asked + ANSWER_MARK, param="input")
    return prompt, [f" {text}" for text in texts], (*ends, new_line[-1])


def _trained_prompt(question: Question, manifest: Manifest | None) -> str | None:
    """The prompt a classifier was trained with, if the question is its own: a choice among its labels."""
    if manifest is None or not isinstance(question, Choice):
        return None
    values = {option.value for option in question.choices}
    return manifest.prompt.template if values <= set(manifest.labels) else None
