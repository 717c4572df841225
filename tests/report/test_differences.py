"""What differs between recipes is told once, and nothing else is."""

from arra.report.differences import recipe_differences


def test_settings_that_differ_are_told_with_their_paths() -> None:
    found = recipe_differences(
        {
            "a": "name: x\nmodel: {layers: 6}\ntrain: {seed: 1, steps: 5, betas: [0.9, 0.95]}",
            "b": "name: y\nmodel: {layers: 6}\ntrain: {seed: 2, steps: 6, betas: [0.9, 0.99]}",
        }
    )
    assert found == [
        ("train.steps", {"a": "5", "b": "6"}),
        ("train.betas", {"a": "[0.9, 0.95]", "b": "[0.9, 0.99]"}),
    ]


def test_a_missing_section_is_one_difference() -> None:
    found = recipe_differences(
        {"none": "align: null", "rep": "align: {target: rep, layer: 2}", "deep": "align: {target: rep, layer: 3}"}
    )
    assert found == [
        ("align", {"none": "null", "rep": "…", "deep": "…"}),
        ("align.layer", {"none": "", "rep": "2", "deep": "3"}),
    ]


def test_a_setting_that_one_recipe_has_not_differs() -> None:
    assert recipe_differences({"a": "x: {y: 1}", "b": "x: {y: 1, z: null}"}) == [("x.z", {"a": "", "b": "null"})]


def test_texts_that_are_no_recipes_differ_in_nothing() -> None:
    assert recipe_differences({"a": "[[[", "b": "", "c": "x: 1", "d": "just words"}) == []
