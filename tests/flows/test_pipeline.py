"""The forms of the Prefect UI: a field a key of params.yaml, with its description."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from flows import pipeline
from prelar.config import Config, Demos, Ssv2, keys


@pytest.mark.parametrize(
    ("form", "model"),
    [
        (pipeline.one_of_each(), Config),
        (pipeline.several_of_each(), Config),
        (pipeline.one_of_each("ssv2"), Ssv2),
        (pipeline.one_of_each("demos"), Demos),
    ],
)
def test_a_form_describes_each_key(form: type[BaseModel], model: type[BaseModel]) -> None:
    fields = form.model_json_schema()["properties"]
    own = {"sources", "mixtures", "unions"}  # which map names of one's own, and are for params.yaml
    flat = [key for key in keys(model) if "." not in key and key not in own]
    assert {key: field["description"] for key, field in fields.items()} == {
        key: model.model_fields[key].description for key in flat
    }
    assert {field["title"] for field in fields.values()} == set(flat)
