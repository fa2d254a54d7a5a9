"""The two prompts that the fine-tune is compared with: zero-shot, and few-shot with two train mails a class.

    python -m models.email_triage.data.prompts

Both end in `List:`; a base model continues with a space, the label and a newline. The examples are short train mails
that are typical of their class, picked by hand before any prompt was measured: what a careful user would have done.
"""

import gzip
import json
from pathlib import Path

from .prepare import LABELS

HERE = Path(__file__).parent
EXAMPLES = {
    "fork": ("easy-ham-2/00684", "easy-ham-1/00932"),
    "ilug": ("easy-ham-2/00372", "easy-ham-2/00345"),
    "rpm-zzzlist": ("easy-ham-2/01149", "easy-ham-1/01252"),
    "razor-users": ("easy-ham-2/00584", "easy-ham-2/00608"),
    "spamassassin-talk": ("easy-ham-1/00929", "easy-ham-1/01388"),
    "exmh-workers": ("easy-ham-2/00773", "easy-ham-1/01148"),
    "exmh-users": ("easy-ham-1/01028", "easy-ham-1/01031"),
    "spam": ("spam-2/00358", "spam-2/00438"),
}
DESCRIPTIONS = {
    "fork": "friends talking about technology, politics, business, news and whatever else comes up",
    "ilug": "the Irish Linux users' group: help and talk about Linux, hardware, networks and jobs",
    "rpm-zzzlist": "RPM packages for Red Hat Linux: building them, apt repositories, dependencies, sound and video",
    "razor-users": "Vipul's Razor, the shared spam catalogue: installing, reporting, servers, false positives",
    "spamassassin-talk": "SpamAssassin, the rule-based spam filter: rules, scores, set-up, how spam behaves",
    "exmh-workers": "developing the exmh mail reader: patches, CVS, bugs and tracebacks",
    "exmh-users": "using the exmh mail reader: set-up, questions, how to do something",
    "spam": "unasked advertising, offers, scams and newsletters",
}


def zero_shot() -> str:
    """The instruction and the eight labels with a line about each; `{mail}` marks the mail's place."""
    labels = "\n".join(f"- {label}: {DESCRIPTIONS[label]}" for label in LABELS)
    head = "Every mail below was sent to one of these mailing lists, or is spam. The lists:"
    return f"{head}\n{labels}\n\nAfter each mail stands the name of its list.\n\nMail:\n{{mail}}\nList:"


def few_shot(examples: list[tuple[str, str]]) -> str:
    """The zero-shot prompt with worked (mail, label) examples before the mail in question."""
    instruction, _, question = zero_shot().partition("Mail:\n")
    shown = "".join(f"Mail:\n{mail}\nList: {label}\n\n" for mail, label in examples)
    return f"{instruction}{shown}Mail:\n{question}"


def main() -> None:
    with gzip.open(HERE / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        mails = {record["id"]: record["messages"][0]["content"] for record in map(json.loads, lines)}
    examples = [(mails[ids[turn]], label) for turn in range(2) for label, ids in EXAMPLES.items()]
    for name, prompt in (("zero_shot", zero_shot()), ("few_shot", few_shot(examples))):
        path = HERE.parent / "prompts" / f"{name}.txt"
        path.write_text(prompt, encoding="utf-8")
        print(f"{path.name}: {len(prompt)} characters")


if __name__ == "__main__":
    main()
