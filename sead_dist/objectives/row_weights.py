"""How much each teacher counts for one row, by what it says of that row.

Shapes: N teachers, B rows, C classes. Every weighting returns weights_NB.
"""

import torch


def entropy(logits_NBC: torch.Tensor, labels_B: torch.Tensor | None) -> torch.Tensor:
    """Softmax over teachers of -entropy (the sure teacher counts more), in the manner of EBKD (Kwon
    et al. 2020): weights_NB."""
    log_p_NBC = torch.log_softmax(logits_NBC, dim=-1)
    entropy_NB = -(log_p_NBC.exp() * log_p_NBC).sum(-1)
    return torch.softmax(-entropy_NB, dim=0)


def confidence(logits_NBC: torch.Tensor, labels_B: torch.Tensor | None) -> torch.Tensor:
    """By the cross-entropy l with the gold label, scaled as CA-MKD does (Zhang et al. 2022, eq. 4:
    (1 - exp(l_n) / sum_m exp(l_m)) / (N - 1)); equal where there is none: weights_NB."""
    if labels_B is None or len(logits_NBC) == 1:
        return equal(logits_NBC)
    loss_NB = errors(logits_NBC, labels_B)
    weights_NB = (1.0 - torch.softmax(loss_NB, dim=0)) / (len(logits_NBC) - 1)
    return torch.where(known(labels_B)[None], weights_NB, equal(logits_NBC))


def answers(logits_NBC: torch.Tensor, labels_B: torch.Tensor | None) -> torch.Tensor:
    """In proportion to the probability of the gold label; for scores exp(-e_n / mean_m e_m), e the
    squared errors (our own); equal where there is none: weights_NB."""
    if labels_B is None or len(logits_NBC) == 1:
        return equal(logits_NBC)
    weights_NB = torch.softmax(-errors(logits_NBC, labels_B), dim=0)
    return torch.where(known(labels_B)[None], weights_NB, equal(logits_NBC))


def equal(logits_NBC: torch.Tensor) -> torch.Tensor:
    N, B, _ = logits_NBC.shape
    return torch.full((N, B), 1.0 / N, device=logits_NBC.device)


def known(labels_B: torch.Tensor) -> torch.Tensor:
    """known_B: False where a row has no gold label."""
    return ~torch.isnan(labels_B) if labels_B.is_floating_point() else labels_B >= 0


def errors(logits_NBC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """How wrong each teacher is on each labelled row, loss_NB: cross-entropy with the gold label;
    for scores the squared error over the teachers' mean one, so that the scale does not count."""
    if labels_B.is_floating_point():
        error_NB = (logits_NBC[..., 0] - labels_B[None]) ** 2
        return error_NB / error_NB.mean(0, keepdim=True).clamp(min=1e-12)
    N, B, _ = logits_NBC.shape
    gold_NB1 = labels_B.clamp(min=0)[None, :, None].expand(N, B, 1)
    log_p_NBC = torch.log_softmax(logits_NBC, dim=-1)
    return -log_p_NBC.gather(-1, gold_NB1).squeeze(-1)
