"""What all parameters are made of: unchangeable values, and numbers with bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what torch, NumPy and scikit-learn all take


class Frozen(BaseModel):
    """A value: unchangeable, and without room for a misspelt key."""

    model_config = ConfigDict(frozen=True, extra="forbid")
