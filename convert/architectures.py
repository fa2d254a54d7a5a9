"""The family of a checkpoint that an adapter is merged into, by the architecture its header names."""

from convert.families.base import Family
from models.gguf.header import Header

from .errors import ArchitectureUnknown
from .families import BY_ARCHITECTURE


class Gemma(Family):
    """The first Gemma. Its folders are not converted, but GGUF files of it can take an adapter."""

    architecture = "gemma"
    norm_offset = 1.0


def family_of(header: Header) -> Family:
    """The family of a checkpoint. Raises ArchitectureUnknown naming it and the known ones."""
    families = {Gemma.architecture: Gemma(), **BY_ARCHITECTURE}
    family = families.get(header.architecture)
    if family is None:
        raise ArchitectureUnknown(
            f"no adapter can be merged into architecture {header.architecture!r} ({str(header.path)!r}); "
            f"known are {', '.join(sorted(families))}"
        )
    return family
