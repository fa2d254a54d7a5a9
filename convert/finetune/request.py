"""The request of `deskside finetune`. Its options are generated from here, the training's from its settings."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from convert.planning.request import TARGET_HELP, Targets
from models.common.options import Flag


class FinetuneRequest(BaseModel):
    """A fine-tune as the user states it: the task, the base, and the model that is made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Annotated[str, Flag(metavar="TASK", positional=True)] = Field(
        description="A task's name or folder; or a table or JSON lines of examples, of which a task is made first."
    )
    base: Annotated[str, Flag(metavar="BASE")] = Field(
        default="gemma-3-270m",
        description="The model to train: an installed or known model, a Hugging Face folder, or a .gguf file.",
    )
    name: Annotated[str | None, Flag(metavar="NAME", shown="the task's")] = Field(
        default=None, description="Name of the model."
    )
    depth: Annotated[str, Flag(metavar="N|auto|all")] = Field(
        default="all",
        pattern=r"^(all|auto|[1-9][0-9]{0,3})$",
        description="Keep N of the base's layers; auto: as few as lose nothing on the validation examples.",
    )
    target: Targets = Field(default=(), description=TARGET_HELP)
    seeds: int = Field(default=1, ge=1, le=20, description="Train with N seeds, and keep the best on validation.")
    whole_vocabulary: Annotated[bool, Flag("whole-vocab")] = Field(
        default=False, description="Do not cut a large vocabulary to what the examples need."
    )
    replace: bool = Field(default=False, description="Replace an installed model of that name, even with a worse one.")
    only_train: bool = Field(default=False, description="Stop after the training; the next command is told.")
    out: Annotated[Path | None, Flag(metavar="DIR", shown="trained/NAME beside the store")] = Field(
        default=None, description="Folder for the result; a stopped run with the same folder resumes."
    )
