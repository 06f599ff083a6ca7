"""Forms of the Prefect UI made from the keys of params.yaml, with the types and bounds of `Config`."""

from __future__ import annotations

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
)

from prelar.config import Config, keys


class Form(BaseModel):
    """A form whose fields may stay empty; an empty field is no change."""

    model_config = ConfigDict(extra="forbid")

    @model_serializer(mode="wrap")
    def _without_empty(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialise(self).items() if value is not None}


def _no_default(schema: dict[str, Any]) -> None:
    del schema["default"]


def _fields(group: str | None = None) -> dict[str, Any]:
    """The fields of a group of params.yaml, or its flat keys."""
    model: Any = Config.model_fields[group].annotation if group else Config
    return {name: field for name, field in model.model_fields.items() if name in keys(model)}


def one_of_each(group: str | None = None) -> type[Form]:
    """A value for each flat key of params.yaml, or for each key of a group.

    The UI shows a switch that is off for a boolean without default, and sends it; None keeps it empty.
    """
    fields: dict[str, Any] = {}
    for key, field in _fields(group).items():
        if field.annotation is bool:
            fields[key] = (bool | None, Field(default=None, title=key))
        else:
            empty = Field(default=None, title=key, json_schema_extra=_no_default)
            fields[key] = (field.rebuild_annotation(), empty)
    return create_model(group or "params", __base__=Form, **fields)


def several_of_each() -> type[Form]:
    """A list of values for each flat key of params.yaml."""
    fields: dict[str, Any] = {
        key: (
            list[field.rebuild_annotation()],  # type: ignore[misc]
            Field(default=None, title=key, min_length=1, json_schema_extra=_no_default),
        )
        for key, field in _fields().items()
    }
    return create_model("grid", __base__=Form, **fields)
