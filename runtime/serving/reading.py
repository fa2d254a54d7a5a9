"""Preparation of calls that read texts and write none: `/v1/decisions` and `/v1/embeddings`.

A body of decisions becomes one scoring request, with a prompt for each question, a body of embeddings one embedding
request.
"""

import reprlib
import secrets
from collections.abc import Sequence

from models.manifest import Manifest
from runtime.errors import ContextTooLong, InvalidRequest
from runtime.openai.answer import WholeAnswer
from runtime.openai.decisions import Choice, ParsedDecision, Question, options, parse_decision, to_decision
from runtime.openai.embeddings import parse_embedding, to_embeddings
from runtime.prompt.cut import CutMessages, spoken
from runtime.prompt.prompter import ANSWER_MARK, input_text, question_text, too_long
from runtime.requests import Embedded, Embedding, Scored, Scoring, ScoringPrompt

from .call import Call
from .chat import require_model
from .model import ServedModel
from .promise import is_as_trained

# Of all questions of a call together: bounds the memory that waiting calls take.
MAX_PROMPT_TOKENS = 1 << 19
_SHOWN_LABELS = 12
# Of all inputs of a call together, as OpenAI bounds them.
MAX_EMBEDDING_TOKENS = 300_000


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

    promise = model.promise if _holds_promise(body, model) else None

    def answer() -> WholeAnswer[Scored]:
        return WholeAnswer(Scored, lambda scored: to_decision(model.name, body.questions, scored, promise))

    return Call(scoring.id, (scoring,), answer, n_cut=_input(body, model).n_cut)


def _holds_promise(body: ParsedDecision, model: ServedModel) -> bool:
    said = [("system" if message.role == "developer" else message.role, message.content) for message in body.input]
    return model.manifest is not None and is_as_trained(said, model.manifest.prompt, wrapped=False)


def _input(body: ParsedDecision, model: ServedModel) -> CutMessages:
    """The messages to decide about, with a fine-tune's prompt around them, cut to the model's length."""
    said = [("system" if m.role == "developer" else m.role, m.content) for m in body.input]
    if model.manifest is not None and model.manifest.fine_tuned:
        return model.cut(model.manifest.prompt.messages(said))
    return model.cut([{"role": m.role, "content": m.content} for m in body.input])


def _scoring_prompt(body: ParsedDecision, place: int, model: ServedModel) -> ScoringPrompt:
    question = body.questions[place]
    texts = [text for text, _ in options(question)]
    param = f"questions[{place}]"
    prompt, answers, ends = _prompt(body, question, param, texts, model)
    encode = model.tokenizer.encode
    choices = tuple(tuple(encode(text, add_special=False, parse_special=False)) for text in answers)
    if len(set(choices)) < len(choices):
        raise InvalidRequest(f"{param}: two of the choices are the same tokens to this model", param=param)
    longest, n_ctx = max(map(len, choices)), model.prompter.n_ctx
    if len(prompt) + longest > n_ctx:
        message = too_long(f"{param}: the prompt has {len(prompt)} tokens and the longest choice {longest}", n_ctx)
        raise ContextTooLong(message, param="input", code="context_length_exceeded")
    return ScoringPrompt(prompt, choices, ends)


def _prompt(
    body: ParsedDecision, question: Question, param: str, texts: Sequence[str], model: ServedModel
) -> tuple[tuple[int, ...], Sequence[str], tuple[int, ...]]:
    """The prompt of a question, the texts that answer it, and the tokens that end an answer."""
    asked = _input(body, model).messages
    ends = model.tokenizer.end_tokens
    if model.manifest is not None and model.manifest.fine_tuned:
        _require_trained(question, param, texts, model.name, model.manifest)
    else:
        about = input_text(spoken(asked))
        asked = [
            {"role": "user", "content": question_text(question.type, about, question.instructions, options(question))}
        ]
    if model.info.chat_template is not None and ends:
        return model.prompter.chat(asked, param="input"), texts, ends
    # A base model has learnt no end of a turn: a new line ends its answer too.
    new_line = model.tokenizer.encode("\n", add_special=False, parse_special=False)
    text = input_text(spoken(asked))
    prompt = model.prompter.literal(text + ANSWER_MARK, param="input")
    return prompt, [f" {text}" for text in texts], (*ends, new_line[-1])


def _require_trained(question: Question, param: str, texts: Sequence[str], name: str, manifest: Manifest) -> None:
    """Refuse a question that a fine-tune was not trained to answer: it would answer, with confidence, something else.

    AUC of "This mail is spam." on the default model: 0.03.
    """
    if not manifest.labels:
        what = "a fine-tune for writing" if manifest.task == "write" else "a fine-tune whose labels are not known"
        message = (
            f"{name!r} is {what}: it has learnt to answer no question of /v1/decisions. For a classifier, give convert "
            "its examples (`deskside convert … --examples FILE`) or a manifest with its labels (`--manifest FILE`); "
            "/v1/chat/completions with `choice` asks it in the words you choose"
        )
        raise InvalidRequest(message, param="model", code="decisions_not_supported")
    labels = ", ".join(map(repr, manifest.labels[:_SHOWN_LABELS])) + (", …" if manifest.labels[_SHOWN_LABELS:] else "")
    trained = f"{name!r} was trained to answer with one of its {len(manifest.labels)} labels ({labels})"
    if not isinstance(question, Choice):
        message = f"{param}: {trained}, not with a {question.type}; ask a choice among its labels"
        raise InvalidRequest(message, param=f"{param}.type", code="invalid_value")
    if (other := next((text for text in texts if text not in manifest.labels), None)) is not None:
        message = f"{param}.choices: {trained}; {reprlib.repr(other)} is none of them"
        raise InvalidRequest(message, param=f"{param}.choices", code="invalid_value")


def prepare_embedding(payload: object, model: ServedModel) -> Call:
    """Prepare a body of `/v1/embeddings`. Raises InvalidRequest, ModelUnknown, ContextTooLong or TokenizeFailed."""
    body = parse_embedding(payload, model.info.n_embd)
    require_model(body.model, model.name)
    prompts: list[tuple[int, ...]] = []
    n_tokens = 0
    for place, item in enumerate(body.input):
        prompts.append(_embedding_tokens(item, f"input[{place}]", model))
        n_tokens += len(prompts[-1])
        if n_tokens > MAX_EMBEDDING_TOKENS:
            message = f"the first {place + 1} inputs have {n_tokens} tokens, limit {MAX_EMBEDDING_TOKENS} a call"
            raise ContextTooLong(f"{message}; send fewer", param="input", code="context_length_exceeded")
    embedding = Embedding(f"embedding-{secrets.token_hex(12)}", tuple(prompts), model.adapter)

    def answer() -> WholeAnswer[Embedded]:
        return WholeAnswer(Embedded, lambda embedded: to_embeddings(model.name, embedded, body.encoding_format))

    return Call(embedding.id, (embedding,), answer, large=True)


def _embedding_tokens(item: str | tuple[int, ...], name: str, model: ServedModel) -> tuple[int, ...]:
    info = model.info
    tokens = item if isinstance(item, tuple) else _encoded(item, model)
    if len(tokens) > info.embed_n_ctx:
        message = too_long(f"{name} has {len(tokens)} tokens; split it", info.embed_n_ctx)
        raise ContextTooLong(message, param="input", code="context_length_exceeded")
    if not tokens:
        raise InvalidRequest(f"{name} has no tokens", param="input")
    if max(tokens) >= info.n_vocab:
        raise InvalidRequest(f"{name} holds token id {max(tokens)}, the vocabulary has {info.n_vocab}", param="input")
    return tokens


def _encoded(text: str, model: ServedModel) -> tuple[int, ...]:
    """The tokens of a whole text: BOS where the model has one, and EOS if it was trained with it."""
    tokens = model.prompter.literal(text, param="input")
    ends = model.info.metadata.get("tokenizer.ggml.add_eos_token") == "true"
    return (*tokens, model.tokenizer.eos) if ends and model.tokenizer.eos is not None else tokens
