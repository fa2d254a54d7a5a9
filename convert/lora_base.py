"""Is this the base the adapter was trained on? By its name, as far as names tell; the shapes are checked elsewhere."""

import re

from models.gguf.header import Header

from .lora import Adapter

_NAMES = ("general.name", "general.basename", "general.base_model.0.name", "general.source.huggingface.repository")
# Endings that say how the weights are stored, not which they are.
_STORAGE = re.compile(
    r"(gguf|hf|unsloth|bnb|[248]bit|gptq|awq|fp?16|fp?32|bf16|i?q[1-8]|[01]|k|nl|xxs|xs|s|m|l|xl|ud)", re.IGNORECASE
)


def base_warning(adapter: Adapter, header: Header) -> str | None:
    """What to tell the user when the adapter names another base than `header` is of; None when nothing is known."""
    if not _is_hub_name(adapter.base):
        return None
    own = [header.path.stem, header.path.name, header.path.parent.name]
    own += [str(header.fields[key].value) for key in _NAMES if key in header.fields]
    if _essence(adapter.base) in {_essence(name) for name in own}:
        return None
    called = header.fields["general.name"].value if "general.name" in header.fields else header.path.name
    return (
        f"the adapter {str(adapter.folder)!r} says that it was trained on {adapter.base!r}, this base calls itself "
        f"{called!r}: on another model than its own an adapter does harm, even where it fits"
    )


def _is_hub_name(name: str) -> bool:
    """True for OWNER/NAME and for a plain name. A path on the machine it was trained on says nothing."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not name.startswith(".")


def _essence(name: str) -> str:
    words = re.split(r"[^a-z0-9]+", name.rsplit("/", 1)[-1].lower())
    while len(words) > 1 and _STORAGE.fullmatch(words[-1]):
        words.pop()
    return "".join(words)
