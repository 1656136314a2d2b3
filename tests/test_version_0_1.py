"""Checkpoints and `training_args.bin` of the version before the methods had files of their own."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from trl_cancel import NTHRConfig, NTHRTrainer
from trl_cancel.playground.data import load_prompts

from .runs import noisy_reward


# Written by NTHRTrainer with DelTA, symmetric clipping and chosen groups, in eight steps over 16 prompts of the playground.
FOLDER = Path(__file__).parent / "version_0_1"
CHECKPOINT = FOLDER / "checkpoint-4"


def test_training_args_are_read_and_a_run_resumes_to_the_same_weights(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "checkpoint-4")
    args = torch.load(CHECKPOINT / "training_args.bin", weights_only=False)
    assert type(args) is NTHRConfig
    assert (args.nthr, args.delta_credit, args.symmetric_clip, args.reward_balance) == (True, True, True, 0.25)
    assert args.filter_zero_variance
    args.output_dir = str(tmp_path)
    trainer = NTHRTrainer(str(CHECKPOINT), noisy_reward, args, load_prompts("train", 16))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 8
    finished = load_file(FOLDER / "finished.safetensors")
    for name, value in trainer.model.state_dict().items():
        if name in finished:  # tied weights are saved once
            torch.testing.assert_close(value, finished[name], rtol=1e-4, atol=1e-5)
