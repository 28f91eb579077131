"""Tokenizers, language models and reward models: standard ``transformers`` classes, scored in one place.

A reward model is a ``...ForSequenceClassification`` checkpoint with one label and no bias, read at the
last real token (causal models) or at the pooled first one (encoders); a *frozen* one is a small trained
head on cached encoder features. ``pair_rewards`` scores all of them.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.utils import logging

logging.set_verbosity_error()  # a new head is what a reward model is made of, not a warning
logging.disable_progress_bar()

SPECIAL = ("<pad>", "<bos>", "<sep>", "<eos>", "<unk>")


def word_tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """A standard fast tokenizer with one token a word, for the miniature world."""
    ids = {token: i for i, token in enumerate([*SPECIAL, *vocabulary])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    names = {f"{token.strip('<>')}_token": token for token in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **names)


def small_llama(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, layers: int, heads: int, max_length: int, seed: int
) -> LlamaForCausalLM:
    """A fresh Llama for the miniature world; ``seed`` fixes its weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=max_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def source_folder(name: str) -> str:
    """Where pretrained weights lie: a folder, else an installed package that holds them, else a hub name."""
    if Path(name).is_dir():
        return name
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        return name
    configs = sorted(Path(spec.origin).parent.rglob("config.json"), key=lambda path: len(path.parts))
    if not configs:
        raise FileNotFoundError(f"package {name!r} holds no config.json, so no pretrained model")
    return str(configs[0].parent)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer that belongs to a checkpoint (folder, package or hub name)."""
    return AutoTokenizer.from_pretrained(source_folder(name))


def reward_model(base: str, *, head_seed: int, dropout: float = 0.0) -> nn.Module:
    """A reward model on a pretrained ``base``: its trunk, and a new scalar head drawn after seeding.

    ``base`` is a causal LM or an encoder (folder, package or hub name), or a feature file
    (``*.safetensors``), which gives a :class:`FrozenRewardModel`. ``dropout`` acts inside attention
    (causal models), or on the features (frozen); raises ``ValueError`` for a model that has no such place.
    """
    torch.manual_seed(head_seed)
    if base.endswith(".safetensors"):
        return FrozenRewardModel(load_file(base)["features"].shape[1], dropout=dropout)
    folder = source_folder(base)
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    if dropout and not hasattr(config, "attention_dropout"):
        raise ValueError(f"{base}: a {config.model_type} has no attention_dropout to set")
    if dropout:
        config.attention_dropout = dropout
    model = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
    if hasattr(model, "classifier"):  # encoders carry a bias that no difference can learn: pin it at zero
        model.classifier.bias.requires_grad_(False).zero_()
    return model


def load_reward_model(folder: str | Path) -> nn.Module:
    """The reward model that ``save_reward_model`` left in ``folder``, scoring exactly as it did."""
    head = Path(folder) / "head.safetensors"
    if not head.exists():
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()
    state = load_file(head)
    width, n_features = state["hidden.weight"].shape
    model = FrozenRewardModel(n_features, hidden_size=width)
    model.load_state_dict(state)
    return model.eval()


def save_reward_model(model: nn.Module, folder: str | Path) -> None:
    """Write ``model`` to ``folder`` as a standard checkpoint (safetensors)."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    if isinstance(model, FrozenRewardModel):
        save_file(model.state_dict(), Path(folder) / "head.safetensors")
    else:
        model.save_pretrained(folder)


class FrozenRewardModel(nn.Module):
    """A small head, trained with dropout, on cached features: rewards of a frozen encoder, in milliseconds."""

    def __init__(self, n_features: int, *, hidden_size: int = 128, dropout: float = 0.0):
        super().__init__()
        self.hidden = nn.Linear(n_features, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Rewards, shape (batch,), of features, shape (batch, n_features)."""
        return self.score(self.dropout(torch.relu(self.hidden(self.dropout(features)))))[:, 0]


def last_token_features(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Last-layer hidden state of a causal model at each response's last real token, shape (responses, hidden).

    For the Llama family the last layer runs at the scored tokens only, with the same result.
    """
    trunk, mask, positions = model.base_model, batch["attention_mask"], batch["position_ids"]
    if model.config.model_type not in ("llama", "mistral", "qwen2"):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        return trunk(**inputs, use_cache=False).last_hidden_state[batch["row"], batch["last"]]
    hidden = trunk.embed_tokens(batch["input_ids"])
    rotary = trunk.rotary_emb(hidden, positions)
    for layer in trunk.layers[:-1]:
        hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    return trunk.norm(_layer_at(trunk.layers[-1], hidden, rotary, mask, batch["row"], batch["last"]))


def _layer_at(layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, row: Tensor, at: Tensor):
    """One decoder layer, evaluated at position ``at[i]`` of row ``row[i]`` alone; shape (len(at), hidden)."""
    attention, (cos, sin) = layer.self_attn, rotary
    batch, queries = hidden.shape[0], len(at) // hidden.shape[0]
    normed = layer.input_layernorm(hidden)

    def by_row(values: Tensor) -> Tensor:  # (responses, ...) -> (rows, responses a row, ...)
        return values.view(queries, batch, *values.shape[1:]).transpose(0, 1)

    def heads(projected: Tensor) -> Tensor:
        return projected.view(batch, -1, projected.shape[-1] // attention.head_dim, attention.head_dim).transpose(1, 2)

    q = heads(attention.q_proj(by_row(normed[row, at])))
    k, v = heads(attention.k_proj(normed)), heads(attention.v_proj(normed))
    q, _ = apply_rotary_pos_emb(q, q, by_row(cos[row, at]), by_row(sin[row, at]))
    k, _ = apply_rotary_pos_emb(k, k, cos, sin)
    seen = nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=by_row(mask[row, 0, at])[:, None],
        dropout_p=attention.attention_dropout if layer.training else 0.0,
        enable_gqa=k.shape[1] != q.shape[1],
    )
    out = attention.o_proj(seen.transpose(1, 2).reshape(batch, queries, -1))
    out = hidden[row, at] + out.transpose(0, 1).reshape(len(at), -1)
    return out + layer.mlp(layer.post_attention_layernorm(out))


def rewards(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Rewards of all responses in a batch, shape (responses,), fp32; which kind of batch decides how."""
    if "features" in batch:
        return model(batch["features"])
    if "last" in batch:
        return model.score(last_token_features(model, batch))[:, 0].float()
    return model(**batch).logits[:, 0].float()


def pair_rewards(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Rewards of chosen and of rejected responses, each of shape (pairs,), in one forward pass."""
    rewards_chosen, rewards_rejected = rewards(model, batch).chunk(2)
    return rewards_chosen, rewards_rejected


@torch.no_grad()
def generate(
    model: nn.Module, prompts: list[np.ndarray], *, max_new_tokens: int, eos_id: int, pad_id: int, seed: int
) -> list[list[int]]:
    """One sampled response (token ids without the end token) for each prompt, at temperature 1 and no top-p."""
    torch.manual_seed(seed)
    width = max(len(ids) for ids in prompts)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(prompts):
        ids[i, width - len(tokens) :] = torch.from_numpy(tokens)
        mask[i, width - len(tokens) :] = 1
    sampled = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=True,
        top_k=0,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )[:, width:].tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in sampled]


@torch.no_grad()
def encode(name: str, texts: list[tuple[str, str]], *, max_length: int, batch_size: int = 64) -> Tensor:
    """Mean-pooled features of (prompt, response) texts from a frozen encoder, shape (texts, hidden).

    Each text's features are scaled to a mean square of 1, so that a head trains on them at an ordinary rate.
    """
    folder = source_folder(name)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]) + len(texts[i][1]))
    features = torch.empty(len(texts), model.config.hidden_size)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        prompts, responses = zip(*(texts[i] for i in rows), strict=True)
        batch = tokenizer(
            list(prompts), list(responses), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
        )
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        features[rows] = nn.functional.normalize(pooled, dim=1) * pooled.shape[1] ** 0.5
    return features


def save_features(features: Tensor, ids: list[str], path: Path) -> None:
    """Write features (safetensors) and, beside them, the id of each row (text, one a line)."""
    save_file({"features": features}, path)
    path.with_suffix(".txt").write_text("\n".join(ids) + "\n", encoding="utf-8")


def load_language_model(folder: str | Path) -> nn.Module:
    """The causal LM in ``folder``, ready to sample from."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()
