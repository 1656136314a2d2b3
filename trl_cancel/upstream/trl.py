"""
Everything private of TRL's that this package uses, each with the reason it is needed.

TRL promises nothing about these names, so they are gathered here, looked up and compared with the expected signatures
when the module is imported, and their behaviour is pinned by `tests/contract/`. Widening the supported range of TRL
means: run the contract tests against the new version, mend what they show, then change the range here and in
`setup.cfg`.
"""

import inspect

from packaging.version import Version


# Kept in step with `install_requires` in setup.cfg by tests/contract/test_upstream.py.
TRL_MIN, TRL_BELOW = "1.16", "1.17"


def check_trl_version(installed: str) -> None:
    """
    Refuses a version of TRL outside the tested range.

    Args:
        installed (`str`):
            The installed version.

    Raises:
        `ImportError`: If `installed` is outside the range; the message says what to install.
    """
    if not Version(TRL_MIN) <= Version(Version(installed).base_version) < Version(TRL_BELOW):
        raise ImportError(
            f"trl-cancel works with trl>={TRL_MIN},<{TRL_BELOW}, but trl {installed} is installed. "
            f"Run: pip install 'trl>={TRL_MIN},<{TRL_BELOW}'"
        )


try:
    from trl import GRPOTrainer

    # Keeps a forward pass without gradients from warning about checkpoints that it does not need.
    from trl.models.utils import (
        disable_gradient_checkpointing,
        # Lets a pass be made that is not part of the training, also where DeepSpeed ZeRO-3 shards the model.
        unwrap_model_for_generation,
    )
    from trl.trainer.utils import (
        # Name of a reward function in logs and messages: also of one whose arguments are partly given.
        get_callable_name,
        # Name of the base model, for the default output folder: the same as TRL's own default.
        get_config_model_id,
        # Whether a reward function is to be awaited.
        is_async_callable,
        # Pads rollouts of different rounds, or processes, to one length.
        pad,
        # Cut a batch into micro-batches, with the images of vision-language models kept by their rollouts.
        split_pixel_values_by_grid,
        split_tensor_dict,
        unsplit_pixel_values_by_grid,
    )
except ImportError as error:
    import trl

    check_trl_version(trl.__version__)
    raise ImportError(
        f"trl {trl.__version__} lacks a name that trl-cancel builds on ({error}). The installation may be incomplete; "
        f"run: pip install --force-reinstall 'trl>={TRL_MIN},<{TRL_BELOW}'"
    ) from error


# Methods that are overridden, with the parameters that the overrides rely on, in order.
METHODS = {
    # Generates and scores one generation batch; its result is where rollout-time credit goes.
    "_generate_and_score_completions": ["self", "inputs"],
    # Returns the raw rewards of all processes, which the scored batch no longer holds.
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    # The order of the prompts, beside which a stream of fresh ones is kept.
    "_get_train_sampler": ["self", "dataset"],
    # Splits a generation batch into micro-batches; groups are put together again behind it.
    "_prepare_inputs": ["self", "generation_batch"],
    # The forward pass of the loss: the loss reads `advantages` and `old_per_token_logps` only after it.
    "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
    # Writes a checkpoint: after each so many steps, and when something fails in the middle of a run.
    "_save_checkpoint": ["self", "model", "trial"],
    # Trains from a checkpoint that is loaded (transformers), unless that is of the last step already.
    "_inner_training_loop": ["self", "batch_size", "args", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    # Take the counts and the states of a checkpoint over (transformers), with which a finished run ends.
    "_init_training_state": [
        *("self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"),
    ],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_load_best_model": ["self"],
    # Loads the states of the optimizer and the scheduler (transformers), of another optimizer with a late `KeyError`.
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    # Ends a training (transformers); after a signal it must leave the last checkpoint, which is not the best one.
    "_finalize_training": ["self", "trial", "num_train_samples", "start_time"],
    # Pushes a checkpoint in the background (transformers); a push that fails is reported.
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    # Folder of the checkpoints, which differs between the trials of a search.
    "_get_output_dir": ["self", "trial"],
    # Loads a checkpoint; adapters keep the type in which they were trained.
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    # The loss proper; its inputs are rewritten where it is called, below all overrides of it.
    "_compute_loss": ["self", "model", "inputs"],
    # What calls it, public in name.
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
}
# Instance attributes that are read or written; tests/contract/ asserts that a trainer has them.
ATTRIBUTES = {
    "_step": "micro-steps done; tells which micro-batch comes next",
    "_buffered_inputs": "micro-batches of the current generation batch",
    "_metrics": "lists of values by mode and metric name, averaged at the next log",
    "_pending_metrics": "what reward functions have logged, until all processes have scored",
    "_pending_extra_logs": "the same of columns of the table of completions",
    "_current_train_step_time": "time of the micro-batches of the current optimizer step",
    "_logs": "columns of the table of completions",
    "reward_weights": "weights of the reward functions",
    "epsilon_low": "clipping range used by the loss, set for symmetric clipping",
    "epsilon_high": "clipping range used by the loss",
    "importance_sampling_level": "token or sequence, read by the loss after its forward pass",
    "reward_funcs": "reward functions, checked while they are called",
    "reward_processing_classes": "tokenizers of reward models, whose chat templates are looked at",
    "chat_template": "a template that TRL has put in the place of the tokenizer's",
    "environment_factories": "whether environments bring prompts",
    "rollout_func": "whether a function of the user's generates",
    "use_transformers_continuous_batching": "whether transformers generates without batches",
    "reward_func_names": "names of the columns of the rewards",
    "temperature": "temperature of the policy",
    "is_fsdp_enabled": "whether the model is sharded by FSDP",
    "is_deepspeed_enabled": "whether the model is sharded by DeepSpeed",
    "_tag_names": "tags of the model and its card",
    "_name": "name of the trainer, on the card",
    "async_loop": "event loop of async reward functions, where there are some; evaluation awaits them in it too",
    "_tokenizer": "tokenizer, also where the processing class is a processor of several kinds of input",
}
# Methods in which a subclass may change rows, or how they become prompts and rewards: where none is overridden, the
# columns of a data set are what its reward functions get.
WAY_OF_ROWS = (
    "get_train_dataloader",
    "get_eval_dataloader",
    "training_step",
    "prediction_step",
    "_prepare_inputs",
    "_generate_and_score_completions",
    "_tokenize_prompts",
    "_generate",
    "_calculate_rewards",
)
# Number of values that a method returns, where the override unpacks them.
RETURNS = {"_get_per_token_logps_and_entropies": 3}


def check_signatures(trainer: type = GRPOTrainer) -> None:
    """
    Compares the private methods of TRL's trainer with what this package was written against.

    Args:
        trainer (`type`, *optional*, defaults to [`~trl.GRPOTrainer`]):
            Class to check.

    Raises:
        `ImportError`: If a method is missing, or takes or returns something else.
    """
    for name, expected in METHODS.items():
        method = getattr(trainer, name, None)
        found = list(inspect.signature(method).parameters)[: len(expected)] if method else None
        if found != expected:
            raise ImportError(_changed(f"GRPOTrainer.{name} takes {found}, expected {expected}"))
    for name, arity in RETURNS.items():
        annotation = inspect.signature(getattr(trainer, name)).return_annotation
        if len(getattr(annotation, "__args__", ())) != arity:
            raise ImportError(_changed(f"GRPOTrainer.{name} returns {annotation}, expected {arity} values"))


def _changed(difference: str) -> str:
    import trl

    return (
        f"trl {trl.__version__} differs from the versions that trl-cancel was tested with (trl>={TRL_MIN},<{TRL_BELOW}): "
        f"{difference}. Install a tested version."
    )


def check_installation() -> None:
    """Refuses to work on an untested TRL; run once, when the trainers are imported."""
    import trl

    check_trl_version(trl.__version__)
    check_signatures()


check_installation()

__all__ = [
    "ATTRIBUTES",
    "METHODS",
    "TRL_BELOW",
    "TRL_MIN",
    "WAY_OF_ROWS",
    "check_installation",
    "check_signatures",
    "check_trl_version",
    "disable_gradient_checkpointing",
    "get_callable_name",
    "get_config_model_id",
    "is_async_callable",
    "pad",
    "split_pixel_values_by_grid",
    "split_tensor_dict",
    "unsplit_pixel_values_by_grid",
    "unwrap_model_for_generation",
]
