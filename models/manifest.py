"""`model.toml`, the manifest of a model's folder. Only this module reads and writes it."""

import tomllib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import tomli_w
from pydantic import Field, ValidationError, model_validator

from models.calibration.record import Calibration
from models.common.file_kinds import file_kind
from models.common.record import Record
from models.training import Training

from .errors import BadManifest

MANIFEST_FILE = "model.toml"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
TextTokens = Annotated[int, Field(ge=8, le=1 << 20)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Base(Record):
    """The weights a model was made from."""

    name: str
    source: str = ""
    revision: str = ""
    sha256: Sha256


class Adapter(Record):
    """The LoRA adapter that was merged. `path` is relative to the manifest while the model is not built yet."""

    path: str
    sha256: Sha256 | None = None
    rank: int | None = None


class Prompt(Record):
    """The prompt that the model was trained with.

    `template` holds `{text}` once, for the user's message; `system` is the system message's text, if any. Of a longer
    text only the first `max_text_tokens` tokens go into the template (None: the whole text).
    """

    template: str = "{text}"
    system: str = ""
    max_text_tokens: TextTokens | None = None

    @model_validator(mode="after")
    def _one_place(self) -> "Prompt":
        if self.template.count("{text}") != 1:
            raise ValueError(f"prompt.template must hold {{text}} exactly once, got {self.template!r}")
        return self

    def wrap(self, text: str) -> str:
        """The user's message for `text`. What the text begins or ends with already is not put around it again."""
        before, _, after = self.template.partition("{text}")
        if not text.startswith(before):
            text = before + text
        return text if text.endswith(after) else text + after

    def parts(self, content: str) -> tuple[str, str, str]:
        """A user's message in three: what is before the text, the text, and what is after it.

        The first and the last are the template's, or empty where the message lacks them.
        """
        before, _, after = self.template.partition("{text}")
        before = before if content.startswith(before) else ""
        text = content[len(before) :]
        after = after if text.endswith(after) else ""
        return before, text[: len(text) - len(after)], after

    def messages(self, said: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
        """The (role, text) pairs `said` as messages of the form trained on: each of the user's wrapped, `system` first.

        A system message among those said takes the place of `system`.
        """
        messages = [{"role": role, "content": self.wrap(text) if role == "user" else text} for role, text in said]
        if self.system and not any(message["role"] in {"system", "developer"} for message in messages):
            messages.insert(0, {"role": "system", "content": self.system})
        return messages


BARE_PROMPT = Prompt()


class Conversion(Record):
    """The conversion of a model from its weights. A recipe holds the measured choice, so that a build need not measure.

    `trim` names a file of examples in the recipe's folder, by which the vocabulary is cut to `keep` tokens. In a model
    that was cut by other examples it is empty and `keep` gives the size; without either the vocabulary is whole.
    `imatrix` names the importance matrix in the folder by which weights are rounded, in llama.cpp's format.
    """

    quantization: str = "Q8_0"
    imatrix: str = ""
    trim: str = ""
    keep: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _files_are_inside_and_a_trim_says_how_far(self) -> "Conversion":
        for field, name in (("trim", self.trim), ("imatrix", self.imatrix)):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name:
                raise ValueError(f"conversion.{field} must be a path inside the recipe's folder, with /, got {name!r}")
        if self.trim and not self.keep:
            raise ValueError(f"conversion.trim {self.trim!r} needs conversion.keep, the number of tokens to keep")
        return self


class Artefact(Record):
    """A GGUF file of the model."""

    file: str
    quantization: str
    size_bytes: Annotated[int, Field(gt=0)]
    sha256: Sha256

    @model_validator(mode="after")
    def _plain_name(self) -> "Artefact":
        if Path(self.file).name != self.file or self.file in {"", ".", ".."}:
            raise ValueError(f"artefact file must be a plain file name, got {self.file!r}")
        return self


class Accuracy(Record):
    """A measured accuracy on a split of the examples, with its 95 % interval (Wilson)."""

    what: str
    split: str
    correct: Annotated[int, Field(ge=0)]
    total: Annotated[int, Field(gt=0)]
    interval_low: Annotated[float, Field(ge=0, le=1)]
    interval_high: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _possible(self) -> "Accuracy":
        if self.correct > self.total:
            raise ValueError(f"correct must be at most total, got {self.correct} of {self.total}")
        if self.interval_low > self.interval_high:
            raise ValueError(f"interval_low must be at most interval_high, got {self.interval_low}")
        return self


class Manifest(Record):
    """A model: name, purpose, origin and files.

    A built model has at least one artefact; a recipe (base plus adapter, not built yet) has none. `source` is where
    the artefacts were fetched from; it is empty when they were made here. `compact_json`: the model was trained
    on JSON without white space, and its answers under a JSON schema have none. `training`: how it was trained here.
    `calibration`: how sure it is of its labels, fitted to held-out examples.

    Of kind `adapter` it is a LoRA adapter that is applied while its base is served, under the name BASE:NAME. Its one
    artefact is a GGUF file with the `general.type` "adapter". `base.sha256` is that of the weights it was trained on:
    of the GGUF file to serve it with, or of the checkpoint that such files were made from (their own `base.sha256`).
    `base.name` is the installed name of that GGUF file, if it has one. `prompt`, `task`, `labels` and
    `quality` are the adapter's own; a chat template in its GGUF metadata takes the place of the base's.
    """

    schema_version: Literal[1] = 1
    kind: Literal["model", "adapter"] = "model"
    name: Name
    description: str = ""
    task: Literal["classify", "write", "general"] = "general"
    licence: str
    licence_notice: str = ""
    source: str = ""
    base: Base | None = None
    adapter: Adapter | None = None
    conversion: Conversion | None = None
    prompt: Prompt = Prompt()
    labels: tuple[str, ...] = ()
    compact_json: bool = False
    artefacts: tuple[Artefact, ...] = ()
    quality: tuple[Accuracy, ...] = ()
    training: Training | None = None
    calibration: Calibration | None = None

    @model_validator(mode="after")
    def _labels_differ(self) -> "Manifest":
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels must differ, got {list(self.labels)!r}")
        if self.task == "classify" and not self.labels:
            raise ValueError("task 'classify' needs labels")
        if self.calibration is not None and not self.labels:
            raise ValueError("calibration is about labels, and there are none")
        return self

    @model_validator(mode="after")
    def _adapter_has_a_base(self) -> "Manifest":
        if self.kind == "adapter" and (self.base is None or len(self.artefacts) != 1):
            raise ValueError(f"kind 'adapter' needs a base and exactly one artefact, got {len(self.artefacts)}")
        return self

    @property
    def fine_tuned(self) -> bool:
        """True if the model is known to be made for a task of its own, and so to answer nothing else reliably."""
        return self.task != "general" or bool(self.labels) or self.kind == "adapter" or self.adapter is not None


def read_manifest(path: Path) -> Manifest:
    """Read `model.toml` (the file, or the folder that holds it). Raises BadManifest naming the file and the field."""
    file = path / MANIFEST_FILE if path.is_dir() else path
    try:
        return Manifest.model_validate(tomllib.loads(file.read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        given = file_kind(file)
        if given.kind not in {"missing", "text", "empty"}:
            raise BadManifest(f"{str(file)!r} is {given.name}, not a manifest (TOML)") from error
        raise BadManifest(f"{str(file)!r} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise BadManifest(f"{str(file)!r}: {field}: {first['msg']}") from error


def dump_manifest(manifest: Manifest) -> str:
    """The manifest as TOML; reading it back gives an equal manifest."""
    return tomli_w.dumps(manifest.model_dump(mode="json", exclude_none=True))
