"""The launch files of accelerate: each is read without an unknown key, and would start what its comment says."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env


FOLDER = Path(__file__).parents[1] / "configs" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
STARTS = {
    "multi_cpu": {},  # TRL's use_cpu keeps it off GPUs
    "multi_gpu": {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"},
    "multi_node": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
}


@pytest.fixture
def started(monkeypatch):
    """A function: what `accelerate launch` would start on a machine with eight GPUs, its arguments and environment."""
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found = []
    for name in ("multi_gpu_launcher", "deepspeed_launcher", "simple_launcher"):
        monkeypatch.setattr(f"accelerate.commands.launch.{name}", found.append)

    def start(words):
        launch_command(launch_command_parser().parse_args(words))
        args = found.pop()
        environment = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
        return args, environment

    return start


def command_of(file):
    """The command in the comment, as words after `accelerate launch`."""
    text = file.read_text().replace("\\\n#", "")
    line = next(line for line in text.splitlines() if "accelerate launch" in line)
    return shlex.split(line.lstrip("# "))[2:]


def test_each_file_is_looked_at():
    assert [file.stem for file in FILES] == sorted(STARTS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_it(file):
    config = load_config_from_file(str(file))  # refuses keys that it does not know
    assert config.num_processes == yaml.safe_load(file.read_text())["num_processes"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_starts_what_it_says(file, started):
    words = command_of(file)
    assert words[:2] == ["--config_file", f"configs/accelerate/{file.name}"]
    args, environment = started(["--config_file", str(file), *words[2:]])
    assert (args.module, args.training_script, args.training_script_args[0]) == (True, "trl_cancel", "train")
    assert environment.items() >= STARTS[file.stem].items()
    assert args.use_fsdp == (environment.get("ACCELERATE_USE_FSDP") == "true")
    if file.stem == "multi_node":
        assert (args.num_machines, args.machine_rank, args.num_processes, args.nproc_per_node) == (2, 0, 16, "8")
        assert args.rdzv_endpoint == "HOST:29500"
    recipe = words[words.index("--config", 3) + 1]
    assert recipe.startswith("configs/")
    assert (FOLDER.parents[1] / recipe).exists()
    if file.stem == "multi_cpu":
        assert yaml.safe_load((FOLDER.parents[1] / recipe).read_text())["use_cpu"] is True


@pytest.mark.slow
def test_two_processes_train(tmp_path):
    """The file for the CPU, as its comment has it, for two steps."""
    file = FOLDER / "multi_cpu.yaml"
    words = ["--max_steps", "2", "--eval_problems", "0", "--output_dir", str(tmp_path), "--save_strategy", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *command_of(file), *words]
    done = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.glob("*"))
