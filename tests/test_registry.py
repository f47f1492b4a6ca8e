"""A registry finds its own objects, those of installed packages, and those of any importable module."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from cliffscope import registry as module
from cliffscope.errors import DataError
from cliffscope.registry import Registry


@pytest.fixture
def numbers() -> Registry[int]:
    found: Registry[int] = Registry(kind="number", group="cliffscope.test_numbers", expected=int)
    found.register("one", 1)
    found.register("two", 2)
    return found


def test_a_registered_name_gives_its_object_and_an_object_itself(numbers: Registry[int]) -> None:
    assert numbers.get("two") == 2
    assert numbers.get(7) == 7
    assert numbers.names() == ("one", "two")
    assert dict(numbers) == {"one": 1, "two": 2}


def test_a_name_is_registered_once(numbers: Registry[int]) -> None:
    with pytest.raises(DataError, match="'one' is registered already"):
        numbers.register("one", 3)


@pytest.mark.parametrize("choice", ["three", "", "no.such.module:x", "os:nothing", ":x"])
def test_an_unknown_choice_says_what_there_is(numbers: Registry[int], choice: str) -> None:
    with pytest.raises(DataError, match=r"package\.module:name"):
        numbers.get(choice)


def test_an_object_of_another_class_is_refused(numbers: Registry[int]) -> None:
    with pytest.raises(DataError, match="is a str, not a number"):
        numbers.get("os:sep")
    with pytest.raises(DataError, match="is a float, not a number"):
        numbers.get(0.5)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="not a number"):
        numbers.register("half", 0.5)  # type: ignore[arg-type]


def test_a_module_on_the_path_is_imported(
    numbers: Registry[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_numbers.py").write_text("class Holder:\n    seven = 7\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert numbers.get("their_numbers:Holder.seven") == 7
    sys.modules.pop("their_numbers")


def test_entry_points_of_installed_packages_are_offered_by_name(
    numbers: Registry[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def points(group: str) -> list[EntryPoint]:
        assert group == "cliffscope.test_numbers"
        return [EntryPoint("most", "sys:maxsize", group), EntryPoint("one", "sys:hexversion", group)]

    monkeypatch.setattr(module, "entry_points", points)
    assert numbers.names() == ("one", "two", "most")
    assert numbers.get("most") == sys.maxsize
    assert numbers.get("one") == 1
