"""
Everything private of TRL's and transformers' that this package uses, with what is used of it and why.

They promise nothing about these names, so all of them stand here, are compared with what is installed when the package is
imported (`checks.py`), and their behaviour is what `trl-cancel doctor` tries.
"""

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
# Number of values that a method returns, where the override unpacks them, and it says so.
RETURNS = {"_get_per_token_logps_and_entropies": 3}
# Functions that `trl.py` imports: how many arguments they are given by place, and which by name.
FUNCTIONS: dict[str, tuple[int, tuple[str, ...]]] = {
    # Keeps a forward pass without gradients from warning about checkpoints that it does not need.
    "disable_gradient_checkpointing": (2, ()),
    # Lets a pass be made that is not part of the training, also where DeepSpeed ZeRO-3 shards the model.
    "unwrap_model_for_generation": (2, ("gather_deepspeed3_params",)),
    # Name of a reward function in logs and messages: also of one whose arguments are partly given.
    "get_callable_name": (1, ()),
    # Name of the base model, for the default output folder: the same as TRL's own default.
    "get_config_model_id": (1, ()),
    # Whether a reward function is to be awaited.
    "is_async_callable": (1, ()),
    # Cut a batch into micro-batches, with the images of vision-language models kept by their rollouts.
    "split_pixel_values_by_grid": (1, ()),
    "split_tensor_dict": (2, ()),
    "unsplit_pixel_values_by_grid": (1, ()),
}
# Attributes of a trainer that are read or written.
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
    "_paper": "paper of the trainer, on the card",
    "args": "the configuration, a plain one of TRL's turned into this package's",
    "is_in_train": "whether a training runs, set back after an error",
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
