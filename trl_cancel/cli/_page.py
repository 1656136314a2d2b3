"""Report pages, whose libraries are optional."""

from types import ModuleType

from . import UsageError


def load_pages() -> ModuleType:
    """
    The module of [`~trl_cancel.diagnostics.reports.page.Page`].

    Raises:
        `UsageError`: If matplotlib or jinja2 is missing.
    """
    try:
        from ..diagnostics.reports import page
    except ImportError as error:
        raise UsageError(str(error)) from error
    return page
