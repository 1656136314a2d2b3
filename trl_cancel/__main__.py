"""`python -m trl_cancel` is `trl-cancel`; so is `accelerate launch -m trl_cancel`, for several processes."""

import atexit
import os
import sys

from .cli import main


_status: list[int] = []


def _leave() -> None:
    """
    Ends one of several processes before the interpreter is taken down.

    A thread of gloo's that drops its last tensor after that ends the process with SIGABRT, and the launcher would then
    end the others, which may be saving or pushing (`destroy_process_group` does not wait for it, if DDP has run).
    """
    if _status and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status[0])


if __name__ == "__main__":
    atexit.register(_leave)  # before anything else registers: so it is called last
    _status.append(main())
    sys.exit(_status[0])
