"""A checkpoint and a data set meet by ids: files in another order, items that are gone, items that are new."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_holo.bridge import checkpoint
from recbole_holo.errors import ConfigError, DataError
from recbole_holo.quick_start import load_data_and_model, run
from recbole_holo.training.trainer import get_trainer_class

Rows = list[list[str]]


@pytest.fixture
def rewrite(cyclic_dataset: str) -> Callable[..., None]:
    """Changes the rows of one of the files of the data set."""

    def write(change: Callable[[Rows], Rows], suffix: str = "inter") -> None:
        path = Path("dataset") / cyclic_dataset / f"{cyclic_dataset}.{suffix}"
        head, *lines = path.read_text().splitlines()
        rows = change([line.split("\t") for line in lines])
        path.write_text("\n".join([head, *("\t".join(row) for row in rows)]) + "\n")

    return write


def backwards(rows: Rows) -> Rows:
    return rows[::-1]


def by_item(rows: Rows) -> Rows:
    return sorted(rows, key=lambda row: row[1])


def evaluated(path: str, **settings: Any) -> tuple[dict[str, float], Any, Any]:
    config, model, dataset, train, _, test = load_data_and_model(path, **settings)
    trainer = get_trainer_class(config)(config, model)
    trainer.eval_collector.data_collect(train)
    return trainer.evaluate(test, load_best_model=False), model, dataset


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("RecMamba", {}),
        ("HoloMambaRec", {"item_attributes": ["genre", "tags", "price"], "binding": "both", "bind_output": True}),
        ("HoloMambaRec", {"item_attributes": ["price"], "attribute_floats": "learned", "event_time": "gap"}),
        ("HoloMambaRec", {"item_attributes": ["genre"], "attribute_shuffle": True}),
        ("RecMamba", {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni5"}}),
        ("GRU4RecF", {"selected_features": ["genre"], "load_col": None}),
        ("BPR", {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}}),
        ("ItemKNN", {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}}),
    ],
    ids=["items", "attributes", "numbers", "shuffled", "candidates", "RecBole's attributes", "users", "matrices"],
)
def test_files_in_another_order_give_the_same_result(
    model: str, settings: dict[str, Any], cyclic_dataset: str, tiny: dict, rewrite: Any
) -> None:
    """Numbers of items, users and attributes' values follow the file's order; metrics fell to those of chance."""
    settings = {**tiny, "epochs": 1, **settings}
    done = run(model, cyclic_dataset, config_dict=settings)
    for order in (backwards, by_item):
        rewrite(order)
        rewrite(backwards, "item")
        assert evaluated(done["report"]["checkpoint"])[0] == done["test_result"], order


COLD = {"item_attributes": ["genre", "price"], "binding": "role", "bind_output": True, "cold_items": "attributes"}


def one_gone_and_one_new(rows: Rows) -> Rows:
    rows = [row for row in rows if row[1] != "i3"]
    return [["new", "i9", "1700000000"], ["new", "fresh", "1700000100"], ["new", "i1", "1700000200"], *rows]


def with_a_new_item(rows: Rows) -> Rows:
    return [["fresh", "g1", "", "3.1"], *rows]


def test_a_new_item_is_an_error_that_names_it(cyclic_dataset: str, tiny: dict, rewrite: Any) -> None:
    """With one gone the number of items is the same, and nothing was said; with another number PyTorch raised."""
    for model in ("RecMamba", "SASRec", "ItemKNN"):
        done = run(model, cyclic_dataset, config_dict=tiny)["report"]
        original = (Path("dataset") / cyclic_dataset / "cycle.inter").read_text()
        rewrite(one_gone_and_one_new)
        with pytest.raises(DataError, match=r"item_id: the checkpoint does not know 'fresh', which the data have"):
            load_data_and_model(done["checkpoint"])
        with pytest.raises(DataError, match="'fresh'"):
            run(model, cyclic_dataset, config_dict={**tiny, "resume": done["checkpoint"], "epochs": 3})
        (Path("dataset") / cyclic_dataset / "cycle.inter").write_text(original)


def test_a_gone_item_keeps_its_number(cyclic_dataset: str, tiny: dict, rewrite: Any, caplog: Any) -> None:
    settings = {**tiny, **COLD, "state": "WARNING"}
    done = run("HoloMambaRec", cyclic_dataset, config_dict=settings)["report"]
    _, before, data = evaluated(done["checkpoint"])
    rewrite(lambda rows: [row for row in backwards(rows) if row[1] != "i3"])
    rewrite(lambda rows: [row for row in backwards(rows) if row[0] != "i3"], "item")
    with caplog.at_level(logging.WARNING):
        _, after, changed = evaluated(done["checkpoint"], state="WARNING")
    assert list(changed.field2id_token["item_id"]) == list(data.field2id_token["item_id"])
    assert torch.equal(before.item_vectors(), after.item_vectors())  # its attributes, too, are those of the checkpoint


def test_new_items_get_what_their_attributes_say(cyclic_dataset: str, tiny: dict, rewrite: Any) -> None:
    settings = {**tiny, **COLD}
    done = run("HoloMambaRec", cyclic_dataset, config_dict=settings)["report"]
    _, before, data = evaluated(done["checkpoint"])
    rewrite(lambda rows: one_gone_and_one_new(backwards(rows)))
    rewrite(lambda rows: with_a_new_item(backwards(rows)), "item")
    _, after, changed = evaluated(done["checkpoint"])
    known = data.item_num
    assert list(changed.field2id_token["item_id"][known:]) == ["fresh"]
    assert torch.equal(before.item_vectors(), after.item_vectors()[:known])
    assert not after.item_embedding.weight[known].any()
    assert after.item_vectors()[known].any()
    resumed = run("HoloMambaRec", cyclic_dataset, config_dict={**settings, "epochs": 3, "resume": done["checkpoint"]})
    assert resumed["report"]["epochs"] == 1
    assert evaluated(done["checkpoint"])[0] == resumed["test_result"]


def test_a_run_goes_on_with_reordered_files_as_if_nothing_were(cyclic_dataset: str, tiny: dict, rewrite: Any) -> None:
    """Weights of one item went on as another's; the report gave the validation of before."""
    settings = {**tiny, "item_attributes": ["genre"], "dropout_prob": 0.3, "eval_step": 0, "lr_scheduler": None}
    whole = run("HoloMambaRec", cyclic_dataset, config_dict={**settings, "epochs": 4})
    half = run("HoloMambaRec", cyclic_dataset, config_dict={**settings, "epochs": 2})["report"]
    rewrite(by_item)
    rewrite(backwards, "item")
    rest = run("HoloMambaRec", cyclic_dataset, config_dict={**settings, "epochs": 4, "resume": half["checkpoint"]})
    assert rest["test_result"] == whole["test_result"]
    one, other = (checkpoint.load(done["report"]["checkpoint"])["state_dict"] for done in (whole, rest))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_another_data_set_with_as_many_items_is_no_place_to_go_on(
    cyclic_dataset: str, tiny: dict, write_dataset: Any
) -> None:
    done = run("RecMamba", cyclic_dataset, config_dict=tiny)["report"]
    lines = (Path("dataset") / cyclic_dataset / "cycle.inter").read_text().splitlines()[1:]
    rows = [[cell.replace("i", "j") for cell in line.split("\t")] for line in lines]
    write_dataset(rows, "other")
    with pytest.raises(ConfigError, match="a checkpoint of dataset 'cycle'"):
        run("RecMamba", "other", config_dict={**tiny, "resume": done["checkpoint"]})
    write_dataset(rows, cyclic_dataset)
    with pytest.raises(DataError, match=r"does not know 'j\d+', .* and 15 more"):
        run(
            "RecMamba",
            cyclic_dataset,
            config_dict={**tiny, "resume": done["checkpoint"], "epochs": 3},
        )


def test_a_model_is_not_loaded_over_one_of_other_numbers(cyclic_dataset: str, tiny: dict, rewrite: Any) -> None:
    """``evaluate(model_file=…)`` took the weights as they were."""
    done = run("RecMamba", cyclic_dataset, config_dict=tiny)["report"]["checkpoint"]
    rewrite(backwards)
    other = run("RecMamba", cyclic_dataset, config_dict=tiny)["report"]["checkpoint"]
    config, model, _, _, _, test = load_data_and_model(other)
    with pytest.raises(DataError, match="other numbers"):
        get_trainer_class(config)(config, model).evaluate(test, model_file=done)


def test_values_that_an_attribute_never_had_are_none(cyclic_dataset: str, tiny: dict, rewrite: Any) -> None:
    done = run("HoloMambaRec", cyclic_dataset, config_dict={**tiny, "item_attributes": ["genre", "price"]})["report"]
    before = load_data_and_model(done["checkpoint"])[3].dataset.item_attributes
    rewrite(
        lambda rows: [[*row[:1], "opera" if row[0] == "i5" else row[1], *row[2:]] for row in backwards(rows)], "item"
    )
    attributes = load_data_and_model(done["checkpoint"])[3].dataset.item_attributes
    changed = (attributes["genre"].index != before["genre"].index).nonzero().flatten().tolist()
    assert len(changed) == 1
    assert attributes["genre"].index[changed[0]] == 0
    assert attributes["genre"].labels == before["genre"].labels
    assert torch.equal(attributes["price"].index, before["price"].index)
    assert np.allclose(attributes["price"].position, before["price"].position)


def test_a_knowledge_graph_is_compared_and_its_items_are_read_in_their_numbers(
    cyclic_dataset: str, tiny: dict, rewrite: Any
) -> None:
    folder = Path("dataset") / cyclic_dataset
    links = [f"i{i}\te{i}" for i in range(0, 20, 2)]
    facts = [f"e{i}\tr{i % 2}\te{20 + i % 3}" for i in range(0, 20, 2)]
    (folder / "cycle.link").write_text("\n".join(["item_id:token\tentity_id:token", *links]))
    graph = ["head_id:token\trelation_id:token\ttail_id:token", *facts]
    (folder / "cycle.kg").write_text("\n".join(graph))
    split = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
    load = {"inter": ["user_id", "item_id", "timestamp"], "link": ["item_id", "entity_id"]}
    load["kg"] = ["head_id", "relation_id", "tail_id"]
    settings = {**tiny, "epochs": 1, "load_col": load, "eval_args": split}
    done = run("CFKG", cyclic_dataset, config_dict=settings)
    path = done["report"]["checkpoint"]
    assert evaluated(path)[0] == done["test_result"]
    rewrite(by_item)
    assert evaluated(path)[0] == done["test_result"]
    (folder / "cycle.kg").write_text("\n".join([graph[0], *facts[::-1]]))
    with pytest.raises(DataError, match="other numbers"):
        load_data_and_model(path)
