"""`trl-cancel train`: TRL's settings, data sets and rewards; this package's methods."""

from ._quiet import quiet


def run(arguments: list[str]) -> int:
    with quiet():
        from .settings import Parser
        from .training import run_training

        parser = Parser("trl-cancel train", "Train a model. Settings come from --config FILE.yaml and from flags.")
        run_training(parser.read(arguments))
    return 0
