"""The errors of `convert`. Each message names the file or tensor, the value found and the one that was needed.

ConvertError
├── SourceInvalid        the source is incomplete, damaged, or holds what cannot be converted
├── ArchitectureUnknown  nothing is known of this model family
├── AdapterInvalid       the adapter folder is incomplete, malformed, or not made for this base
├── TokenizerInvalid     the tokenizer is missing, malformed, or nothing that llama.cpp can repeat
├── TemplateInvalid      the chat template beside the adapter cannot be used
├── QuantizeFailed       llama.cpp could not quantize
├── VerifyFailed         what was written is not what was meant, or does not run
└── RequestInvalid       the options contradict each other or lack a name
    └── QuantizationUnknown  no quantization of that name
"""


class ConvertError(Exception):
    """Base of everything `convert` raises on purpose."""


class SourceInvalid(ConvertError):
    """The source is incomplete, damaged, or holds what cannot be converted."""


class ArchitectureUnknown(ConvertError):
    """Nothing is known of this model family."""


class AdapterInvalid(ConvertError):
    """The adapter folder is incomplete, malformed, or not made for this base."""


class TokenizerInvalid(ConvertError):
    """The tokenizer is missing, malformed, does not fit the weights, or is nothing that llama.cpp can repeat."""


class TemplateInvalid(ConvertError):
    """The chat template beside the adapter cannot be used."""


class QuantizeFailed(ConvertError):
    """llama.cpp could not quantize the file."""


class VerifyFailed(ConvertError):
    """What was written is not what was meant, or it does not run."""


class RequestInvalid(ConvertError):
    """The options contradict each other or lack a name."""


class QuantizationUnknown(RequestInvalid):
    """No quantization of that name."""
