"""The credit of one who knows the playground, to compare with: is there anything for credit to find?"""

import torch
from transformers import PreTrainedTokenizerBase

from trl_cancel import Rollouts
from trl_cancel.playground.task import Problem
from trl_cancel.playground.tasks import Task


OPERATIONS = ("+", "-", "*")


class Oracle:
    """
    Only tokens that decide carry credit: what is pushed up are results, before the first wrong token if there is one
    (two slips may cancel); what is pushed down is the first wrong token.

    Args:
        task ([`~trl_cancel.playground.tasks.Task`]):
            The task.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
    """

    scope = "rollout"

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase):
        self.task, self.tokenizer = task, tokenizer

    def coefficients(self, rollouts: Rollouts) -> torch.Tensor:
        """Coefficients of shape `(B, T)`: 1 for the tokens that decide, else 0."""
        credit = torch.zeros(rollouts.completion_ids.shape)
        columns = (rollouts.prompt_ids, rollouts.completion_ids, rollouts.mask.bool(), rollouts.advantages > 0)
        for row, prompt, ids, mask, up in zip(credit, *(column.cpu() for column in columns), strict=True):
            tokens = response_tokens(self.tokenizer, ids[mask])
            wrong = first_wrong(self.task, self.tokenizer, prompt, tokens)
            if wrong is None or up:
                right = results(self.task, tokens[:wrong])
                row[: len(right)] = torch.tensor(right)
            else:
                row[wrong : wrong + 1] = 1  # of a response that is cut off, this is padding, which does not count
        return credit.to(rollouts.mask.device)


def response_tokens(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[str]:
    """The texts of a completion's tokens, without the one that ends it."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token else tokens


def first_wrong(task: Task, tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor, tokens: list[str]) -> int | None:
    """Index of the first wrong token of a response, `None` if it is right."""
    return task.forms.first_wrong_token(Problem.parse(tokenizer.decode(prompt)), tokens)


def results(task: Task, tokens: list[str]) -> list[bool]:
    """Which tokens stand between the verb of a line with an operation and its end, and so are a result."""
    worked = inside = False
    found = []
    for token in tokens:
        worked = token != "\n" and (worked or token in OPERATIONS)
        inside = worked and (inside or token in task.forms.verbs)
        found.append(inside and token not in task.forms.verbs)
    return found
