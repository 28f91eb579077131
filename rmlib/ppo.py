r"""PPO for language models in functions that stand alone: rollout, shape_rewards, gae, losses, ppo_step.

The paper's policies maximise $r_\psi(x, y) - \eta\, \mathrm{KL}(\pi \| \pi_{SFT})$ (Eq 3) with the PPO of its Part I.
Tensors of shape (responses, tokens) run over the tokens of each response, its end token included where it was said;
``mask`` is true on them, and what stands elsewhere has no effect on anything.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rmlib import data, models, training
from rmlib.params import Settings

Scores = Float[Tensor, "responses"]
PerToken = Float[Tensor, "responses tokens"]
Mask = Bool[Tensor, "responses tokens"]
TextReward = Callable[[list[str], list[str]], Sequence[float] | Tensor]


def masked_mean(values: PerToken, mask: Mask) -> Float[Tensor, ""]:
    """Mean over the tokens where ``mask`` is true."""
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def masked_whiten(values: PerToken, mask: Mask) -> PerToken:
    """``values`` with mean 0 and (biased) variance 1 over ``mask``; 0 elsewhere."""
    centred = torch.where(mask, values - masked_mean(values, mask), 0.0)
    return centred * torch.rsqrt(masked_mean(centred.square(), mask) + 1e-8)


def kl_per_token(logprobs: PerToken, ref_logprobs: PerToken, estimator: str = "k1") -> PerToken:
    r"""Estimates of $\mathrm{KL}(\pi \| \pi_{ref})$ at tokens drawn from $\pi$, in nats; both forms are unbiased.

    With $\delta = \log\pi - \log\pi_{ref}$: k1 is $\delta$, k3 is $e^{-\delta} - 1 + \delta$. As *penalties*
    they are not alike: the policy gradient of k1 is that of the KL, that of k3 nearly vanishes close to the reference.
    """
    ratio = logprobs - ref_logprobs
    if estimator not in ("k1", "k3"):
        raise ValueError(f"unknown estimator {estimator!r}; choose from k1, k3")
    return ratio if estimator == "k1" else torch.expm1(-ratio) + ratio


def explained_variance(values: PerToken, returns: PerToken, mask: Mask) -> float:
    """Share of the returns' variance that the critic foresaw: 1 is perfect, 0 no better than a constant."""
    return float(1 - (returns - values)[mask].var(correction=0) / returns[mask].var(correction=0).clamp(min=1e-12))


def shape_rewards(
    scores: Scores, logprobs: PerToken, ref_logprobs: PerToken, mask: Mask, *, kl_coef: float, kl_estimator: str = "k1"
) -> PerToken:
    """Reward of each token (Eq 3): the KL penalty everywhere, the response's score at its last token."""
    rewards = torch.where(mask, -kl_coef * kl_per_token(logprobs, ref_logprobs, kl_estimator), 0.0)
    last = mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None])


def gae(rewards: PerToken, values: PerToken, mask: Mask, *, gamma: float, lam: float) -> tuple[PerToken, PerToken]:
    r"""Generalised advantage estimates and returns; both 0 where ``mask`` is false.

    $\delta_t = r_t + \gamma V_{t+1} - V_t$ with $V = 0$ after the last token, $A_t = \delta_t + \gamma\lambda A_{t+1}$,
    and the returns are $A + V$.
    """
    rewards, values = (torch.where(mask, tensor, 0.0) for tensor in (rewards, values))
    after = torch.nn.functional.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * after - values
    advantages, carried = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        carried = torch.where(mask[:, t], deltas[:, t] + gamma * lam * carried, 0.0)
        advantages[:, t] = carried
    return advantages, advantages + values


def policy_loss(
    logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask, *, cliprange: float | None
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    r"""Clipped surrogate $-\min(\rho A, \mathrm{clip}(\rho, 1 \pm \epsilon) A)$, a mean over tokens, and what it saw.

    ``clip_fraction``: share of tokens where the clip decides; ``approx_kl``: k3 between old and new policy.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    losses = -ratio * advantages
    if cliprange is not None:
        losses = torch.max(losses, -ratio.clamp(1 - cliprange, 1 + cliprange) * advantages)
    with torch.no_grad():
        clipped = (losses > -ratio * advantages).float()
        seen = {"clip_fraction": clipped, "approx_kl": torch.expm1(log_ratio) - log_ratio}
        stats = {name: masked_mean(values, mask).item() for name, values in seen.items()}
    return masked_mean(losses, mask), stats


def value_loss(
    values: PerToken, old_values: PerToken, returns: PerToken, mask: Mask, *, cliprange_value: float | None
) -> Float[Tensor, ""]:
    """Half the squared error of the critic, the worse of it and of the clipped value's; a mean over tokens."""
    values, old_values, returns = (torch.where(mask, tensor, 0.0) for tensor in (values, old_values, returns))
    errors = (values - returns).square()
    if cliprange_value is not None:
        clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
        errors = torch.max(errors, (clipped - returns).square())
    return 0.5 * masked_mean(errors, mask)


@dataclass
class Experience:
    """One step's responses with all that learning needs; tensors are (responses, tokens)."""

    texts: data.Responses
    prompts: list[str]
    responses: list[str]
    ended: np.ndarray
    scores: Tensor
    mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor


def choices(policy: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of all that could be said at each response token, shape (responses, tokens, vocabulary)."""
    return policy.get_output_embeddings()(models.states_at(policy, batch)).float().log_softmax(-1)


def token_logprobs(policy: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability of each response token, shape (responses, tokens)."""
    return _said(choices(policy, batch), batch)


def _said(logprobs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return logprobs.gather(-1, batch["response_ids"][..., None])[..., 0]


def entropy(logprobs: Tensor) -> Tensor:
    """Entropy of each choice in nats, shape (responses, tokens), from log-probabilities of all that could be said."""
    return -(logprobs.exp() * logprobs).sum(-1)


def token_values(critic: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The critic's value before each response token, shape (responses, tokens)."""
    return models.rewards_of(critic, models.states_at(critic, batch))


@torch.no_grad()
def of_all(measure: Callable, model: nn.Module, texts: data.Responses, shape: tuple[int, ...], size: int) -> Tensor:
    """``measure(model, batch)`` of all responses in batches of similar length, on the CPU."""
    out, device = torch.zeros(shape), next(model.parameters()).device
    for rows in data.score_batches(texts.lengths, np.arange(shape[0]), size):
        batch = {name: tensor.to(device) for name, tensor in texts.collate(rows).items()}
        values = measure(model, batch)
        out[torch.from_numpy(rows), : values.shape[1]] = values.float().cpu()
    return out


def rollout(
    policy: nn.Module,
    reference: nn.Module,
    critic: nn.Module,
    tokenizer,
    prompts: list[str],
    reward_fn: TextReward,
    settings: Settings,
    *,
    seed: int,
    micro_batch_size: int = 16,
) -> Experience:
    """Let ``policy`` answer ``prompts`` and note scores, values and log-probabilities under it and ``reference``.

    Raises ``ValueError`` naming the first response whose score is not finite, or scores of another number.
    """
    ids = data.prompt_ids(prompts, tokenizer)
    ends = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    said = models.generate(policy, ids, **settings.sampling, **ends, seed=seed)
    ended = np.array([len(tokens) < settings.max_new_tokens for tokens in said])
    actions = [np.array(t + [tokenizer.eos_token_id] * end) for t, end in zip(said, ended.tolist(), strict=True)]
    texts = data.Responses(ids, actions, tokenizer.pad_token_id)
    responses = tokenizer.batch_decode(said, skip_special_tokens=True)
    scores = torch.as_tensor(reward_fn(prompts, responses), dtype=torch.float32).cpu()
    if scores.shape != (len(prompts),):
        raise ValueError(f"reward_fn gave scores of shape {tuple(scores.shape)} for {len(prompts)} responses")
    if not torch.isfinite(scores).all():
        row = int(torch.isfinite(scores).int().argmin())
        raise ValueError(f"reward_fn gave {scores[row]} to response {responses[row]!r} to prompt {prompts[row]!r}")
    mask = torch.arange(max(map(len, actions)))[None] < torch.tensor([len(tokens) for tokens in actions])[:, None]

    def measured(measure: Callable, model: nn.Module) -> Tensor:
        with training.accelerator().autocast():
            return torch.where(mask, of_all(measure, model, texts, mask.shape, micro_batch_size), 0.0)

    logprobs, ref_logprobs = (measured(token_logprobs, m) for m in (policy, reference))
    values = measured(token_values, critic)
    return Experience(texts, prompts, responses, ended, scores, mask, logprobs, ref_logprobs, values)


def ppo_step(
    policy: nn.Module,
    critic: nn.Module,
    optimiser: torch.optim.Optimizer,
    texts: data.Responses,
    target: dict[str, Tensor],
    rows: np.ndarray,
    settings: Settings,
    micro_batch_size: int = 16,
) -> dict[str, float]:
    """One optimiser step on the responses ``rows``; returns losses and statistics.

    ``target`` holds ``mask, logprobs, values, advantages, returns`` of all responses. Gradients gather over
    ``micro_batch_size`` responses of similar length at a time, which changes nothing but padding and memory.
    """
    device, total = next(policy.parameters()).device, target["mask"][rows].sum().item()
    stats: dict[str, float] = {}
    optimiser.zero_grad()
    for part in data.score_batches(texts.lengths, rows, micro_batch_size):
        batch = {name: tensor.to(device) for name, tensor in texts.collate(part).items()}
        width = batch["mask"].shape[1]
        old = {name: tensor[part, :width].to(device) for name, tensor in target.items()}
        with training.accelerator().autocast():
            every, values = choices(policy, batch), token_values(critic, batch)
            logprobs = _said(every, batch)
        mask, clip, value_clip = old["mask"], settings.cliprange, settings.cliprange_value
        actor, seen = policy_loss(logprobs, old["logprobs"], old["advantages"], mask, cliprange=clip)
        error = value_loss(values, old["values"], old["returns"], mask, cliprange_value=value_clip)
        with torch.set_grad_enabled(settings.entropy_coef > 0):  # dear where the vocabulary is large
            spread = masked_mean(entropy(every), mask)
        share = mask.sum().item() / total
        (share * (actor + settings.vf_coef * error - settings.entropy_coef * spread)).backward()
        seen |= {"policy_loss": actor.item(), "value_loss": error.item(), "entropy": spread.item()}
        stats = {name: stats.get(name, 0.0) + share * value for name, value in seen.items()}
    for model in (policy, critic):
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm or math.inf, error_if_nonfinite=True)
    optimiser.step()
    return stats


def shaped_scores(scores: Tensor, ended: np.ndarray, settings: Settings, past: list[float]) -> Tensor:
    """Scores as the policy is paid: penalty, normalisation or scaling (by all scores, which ``past`` keeps), clip."""
    scores = scores - settings.missing_eos_penalty * torch.from_numpy(~ended).float()
    if settings.reward_norm:
        scores = (scores - scores.mean()) / scores.std(correction=0).clamp(min=1e-4)
    if settings.reward_scaling:
        past += scores.tolist()
        scores = scores / (np.std(past) if np.std(past) > 1e-4 else 1.0)  # equal scores have no scale yet
    return scores if settings.reward_clip is None else scores.clamp(-settings.reward_clip, settings.reward_clip)


def learn(
    policy: nn.Module,
    critic: nn.Module,
    optimiser: torch.optim.Optimizer,
    experience: Experience,
    settings: Settings,
    rng: np.random.Generator,
    past_scores: list[float],
) -> dict[str, float]:
    """All updates of one step; returns the means of losses and statistics, ``explained_variance`` and ``return``."""
    mask, kl = experience.mask, {"kl_coef": settings.kl_coef, "kl_estimator": settings.kl_estimator}
    scores = shaped_scores(experience.scores, experience.ended, settings, past_scores)
    rewards = shape_rewards(scores, experience.logprobs, experience.ref_logprobs, mask, **kl)
    advantages, returns = gae(rewards, experience.values, mask, gamma=settings.gamma, lam=settings.lam)
    if settings.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    if settings.advantage_clip is not None:
        advantages = advantages.clamp(-settings.advantage_clip, settings.advantage_clip)
    target = {"mask": mask, "logprobs": experience.logprobs, "values": experience.values}
    target |= {"advantages": advantages, "returns": returns}
    stats = [
        ppo_step(policy, critic, optimiser, experience.texts, target, rows, settings)
        for _ in range(settings.num_ppo_epochs)
        for rows in np.array_split(rng.permutation(len(mask)), settings.num_mini_batches)
    ]
    means = {name: float(np.mean([each[name] for each in stats])) for name in stats[0]}
    means["explained_variance"] = explained_variance(experience.values, returns, mask)
    return means | {"return": masked_mean(returns, mask).item()}


def check_policy(policy: nn.Module, tokenizer, prompts: list[str], settings: Settings) -> None:
    """Raise ``ValueError`` for a tokenizer without an end token, and for a prompt whose answer may not fit.

    Also for what :func:`rmlib.models.check_head` refuses.
    """
    models.check_head(policy)
    if tokenizer.eos_token_id is None:
        raise ValueError("the policy's tokenizer has no end-of-text token: it could never end a response")
    context, new = getattr(policy.config, "max_position_embeddings", np.inf), settings.max_new_tokens
    for i, ids in enumerate(data.prompt_ids(prompts, tokenizer)):
        if len(ids) + new > context:
            problem = f"{len(ids)} tokens and max_new_tokens {new} exceed the context of {context}"
            raise ValueError(f"prompt {i} ({prompts[i][:60]!r}): {problem}")


def train_policy(
    policy: nn.Module,
    critic: nn.Module,
    tokenizer,
    prompts: list[str],
    reward_fn: TextReward,
    settings: Settings,
    *,
    seed: int,
    gold_fn: TextReward | None = None,
    reference: nn.Module | None = None,
    n_samples: int = 5,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 120.0,
) -> dict[str, list]:
    """Train ``policy`` in place against ``reward_fn(prompts, responses)``; returns its log and sample texts.

    ``critic`` is a reward model, whose head becomes the value head; ``gold_fn`` is looked at, never trained on. KL
    counts from ``reference``, by default the policy that came in. The log has a row a step: ``reward, reward_std,
    gold``; ``spread, gold_spread``, their standard deviation within a prompt of several rollouts; ``kl, kl_k3`` (nats a
    response), ``length, eos_rate, perplexity`` under the reference; what :func:`learn` returns; and the seconds of
    ``sampling`` (with scoring) and ``learning``. A step's random numbers follow from ``seed`` and its number, so a
    rerun from ``checkpoint`` equals a straight run.
    """
    check_policy(policy, tokenizer, prompts, settings)
    device = training.accelerator().device
    reference = copy.deepcopy(policy if reference is None else reference).to(device).eval().requires_grad_(False)
    policy.to(device).eval(), critic.to(device).eval()  # no dropout: log-probabilities must be those that sampled
    groups = [{"params": policy.parameters(), "lr": settings.lr}, {"params": critic.parameters()}]
    optimiser = torch.optim.AdamW(groups, lr=settings.critic_lr, weight_decay=0.0, fused=True)
    record: dict[str, list] = {"log": [], "samples": [], "past_scores": []}
    state = {"policy": policy, "critic": critic, "optimiser": optimiser}
    training.resume(checkpoint, state, record)
    saved = time.monotonic()
    shown = {round(k * (settings.steps - 1) / 4) + 1 for k in range(5)}
    for step in range(len(record["log"]) + 1, settings.steps + 1):
        rng = np.random.default_rng([seed, step])
        warm = min(1.0, step / max(settings.warmup_steps, 1))
        for group, lr in zip(optimiser.param_groups, (settings.lr, settings.critic_lr), strict=True):
            group["lr"] = warm * lr
        asked = rng.choice(len(prompts), settings.batch_size, replace=settings.batch_size > len(prompts))
        asked = [prompts[i] for i in asked for _ in range(settings.rollouts_per_prompt)]
        began = time.perf_counter()
        draw = int(rng.integers(2**31))
        experience = rollout(policy, reference, critic, tokenizer, asked, reward_fn, settings, seed=draw)
        sampled = time.perf_counter()
        stats = learn(policy, critic, optimiser, experience, settings, rng, record["past_scores"])
        times = {"sampling": sampled - began, "learning": time.perf_counter() - sampled}
        record["log"].append({"step": step} | _described(experience, gold_fn, settings) | stats | times)
        too_far = settings.max_kl is not None and record["log"][-1]["kl"] > settings.max_kl
        if step in shown or too_far:
            texts = zip(asked[:n_samples], experience.responses, experience.scores.tolist(), strict=False)
            record["samples"] += [{"step": step, "prompt": q, "response": a, "reward": r} for q, a, r in texts]
        if too_far:
            break
        if checkpoint and time.monotonic() - saved >= checkpoint_seconds:
            training.save_state(checkpoint, state, record)
            saved = time.monotonic()
    return record


def _described(experience: Experience, gold_fn: TextReward | None, settings: Settings) -> dict[str, float]:
    """What one step's responses were like, before learning from them."""
    mask, n = experience.mask, settings.rollouts_per_prompt
    row = {"reward": experience.scores.mean().item(), "reward_std": experience.scores.std(correction=0).item()}
    if n > 1:
        row["spread"] = experience.scores.unflatten(0, (-1, n)).std(dim=1, correction=0).mean().item()
    for name, estimator in (("kl", "k1"), ("kl_k3", "k3")):
        each = kl_per_token(experience.logprobs, experience.ref_logprobs, estimator)
        row[name] = torch.where(mask, each, 0.0).sum(1).mean().item()
    row |= {"length": mask.sum(1).float().mean().item(), "eos_rate": float(experience.ended.mean())}
    row["perplexity"] = masked_mean(-experience.ref_logprobs, mask).exp().item()
    if gold_fn is not None:
        gold = np.array([float(value) for value in gold_fn(experience.prompts, experience.responses)])
        row["gold"] = float(gold.mean())
        row |= {"gold_spread": float(gold.reshape(-1, n).std(axis=1).mean())} if n > 1 else {}
    return row


def reward_of_texts(model: nn.Module, tokenizer, *, mean: float = 0.0, std: float = 1.0, batch_size: int = 64):
    """A causal reward model as ``reward_fn(prompts, responses)``: (its reward - ``mean``) / ``std``, shape (texts,).

    It reads texts as in training, without dropout: one beginning token, the prompt, the response and its end token.
    """
    model.eval()

    def at_end(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return models.rewards(model, batch | {"at": batch["end"]})[:, None]

    def reward_fn(prompts: list[str], responses: list[str]) -> Tensor:
        asked, said = data.prompt_ids(prompts, tokenizer), data.response_ids(responses, tokenizer)
        texts = data.Responses(asked, said, tokenizer.pad_token_id)
        return (of_all(at_end, model, texts, (len(prompts), 1), batch_size)[:, 0] - mean) / std

    return reward_fn
