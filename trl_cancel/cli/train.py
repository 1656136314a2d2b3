"""`trl-cancel train`: TRL's settings, data sets and rewards; this package's methods."""

from ._quiet import quiet


def run(arguments: list[str]) -> int:
    with quiet():
        from ..playground import CHECKPOINTS
        from .settings import Parser
        from .training import run_training, use_one_thread

        parser = Parser("trl-cancel train", "Train a model. Settings come from --config FILE.yaml and from flags.")
        settings = parser.read(arguments)
        if settings.model.model_name_or_path in CHECKPOINTS:
            use_one_thread()
        run_training(settings)
    return 0
