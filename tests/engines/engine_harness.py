"""A tiny random model, an engine for it, and requests."""

import asyncio
import sys
from pathlib import Path

from rejoinder.worker.engines.protocol import EngineRequest

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('a system message must come first') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
GREEDY = {"prompt": "the quick", "temperature": 0, "max_tokens": 24}
KINDS = [
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.5},
    {"temperature": 2, "top_k": 10**9},
]
CONTEXT = 256


def build_tiny(directory: Path, *, eos: list[int] | None = None, template: str | None = TEMPLATE, family="llama"):
    """Save a random model of some thousand weights and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    model = FAMILIES[family](len(fast))
    start = 0 if model.config.is_encoder_decoder else None
    model.generation_config = GenerationConfig(eos_token_id=eos or [1], decoder_start_token_id=start)
    model.save_pretrained(directory)
    return directory


# Far from uniform, so that greedy has a clear winner.
SPREAD = 0.3


def llama(vocabulary):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=SPREAD,
    )
    return LlamaForCausalLM(config)


def t5(vocabulary):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=vocabulary,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        n_positions=CONTEXT,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def mamba(vocabulary):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=SPREAD,
    )
    return MambaForCausalLM(config)


FAMILIES = {"llama": llama, "t5": t5, "mamba": mamba}


SMALL = {
    "threads": 1,
    "cache_bytes": 2**21,
    "page_size": 16,
    "max_batch_tokens": 64,
    "max_running": 8,
    "warmup": False,  # steps are counted
}


async def started(model, **config):
    from rejoinder.worker.engines.transformers.engine import create

    engine = create({"model": str(model), **SMALL, **config})
    await engine.start()
    return engine


async def tokens_of(batch, *arguments):
    return (await batch.run(*arguments)).tokens


def completion(body, response_id="r"):
    return EngineRequest("/v1/completions", body, response_id, 1_700_000_000)


def chat(body, response_id="r"):
    return EngineRequest("/v1/chat/completions", body, response_id, 1_700_000_000)


def forget_vllm():
    """Let the next import find another vLLM, or none."""
    names = ("rejoinder.worker.engines.vllm_engine", "vllm")
    for name in [name for name in sys.modules if name in names or name.startswith("vllm.")]:
        del sys.modules[name]


async def eventually(condition, seconds=60.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
