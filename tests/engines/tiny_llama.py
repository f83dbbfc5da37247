"""A real Llama, 470 KB of random weights in the layout of a Hugging Face folder, for a real vLLM.

Its vocabulary are bytes. What it says is noise, but printable noise: the rows of all other tokens are zero,
so that a stream has text in it and ends by length, never by chance.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

CONTEXT_TOKENS = 512
# Of 32 for each head: less has no kernel on CPUs.
_HIDDEN = 64
_LAYERS = 2
_HEADS = 2
_FEED_FORWARD = 128
_SPECIAL = ("<s>", "</s>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write_tiny_llama(folder: Path, *, seed: int = 20) -> Path:
    """Write the model to `folder` and return it. The same seed gives the same model."""
    folder.mkdir(parents=True, exist_ok=True)
    signs = _signs_of_bytes()
    vocabulary = {sign: index for index, sign in enumerate((*_SPECIAL, *signs))}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "hidden_size": _HIDDEN,
        "intermediate_size": _FEED_FORWARD,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "head_dim": _HIDDEN // _HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": index,
                "content": sign,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, sign in enumerate(_SPECIAL)
        ],
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[1],
        "model_max_length": CONTEXT_TOKENS,
        "chat_template": _CHAT_TEMPLATE,
    }
    for name, content in (
        ("config.json", config),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", told),
    ):
        (folder / name).write_text(json.dumps(content))
    _write_tensors(folder / "model.safetensors", _tensors(len(vocabulary), seed))
    return folder


def _signs_of_bytes() -> list[str]:
    """What a byte-level vocabulary calls each byte: itself if it can be seen, else a sign from above 255."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    above = iter(range(256, 512))
    return [chr(byte if byte in seen else next(above)) for byte in range(256)]


def _tensors(vocabulary: int, seed: int) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    random = np.random.default_rng(seed)

    def weights(*shape: int, scale: float = 0.1) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    output = weights(vocabulary, _HIDDEN, scale=1.0)
    printable = np.zeros(vocabulary, dtype=bool)
    printable[len(_SPECIAL) + 0x20 : len(_SPECIAL) + 0x7F] = True
    output[~printable] = 0.0
    found = {
        "model.embed_tokens.weight": weights(vocabulary, _HIDDEN, scale=1.0),
        "model.norm.weight": np.ones(_HIDDEN, dtype=np.float32),
        "lm_head.weight": output,
    }
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{norm}.weight"] = np.ones(_HIDDEN, dtype=np.float32)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{prefix}.self_attn.{name}.weight"] = weights(_HIDDEN, _HIDDEN)
        for name in ("gate_proj", "up_proj"):
            found[f"{prefix}.mlp.{name}.weight"] = weights(_FEED_FORWARD, _HIDDEN)
        found[f"{prefix}.mlp.down_proj.weight"] = weights(_HIDDEN, _FEED_FORWARD)
    return found


def _write_tensors(path: Path, tensors: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]) -> None:
    """A safetensors file: the length of a JSON header, the header, and the bytes that it speaks of."""
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors.values():
            file.write(tensor.tobytes())
