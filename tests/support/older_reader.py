"""A reader of exports from before some field."""

from pydantic import BaseModel, create_model

from vavae.config import Config
from vavae.interop.export import LightningDiTDescription
from vavae.models.dit.config import LightningDiTConfig


def reader_without(field: str) -> type[LightningDiTDescription]:
    """The description of a LightningDiT as it was before a field of its configuration."""
    fields = {name: (each.annotation, each) for name, each in LightningDiTConfig.model_fields.items() if name != field}
    older: type[BaseModel] = create_model("OlderLightningDiTConfig", __base__=Config, **fields)  # type: ignore[call-overload]
    return create_model("OlderDescription", __base__=LightningDiTDescription, lightningdit=(older, ...))
