"""What a loss does to each token, read off the loss itself."""

import torch


def policy_pushes(loss: torch.Tensor, logps: torch.Tensor, advantages: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    The coefficient with which each token's \\( \nabla\log\pi \\) enters the ascent direction, as far as it comes from
    the advantages: clipping, masks, importance ratios and normalisation included, the KL term and an entropy bonus
    left out.

    A loss without a KL term depends on the log-probabilities through the advantages alone. Otherwise: it is homogeneous
    in its advantages, so its policy part is \\( \sum A\,\partial L/\partial A \\) (Euler), whose derivative by the
    log-probabilities is asked for. Only the loss's own elementwise operations are differentiated, not the model.

    Args:
        loss (`torch.Tensor`):
            Scalar loss, with its graph.
        logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities that the loss was computed from.
        advantages (`torch.Tensor` of shape `(B,)` or `(B, T)`, *optional*):
            Advantages that the loss was computed from, a leaf that requires gradients. Needed if the loss has terms in
            the log-probabilities that no advantage multiplies.

    Returns:
        `torch.Tensor` of shape `(B, T)`: The pushes, positive where the update raises the token's log-probability.
    """
    if advantages is None:
        (by_logp,) = torch.autograd.grad(loss, logps, retain_graph=True, materialize_grads=True)
        return -by_logp
    (by_advantage,) = torch.autograd.grad(loss, advantages, create_graph=True)
    (by_logp,) = torch.autograd.grad(
        by_advantage, logps, grad_outputs=advantages.detach(), retain_graph=True, materialize_grads=True
    )
    return -by_logp
