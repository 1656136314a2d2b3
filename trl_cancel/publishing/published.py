"""Runs that are published: the model card, and pushing to the Hub."""

from pathlib import Path
from typing import Any, cast

from accelerate.logging import get_logger
from trl import GRPOTrainer

from ..config import CancelGRPOConfig
from ..evaluation import Evaluation
from ..methods.method import ActiveMethod
from ..running.checkpoints import no_halves
from ..running.secrets import quotable
from ..running.storage import is_storage_error
from ..texts import plain
from ..upstream.trl import get_config_model_id
from . import hub
from .model_card import FILE, complete_model_card, hub_id


logger = get_logger(__name__)


class Published(GRPOTrainer):
    """
    The part of [`CancelGRPOTrainer`] that writes model cards and pushes.

    Attributes:
        evaluations (`list[Evaluation]`):
            What the model card tells of, in order.
        dataset_names (`list[str]`):
            Training data on the Hub.
        active_methods (`list[ActiveMethod]`):
            The methods that the configuration has on.
    """

    args: CancelGRPOConfig
    evaluations: list[Evaluation]
    dataset_names: list[str]
    active_methods: list[ActiveMethod]
    _base_license: str | None = None

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Writes the model card into the output folder: the methods and settings that were on and the papers behind them,
        the last evaluation, metrics of the training, and how to load the model. Done at every checkpoint and push; a
        card that cannot be written is reported and stops nothing.

        Args:
            model_name (`str`, *optional*):
                Name of the model.
            dataset_name (`str` or `list[str]`, *optional*):
                Training data on the Hub; `trainer.dataset_names` if not given.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        if dataset_name:
            self.dataset_names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
        path = Path(str(self.args.output_dir)) / FILE
        before = path.read_bytes() if path.is_file() else b""
        tags = [tags] if isinstance(tags, str) else tags
        try:
            # TRL writes names as they are, of which the encoding may fail when the file is open and empty.
            super().create_model_card(
                model_name=model_name and plain(model_name), tags=tags and list(map(plain, tags))
            )
            if self.is_world_process_zero():
                complete_model_card(cast(Any, self), model_name, self.dataset_names, self._base_license)
        except Exception as error:
            if before and path.is_file() and not path.stat().st_size:
                path.write_bytes(before)
            logger.warning(f"The model card could not be written: {type(error).__name__}: {error}")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Makes the repository, before the training where `push_to_hub=True`, and makes sure that it can be written.

        Args:
            token (`str`, *optional*):
                Token; that of the configuration if not given.
            private (`bool`, *optional*):
                Whether a new repository is private.

        Raises:
            [`~trl_cancel.publishing.hub.PushError`]: If the token, the name or a permission is refused, or the Hub cannot be
                reached.
        """
        try:
            super().init_hf_repo(token=token, private=private)
        except Exception as error:
            raise hub.no_access(error, self.args.hub_model_id) from quotable(error)
        if self.is_world_process_zero():
            hub.check_write(str(self.hub_model_id), token or self.args.hub_token)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """
        Saves the model, writes its card and pushes both, as [`~transformers.Trainer.push_to_hub`] does.

        Raises:
            [`~trl_cancel.publishing.hub.PushError`]: If the upload fails. The model is saved by then, and the message says how to
                push it later.
        """
        base = hub_id(get_config_model_id(cast(Any, self.model).config))
        if base and self._base_license is None and self.is_world_process_zero():
            self._base_license = hub.license_of(base, self.args.hub_token)
        if self.hub_model_id is None:  # the repository is made now, which transformers does before it saves
            self.save_model(_internal_call=True)
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception as error:
            if not isinstance(error, hub.PushError) and not hub.comes_from_hub(error):
                raise
            raise self._push_failed(error) from quotable(error)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes in the background during the training, which goes on whatever becomes of it."""
        pushing: Any = getattr(self, "push_in_progress", None)
        before = list(pushing.jobs) if pushing else []
        folder = Path(str(self.args.output_dir))
        try:
            with no_halves(folder):
                super()._push_from_checkpoint(checkpoint_folder)
        except Exception as error:
            if is_storage_error(error):
                what = (
                    f"{checkpoint_folder} is not pushed, for it could not be copied to {folder}: {hub.reason(error)}"
                )
            else:
                what = str(self._push_failed(error))
            logger.warning(f"{what} (the training goes on)")
            return
        pushing = getattr(self, "push_in_progress", None)
        for job in pushing.jobs if pushing else []:
            if job not in before:
                job.add_done_callback(self._report_push)

    def _report_push(self, job: Any) -> None:
        error = None if job.cancelled() else job.exception()
        if error is not None:
            logger.warning(f"{self._push_failed(error)} (the training goes on)")

    def _push_failed(self, error: Exception) -> hub.PushError:
        folder = str(self.args.output_dir)
        repo_id = self.hub_model_id or self.args.hub_model_id or Path(folder).absolute().name
        return hub.push_failed(error, folder, repo_id, self.args.hub_revision, self.args.hub_private_repo)
