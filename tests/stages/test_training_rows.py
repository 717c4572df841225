"""`data.max_train_records`: a run trains on that share of a store which stays whole."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arra.config import Recipe, load_recipe
from arra.data.index import build_index
from arra.data.records import ImageRef, Record, Source
from arra.data.store import Store
from arra.errors import ArraError
from arra.stages.prepare import PrepareOptions, prepare
from arra.stages.train import train
from arra.stages.training_data import epoch_length, training_data, training_rows
from arra.tokenizers import load_tokenizer


class Toys(Source):
    path: str = "/toys"
    ids: tuple[str, ...]

    def scan(self) -> Any:
        for name in self.ids:
            yield Record(name, ImageRef("file", f"/{name}.png"), name, "train")


def demo(*overrides: str) -> Recipe:
    return load_recipe("demo", row="baseline", overrides=overrides)


def toy_recipe(pipeline: Any, *overrides: str) -> Recipe:
    return load_recipe(pipeline.aligned / "recipe.yaml", overrides=overrides)


def test_an_epoch_is_of_the_records_that_are_used_and_of_sources_that_have_some(tmp_path: Path) -> None:
    names = tuple(f"name {number}" for number in range(12))
    store = build_index([Toys(ids=names[:2]), Toys(ids=names[2:])], tmp_path / "store").store
    assert store is not None
    store.write("codes", np.zeros((12, 1), np.uint8), {})
    assert epoch_length(demo(), store) == 12
    for most in range(1, 12):
        told = demo(f"data.max_train_records={most}")
        assert len(training_rows(told, store)) == epoch_length(told, store) == most
    assert any(0 in store.source_counts(training_rows(demo(f"data.max_train_records={n}"), store)) for n in range(1, 9))


def test_batches_and_statistics_are_of_the_share_and_validation_is_whole(pipeline: Any) -> None:
    store, told = Store.open(pipeline.store), toy_recipe(pipeline, "data.max_train_records=20", "train.seed=3")
    tokenizer = load_tokenizer(told.tokenizer.name)
    whole, few = (training_data(each, store, tokenizer) for each in (toy_recipe(pipeline), told))
    assert len(whole.pictures) > len(few.pictures) == 20
    assert set(few.pictures.rows.tolist()) < set(whole.pictures.rows.tolist())
    visited = np.concatenate([few.batches.batch(step).rows for step in range(5)])
    assert np.bincount(visited, minlength=20).tolist() == [2] * 20  # two epochs of them
    assert few.features is not None
    assert {len(found) for found in few.features.values()} == {20}
    assert few.validation_rows.tolist() == whole.validation_rows.tolist()


def test_the_store_is_the_same_and_the_run_is_another(pipeline: Any, toy_copy: Any) -> None:
    told = toy_recipe(pipeline, "data.max_train_records=20")
    before = Store.open(toy_copy.store).manifest()
    store = prepare(told, toy_copy.store, options=PrepareOptions(workers=0)).checked()
    assert json.dumps(store.manifest()) == json.dumps(before)
    with pytest.raises(ArraError, match=r"another recipe: data.max_train_records is None in this run, now 20; use"):
        train(told, store, toy_copy.aligned)


def test_what_the_planner_is_told_makes_no_other_run(pipeline: Any, toy_copy: Any) -> None:
    told = toy_recipe(pipeline, "data.expected_records=5")
    assert train(told, Store.open(toy_copy.store), toy_copy.aligned).path == toy_copy.aligned


@pytest.mark.parametrize("key", ["max_train_records", "expected_records"])
def test_no_records_at_all_are_refused(key: str) -> None:
    with pytest.raises(ArraError, match=f"--set data.{key}: expected .*, found 0"):
        demo(f"data.{key}=0")
