"""The client's models know every field of the server's: whatever the server learns, this file asks the client for."""

from __future__ import annotations

import types
import typing
from typing import Any

import pytest
from pydantic import BaseModel

from claas_client import models as client
from claas_operator.shim import models as server

BODIES = ["Message", "Sample", "LiteSample", "Training", "Teacher", "DistillBody", "LiteBody"]
ANSWERS = [
    *("Numbers", "Metadata", "Timings", "Distilled", "Initialised", "Request", "Adapter", "Version", "Lineage"),
    *("Place", "Part", "Workers", "Health", "Limits", "Caller", "ReasonMeaning", "FieldProblem"),
]


@pytest.mark.parametrize("name", BODIES)
def test_a_body_has_the_server_s_fields(name: str) -> None:
    assert set(typing.get_type_hints(getattr(client, name))) >= set(getattr(server, name).model_fields)


def test_init_lora_has_the_server_s_fields() -> None:
    assert {"output_uri", *typing.get_type_hints(client.InitOptions)} == set(server.InitBody.model_fields)


@pytest.mark.parametrize("name", ["Message", "Sample", "Training", "Teacher", "DistillBody", "LiteBody", "InitOptions"])
def test_a_choice_has_the_server_s_words(name: str) -> None:
    theirs = server.InitBody if name == "InitOptions" else getattr(server, name)
    for field, hint in typing.get_type_hints(getattr(client, name)).items():
        if typing.get_origin(hint) is typing.Literal and field in theirs.model_fields:
            assert set(typing.get_args(hint)) == _words(theirs.model_fields[field].annotation), field


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_has_the_server_s_fields(name: str) -> None:
    ours: type[BaseModel] = getattr(client, name)
    theirs: type[BaseModel] = getattr(server, name)
    assert set(ours.model_fields) >= set(theirs.model_fields)


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_holds_all_that_the_server_may_say_is_read(name: str) -> None:
    theirs: type[BaseModel] = getattr(server, name)
    content = _filled(theirs)
    given = theirs.model_validate(content).model_dump(mode="json", by_alias=True)
    ours = getattr(client, name).model_validate(given)
    assert ours.model_dump(mode="json", by_alias=True, exclude_unset=True) == given


def test_the_final_states_are_the_server_s() -> None:
    assert set(typing.get_args(server.State)) >= client.FINAL_STATES
    assert set(typing.get_args(server.State)) - client.FINAL_STATES == {"Pending", "Assigned", "Running"}


def _words(hint: Any) -> set[Any]:
    if typing.get_origin(hint) is typing.Literal:
        return set(typing.get_args(hint))
    return {word for part in typing.get_args(hint) for word in _words(part)}


def _filled(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: _value(field.annotation) for name, field in model.model_fields.items()}


def _value(hint: Any) -> Any:
    """Some value of that type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return _filled(hint)
    if origin is typing.Literal:
        return arguments[0]
    if origin in (typing.Union, types.UnionType):
        return _value(arguments[0])
    if origin is list:
        return [_value(arguments[0])]
    return {str: "text", int: 3, float: 0.5, bool: True}[hint]
