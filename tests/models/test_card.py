"""The metadata that every card begins with, as the hub's own library reads it."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard

from harness.models.card import head


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ({"name": "them/base", "revision": "0" * 40}, "them/base"),
        ({"name": 'a"b: c', "revision": "0" * 40}, 'a"b: c'),
        # A folder's name is no model of the hub, whatever it is called.
        ({"name": "them/base", "revision": None}, None),
        ({"name": "them/base"}, None),
        (None, None),
    ],
)
def test_a_base_is_named_where_somebody_else_can_find_it(base: dict[str, Any] | None, told: str | None) -> None:
    data = ModelCard("\n".join([*head("peft", ("merge",), base), "# arm"])).data.to_dict()
    assert (data.get("base_model"), data["library_name"]) == (told, "peft")
    assert data["tags"] == ["harness", "preference-alignment", "merge"]
