"""The proof that goes with every conversion of a folder: its tokenizer and chat template came over unchanged.

It is made before the weights are written, on a file that holds the vocabulary alone.
"""

from pathlib import Path

from models.chat_records import ChatRecord
from models.gguf_header import Header

from .gguf_file import Layout
from .parity import check_tokenizer, open_pair
from .parity_template import check_template
from .progress import Reporter
from .texts import messages_of

# What more than these would add is time: each is tokenised twice.
MAX_EXAMPLES = 1000
_MAX_MESSAGE_CHARS = 20_000  # llama.cpp's tokenizer is quadratic on text that falls back to bytes


def prove(header: Header, folder: Path, records: tuple[ChatRecord, ...], workdir: Path, report: Reporter) -> None:
    """Compare llama.cpp's tokens and prompts for `header` with Hugging Face's for `folder`; tell what was compared.

    `records` are the user's own examples, beside the built-in texts. Raises VerifyFailed with the first difference.
    """
    vocabulary = workdir / "vocabulary.gguf"
    vocabulary.write_bytes(Layout(header.fields, (), header.alignment).head())
    try:
        pair = open_pair(vocabulary, folder)
        shown = [record for record in records[:MAX_EXAMPLES] if _is_short(record)]
        texts = [message.content for record in shown for message in record.prompt] + [one.answer for one in shown]
        report.stage("compare the tokenizer with Hugging Face's")
        tokens = check_tokenizer(pair, texts, report.advance)
        prompts = check_template(pair, [messages_of(record) for record in shown])
    finally:
        vocabulary.unlink()
    report.note(f"tokenizer: {tokens.n_texts} texts have the same {tokens.n_tokens} tokens as in Hugging Face's")
    for mismatch in tokens.mismatches:
        report.warn(f"llama.cpp comes only near this tokenizer: {mismatch}")
    for limit in (*tokens.limits, *prompts.warnings):
        report.note(limit)
    if prompts.n_compared:
        report.note(f"chat template: {prompts.n_compared} prompts have the same text and tokens as Hugging Face's")


def _is_short(record: ChatRecord) -> bool:
    return all(len(message.content) <= _MAX_MESSAGE_CHARS for message in record.prompt)
