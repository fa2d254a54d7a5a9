"""How a question that the model was not trained for is put in words: the input, the task, what may be answered.

The input comes first, so that many questions about one input share it as a prefix.
"""

from collections.abc import Sequence
from typing import Literal

# What a text-only model writes its answer after.
ANSWER_MARK = "\nAnswer:"

_TASKS = {
    "predicate": "Statement: {instructions}\nIs the statement true of the text above? Answer yes or no.",
    "choice": "Task: {instructions}\nChoices:\n{options}\nAnswer with one of the choices, exactly as it is written.",
    "score": "Task: {instructions}\nLevels, from the lowest to the highest:\n{options}\n"
    "Answer with one of the levels, exactly as it is written.",
}


def input_text(messages: Sequence[tuple[str, str]]) -> str:
    """(role, text) pairs as one text: a lone message as it is, a conversation with who said what."""
    if len(messages) == 1:
        return messages[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in messages)


def question_text(
    kind: Literal["predicate", "choice", "score"],
    about: str,
    instructions: str,
    options: Sequence[tuple[str, str | None]],
) -> str:
    """The user's message that asks about the text `about`; `options` are (text, description)."""
    listed = "\n".join(f"- {text}: {description}" if description else f"- {text}" for text, description in options)
    before, marker, after = _TASKS[kind].partition("{options}")
    return f"{about}\n\n{before.replace('{instructions}', instructions)}{listed if marker else ''}{after}"
