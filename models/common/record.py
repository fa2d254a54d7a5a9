"""The base of all records that are read from a file or a command line."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """An immutable record with checked fields; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
