"""The errors of `convert`. Each message names the file or tensor, the value found and the one that was needed.

ConvertError
├── SourceInvalid        the source is incomplete, damaged, or holds something that cannot be converted
├── ArchitectureUnknown  the model family is not supported
├── AdapterInvalid       the adapter folder is incomplete, malformed, or not made for this base
├── TokenizerInvalid     the tokenizer is missing, malformed, or does something that llama.cpp cannot
├── TemplateInvalid      the chat template beside the adapter cannot be used
├── ImatrixFailed        no importance matrix could be collected
├── ImatrixInvalid       an importance matrix is damaged, or was collected on another model
├── TrimImpossible       the vocabulary cannot be cut: an unsupported kind, missing fields, or cut before
├── QuantizeFailed       llama.cpp could not quantize
├── MeasureFailed        a file cannot be measured: it does not run, its logits are not finite, or it has other tokens
├── FinetuneFailed       a fine-tune cannot be done: no library, too little time or memory, another run's checkpoint
├── NotReplaced          a new model is worse than the installed one, or cannot be compared with it
├── VerifyFailed         the written file is not as planned, or does not run
└── RequestInvalid       the options contradict each other or lack a name
    └── QuantizationUnknown  no quantization of that name
"""

from codecs import BOM_UTF8
from contextlib import suppress
from pathlib import Path

CLASSIFICATION_HEAD = (
    "it has a classification head, which writes no text and which llama.cpp does not run. Train the labels as text: "
    "the same base as a causal language model (AutoModelForCausalLM, task_type CAUSAL_LM), on prompts with the "
    "labels as answers"
)
"""The end of a message about a model or an adapter for classification, with the way out."""


class ConvertError(Exception):
    """Base of all errors of `convert`."""


class SourceInvalid(ConvertError):
    """The source is incomplete, damaged, or holds something that cannot be converted."""


class ArchitectureUnknown(ConvertError):
    """The model family is not supported."""


class AdapterInvalid(ConvertError):
    """The adapter folder is incomplete, malformed, or not made for this base."""


class TokenizerInvalid(ConvertError):
    """The tokenizer is missing, malformed, does not fit the weights, or does something that llama.cpp cannot."""


class TemplateInvalid(ConvertError):
    """The chat template beside the adapter cannot be used."""


class ImatrixFailed(ConvertError):
    """No importance matrix could be collected."""


class ImatrixInvalid(ConvertError):
    """An importance matrix is damaged, or it was collected on another model."""


class TrimImpossible(ConvertError):
    """The vocabulary cannot be cut: an unsupported kind, missing fields, or cut before."""


class QuantizeFailed(ConvertError):
    """llama.cpp could not quantize the file."""


class MeasureFailed(ConvertError):
    """A file cannot be measured: it does not run, its logits are not finite, or it has another vocabulary."""


class FinetuneFailed(ConvertError):
    """A fine-tune cannot be done: no library, too little time or memory, or another run's checkpoint in its folder."""


class NotReplaced(ConvertError):
    """A new model is worse than the one that is installed under its name, or cannot be compared with it."""


class VerifyFailed(ConvertError):
    """The written file is not as planned, or does not run."""


class RequestInvalid(ConvertError):
    """The options contradict each other or lack a name."""


class QuantizationUnknown(RequestInvalid):
    """No quantization of that name."""


def json_fault(path: Path, error: Exception) -> str:
    """A message for a file that is not valid JSON, with the way out where the file is JSON but for its first bytes."""
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(BOM_UTF8)) == BOM_UTF8:
            return (
                f"{str(path)!r} begins with a byte order mark, which JSON does not allow: save it as UTF-8 without one "
                f"(tail -c +{len(BOM_UTF8) + 1} FILE > NEW)"
            )
    return f"{str(path)!r} is not valid JSON: {error}"


def inner_folder(folder: Path, name: str) -> str:
    """A hint at the subfolder with the file `name`, as trainers write them (checkpoint-500); empty without one."""
    with suppress(OSError):
        found = [path.parent for path in folder.glob(f"*/{name}")]
        if found:
            newest = max(found, key=lambda path: (path.stat().st_mtime, path.name))
            return f"; {str(newest)!r} has one: give that folder"
    return ""
