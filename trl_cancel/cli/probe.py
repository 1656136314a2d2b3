"""`trl-cancel probe`: what one update does to each token."""

from ._page import load_pages
from ._quiet import quiet


MEASUREMENTS = ("shifts", "coupling", "displacement", "energy", "residual", "values", "coefficients")
DESCRIPTION = f"""\
Measure what one update does to each token. MEASUREMENT is all or one of {", ".join(MEASUREMENTS)}.
Takes the settings of trl-cancel train, of which model, data set, reward, num_generations, temperature,
max_completion_length and learning_rate count.
"""


def run(arguments: list[str]) -> int:
    from . import UsageError

    chosen, rest = _chosen(arguments)
    with quiet():
        pages = load_pages()
        from .probing import probe_settings, run_probe
        from .training import use_one_thread

        settings = probe_settings(DESCRIPTION, rest)
        use_one_thread()
        try:
            run_probe(settings, chosen, pages)
        except ValueError as error:
            raise UsageError(str(error)) from error
    return 0


def _chosen(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The measurements that are asked for, and the other arguments."""
    from . import UsageError

    if any(argument in ("-h", "--help") for argument in arguments):
        return [], ["--help"]
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"name a measurement first: all, {', '.join(MEASUREMENTS)}.")
    name, *rest = arguments
    if name not in (*MEASUREMENTS, "all"):
        raise UsageError(f"{name!r} is not a measurement; use all, {', '.join(MEASUREMENTS)}.")
    return list(MEASUREMENTS) if name == "all" else [name], rest
