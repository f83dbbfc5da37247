"""A real GGUF model, 470 KB of random weights, for tests against a real llama.cpp.

It has the llama architecture (2 layers, 64 wide) and a vocabulary of bytes. What it says is noise, but
printable noise: the rows of all other tokens are zero, so that a stream has text in it and ends by
length, never by chance.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

CONTEXT_TOKENS = 2048
EMBEDDING_LENGTH = 64
_LAYERS = 2
_HEADS = 4
_FEED_FORWARD = 128
_SPECIAL = (b"<unk>", b"<s>", b"</s>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def _vocabulary() -> tuple[list[bytes], list[int]]:
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>".encode() for byte in range(256)), "▁".encode()]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL]
    return tokens, [int(kind) for kind in kinds]


def write_tiny_gguf(path: Path, *, seed: int = 20) -> Path:
    """Write the model to `path` and return it. The same seed gives the same file."""
    random = np.random.default_rng(seed)
    tokens, kinds = _vocabulary()

    def weights(*shape: int, scale: float = 0.1) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(EMBEDDING_LENGTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(EMBEDDING_LENGTH // _HEADS)
    writer.add_vocab_size(len(tokens))
    # Without pooling an engine gives one vector a token, and OpenAI's shape has one an input.
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(_CHAT_TEMPLATE)

    writer.add_tensor("token_embd.weight", weights(len(tokens), EMBEDDING_LENGTH, scale=1.0))
    writer.add_tensor("output_norm.weight", np.ones(EMBEDDING_LENGTH, dtype=np.float32))
    output = weights(len(tokens), EMBEDDING_LENGTH, scale=1.0)
    printable = np.zeros(len(tokens), dtype=bool)
    printable[len(_SPECIAL) + 0x20 : len(_SPECIAL) + 0x7F] = True
    output[~printable] = 0.0
    writer.add_tensor("output.weight", output)
    for layer in range(_LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(EMBEDDING_LENGTH, dtype=np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", weights(EMBEDDING_LENGTH, EMBEDDING_LENGTH))
        for name in ("ffn_gate", "ffn_up"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", weights(_FEED_FORWARD, EMBEDDING_LENGTH))
        writer.add_tensor(f"blk.{layer}.ffn_down.weight", weights(EMBEDDING_LENGTH, _FEED_FORWARD))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
