"""Gemma 3 in torch, for the recipe only: load it from GGUF, encode mails as turns, score whole labels.

Needs the extra `recipe`. Serving never imports this module: llama.cpp computes the answers there.
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

PADDING = 0


@dataclass(frozen=True)
class TrainingMail:
    """One labelled mail as text."""

    id: str
    content: str
    label: str


@dataclass(frozen=True)
class Mail:
    """One labelled mail, tokenised: the prompt up to the model's turn, and the label with its end of turn."""

    id: str
    label: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Judgement:
    """The model's answer to a mail. `greedy` is None when greedy decoding would leave the set of labels."""

    id: str
    label: str
    prediction: str
    greedy: str | None


def load_base(path: Path) -> tuple[Any, Any]:
    """(float32 `Gemma3ForCausalLM`, tokenizer) from a GGUF file.

    The vocabulary may be a trimmed one: tokenizer and embedding are the file's. The dequantized weights are copied into
    a fresh model: one loaded from GGUF calls itself quantized, which stops PEFT.
    """
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model.eval(), tokenizer


def perplexity(model: Any, tokenizer: Any, text: str) -> float:
    """Perplexity per token: thousands for a wrongly read file, tens for a sound one."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss.exp())


def read_examples(path: Path) -> list[TrainingMail]:
    """Chat records of a .jsonl.gz, in the file's order."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [TrainingMail(record["id"], *(said["content"] for said in record["messages"])) for record in records]


def encode(tokenizer: Any, example: TrainingMail) -> Mail:
    answer = encode_label(tokenizer, example.label)
    return Mail(example.id, example.label, encode_prompt(tokenizer, example.content), answer)


def encode_prompt(tokenizer: Any, content: str) -> tuple[int, ...]:
    """Gemma's user turn and the head of the model's turn; the tokenizer puts <bos> first."""
    text = f"<start_of_turn>user\n{content.strip()}<end_of_turn>\n<start_of_turn>model\n"
    return tuple(tokenizer(text).input_ids)


def encode_label(tokenizer: Any, label: str) -> tuple[int, ...]:
    """The label and its end of turn, which has another id in a trimmed vocabulary."""
    return tuple(tokenizer(f"{label}<end_of_turn>", add_special_tokens=False).input_ids)


def completion_loss(model: Any, mails: Sequence[Mail]) -> torch.Tensor:
    """Mean cross-entropy over the answer tokens of a batch. Logits (262k wide) are computed at those positions only."""
    width = max(len(mail) for mail in mails)
    ids = torch.full((len(mails), width), PADDING)
    seen = torch.zeros((len(mails), width), dtype=torch.long)
    rows, columns, targets = list[int](), list[int](), list[int]()
    for row, mail in enumerate(mails):
        ids[row, : len(mail)] = torch.tensor(mail.prompt + mail.answer)
        seen[row, : len(mail)] = 1
        rows += [row] * len(mail.answer)
        columns += range(len(mail.prompt) - 1, len(mail) - 1)
        targets += mail.answer
    hidden = model.model(input_ids=ids, attention_mask=seen).last_hidden_state
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[rows, columns]), torch.tensor(targets))


def judge(model: Any, tokenizer: Any, mails: Sequence[Mail], labels: Sequence[str], batch: int = 8) -> list[Judgement]:
    """Score every whole label for every mail: the sum of log p over its tokens and its end of turn. Shortest first."""
    answers = [encode_label(tokenizer, label) for label in labels]
    ordered = sorted(mails, key=len)
    verdicts: list[Judgement] = []
    for start in range(0, len(ordered), batch):
        group = ordered[start : start + batch]
        with torch.inference_mode():
            judged = _branch_scores(model, group, answers)
        for mail, (scores, greedy) in zip(group, judged, strict=True):
            chosen = next((label for label, hit in zip(labels, greedy, strict=True) if hit), None)
            verdicts.append(Judgement(mail.id, mail.label, labels[scores.index(max(scores))], chosen))
    return verdicts


def _branch_scores(
    model: Any, mails: Sequence[Mail], answers: Sequence[tuple[int, ...]]
) -> list[tuple[list[float], list[bool]]]:
    """Per mail: each answer's log p, and whether greedy decoding yields exactly that answer.

    All answers hang as branches behind one copy of the prompt; the mask lets a branch see the prompt and itself.
    """
    ids, positions, mask = _pack_branches(mails, answers)
    both = {"full_attention": mask, "sliding_attention": mask}
    hidden = model.model(input_ids=ids, position_ids=positions, attention_mask=both).last_hidden_state
    results = []
    for row, mail in enumerate(mails):
        start = len(mail.prompt)
        columns, targets = list[int](), list[int]()
        for answer in answers:
            columns += [len(mail.prompt) - 1, *range(start, start + len(answer) - 1)]
            targets += answer
            start += len(answer) - 1
        logits = model.lm_head(hidden[row, columns])
        wanted = torch.tensor(targets)
        log_p = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)
        sizes = [len(answer) for answer in answers]
        scores = [float(part.sum()) for part in log_p.split(sizes)]
        results.append((scores, [bool(part.all()) for part in (logits.argmax(1) == wanted).split(sizes)]))
    return results


def _pack_branches(
    mails: Sequence[Mail], answers: Sequence[tuple[int, ...]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids and positions (mails, width), additive mask (mails, 1, width, width); a pad sees only itself."""
    branches = sum(len(answer) - 1 for answer in answers)
    width = max(len(mail.prompt) for mail in mails) + branches
    ids = torch.full((len(mails), width), PADDING)
    positions = torch.zeros((len(mails), width), dtype=torch.long)
    visible = torch.eye(width, dtype=torch.bool).repeat(len(mails), 1, 1)
    for row, mail in enumerate(mails):
        start = prompt = len(mail.prompt)
        ids[row, :prompt] = torch.tensor(mail.prompt)
        positions[row, :prompt] = torch.arange(prompt)
        visible[row, :prompt, :prompt] = torch.ones(prompt, prompt).tril().bool()
        for answer in answers:
            size = len(answer) - 1
            stop = start + size
            ids[row, start:stop] = torch.tensor(answer[:-1])
            positions[row, start:stop] = torch.arange(prompt, prompt + size)
            visible[row, start:stop, :prompt] = True
            visible[row, start:stop, start:stop] = torch.ones(size, size).tril().bool()
            start = stop
    blocked = torch.finfo(torch.float32).min
    return ids, positions, torch.where(visible[:, None], 0.0, blocked)
