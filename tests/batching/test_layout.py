"""Which rollouts meet in one optimizer step, in numbers, against a simulation of the micro-steps."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trl_cancel.batching import BatchLayout


sizes = st.builds(
    BatchLayout,
    num_generations=st.integers(2, 6),
    per_device_train_batch_size=st.integers(1, 12),
    gradient_accumulation_steps=st.integers(1, 6),
    steps_per_generation=st.integers(1, 6),
    num_iterations=st.integers(1, 3),
    num_processes=st.integers(1, 3),
)


@given(layout=sizes)
@settings(max_examples=300)
def test_micro_batches_together_against_a_simulation(layout):
    """Micro-steps counted one by one: which neighbours in a generation batch ever fall into different steps."""
    cut = set()
    for step in range(1, 200):
        if step % layout.gradient_accumulation_steps == 0:
            cut.add(step % layout.steps_per_generation)
    cut.discard(0)
    together = min([layout.steps_per_generation, *cut])
    assert layout.micro_batches_together == together
    assert layout.is_split == bool(cut)


@given(layout=sizes)
@settings(max_examples=200)
def test_on_policy_against_a_simulation(layout):
    """On-policy means that no optimizer step ends inside the use of a generation batch."""
    uses = layout.steps_per_generation * layout.num_iterations
    ends_inside = any(step % uses for step in range(0, 500, layout.gradient_accumulation_steps))
    assert layout.is_on_policy == (not ends_inside)


@given(layout=sizes)
@settings(max_examples=300)
def test_suggested_sizes_fit(layout):
    assume(not layout._fits())
    for suggestion in layout.sizes_that_fit():
        name, size = suggestion.split("=")
        changed = BatchLayout(**{**vars(layout), name: int(size)})
        assert changed.groups_are_local
        assert changed.groups_fit_steps
        assert changed.generation_batch_per_process * changed.num_processes % changed.num_generations == 0


def test_suggestions_are_near():
    layout = BatchLayout(
        num_generations=8, per_device_train_batch_size=4, gradient_accumulation_steps=1, steps_per_generation=4
    )
    assert layout.sizes_that_fit() == [
        "per_device_train_batch_size=8",
        "gradient_accumulation_steps=2",
        "num_generations=4",
    ], "no steps_per_generation would do"


@pytest.mark.parametrize(
    ("changes", "local", "steps", "micro_batches"),
    [
        ({}, True, True, True),
        ({"per_device_train_batch_size": 4}, True, False, False),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, True, True, False),
        ({"per_device_train_batch_size": 2, "num_processes": 2, "steps_per_generation": 2}, False, False, False),
    ],
)
def test_where_groups_fit(changes, local, steps, micro_batches):
    layout = BatchLayout(
        **{
            "num_generations": 8,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "steps_per_generation": 4,
            **changes,
        }
    )
    assert (layout.groups_are_local, layout.groups_fit_steps, layout.groups_fit_micro_batches) == (
        local,
        steps,
        micro_batches,
    )
