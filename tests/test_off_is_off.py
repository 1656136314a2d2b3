"""With every feature off, this package's trainer is TRL's, to the last bit; its metrics change nothing either."""

from itertools import product

import pytest
import trl
from peft import LoraConfig

from .runs import OFF_POLICY, assert_same_weights, build, train, trained_by_trl, without


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
OFF = {"query_preserved": False, "cancellation_metrics": False}
# Every loss type at both levels, once and twice a batch, without and with a KL term; the rest spread over loss types. A
# quarter of the combinations, in which each two of these meet, is quick; the others are slow.
ROWS, SLOW_ROWS = [], []
for loss, level, iterations, beta in product(range(len(LOSSES)), range(2), range(2), range(2)):
    is_quick = level ^ iterations == loss % 2 and level ^ beta == loss // 2 % 2
    (ROWS if is_quick else SLOW_ROWS).append(
        {
            "loss_type": LOSSES[loss],
            "importance_sampling_level": ("token", "sequence")[level],
            "num_iterations": 1 + iterations,
            "beta": 0.1 * beta,
        }
    )
ROWS += [
    {"loss_type": loss, **extra}
    for loss, extra in product(
        LOSSES,
        (
            {"mask_truncated_completions": True},
            {"top_entropy_quantile": 0.5},
            {"off_policy_mask_threshold": 0.1, "importance_sampling_level": "sequence"},
        ),
    )
]
ROWS += [
    {"num_iterations": 1, "steps_per_generation": 1, "max_steps": 3},  # exactly on-policy
    {"delta": 1.3, "epsilon_high": 0.28},
    {"entropy_coef": 0.01},
    {"scale_rewards": "batch"},
    {"multi_objective_aggregation": "normalize_then_sum"},
]


def name(row):
    return "-".join(str(value) for value in row.values())


@pytest.mark.parametrize("row", [*ROWS, *(pytest.param(row, marks=pytest.mark.slow) for row in SLOW_ROWS)], ids=name)
def test_off_is_off(tiny_model, row):
    settings = {**OFF_POLICY, **row}
    theirs = trained_by_trl(tiny_model, **settings)
    ours = train(tiny_model, **settings, **OFF)
    assert ours.logs == theirs.logs
    assert_same_weights(ours.weights, theirs.weights)
    assert len({entry["grad_norm"] for entry in theirs.logs[:-1]}) > 2, "the runs must have something to compare"


@pytest.mark.parametrize("row", ROWS[::5], ids=name)
def test_metrics_change_nothing(tiny_model, row):
    settings = {**OFF_POLICY, **row}
    theirs = trained_by_trl(tiny_model, **settings)
    ours = train(tiny_model, **settings, query_preserved=False, cancellation_metrics=True)
    assert [without(entry, ("cancel/",)) for entry in ours.logs] == theirs.logs
    assert_same_weights(ours.weights, theirs.weights)


def test_off_is_off_with_lora(tiny_model):
    def run(*args, **settings):
        return train(tiny_model, *args, **OFF_POLICY, beta=0.1, arguments={"peft_config": LoraConfig(r=2)}, **settings)

    theirs, ours = run(trl.GRPOTrainer), run(**OFF)
    assert ours.logs == theirs.logs
    assert_same_weights(ours.weights, theirs.weights)
    assert any("lora_B" in key and value.any() for key, value in ours.weights.items())


def test_defaults_are_off_where_one_step_holds_the_generation_batch(tiny_model):
    """The default configuration differs from TRL's only where groups would be torn."""
    theirs = train(tiny_model, trl.GRPOTrainer, gradient_accumulation_steps=2)
    ours = train(tiny_model, gradient_accumulation_steps=2)
    assert [without(entry, ("cancel/",)) for entry in ours.logs] == theirs.logs
    assert_same_weights(ours.weights, theirs.weights)


def test_plain_config_is_accepted(tiny_model):
    trainer = build(tiny_model)
    plain = build(tiny_model, arguments={"args": trl.GRPOConfig(output_dir=trainer.args.output_dir, use_cpu=True)})
    assert type(plain.args) is type(trainer.args)
    assert plain.args.query_preserved == "auto"
    assert plain.args.steps_per_generation == plain.args.gradient_accumulation_steps
