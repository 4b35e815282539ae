"""The planner: every row from exactly one training, nothing trained twice, and nothing trained for what only votes."""

from itertools import product
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli import InputError
from mmcli.cache.key import digest_of
from mmcli.pipeline.ablation.experiments import SHIPPED, grid_experiment, read_experiments, read_grid, with_values
from mmcli.pipeline.ablation.identity import evaluation_identity, training_identity, training_key
from mmcli.pipeline.ablation.plan import Base, make_plan, restrict
from mmcli.pipeline.core.config import GridConfig, dump_config, load_config, resolve

SEEDS = (42, 43)
FROM_STORE = ("A1", "A2", "A3", "B2", "B4", "C1", "C2", "C3", "C4", "M0", "M1", "M2", "base")


def base_of(patches: int = 256, **options) -> Base:
    return Base(
        resolve=lambda settings: load_config(options={**options, **settings}),
        store_digest=lambda budget: f"store-{budget}",
        images_digest=lambda budget: f"images-{budget}",
        patches=patches,
    )


def choices_of(*names: str, file: str = "experiments"):
    experiments = read_experiments(file)
    return [choice for name in names for choice in experiments[name].choices]


def plan_of(*names: str, seeds=SEEDS, **options):
    return make_plan(choices_of(*names), seeds, base_of(**options))


def test_the_plans_grid_needs_what_it_needs() -> None:
    """3^5 x 2 x 2 combinations are 972 rows; with alpha collapsed where towers are frozen, 648 from 72 trainings."""
    grid, rest = read_grid("plan")
    assert rest == {}
    plan = make_plan(grid.choices, (42,), base_of())
    assert plan.asked == 3**5 * 2 * 2 == 972
    frozen, trained = 3 * 3 * 3 * 3 * 2, 3**5 * 2
    assert len(plan.rows) == len(plan.evaluations) == plan.votes == frozen + trained == 648
    # Heads: bits x gamma x patches; towers: alpha is alive too.
    assert plan.count("head") == 3 * 3 * 2
    assert plan.count("finetune") == 3 * 3 * 3 * 2
    assert plan.searches == 72
    assert plan.stores == {"store-256": 256, "store-512": 512}
    collapsed = [row for row in plan.rows if row.status == "collapsed"]
    assert len(collapsed) == frozen
    assert all("no trainable input" in row.note and "alpha 0.5/1/2" in row.value for row in collapsed)


def test_what_only_votes_trains_nothing() -> None:
    assert plan_of("A3", "C1", "C2", "C3", "C4", seeds=(42,)).count("head") == 1
    with_all = plan_of("A1", "A2", "A3", "B4", "C1", "C2", "C3", "C4", "base")
    without = plan_of("A1", "A2", "B4", "base")
    assert with_all.trainings.keys() == without.trainings.keys()


def test_experiments_share_the_reference() -> None:
    """The full head is in A1, A2, A3, B1, B2 (as alpha), B3, C1 to C4, M0, M1, M2 and base: it is trained once."""
    plan = plan_of("A1", "A2", "A3", "B1", "B2", "B3", "C1", "C2", "C3", "C4", "M0", "M1", "M2", "base", seeds=(42,))
    key = next(row.training for row in plan.rows if row.experiment == "base" and row.value == "full")
    sharing = {row.experiment for row in plan.rows if row.training == key}
    assert sharing == {"A1", "A2", "A3", "B1", "B2", "B3", "C1", "C2", "C3", "C4", "M0", "M1", "M2", "base"}
    assert plan.count("finetune") == 2
    assert plan.stores.keys() == {"store-256", "store-512", "store-1024"}


def test_alpha_on_frozen_towers_is_one_row_that_says_why() -> None:
    rows = [row for row in plan_of("B2", seeds=(42,)).rows if "alpha" in row.value]
    assert [(row.value, row.status, row.stands_for) for row in rows] == [("alpha 0.5/1", "collapsed", 2)]
    assert "frozen" in rows[0].note
    alive = plan_of("B2", seeds=(42,), **{"fusion.adapter": "linear"})
    assert sum("alpha" in row.value and row.status == "planned" for row in alive.rows) == 2


def test_values_of_one_configuration_share_an_evaluation() -> None:
    """In `recommended` L_balance has weight 1, and L_decorr 10: naming them changes nothing."""
    plan = plan_of("B2", seeds=(42,))
    same = ("gamma 0.1", "gamma 0.1 lambda_balance 1", "gamma 0.1 lambda_decorr 10")
    assert len({row.key for row in plan.rows if row.value in same}) == 1
    assert sum(row.value in same for row in plan.rows) == 3
    assert (plan.asked, len(plan.rows), len(plan.evaluations)) == (9, 8, 6)


def test_values_written_in_two_ways_are_one_row() -> None:
    experiment = with_values(read_experiments()["C4"], [0.1, "1e-1"])
    (row,) = make_plan(experiment.choices, (42,), base_of()).rows
    assert (row.value, row.note, row.stands_for) == ("0.1/1e-1", "these values resolve to one configuration", 2)


def test_a_refused_value_is_a_failed_row() -> None:
    plan = plan_of("A2", "C2", seeds=(42,), **{"fusion.adapter": "linear", "head": "fusion", "hash.bits": 0})
    failed = [(row.experiment, row.value) for row in plan.rows if row.status == "failed"]
    assert failed == [("C2", "hamming"), ("C2", "hybrid"), ("C2", "asymmetric")]
    assert "no hash layer" in next(row.note for row in plan.rows if row.status == "failed")


def test_seeds_are_rows_of_their_own_but_for_what_has_none() -> None:
    plan = plan_of("base", seeds=(7, 8, 9))
    assert len(plan.rows) == 5 * 3
    assert plan.count("zero-shot", "prior") == 2
    assert {row.seed for row in plan.rows if row.value == "prior"} == {7, 8, 9}
    order = [training.seed for training in plan.trainings.values() if training.kind == "head"]
    assert order == sorted(order)  # a stop leaves a whole table of the first seed


grids = st.fixed_dictionaries(
    {
        "hash_bits": st.lists(st.sampled_from([0, 32, 64]), unique=True, max_size=2),
        "K_neighbors": st.lists(st.sampled_from([5, 10, 20]), unique=True, max_size=2),
        "cosine_weight": st.lists(st.sampled_from([0.5, 1.0, 2.0]), unique=True, max_size=3),
        "hash_weight": st.lists(st.sampled_from([0.0, 0.05, 0.1]), unique=True, max_size=2),
        "tau": st.lists(st.sampled_from([0.03, 0.07]), unique=True, max_size=2),
        "max_num_patches": st.lists(st.sampled_from([256, 512]), unique=True, max_size=2),
        "freeze_towers": st.lists(st.sampled_from(["frozen", "last-2"]), unique=True, max_size=2),
    }
)


def planned(grid: dict, seeds=SEEDS):
    experiment = grid_experiment(GridConfig(**{key: tuple(values) for key, values in grid.items()}))
    return make_plan(experiment.choices, seeds, base_of()), experiment


@given(grids)
@settings(max_examples=25, deadline=None)
def test_every_row_has_one_training_and_no_two_are_the_same(grid) -> None:
    plan, experiment = planned(grid)
    assert plan.asked == len(experiment.choices) * len(SEEDS)
    for row in plan.rows:
        assert plan.evaluations[row.key].training == row.training
        assert plan.trainings[row.training].seed == row.seed
    identities = [
        (item.kind, item.store, digest_of(training_identity(item.config, item.towers)))
        for item in plan.trainings.values()
    ]
    assert len(set(identities)) == len(identities)
    evaluations = [
        (item.training, digest_of(evaluation_identity(item.config, item.method))) for item in plan.evaluations.values()
    ]
    assert len(set(evaluations)) == len(evaluations)
    needed = {row.training for row in plan.rows}
    assert needed == set(plan.trainings)
    assert {row.key for row in plan.rows} == set(plan.evaluations)


@given(grids, st.sampled_from(["K_neighbors", "tau"]))
@settings(max_examples=25, deadline=None)
def test_an_axis_that_only_votes_adds_no_training(grid, axis) -> None:
    assert planned(grid)[0].trainings.keys() == planned({**grid, axis: []})[0].trainings.keys()


@given(grids)
@settings(max_examples=15, deadline=None)
def test_alpha_never_adds_a_head(grid) -> None:
    with_alpha, without = planned(grid)[0], planned({**grid, "cosine_weight": []})[0]
    heads = [
        {key for key, training in plan.trainings.items() if training.kind == "head"} for plan in (with_alpha, without)
    ]
    assert heads[0] == heads[1]


@given(grids, st.permutations(range(3)))
@settings(max_examples=12, deadline=None)
def test_the_order_of_values_changes_no_key(grid, order) -> None:
    turned = {key: [values[place] for place in order if place < len(values)] for key, values in grid.items()}
    assert planned(grid)[0].evaluations.keys() == planned(turned)[0].evaluations.keys()


@given(st.sampled_from(FROM_STORE), st.sampled_from(["recommended", "small", "plan"]))
@settings(max_examples=12, deadline=None)
def test_a_saved_configuration_has_the_key_of_its_plan(name, preset) -> None:
    """What ``train-head`` saves is found again, whatever preset and options led to it."""
    plan = plan_of(name, seeds=(42,), preset=preset)
    for training in plan.trainings.values():
        if training.kind == "head":
            saved = yaml.safe_load(dump_config(training.config))
            saved["data"]["num_workers"], saved["hardware"]["device"], saved["preset"] = 3, "cuda:1", "plan"
            again = load_config(options=_flat(saved))
            assert training_key(resolve(again), training.store) == training.key


def _flat(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def test_a_part_of_a_plan_needs_only_what_it_needs() -> None:
    plan = plan_of("A1", "A2", "C1")
    part = restrict(plan, lambda row: row.experiment == "C1")
    assert len(part.rows) == 4 * len(SEEDS)
    assert part.count("head") == len(SEEDS)
    assert len(part.evaluations) == 4 * len(SEEDS)


@pytest.mark.parametrize("file", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_shipped_files_resolve(file: str) -> None:
    choices = read_grid(file)[0].choices if file == "plan" else choices_of(*read_experiments(file), file=file)
    plan = make_plan(choices, (42,), base_of())
    assert not [row.note for row in plan.rows if row.status == "failed"]


def test_the_miniature_differs_in_towers_and_patches() -> None:
    ours, others = read_experiments("miniature"), read_experiments()
    assert [name for name in ours if ours[name] != others.get(name)] == ["B1", "B3"]
    assert [choice.value for choice in ours["B3"].choices] == ["36", "64", "100"]
    assert ours["B1"].needs_images
    assert ours["B3"].needs_images


def test_other_values() -> None:
    experiment = with_values(read_experiments()["B3"], [36, 64])
    assert [dict(choice.settings) for choice in experiment.choices] == [
        {"model.max_num_patches": 36},
        {"model.max_num_patches": 64},
    ]
    assert experiment.needs_images
    with pytest.raises(InputError, match="values of no single key"):
        with_values(read_experiments()["B2"], [1, 2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A1: 3", "not an experiment"),
        ("A1: {varies: hash.bits, values: []}", "without values"),
        ("A1: {varies: hash.bit, values: [32]}", "did you mean hash.bits"),
        ("A1: {varies: method, values: [magic]}", "no such method"),
        ("A1: {varies: hash.bits, values: [32, 32]}", "a value twice"),
        ("- 1", "wanted experiments by name"),
        ("A1: [", "wanted YAML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_experiments(str(tmp_path / "x.yaml"))


def test_a_wrong_grid_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    for text, message in (
        ("a: 1", "no section grid_search"),
        ("grid_search: {bits: [1]}", "bits"),
        ("grid_search: {hash_bits: [a]}", "no grid"),
        (f"grid_search: {{tau: {list(range(1, 1001))}, K_neighbors: {list(range(1, 1001))}}}", "too many rows"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            read_grid(str(file))


def test_every_key_of_the_plans_grid_is_served() -> None:
    every = {
        key: [value]
        for key, value in {
            "hash_bits": 32,
            "K_neighbors": 5,
            "cosine_weight": 0.5,
            "hash_weight": 0.1,
            "tau": 0.1,
            "max_num_patches": 512,
            "freeze_towers": False,
        }.items()
    }
    plan, experiment = planned(every, seeds=(1,))
    assert experiment.choices[0].value == "bits 32, K 5, alpha 0.5, gamma 0.1, tau 0.1, patches 512, towers last-2"
    (row,), (training,) = plan.rows, plan.trainings.values()
    assert row.config is not None
    assert (row.config.hash.bits, row.config.knn.K, row.config.knn.tau, training.towers, training.patches) == (
        32,
        5,
        0.1,
        "last-2",
        512,
    )
    assert set(every) == set(GridConfig.model_fields)


def test_grids_have_as_many_values_as_combinations() -> None:
    grid = {"hash_bits": (32, 64), "tau": (0.1, 0.2, 0.3)}
    values = {choice.value for choice in grid_experiment(GridConfig(**grid)).choices}
    assert values == {f"bits {b}, tau {t:g}" for b, t in product(*grid.values())}
