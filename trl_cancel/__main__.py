"""`python -m trl_cancel` is `trl-cancel`; so is `accelerate launch -m trl_cancel`, for several processes."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
