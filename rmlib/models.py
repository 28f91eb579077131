"""Tokenizers, language models and reward models: standard ``transformers`` classes, scored in one place.

A reward model is a ``...ForSequenceClassification`` checkpoint with one label and no bias, read at the
last real token; a *frozen* one is a small trained head on cached encoder features. ``pair_rewards`` scores all of them.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rmlib import runs

transformers.logging.set_verbosity_error()  # a new head is what a reward model is made of, not a warning
transformers.logging.disable_progress_bar()

SPECIAL = ("<pad>", "<bos>", "<sep>", "<eos>", "<unk>")


def word_tokenizer(vocabulary: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A standard fast tokenizer with one token a word, for the miniature world."""
    ids = {token: i for i, token in enumerate([*SPECIAL, *vocabulary])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    names = {f"{token.strip('<>')}_token": token for token in SPECIAL}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **names)


def small_llama(tokenizer, *, hidden_size: int, layers: int, heads: int, max_length: int, seed: int) -> nn.Module:
    """A fresh Llama for the miniature world; ``seed`` fixes its weights."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )
    return transformers.LlamaForCausalLM(config)


def source_folder(name: str | Path) -> str:
    """Where pretrained weights lie: a folder, else an installed package that holds them, else a hub name.

    Raises ``FileNotFoundError`` for a path or a package that holds no ``config.json``.
    """
    if isinstance(name, Path) or Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        if not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(f"{name}: no checkpoint here, config.json is missing")
        return str(name)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        return name
    configs = sorted(Path(spec.origin).parent.rglob("config.json"), key=lambda path: len(path.parts))
    if not configs:
        raise FileNotFoundError(f"package {name!r} holds no config.json, so no pretrained model")
    return str(configs[0].parent)


def identity(name: str, revision: str | None = None) -> Path | tuple[str, str | None]:
    """What tells a checkpoint from all others, for content keys: its files, or its hub name and revision."""
    folder = Path(source_folder(name))
    return folder if folder.is_dir() else (name, revision)


@contextmanager
def _naming(name: str | Path) -> Iterator[None]:
    """Errors of the libraries below say which checkpoint they mean."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError | ValueError) and str(name) in str(error):
            raise
        raise ValueError(f"{name}: cannot be read ({error})") from error


def _from_checkpoint(kind: type, name: str | Path, **settings) -> tuple[nn.Module, list[str]]:
    """A model in fp32, and the names of the weights that its checkpoint lacks.

    Raises ``ValueError`` naming the checkpoint for weights that are broken, not finite or of another shape.
    """
    settings |= {"use_safetensors": True, "trust_remote_code": False}  # no pickle, no code of strangers
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are refused here, by name
    with _naming(name):
        model, info = kind.from_pretrained(source_folder(name), dtype=torch.float32, **settings)
    _refuse(name, "weights of another shape than config.json says", (key for key, *_ in info["mismatched_keys"]))
    _refuse(name, "weights that are not finite", _not_finite(model))
    return model, sorted(info["missing_keys"])


def _refuse(name: str | Path, problem: str, keys: Iterable[str]) -> None:
    if names := ", ".join(sorted(keys)):
        raise ValueError(f"{name}: {problem}: {names}")


def _not_finite(model: nn.Module) -> list[str]:
    return [key for key, weight in model.state_dict().items() if not torch.isfinite(weight).all()]


def load_tokenizer(name: str | Path, revision: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint (folder, package or hub name); it pads with its end token if it must.

    Raises ``ValueError`` for a tokenizer that can neither pad nor end a text.
    """
    with _naming(name):
        folder, settings = source_folder(name), {"revision": revision, "trust_remote_code": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **settings)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{name}: the tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, so a real end stays visible
    return tokenizer


def reward_model(base: str | Path, *, head_seed: int, dropout: float = 0.0) -> nn.Module:
    """A reward model on a pretrained ``base``: its trunk, and a new scalar head drawn after seeding.

    ``base`` is a causal LM (folder, package or hub name), or a file of an encoder's cached features, which gives a
    :class:`FrozenRewardModel`. ``dropout`` acts inside attention, or on the features. Raises ``ValueError`` naming
    ``base`` for a model that has no such place, has several labels, or lacks sound weights in its trunk.
    """
    torch.manual_seed(head_seed)
    if is_features(base):
        return FrozenRewardModel(load_features(base)[0].shape[1], dropout=dropout)
    folder = source_folder(base)
    with _naming(base):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if "SequenceClassification" in str(config.architectures) and config.num_labels != 1:
        raise ValueError(f"{base}: a reward model has one label, this one has {config.num_labels}")
    config.num_labels = 1
    if dropout and not hasattr(config, "attention_dropout"):
        raise ValueError(f"{base}: a {config.model_type} has no attention_dropout to set")
    if dropout:
        config.attention_dropout = dropout
    model, missing = _from_checkpoint(transformers.AutoModelForSequenceClassification, base, config=config)
    _refuse(base, "weights are missing", (key for key in missing if key.startswith(f"{model.base_model_prefix}.")))
    return model


def load_reward_model(folder: str | Path) -> nn.Module:
    """The reward model that ``save_reward_model`` left in ``folder``, scoring exactly as it did.

    Raises ``FileNotFoundError`` where there is none, and ``ValueError`` naming the folder for weights that are not
    sound, lack the head (a language model has none), or have several labels.
    """
    head = Path(folder) / "head.safetensors"
    if head.exists():
        with _naming(folder):
            state = load_file(head)
            if state["hidden.weight"].ndim != 2:
                raise ValueError("hidden.weight is no matrix")
            width, n_features = state["hidden.weight"].shape
            model = FrozenRewardModel(n_features, hidden_size=width)
            model.load_state_dict(state)
        _refuse(folder, "weights that are not finite", _not_finite(model))
        return model.eval()
    if not list(Path(folder).glob("*.safetensors")):
        raise FileNotFoundError(f"{folder}: no weights in safetensors format (pickled ones are not read)")
    model, missing = _from_checkpoint(transformers.AutoModelForSequenceClassification, folder)
    _refuse(folder, "no reward model, weights are missing", missing)
    if model.config.num_labels != 1:
        raise ValueError(f"{folder}: a reward model has one label, this one has {model.config.num_labels}")
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
        """What the head's last layer reads, shape (batch, hidden), of features, shape (batch, n_features)."""
        return self.dropout(torch.relu(self.hidden(self.dropout(features))))


def states_at(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Last-layer hidden states of a causal model at the positions ``batch["at"]``, shape (rows, positions, hidden).

    For the Llama family the last layer runs at these positions only, with the same result.
    """
    trunk, at = model.base_model, batch["at"]
    row = torch.arange(len(at), device=at.device)[:, None]
    if model.config.model_type not in ("llama", "mistral", "qwen2"):
        return all_states(model, batch)[row, at]
    mask, positions = batch["attention_mask"], batch["position_ids"]
    hidden = trunk.embed_tokens(batch["input_ids"])
    rotary = trunk.rotary_emb(hidden, positions)
    for layer in trunk.layers[:-1]:
        hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    return trunk.norm(_layer_at(trunk.layers[-1], hidden, rotary, mask, row, at))


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Raise ``ValueError`` for a causal LM that scales or caps its logits: it would not sample from what we train."""
    training, at = model.training, torch.arange(4, device=model.device)
    model.eval()
    batch = {"input_ids": at[None], "position_ids": at[None], "at": at[None]}
    batch["attention_mask"] = (at[:, None] >= at[None])[None, None]
    ours, plain = model.get_output_embeddings()(states_at(model, batch)), model(input_ids=at[None]).logits
    model.train(training)
    if not torch.allclose(ours, plain, rtol=1e-3, atol=1e-3):
        raise ValueError(f"{model.config.model_type}: its logits are changed after the output embedding")


def all_states(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Last-layer hidden states of a causal model at every position, shape (rows, length, hidden)."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def _layer_at(layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, row: Tensor, at: Tensor):
    """One decoder layer, evaluated at the positions ``at`` (rows, positions) alone; shape (rows, positions, hidden)."""
    attention, (cos, sin) = layer.self_attn, rotary
    normed = layer.input_layernorm(hidden)

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(2, (-1, attention.head_dim)).transpose(1, 2)

    q = heads(attention.q_proj(normed[row, at]))
    k, v = heads(attention.k_proj(normed)), heads(attention.v_proj(normed))
    q, _ = apply_rotary_pos_emb(q, q, cos[row, at], sin[row, at])
    k, _ = apply_rotary_pos_emb(k, k, cos, sin)
    told = {"dropout_p": attention.attention_dropout if layer.training else 0.0, "enable_gqa": k.shape[1] != q.shape[1]}
    seen = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[row, 0, at][:, None], **told)
    out = hidden[row, at] + attention.o_proj(seen.transpose(1, 2).flatten(2))
    return out + layer.mlp(layer.post_attention_layernorm(out))


def imitation_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Next-token logits of a reward model's trunk, for Part I's imitation term, shape (rows, length, vocabulary).

    Raises ``ValueError`` for a model without a language-model head: its output embeddings must be its input embeddings.
    """
    if "at" not in batch or not model.config.get_text_config().tie_word_embeddings:
        raise ValueError("the imitation term needs a causal model whose input and output embeddings are tied")
    return all_states(model, batch) @ model.base_model.get_input_embeddings().weight.T


def rewards(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Rewards of all responses in a batch, shape (responses,), fp32; which kind of batch decides how."""
    if "features" in batch:
        return rewards_of(model, model(batch["features"]))
    return rewards_of(model, states_at(model, batch)).T.flatten()


def rewards_of(model: nn.Module, states: Tensor) -> Tensor:
    """Rewards, fp32, of what the head reads: shape (..., hidden) to (...)."""
    return model.score(states)[..., 0].float()


def pair_rewards(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Rewards of chosen and of rejected responses, each of shape (pairs,), in one forward pass."""
    return rewards(model, batch).chunk(2)


def pair_states(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the head reads of chosen and of rejected responses, each of shape (pairs, hidden), in one forward pass.

    That is the last hidden state at a response's last token, or the output of a frozen encoder's dropout head.
    """
    if "features" in batch:
        return model(batch["features"]).chunk(2)
    return states_at(model, batch).unbind(1)


@torch.no_grad()
def generate(
    model: nn.Module, prompts: list[np.ndarray], *, max_new_tokens: int, eos_id: int, pad_id: int, seed: int, **sampling
) -> list[list[int]]:
    """One response (token ids without the end token) to each prompt; ``sampling`` may set ``temperature, top_p,
    repetition_penalty``, else it is drawn from the model itself.
    """
    torch.manual_seed(seed)
    texts = [torch.from_numpy(tokens) for tokens in prompts]
    left = {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence(texts, padding_value=pad_id, **left).to(model.device)
    mask = pad_sequence([torch.ones_like(text) for text in texts], **left).to(model.device)
    plain = {"do_sample": True, "top_k": 0, "eos_token_id": eos_id, "pad_token_id": pad_id}  # not the model's own
    model.generation_config = transformers.GenerationConfig(max_new_tokens=max_new_tokens, **plain)
    sampled = model.generate(ids, attention_mask=mask, **sampling)[:, ids.shape[1] :].tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in sampled]


@torch.no_grad()
def encode(
    name: str,
    texts: list[tuple[str, str]],
    *,
    max_length: int,
    revision: str | None = None,
    batch_size: int = 64,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 120.0,
) -> Tensor:
    """Mean-pooled features of (prompt, response) texts from a frozen encoder, shape (texts, hidden), of mean square 1.

    With ``checkpoint`` a rerun goes on where a killed one was at most ``checkpoint_seconds`` ago.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(name, revision)
    model = _from_checkpoint(transformers.AutoModel, name, revision=revision)[0].eval().to(device)
    if max_length > (places := getattr(model.config, "max_position_embeddings", max_length)):
        raise ValueError(f"{name}: it reads {places} tokens, fewer than max_length {max_length}")
    padded = {"truncation": True, "max_length": max_length, "padding": True, "return_tensors": "pt"}
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]) + len(texts[i][1]))
    features = torch.full((len(texts), model.config.hidden_size), torch.nan)
    if checkpoint and checkpoint.exists():
        try:
            found = load_file(checkpoint)["features"]
            if found.shape != features.shape:
                raise KeyError("features of other texts")
            features = found
        except (SafetensorError, KeyError) as error:
            print(f"{checkpoint}: not usable ({error}); encoding starts anew", file=sys.stderr, flush=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    saved = time.monotonic()
    for rows in tqdm([rows for rows in batches if features[rows].isnan().any()], desc="encoding", mininterval=5):
        batch = tokenizer([texts[i] for i in rows], **padded).to(device)
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        features[rows] = nn.functional.normalize(pooled, dim=1).cpu() * pooled.shape[1] ** 0.5
        if checkpoint and time.monotonic() - saved >= checkpoint_seconds:
            with runs.atomic(checkpoint) as temporary:
                save_file({"features": features}, temporary)
            saved = time.monotonic()
    return features


def save_features(features: Tensor, ids: list[str], path: Path) -> None:
    """Write features and, in the file's metadata, the id of each row (safetensors)."""
    save_file({"features": features}, path, metadata={"ids": json.dumps(ids)})


def is_features(base: str | Path) -> bool:
    """Whether ``base`` names a file of cached features rather than a checkpoint."""
    return str(base).endswith(".safetensors")


def load_features(path: str | Path) -> tuple[Tensor, list[str]]:
    """What ``save_features`` wrote: features (responses, hidden) and the id of each row.

    Raises ``ValueError`` for a file that it did not write, or whose features are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            features, ids = file.get_tensor("features"), json.loads(file.metadata()["ids"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a file of cached features ({error})") from None
    if features.ndim != 2 or not isinstance(ids, list) or len(set(ids)) != len(features) or len(ids) != len(features):
        raise ValueError(f"{path}: features of shape {tuple(features.shape)} do not fit {len(ids)} ids, each once")
    if wrong := [name for name, row in zip(ids, features, strict=True) if not torch.isfinite(row).all()]:
        raise ValueError(f"{path}: features that are not finite: {len(wrong)} rows, the first is {wrong[0]!r}")
    return features, ids


def load_language_model(name: str | Path, revision: str | None = None) -> nn.Module:
    """The causal LM in a folder, package or on the hub, in fp32 and ready to sample from.

    Raises ``ValueError`` naming it for weights that are broken, not finite, or missing.
    """
    model, missing = _from_checkpoint(transformers.AutoModelForCausalLM, name, revision=revision)
    _refuse(name, "no causal language model, weights are missing", missing)
    return model.eval()
