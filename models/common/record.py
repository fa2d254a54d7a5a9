"""The base of all records that are read from a file or a command line."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]


class Record(BaseModel):
    """An immutable record with checked fields; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
