"""Recipe of the default model: base GGUF + train split -> LoRA adapter, and the scores of that fine-tune in torch.

    .venv/bin/pip install 'torch>=2.8,<3' --index-url https://download.pytorch.org/whl/cpu
    .venv/bin/pip install -e '.[recipe]'
    .venv/bin/python -m models.email_triage.recipe train --base gemma-3-270m.gguf
    .venv/bin/python -m models.email_triage.recipe evaluate --base gemma-3-270m.gguf --split test

Runs on a CPU; without the first line, torch brings 5 GB of CUDA libraries to a machine without a GPU. A stopped run
resumes from its last checkpoint. Only the validation split chooses anything. An F16 GGUF with a cut vocabulary
(`deskside convert --trim-vocab`) serves as `--base` too: the training then uses the tokens that will be served, and the
adapter is merged onto that file.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

from .data.prepare import LABELS
from .gemma import Judgement, Mail, TrainingMail, completion_loss, encode, judge, load_base, perplexity, read_examples

HOME = Path(__file__).parent
SANITY_TEXT = "The capital of France is Paris, and the capital of Italy is Rome. Water freezes at zero degrees Celsius."
# A file that is read wrongly gives thousands; this base gives tens, and 201 where its vocabulary was cut to 16,384
# tokens, since it then gets words in pieces that it was not trained on.
SANITY_PERPLEXITY = 600.0
CHECKPOINT_STEPS = 40
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Hyperparameters:
    """Set once, without a search; validation chooses the epoch. `crop`: share of train mails cut to a random span."""

    epochs: int = 4
    batch: int = 8
    learning_rate: float = 3e-4
    warmup: float = 0.06
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    crop: float = 0.5
    seed: int = 7


class Log:
    """Training log: one JSON object a line in the file, the same in short on stderr."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def write(self, **entry: object) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        print("  ".join(f"{name} {value}" for name, value in entry.items()), file=sys.stderr, flush=True)


class Trainer:
    """One run: LoRA weights, AdamW's moments and the step, kept together so that a checkpoint is the whole state."""

    def __init__(self, model: Any, tokenizer: Any, out: Path, settings: Hyperparameters) -> None:
        self.settings, self.tokenizer, self.out = settings, tokenizer, out
        self.train = read_examples(HOME / "data" / "train.jsonl.gz")
        self.validation = [encode(tokenizer, e) for e in read_examples(HOME / "data" / "validation.jsonl.gz")]
        torch.manual_seed(settings.seed)
        lora = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(TARGETS),
            task_type="CAUSAL_LM",
        )
        self.adapted = get_peft_model(model, lora)
        self.weights = {name: weight for name, weight in self.adapted.named_parameters() if weight.requires_grad}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=settings.learning_rate, weight_decay=0.01)
        self.steps_per_epoch = math.ceil(len(self.train) / settings.batch)
        self.total = self.steps_per_epoch * settings.epochs
        self.step, self.best = 0, 0.0
        self.log = Log(out / "training_log.jsonl")

    def run(self) -> None:
        """Run all epochs from the checkpoint on; keep the epoch with the best validation accuracy."""
        self._resume()
        for epoch in range(self.step // self.steps_per_epoch, self.settings.epochs):
            self._train_epoch(epoch)
            self._validate(epoch)
        (self.out / "checkpoint.safetensors").unlink(missing_ok=True)

    def _train_epoch(self, epoch: int) -> None:
        chance = random.Random(f"{self.settings.seed}/{epoch}")
        mails = [encode(self.tokenizer, cropped(example, self.settings.crop, chance)) for example in self.train]
        batches = bucketed(mails, self.settings.batch, chance)
        done = self.step % self.steps_per_epoch
        losses, tokens, since = [], 0, time.monotonic()
        self.adapted.train()
        for batch in batches[done:]:
            losses.append(self._update(batch))
            tokens += sum(map(len, batch))
            if self.step % 10 == 0:
                speed = tokens / (time.monotonic() - since)
                self._progress(sum(losses[-10:]) / len(losses[-10:]), speed, tokens / len(losses))
            if (
                self.step % CHECKPOINT_STEPS == 0 and self.step % self.steps_per_epoch
            ):  # the end of an epoch is saved after its validation
                self._save_checkpoint()

    def _update(self, batch: Sequence[Mail]) -> float:
        torch.manual_seed(self.settings.seed + self.step)  # dropout repeats after a resume
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * schedule(self.step / self.total, self.settings.warmup)
        loss = completion_loss(self.adapted.get_base_model(), batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return float(loss.item())

    def _progress(self, loss: float, speed: float, step_tokens: float) -> None:
        minutes = (self.total - self.step) * step_tokens / speed / 60
        rate = self.optimizer.param_groups[0]["lr"]
        self.log.write(
            step=self.step,
            of=self.total,
            loss=round(loss, 4),
            learning_rate=round(rate, 7),
            tokens_per_s=round(speed, 1),
            minutes_left=round(minutes, 1),
        )

    def _validate(self, epoch: int) -> None:
        self.adapted.eval()
        verdicts = judge(self.adapted.get_base_model(), self.tokenizer, self.validation, LABELS)
        accuracy = share_correct(verdicts)
        greedy = sum(v.greedy == v.label for v in verdicts) / len(verdicts)
        kept = accuracy > self.best
        if kept:
            self.best = accuracy
            self._save_adapter()
        self._save_checkpoint()
        self.log.write(
            epoch=epoch + 1,
            step=self.step,
            validation_accuracy=round(accuracy, 4),
            validation_greedy_accuracy=round(greedy, 4),
            mails=len(verdicts),
            kept=kept,
        )

    def _save_adapter(self) -> None:
        state = get_peft_model_state_dict(self.adapted)
        tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in state.items()}
        config = self.adapted.peft_config["default"]
        config.base_model_name_or_path = "google/gemma-3-270m"
        config.inference_mode = True
        config.save_pretrained(str(self.out))
        config.inference_mode = False
        save_atomically(tensors, self.out / "adapter_model.safetensors", {"format": "pt"})

    def _save_checkpoint(self) -> None:
        tensors = {f"weight/{name}": weight.detach() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            moments = self.optimizer.state[weight]
            tensors |= {f"{key}/{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        facts = {"step": str(self.step), "best": repr(self.best), "settings": json.dumps(asdict(self.settings))}
        save_atomically(tensors, self.out / "checkpoint.safetensors", facts)

    def _resume(self) -> None:
        path = self.out / "checkpoint.safetensors"
        if not path.exists():
            self.log.write(start=True, **asdict(self.settings))
            return
        with safe_open(path, "pt") as stored:
            facts = stored.metadata()
            if json.loads(facts["settings"]) != asdict(self.settings):
                raise SystemExit(f"{path} was made with {facts['settings']}; remove it to start again")
            self.step, self.best = int(facts["step"]), float(facts["best"])
            for name, weight in self.weights.items():
                weight.data.copy_(stored.get_tensor(f"weight/{name}"))
                moments = {key: stored.get_tensor(f"{key}/{name}") for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[weight] = {"step": torch.tensor(float(self.step)), **moments}
        self.log.write(resumed=True, step=self.step)


def schedule(progress: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine down to zero; `progress` in 0..1."""
    if progress < warmup:
        return (progress + 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def cropped(example: TrainingMail, share: float, chance: random.Random) -> TrainingMail:
    """With probability `share`, cut the body to a random run of its words, at least half of it."""
    subject, _, body = example.content.partition("\n\n")
    if chance.random() >= share:
        return example
    start = body.find(" ", int(len(body) * chance.uniform(0, 0.3)))
    stop = body.rfind(" ", 0, int(len(body) * chance.uniform(0.8, 1)))
    piece = body[start + 1 : stop] if 0 <= start < stop else body
    return TrainingMail(example.id, f"{subject}\n\n{piece.strip()}", example.label)


def bucketed(mails: Sequence[Mail], size: int, chance: random.Random) -> list[list[Mail]]:
    """Shuffled batches of mails of like length, so that little is padding."""
    shuffled = chance.sample(list(mails), len(mails))
    pools = (sorted(shuffled[i : i + 12 * size], key=len) for i in range(0, len(shuffled), 12 * size))
    batches = [batch for pool in pools for batch in _cut(pool, size)]
    chance.shuffle(batches)
    return batches


def _cut(mails: list[Mail], size: int) -> Iterator[list[Mail]]:
    for start in range(0, len(mails), size):
        yield mails[start : start + size]


def save_atomically(tensors: dict[str, torch.Tensor], path: Path, facts: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata=facts)
    part.replace(path)


def share_correct(verdicts: Sequence[Judgement]) -> float:
    return sum(v.prediction == v.label for v in verdicts) / len(verdicts)


def evaluate(base: Path, adapter: Path, split: str, out: Path | None) -> None:
    """Score a split with the adapter merged in float32: the fine-tune before any conversion."""
    model, tokenizer = load_base(base)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    mails = [encode(tokenizer, e) for e in read_examples(HOME / "data" / f"{split}.jsonl.gz")]
    found = {v.id: v for v in judge(merged, tokenizer, mails, LABELS)}
    verdicts = [found[mail.id] for mail in mails]
    greedy = sum(v.greedy == v.label for v in verdicts) / len(verdicts)
    print(f"{split}: {len(verdicts)} mails, accuracy {share_correct(verdicts):.4f}, greedy {greedy:.4f}")
    if out:
        how = f"float32, torch {torch.__version__}, adapter merged, whole labels scored"
        predictions = [{"id": v.id, "label": v.label, "prediction": v.prediction} for v in verdicts]
        report = {"labels": LABELS, "predictions": predictions, "note": f"{split} split; {how}"}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def train(base: Path, out: Path, settings: Hyperparameters) -> None:
    model, tokenizer = load_base(base)
    measured = perplexity(model, tokenizer, SANITY_TEXT)
    if measured > SANITY_PERPLEXITY:
        raise SystemExit(
            f"{base} reads wrongly: perplexity {measured:.0f} on plain English, at most {SANITY_PERPLEXITY}"
        )
    Trainer(model, tokenizer, out, settings).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("train", "evaluate"))
    parser.add_argument("--base", type=Path, required=True, help="Gemma 3 270M as GGUF (`deskside pull gemma-3-270m`)")
    parser.add_argument("--adapter", type=Path, default=HOME / "adapter", help="folder the adapter is in, or goes to")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="validation")
    parser.add_argument("--out", type=Path, help="evaluate: write every prediction here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for name, value in asdict(Hyperparameters()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.verb == "evaluate":
        evaluate(chosen.base, chosen.adapter, chosen.split, chosen.out)
        return
    settings = Hyperparameters(**{name: getattr(chosen, name) for name in asdict(Hyperparameters())})
    train(chosen.base, chosen.adapter, settings)


if __name__ == "__main__":
    main()
