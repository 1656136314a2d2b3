"""Reading settings: TRL's parser, with a method by name and errors of one line."""

import os
import re
from argparse import SUPPRESS
from dataclasses import dataclass, field, replace
from typing import Any

import yaml
from trl import DatasetMixtureConfig, ModelConfig, TrlParser
from trl.scripts.grpo import GRPOScriptArguments

from ..config import CancelGRPOConfig
from ..methods import NAMED, complete_settings
from ..running.precision import Precision, best_precision
from ..running.removed import SETTINGS, advice, said_of
from ..running.secrets import without_tokens
from . import OneLineErrors, UsageError


@dataclass
class RunArguments(GRPOScriptArguments):
    """
    What to train on, and what to do around the training.

    Args:
        method (`str`, *optional*):
            Name of a method, whose settings become the defaults of this run.
        eval_problems (`int`, *optional*, defaults to `0`):
            Number of prompts of the test split to answer before and after the training, greedily and sampled; the
            first reward function scores the answers. `0` skips this.
        eval_samples (`int`, *optional*, defaults to `4`):
            Sampled answers a prompt.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether the run may replace the finished model of another that `output_dir` holds.
    """

    method: str | None = field(
        default=None,
        metadata={"help": f"Method whose settings become the defaults of this run: {', '.join(NAMED)}."},
    )
    eval_problems: int = field(
        default=0,
        metadata={
            "help": "Number of prompts of the test split to answer before and after the training, greedily and "
            "sampled; the first reward function scores the answers. 0 skips this."
        },
    )
    eval_samples: int = field(default=4, metadata={"help": "Sampled answers a prompt, for `eval_problems`."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Whether the run may replace the finished model of another that `output_dir` holds."},
    )


@dataclass
class Settings:
    """The settings of one run, by who reads them; and the precision, where it was left to the device."""

    run: RunArguments
    training: CancelGRPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    precision: Precision | None = None


class StrictParser(OneLineErrors, TrlParser):
    """TRL's parser, which takes `--config=PATH` too and refuses settings that it does not know, before it reads them."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # The parser gives `--no_x` to switches only; these have a third value, and may stand alone too.
        for setting in [action.dest for action in self._actions if action.const == "true"]:
            names = (f"--no_{setting}", f"--no-{setting.replace('_', '-')}")
            self.add_argument(*names, dest=setting, action="store_const", const="false", default=SUPPRESS)

    def read(self, arguments: list[str]) -> Any:
        """
        Reads settings.

        Args:
            arguments (`list[str]`):
                Arguments of the command.

        Raises:
            `UsageError`: If a file cannot be read, a setting is unknown, or the settings contradict each other.
        """
        arguments = [part for argument in arguments for part in _split_config(argument)]
        self._check_names(arguments, _read_yaml(arguments))
        return self._parse(arguments)

    def _parse(self, arguments: list[str]) -> tuple[Any, ...]:
        try:
            return self.parse_args_and_config(arguments)
        except (TypeError, ValueError) as error:
            raise UsageError(without_tokens(str(error))) from error

    def _check_names(self, arguments: list[str], yaml_settings: dict[str, Any]) -> None:
        known = {action.dest for action in self._actions} | {"env", "config"}
        flags = {
            name.removeprefix("no_") if name.removeprefix("no_") in known else name for name in _flag_names(arguments)
        }
        for name in [*flags, *yaml_settings]:
            if name not in known:
                gone = said_of(name, SETTINGS, known)
                raise UsageError(gone or f"{name}: unknown setting{advice(name, known)}")


class Parser(StrictParser):
    """
    TRL's parser, with methods by name: flags beat the settings of `--method`, these beat the YAML file of `--config`,
    and that beats the settings of a `method` named in the file.
    """

    def __init__(self, prog: str, description: str, run_arguments: type[RunArguments] = RunArguments):
        readers: Any = (run_arguments, CancelGRPOConfig, ModelConfig, DatasetMixtureConfig)
        super().__init__(readers, prog=prog, description=description)

    def read(self, arguments: list[str]) -> Settings:
        """
        Reads the settings of a run.

        Args:
            arguments (`list[str]`):
                Arguments of the command.

        Raises:
            `UsageError`: If a file cannot be read, a setting is unknown, or the settings contradict each other.
        """
        arguments = [part for argument in arguments for part in _split_config(argument)]
        yaml_settings = _read_yaml(arguments)
        self._check_names(arguments, yaml_settings)
        flag = _value_of("--method", arguments)
        method = flag or yaml_settings.get("method")
        if method is not None:
            if not isinstance(method, str) or method not in NAMED:
                raise UsageError(f"method={method}: unknown; use one of {', '.join(NAMED)}.")
            self.set_defaults(**NAMED[method].settings)
        if flag:  # like any flag it beats the file, and what the file says of other methods
            given = {name.removeprefix("no_") for name in _flag_names(arguments)}
            chosen = {name: value for name, value in complete_settings(flag).items() if name not in given}
            arguments += [part for name, value in chosen.items() for part in (f"--{name}", str(value))]
        return self._with_precision(arguments, yaml_settings)

    def _with_precision(self, arguments: list[str], yaml_settings: dict[str, Any]) -> Settings:
        """The settings, with the precision that suits the device unless they name one."""
        env = yaml_settings.get("env") or {}
        if not isinstance(env, dict) or not all(isinstance(name, str) for name in env):
            raise UsageError(f"env={env!r}: must hold names and values, such as {{OMP_NUM_THREADS: 4}}.")
        given = {name.removeprefix("no_") for name in _flag_names(arguments)} | yaml_settings.keys()
        if given & {"bf16", "fp16"}:
            return Settings(*self._parse(arguments))
        os.environ.update({name: str(value) for name, value in env.items()})  # before the device is looked at
        self.set_defaults_with_config(**{name: value for name, value in yaml_settings.items() if name != "env"})
        precision = best_precision(use_cpu=self.parse_known_args(arguments)[0].use_cpu)
        self.set_defaults(bf16=precision.bf16, fp16=precision.fp16)
        settings = replace(Settings(*self._parse(arguments)), precision=precision)
        if settings.model.use_peft and "dtype" not in given:
            settings.model.dtype = precision.name  # of the weights that are not trained
        return settings


def _flag_names(arguments: list[str]) -> set[str]:
    matches = (re.match(r"--([A-Za-z][\w-]*)", argument) for argument in arguments)
    return {match[1].replace("-", "_") for match in matches if match}


def _split_config(argument: str) -> list[str]:
    """TRL's parser knows `--config PATH` but not `--config=PATH`."""
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _value_of(flag: str, arguments: list[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
    return None


def _read_yaml(arguments: list[str]) -> dict[str, Any]:
    path = _value_of("--config", arguments)
    if path is None:
        if "--config" in arguments:
            raise UsageError("--config needs a path to a YAML file.")
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise UsageError(f"--config {path}: must hold settings, one `name: value` a line.")
    return settings
