"""The recipe on a Gemma of a few thousand weights: exact label scores, and stopping changes nothing."""

import random
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `recipe`")
pytest.importorskip("peft", reason="needs the extra `recipe`")

from transformers import Gemma3ForCausalLM, Gemma3TextConfig  # noqa: E402

from convert.checkpoint.source import GgufCheckpoint  # noqa: E402
from convert.trim.plan import TrimmedCheckpoint, plan_trim  # noqa: E402
from models.email_triage import recipe  # noqa: E402
from models.email_triage.data.prepare import LABELS, CleanMail, write_jsonl_gz  # noqa: E402
from models.email_triage.gemma import (  # noqa: E402
    TrainingMail,
    _branch_scores,
    completion_loss,
    encode,
    encode_label,
    judge,
    load_base,
)
from models.gguf.fields import Field  # noqa: E402
from runtime.llama.model import load_tokenizer  # noqa: E402
from tests.convert.trim.test_source import write  # noqa: E402
from tests.support.convert.tiny import END, write_model  # noqa: E402

pytestmark = [pytest.mark.finetune, pytest.mark.filterwarnings("ignore")]


class Letters:
    """A tokenizer whose tokens are bytes, with <bos> in front as Gemma's has."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(input_ids=[2] * add_special_tokens + [8 + byte for byte in text.encode()])


def tiny_gemma() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=300, **sizes, **heads)).eval()


def test_a_branch_scores_as_the_label_alone_would() -> None:
    model, tokenizer = tiny_gemma(), Letters()
    mails = [encode(tokenizer, TrainingMail(str(i), "mail " * (i + 1), label)) for i, label in enumerate(LABELS)]
    answers = [encode_label(tokenizer, label) for label in LABELS]
    verdicts = {verdict.id: verdict for verdict in judge(model, tokenizer, mails, LABELS, batch=3)}
    with torch.no_grad():
        together = [scores for scores, _ in _branch_scores(model, mails, answers)]
        alone = [[log_p_alone(model, mail.prompt, answer) for answer in answers] for mail in mails]
    for mail, scores, expected in zip(mails, together, alone, strict=True):
        assert scores == pytest.approx(expected, abs=1e-3)
        assert verdicts[mail.id].prediction == LABELS[expected.index(max(expected))]
        assert verdicts[mail.id].greedy is None, "an untrained model does not spell a label by itself"


def log_p_alone(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    log_p = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


class Stopped(Exception):
    pass


@pytest.fixture
def few_mails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    records = [CleanMail(str(i), LABELS[i % 8], f"subject {i}", f"some words of mail {i}").record() for i in range(24)]
    write_jsonl_gz(tmp_path / "data" / "train.jsonl.gz", records)
    write_jsonl_gz(tmp_path / "data" / "validation.jsonl.gz", records[:8])
    monkeypatch.setattr(recipe, "HOME", tmp_path)
    monkeypatch.setattr(recipe, "CHECKPOINT_STEPS", 2)


def trainer(out: Path) -> recipe.Trainer:
    settings = recipe.Hyperparameters(epochs=2, batch=4, rank=2, dropout=0.1)
    return recipe.Trainer(tiny_gemma(), Letters(), out, settings)


@pytest.mark.usefixtures("few_mails")
def test_a_stopped_run_ends_with_the_weights_of_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer(tmp_path / "whole")
    whole.run()
    update = recipe.Trainer._update

    def update_until_nine(self: recipe.Trainer, batch: Any) -> float:
        if self.step == 9:
            raise Stopped
        return update(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(recipe.Trainer, "_update", update_until_nine)
        with pytest.raises(Stopped):
            trainer(tmp_path / "stopped").run()
    assert (tmp_path / "stopped" / "checkpoint.safetensors").exists()
    resumed = trainer(tmp_path / "stopped")
    resumed.run()
    assert resumed.step == whole.step == 12
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
    assert not (tmp_path / "stopped" / "checkpoint.safetensors").exists()


@pytest.mark.usefixtures("few_mails")
def test_other_settings_do_not_continue_a_checkpoint(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    first._update([encode(Letters(), TrainingMail("0", "mail", "fork"))])
    first._save_checkpoint()
    other = recipe.Trainer(tiny_gemma(), Letters(), tmp_path, recipe.Hyperparameters(rank=2, seed=1))
    with pytest.raises(SystemExit, match="remove it to start again"):
        other.run()


def test_learning_rate_rises_then_falls_to_nothing() -> None:
    rates = [recipe.schedule(step / 100, 0.1) for step in range(101)]
    assert rates[10] == max(rates) == pytest.approx(1)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[0] > 0
    assert rates[100] == pytest.approx(0)


def test_a_cropped_mail_keeps_its_subject_and_half_of_its_words_in_a_row() -> None:
    words = [f"word{i}" for i in range(40)]
    mail = TrainingMail("1", "Subject: a\n\n" + " ".join(words), "fork")
    chance = random.Random(0)
    cut = [recipe.cropped(mail, 1.0, chance).content for _ in range(50)]
    for content in cut:
        head, _, body = content.partition("\n\n")
        assert head == "Subject: a"
        assert body in mail.content
        assert set(body.split()) <= set(words)
        assert len(body.split()) >= 18
    assert len(set(cut)) > 10
    assert recipe.cropped(mail, 0.0, chance) == mail


def test_batches_hold_every_mail_once_and_little_padding() -> None:
    mails = [encode(Letters(), TrainingMail(str(i), "x" * (i * 7 % 90), "fork")) for i in range(101)]
    batches = recipe.bucketed(mails, 8, random.Random(0))
    assert sorted(mail.id for batch in batches for mail in batch) == sorted(mail.id for mail in mails)
    assert max(map(len, batches)) == 8
    padded = sum(len(batch) * max(map(len, batch)) for batch in batches)
    assert padded < 1.1 * sum(map(len, mails))


def test_a_trimmed_vocabulary_is_trained_on_as_it_will_be_served(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "whole.gguf")
    with closing(GgufCheckpoint(whole)) as checkpoint:
        plan = plan_trim(checkpoint.header, ["<start_of_turn>ello<end_of_turn>"], 266)
        plan = replace(plan, fields={**plan.fields, "tokenizer.ggml.add_space_prefix": Field.boolean(False)})
        trimmed = write(TrimmedCheckpoint(checkpoint, plan), tmp_path / "trimmed.gguf")
    model, tokenizer = load_base(trimmed)
    assert model.get_input_embeddings().weight.shape[0] == len(plan.kept) < plan.n_before
    served = load_tokenizer(trimmed)
    mail = encode(tokenizer, TrainingMail("1", "Hello ello \x07", "hell"))
    prompt = "<start_of_turn>user\nHello ello \x07<end_of_turn>\n<start_of_turn>model\n"
    assert list(mail.prompt[1:]) == served.encode(prompt, add_special=False, parse_special=True)
    assert mail.answer[-1] == plan.new_ids[END]
    assert served.is_end(mail.answer[-1])
    completion_loss(model, [mail]).backward()
    assert torch.isfinite(model.get_input_embeddings().weight.grad).all()
