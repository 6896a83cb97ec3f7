"""The models: the demo's real one, and random weights in the shapes of real ones. Speed does not ask what they say."""

from pathlib import Path

from rejoinder.worker.settings import user_cache_dir

# hidden, intermediate, layers, heads, key heads, vocabulary; the large ones are those of Llama 3.2 1B, 3B and 3.1 8B.
SHAPES = {
    "random-6m": (256, 768, 6, 8, 4, 4096),
    "random-1b": (2048, 8192, 16, 32, 8, 128_256),
    "random-3b": (3072, 8192, 28, 24, 8, 128_256),
    "random-8b": (4096, 14_336, 32, 32, 8, 128_256),
}
CONTEXT = 8192


def directory(name: str) -> str:
    """The directory of a model that is named here, made on first use; any other name or directory as it is."""
    if name == "smollm2":
        from rejoinder.worker.engines.smollm2 import ensure

        return str(ensure(user_cache_dir()))
    if name not in SHAPES:
        return name
    path = user_cache_dir() / "benchmarks" / name
    if not (path / "tokenizer.json").exists():  # written last
        _build(path, name)
    return str(path)


def _build(path: Path, name: str) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, intermediate, layers, heads, key_heads, vocabulary = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=name != "random-8b",
        bos_token_id=0,
        eos_token_id=1,
        dtype=torch.float32 if name == "random-6m" else torch.bfloat16,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = LlamaForCausalLM(config).to(config.dtype)
    model.generation_config = GenerationConfig(eos_token_id=1)
    model.save_pretrained(path)
    # A token for each byte: the tokenizer is a real one, and a text has as many tokens as characters.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(["<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(path)
