"""Which versions of TRL this package works with: too old or known not to work are refused, newer ones than tested are not."""

import warnings
from importlib.util import find_spec

from packaging.version import Version

from ..version import __version__


TRL_MIN = "1.14"  # as in setup.cfg; before it, `use_liger_kernel` goes past the hook of the log-probs
TRL_TESTED = "1.16"  # the newest; docs/versions.md has what was tested
NEEDS_TRITON = "1.15"


def check_trl_version(installed: str) -> None:
    """
    Refuses a version of TRL that is too old, or cannot train here.

    Args:
        installed (`str`):
            The installed version.

    Raises:
        `ImportError`: The message says what to install.
    """
    release = Version(Version(installed).base_version)
    if release < Version(TRL_MIN):
        raise ImportError(
            f"trl-cancel works with trl>={TRL_MIN}, but trl {installed} is installed. Run: pip install -U 'trl>={TRL_MIN}'"
        )
    if is_of(release, NEEDS_TRITON) and find_spec("triton") is None:
        raise ImportError(
            f"trl {installed} trains with Triton on a GPU only, and Triton is not installed. Run: pip install "
            f"'trl!={NEEDS_TRITON}.*' for another TRL, or, with an NVIDIA GPU, pip install triton"
        )


def warn_if_newer(installed: str) -> None:
    """Warns of a version of TRL that is newer than was tested, where nothing that is built on is found to differ."""
    if is_newer(installed):
        warnings.warn(
            f"trl {installed} is newer than trl-cancel {__version__} was tested with (up to trl {TRL_TESTED}). All that it "
            "builds on is still there; `trl-cancel doctor` tries in a minute whether it still does the same.",
            stacklevel=2,
        )


def how_to_mend(installed: str) -> str:
    """What to do where something that is built on differs."""
    if is_newer(installed):
        minor = Version(TRL_TESTED).release
        return f"It is newer than was tested; run: pip install 'trl>={TRL_MIN},<{minor[0]}.{minor[1] + 1}', or update trl-cancel."
    return f"The installation is incomplete, or another package has changed it; run: pip install --force-reinstall trl=={installed}"


def is_newer(installed: str) -> bool:
    """Whether a version of TRL is newer than the tested ones."""
    release = Version(Version(installed).base_version)
    return release > Version(TRL_TESTED) and not is_of(release, TRL_TESTED)


def is_of(release: Version, minor: str) -> bool:
    """Whether a release is one of a minor version, such as 1.16.2 of 1.16."""
    return release.release[:2] == Version(minor).release[:2]
