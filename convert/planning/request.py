"""The request of a conversion, from which the options of `deskside convert` are generated. Help imports only this."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from models.common.options import Flag
from models.quality import TaskKind

OptionalFile = Annotated[Path | None, Flag(metavar="FILE")]


def _possible(targets: tuple[float, ...]) -> tuple[float, ...]:
    for target in targets:
        if not 0.5 <= target < 1:
            raise ValueError("a target is a share of right answers, 0.5 or more and below 1")
    if len(set(targets)) < len(targets):
        raise ValueError("the targets must differ")
    return targets


Targets = Annotated[
    tuple[float, ...], AfterValidator(_possible), Flag(metavar="SHARES", shown="0.97; 0.95 and 0.99 too")
]
TARGET_HELP = (
    "Share of automatic answers that must be right: the confidence from which that holds is kept with the model. Of "
    "several the first applies unless the server is given another."
)


class ConvertRequest(BaseModel):
    """A conversion as the user states it; a recipe needs no `name`. `work` is the kind of task of the examples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Annotated[str, Flag(metavar="SOURCE", positional=True)] = Field(
        description="A Hugging Face folder, hf://owner/name@revision, an installed or known model, "
        "hf://owner/name/file.gguf, a .gguf file, or a recipe of the catalogue (email-triage)."
    )
    adapter: Annotated[Path | None, Flag(metavar="DIR")] = Field(
        default=None, description="PEFT LoRA adapter to merge."
    )
    hot: bool = Field(default=False, description="Do not merge: install the adapter, to be served as SOURCE:NAME.")
    examples: OptionalFile = Field(
        default=None,
        description="JSONL of chat records that were not trained on: choose the quantization by measuring on them.",
    )
    task: Annotated[str | None, Flag(metavar="TASK")] = Field(
        default=None,
        description="A task's name or folder: its validation examples instead of --examples, its kind, labels, prompt.",
    )
    work: Annotated[TaskKind | None, Flag("for", shown="by their answers")] = Field(
        default=None, description="Task of the examples."
    )
    max_loss: Annotated[float | None, Flag(metavar="NATS", shown="0.02")] = Field(
        default=None, description="Most mean KL divergence that a candidate may have."
    )
    target: Targets = Field(default=(), description=TARGET_HELP)
    quantization: Annotated[str | None, Flag("quant", metavar="TYPE", shown="Q8_0")] = Field(
        default=None,
        description="F16, Q8_0, Q6_K, Q5_K_M, Q5_0, Q4_K_M, Q4_0, IQ4_NL, a mixed layout such as "
        "Q8_0-vocab-Q4_0, or keep: a GGUF's weights as they are.",
    )
    trim: Annotated[Path | None, Flag("trim-vocab", metavar="FILE")] = Field(
        default=None, description="JSONL of chat records: cut the vocabulary to the tokens they need."
    )
    keep: Annotated[int | None, Flag(metavar="N", shown="32768")] = Field(
        default=None, description="Tokens in a cut vocabulary."
    )
    whole_vocabulary: Annotated[bool, Flag("whole-vocab")] = Field(
        default=False, description="Do not cut the vocabulary, even if the recipe does."
    )
    gguf: OptionalFile = Field(default=None, description="Weights that another converter made from the folder SOURCE.")
    name: Annotated[str | None, Flag(metavar="NAME")] = Field(
        default=None, description="Name of the model; a recipe has its own."
    )
    manifest: OptionalFile = Field(
        default=None, description="model.toml with description, task, labels, prompt, licence."
    )
    replace: bool = Field(
        default=False, description="Replace an installed model of that name; it is kept for rollback."
    )
    keep_f16: bool = Field(default=False, description="Keep the unquantized file as well.")
