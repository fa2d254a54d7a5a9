"""The prompts that the fine-tune is compared with, for a base model to continue: zero-shot, few-shot, retrieved.

    python -m models.debian_synopsis.data.prompts
    python -m models.debian_synopsis.data.prompts --requests retrieved requests.jsonl
    deskside batch requests.jsonl answers.jsonl --model gemma-3-270m

The first writes `prompts/*.txt`; the second the test split's requests for `deskside batch`. The few-shot examples are
short train records, picked by hand before any prompt was measured: maintainers' synopses that keep the written rules,
of programs, libraries and parts of them.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from models.common.chat_records import ChatRecord, read_chat_records
from models.task.words.nearest import Nearest

HOME = Path(__file__).parent.parent
EXAMPLES = (
    "meson",
    "libpst-dev",
    "octave-optics",
    "aptfs",
    "thunderbird-l10n-bg",
    "golang-github-enescakir-emoji-dev",
    "libjpathwatch-java-doc",
    "pipewalker",
)
N_RETRIEVED = 4
WAYS = ("zero_shot", "few_shot", "retrieved")
# Longer than any synopsis of the data: the longest has 33 tokens.
MAX_TOKENS = 48
MARK = "{text}"
INSTRUCTION = """\
A Debian package has a description and a synopsis. The synopsis says in one line of fewer than 80 characters what the \
package is. It is a noun phrase, not a sentence: no article at its start, no full stop at its end, no capital letter \
at its start but in proper names and acronyms, and not the package's name. If the package is a part of something, the \
part is named at the end, in brackets or after a dash.
"""


def read_split(name: str) -> tuple[ChatRecord, ...]:
    """The records of a split, in the order of its file."""
    return read_chat_records(HOME / "data" / f"{name}.jsonl.gz")


def text_of(record: ChatRecord) -> str:
    """The description that a record asks about."""
    return record.prompt[-1].content


def prompt_with(examples: Sequence[ChatRecord]) -> str:
    """The prompt with worked `examples` before the place of the description in question, MARK."""
    shown = "".join(f"Description:\n{text_of(one)}\nSynopsis: {one.answer}\n\n" for one in examples)
    return f"{INSTRUCTION}\n{shown}Description:\n{MARK}\nSynopsis:"


def few_shot_examples(train: Sequence[ChatRecord]) -> list[ChatRecord]:
    """The records of EXAMPLES, in that order."""
    by_id = {record.id: record for record in train}
    return [by_id[name] for name in EXAMPLES]


def prompts_for(way: str, train: Sequence[ChatRecord], asked: Sequence[ChatRecord]) -> list[str]:
    """The prompt of each of `asked`; retrieved examples have the one most like it last, where it counts most."""
    if way == "retrieved":
        index = Nearest([text_of(record) for record in train])
        chosen = [[train[place] for place in index.find(text_of(one), N_RETRIEVED)[::-1]] for one in asked]
    else:
        chosen = [few_shot_examples(train) if way == "few_shot" else []] * len(asked)
    return [prompt_with(examples).replace(MARK, text_of(one)) for examples, one in zip(chosen, asked, strict=True)]


def request(way: str, record: ChatRecord, prompt: str) -> dict[str, object]:
    """A line of a batch: the base continues `prompt` greedily, to the end of the line where examples show one.

    Without examples its first token is a line's end, always: then the first line with text is its answer.
    """
    body = {"model": "gemma-3-270m", "prompt": prompt, "temperature": 0, "max_tokens": MAX_TOKENS}
    if way != "zero_shot":
        body["stop"] = "\n"
    return {"custom_id": record.id, "method": "POST", "url": "/v1/completions", "body": body}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", nargs=2, metavar=("WAY", "FILE"), help=f"write requests; a way is one of {WAYS}")
    arguments = parser.parse_args()
    train = read_split("train")
    if arguments.requests:
        way, path = arguments.requests
        asked = read_split("test")
        lines = [request(way, one, prompt) for one, prompt in zip(asked, prompts_for(way, train, asked), strict=True)]
        Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return
    for name, examples in (("zero_shot", []), ("few_shot", few_shot_examples(train))):
        path = HOME / "prompts" / f"{name}.txt"
        path.write_text(prompt_with(examples), encoding="utf-8")
        print(f"{path.name}: {len(prompt_with(examples))} characters")


if __name__ == "__main__":
    main()
