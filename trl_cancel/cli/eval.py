"""`trl-cancel eval`: avg@k, pass@k and greedy accuracy of models and checkpoints."""

from ._quiet import quiet


DESCRIPTION = """\
Answer problems greedily and by sampling, score the answers, and print the means with 95% intervals over problems.
Every answer is written to OUTPUT/MODEL/DATA/samples.jsonl as it comes; the same command again goes on from there.
"""


def run(arguments: list[str]) -> int:
    with quiet():
        from .evaluating import EvalParser, print_presets, run_evaluation
        from .training import use_one_thread

        settings = EvalParser("trl-cancel eval", DESCRIPTION).read(arguments)
        if settings.run.list_presets:
            print_presets()
            return 0
        use_one_thread()
        run_evaluation(settings)
    return 0
