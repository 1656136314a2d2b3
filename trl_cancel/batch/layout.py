"""How the rollouts of one generation are cut into micro-batches and optimizer steps, in plain numbers."""

from collections import Counter
from dataclasses import dataclass
from math import gcd, lcm
from typing import Any


@dataclass(frozen=True)
class BatchLayout:
    """
    The sizes that decide which rollouts meet in one optimizer step. Counts are of rollouts unless they say otherwise.

    A generation batch is cut into `steps_per_generation` micro-batches; `gradient_accumulation_steps` micro-batches
    make an optimizer step. Boundaries of optimizer steps fall on multiples of `gradient_accumulation_steps`, so
    within a generation batch on multiples of the greatest common divisor of the two: blocks of that many micro-batches
    are never torn apart, whatever the alignment.

    Args:
        num_generations (`int`):
            G, the rollouts a prompt.
        per_device_train_batch_size (`int`):
            Size of a micro-batch of one process.
        gradient_accumulation_steps (`int`):
            Micro-batches an optimizer step.
        steps_per_generation (`int`):
            Micro-batches a generation batch.
        num_iterations (`int`):
            How often each generation batch is used.
        num_processes (`int`):
            Number of processes.
    """

    num_generations: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    steps_per_generation: int
    num_iterations: int = 1
    num_processes: int = 1

    @classmethod
    def of(cls, args: Any) -> "BatchLayout":
        """Reads the sizes from a [`~trl.GRPOConfig`]."""
        return cls(
            args.num_generations,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.steps_per_generation,
            args.num_iterations,
            args.world_size,
        )

    @property
    def generation_batch_per_process(self) -> int:
        return self.per_device_train_batch_size * self.steps_per_generation

    @property
    def prompts_per_generation(self) -> int:
        return self.generation_batch_per_process * self.num_processes // self.num_generations

    @property
    def micro_batches_together(self) -> int:
        """Micro-batches of a generation batch that always share an optimizer step."""
        return gcd(self.gradient_accumulation_steps, self.steps_per_generation)

    @property
    def rollouts_together(self) -> int:
        """Rollouts of one process and generation batch that always share an optimizer step."""
        return self.micro_batches_together * self.per_device_train_batch_size

    @property
    def is_split(self) -> bool:
        """Whether a generation batch is spread over several optimizer steps, so that shuffling can tear groups."""
        return self.micro_batches_together < self.steps_per_generation

    @property
    def steps_apart(self) -> int:
        """Blocks of a generation batch that can be in different optimizer steps."""
        return self.steps_per_generation // self.micro_batches_together

    @property
    def groups_are_local(self) -> bool:
        """Whether each group lies on one process."""
        return self.num_processes == 1 or self.generation_batch_per_process % self.num_generations == 0

    @property
    def groups_fit_steps(self) -> bool:
        """Whether whole groups can fill the optimizer steps."""
        return not self.is_split or self.rollouts_together % self.num_generations == 0

    @property
    def groups_fit_micro_batches(self) -> bool:
        """Whether whole groups can fill the micro-batches."""
        return self.per_device_train_batch_size % self.num_generations == 0

    @property
    def spreads_groups(self) -> bool:
        """Whether groups have to be spread over several micro-batches."""
        return self.steps_per_generation > 1 and not self.groups_fit_micro_batches

    @property
    def micro_steps_per_generation(self) -> int:
        """Micro-batches that are trained on with each generation batch, those of later iterations included."""
        return self.steps_per_generation * self.num_iterations

    @property
    def updates_per_generation(self) -> float:
        """Optimizer steps made with each generation batch."""
        return self.micro_steps_per_generation / self.gradient_accumulation_steps

    @property
    def steps_until_repeat(self) -> int:
        """Optimizer steps after which a generation batch and an optimizer step begin together again."""
        micro_steps = lcm(self.gradient_accumulation_steps, self.micro_steps_per_generation)
        return micro_steps // self.gradient_accumulation_steps

    def micro_batches_of(self, step: int) -> Counter[tuple[int, int]]:
        """
        The micro-batches of one process in an optimizer step, and how often the step uses each.

        Args:
            step (`int`):
                The optimizer step, from 0 on.

        Returns:
            `Counter`: Uses by the number of the generation batch and that of the micro-batch in it.
        """
        first = step * self.gradient_accumulation_steps
        return Counter(
            (micro_step // self.micro_steps_per_generation, micro_step % self.steps_per_generation)
            for micro_step in range(first, first + self.gradient_accumulation_steps)
        )

    @property
    def fewest_and_most_updates(self) -> tuple[int, int]:
        """The optimizer steps in which a generation batch takes part: in the fewest, and in the most."""
        every, size = self.gradient_accumulation_steps, self.micro_steps_per_generation
        repeat = self.steps_until_repeat * every // size
        updates = [((batch + 1) * size - 1) // every - batch * size // every + 1 for batch in range(repeat)]
        return min(updates), max(updates)

    def ends_generation(self, step: float) -> bool:
        """Whether a generation batch is used up after so many optimizer steps."""
        return step * self.gradient_accumulation_steps % self.micro_steps_per_generation == 0

    @property
    def is_on_policy(self) -> bool:
        """Whether every update uses rollouts of the very weights that it changes, so that all ratios are 1."""
        return self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) == 0

    def sizes_that_fit(self) -> list[str]:
        """
        Single changes of the sizes after which whole groups fill the optimizer steps, nearest first.

        Returns:
            `list[str]`: Settings such as `"per_device_train_batch_size=8"`.
        """
        group, micro_batch = self.num_generations, self.per_device_train_batch_size
        accumulation, split = self.gradient_accumulation_steps, self.steps_per_generation
        candidates = {
            "per_device_train_batch_size": _nearest(
                micro_batch, lambda size: self._fits(per_device_train_batch_size=size), range(1, 16 * group + 1)
            ),
            "gradient_accumulation_steps": _nearest(
                accumulation, lambda size: self._fits(gradient_accumulation_steps=size), range(1, 16 * group + 1)
            ),
            "num_generations": _nearest(group, lambda size: self._fits(num_generations=size), range(2, 2 * group + 1)),
            "steps_per_generation": _nearest(
                split, lambda size: self._fits(steps_per_generation=size), range(1, 2 * split + 1)
            ),
        }
        return [f"{name}={size}" for name, size in candidates.items() if size is not None]

    def _fits(self, **changes: int) -> bool:
        layout = BatchLayout(**{**vars(self), **changes})
        total = layout.generation_batch_per_process * layout.num_processes
        return total % layout.num_generations == 0 and layout.groups_are_local and layout.groups_fit_steps


def _nearest(current: int, fits: Any, sizes: range) -> int | None:
    return min(filter(fits, sizes), key=lambda size: (abs(size - current), -size), default=None)
