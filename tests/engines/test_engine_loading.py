"""What a model is loaded with: adapters, quantization, tokenizers, pins, and no network where none is allowed."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from engine_harness import GREEDY, SMALL, completion, started
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rejoinder.worker.engines.transformers import lora, sources
from rejoinder.worker.engines.transformers.loading import load
from rejoinder.worker.engines.transformers.settings import TransformersSettings
from rejoinder.worker.errors import EngineGone

# peft asks a model what transformers calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
PROMPT = [5, 17, 40, 8, 99]


def base(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def settings(model, **config):
    return TransformersSettings(model=str(model), **{**SMALL, **config})


def build_adapter(model, directory, *, targets=("q_proj", "v_proj", "down_proj")):
    """A random LoRA adapter, strong enough to change what the model says."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft has something to say of tied weights
        adapted = get_peft_model(base(model), LoraConfig(r=4, lora_alpha=16, target_modules=list(targets)))
        for name, weights in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weights, std=0.3)
        adapted.save_pretrained(directory)
    return directory


def says(model):
    """The scores of the prompt's next token."""
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0, -1]


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    return build_adapter(tiny, tmp_path_factory.mktemp("adapter"))


async def test_an_adapter_is_merged_and_served(tiny, adapter, tmp_path):
    merged = PeftModel.from_pretrained(base(tiny), str(adapter)).merge_and_unload()
    merged.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    answers = []
    for config in ({"model": tiny, "lora": str(adapter)}, {"model": tmp_path}, {"model": tiny}):
        engine = await started(**config)
        try:
            answers.append((await engine.generate(completion(GREEDY)))["choices"][0]["text"])
        finally:
            await engine.stop()
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_a_merged_adapter_leaves_nothing_behind(tiny, adapter):
    model = load(settings(tiny, lora=str(adapter))).model
    assert type(model) is type(base(tiny))
    assert {type(module) for module in model.modules()} == {type(module) for module in base(tiny).modules()}
    want = says(PeftModel.from_pretrained(base(tiny), str(adapter)))
    torch.testing.assert_close(says(model), want)
    assert not torch.allclose(want, says(base(tiny)))


def test_on_tied_weights_an_adapter_stays_beside_them(tiny, tmp_path):
    tied = base(tiny)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "tied")
    build_adapter(tmp_path / "tied", tmp_path / "adapter", targets=("lm_head", "q_proj"))
    model = load(settings(tmp_path / "tied", lora=str(tmp_path / "adapter"))).model
    untouched = base(tmp_path / "tied")
    torch.testing.assert_close(model.get_input_embeddings().weight, untouched.get_input_embeddings().weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = says(PeftModel.from_pretrained(base(tmp_path / "tied"), str(tmp_path / "adapter")))
    torch.testing.assert_close(says(model), want)
    assert not torch.allclose(want, says(untouched))


def other_base(tiny, directory, **changes):
    """A model like the tiny one but for its shape, and an adapter for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**json.loads((tiny / "config.json").read_text()), **changes})
    LlamaForCausalLM(config).save_pretrained(directory / "base")
    return build_adapter(directory / "base", directory / "adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48, "head_dim": 12}, "does not fit this model: .*size mismatch"),
        ({"num_hidden_layers": 3}, "does not fit this model: it has, without a place for it, .*layers.2"),
        ({"num_hidden_layers": 1}, "does not fit this model: it lacks .*layers.1"),
    ],
)
def test_an_adapter_of_another_model(tiny, tmp_path, changes, message):
    with pytest.raises(EngineGone, match=message) as caught:
        load(settings(tiny, lora=str(other_base(tiny, tmp_path, **changes))))
    assert "\n" not in str(caught.value)


def test_what_is_no_adapter(tiny, adapter, tmp_path):
    def refused(match, directory=tmp_path):
        with pytest.raises(EngineGone, match=match):
            load(settings(tiny, lora=str(directory)))

    refused("has no adapter_config.json")
    (tmp_path / lora.CONFIG).write_text("{")
    refused("has no weights")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    refused("only adapter_model.bin, which is pickled")
    (tmp_path / lora.WEIGHTS).write_bytes((adapter / lora.WEIGHTS).read_bytes())
    refused("cannot be read")
    (tmp_path / lora.CONFIG).write_text('{"peft_type": "IA3"}')
    refused("is IA3, not LORA")
    config = json.loads((adapter / lora.CONFIG).read_text())
    (tmp_path / lora.CONFIG).write_text(json.dumps({**config, "target_modules": ["nowhere"]}))
    refused("does not fit this model: Target modules .*nowhere.* not found")
    with pytest.raises(EngineGone, match="is an adapter: give its base as model"):
        load(settings(adapter))


def test_quantized_weights(tiny):
    loaded = load(settings(tiny, quantization={"quant_method": "quanto", "weights": "int8"}))
    layer = loaded.model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "QLinear"
    exact = says(base(tiny))
    torch.testing.assert_close(says(loaded.model), exact, atol=0.2, rtol=0.05)
    assert not torch.equal(says(loaded.model), exact)


async def test_a_quantized_model_is_served(tiny):
    engine = await started(tiny, quantization={"quant_method": "quanto", "weights": "int8"})
    try:
        result = await engine.generate(completion(GREEDY))
    finally:
        await engine.stop()
    assert result["usage"]["completion_tokens"] > 0


def test_beside_quantized_weights_an_adapter_is_not_merged(tiny, adapter):
    quantization = {"quant_method": "quanto", "weights": "int8"}
    plain = load(settings(tiny, quantization=quantization)).model
    adapted = load(settings(tiny, quantization=quantization, lora=str(adapter))).model
    assert type(adapted) is type(plain)
    assert any("lora" in type(module).__module__ for module in adapted.modules())
    want = says(PeftModel.from_pretrained(base(tiny), str(adapter)))
    torch.testing.assert_close(says(adapted), want, atol=0.3, rtol=0.1)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "nonsense"}, "quantization: there is no quant_method 'nonsense'; transformers has "),
        ({"quant_method": "quanto", "wieghts": "int8"}, "quantization: quanto has no wieghts; it has .*weights"),
        ({"quant_method": "quanto", "weights": "int3"}, "quantization: quanto cannot be used so: ValueError"),
        ({"quant_method": "gptq"}, "quantization: gptq cannot be used so: TypeError: .*bits"),
        ({"load_in_8bit": True, "bnb_4bit_wrong": 1}, "quantization: bitsandbytes_8bit has no bnb_4bit_wrong"),
        (
            {"quant_method": "torchao", "quant_type": "x"},
            "quantization: torchao cannot be used so: ModuleNot",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "with quantization bitsandbytes_8bit: .*pip install"),
        ({"quant_method": "awq"}, "quantization"),
    ],
)
def test_a_quantization_that_cannot_be(tiny, quantization, message):
    with pytest.raises(EngineGone, match=message) as caught:
        load(settings(tiny, quantization=quantization))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_from_elsewhere(tiny, tmp_path):
    other = AutoTokenizer.from_pretrained(tiny)
    other.chat_template = "{{ messages }}"
    other.save_pretrained(tmp_path)
    assert load(settings(tiny, tokenizer=str(tmp_path))).tokenizer.chat_template == "{{ messages }}"
    other.add_tokens(["one", "more"])
    other.save_pretrained(tmp_path)
    with pytest.raises(EngineGone, match="is not this model's: it has 292 tokens, the model 290"):
        load(settings(tiny, tokenizer=str(tmp_path)))


@pytest.mark.parametrize("what", ["model", "tokenizer", "lora"])
def test_a_directory_has_no_revisions(tiny, adapter, what):
    directory = str(adapter if what == "lora" else tiny)
    config = {"revision": "x"} if what == "model" else {what: directory, f"{what}_revision": "x"}
    with pytest.raises(EngineGone, match=rf"the {what} '.*' is a directory: it has no revision 'x'"):
        load(settings(tiny, **config))


@pytest.mark.parametrize("on_gpu", ["cuda_graphs", "async_batching", "cache_memory_share", "attn"])
def test_what_a_cpu_cannot_do_is_said_before_loading(tmp_path, on_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    value = {"cache_memory_share": 0.5, "attn": "flash"}.get(on_gpu, True)
    config = {**SMALL, "cache_bytes": None, on_gpu: value}
    with pytest.raises(EngineGone, match=f"no GPU to use here, but {on_gpu} "):  # and not: no such model
        load(TransformersSettings(model=str(tmp_path / "missing"), **config))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(home, repository, files, branch="main"):
    """Put a directory's files into a hub cache, as one commit of a branch."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / branch).write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in files.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())


OFFLINE = """
import json, socket, sys, time
tried = []
time.sleep = lambda seconds: None  # the hub's client waits for a minute in all before it has tried often enough
socket.socket.connect = lambda self, address: tried.append(str(address)) or (_ for _ in ()).throw(OSError("no network"))
socket.getaddrinfo = lambda *a, **k: tried.append(str(a)) or (_ for _ in ()).throw(OSError("no network"))
from rejoinder.worker.engines.transformers.loading import load
from rejoinder.worker.engines.transformers.settings import TransformersSettings
from rejoinder.worker.errors import EngineGone
results = []
for config in json.loads(sys.argv[1]):
    try:
        results.append(dict(load(TransformersSettings(threads=1, device="cpu", **config)).commits))
    except EngineGone as exc:
        results.append(str(exc))
print(json.dumps([results, tried]))
"""


def in_a_process_without_network(home, *configs, script=OFFLINE):
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(configs)],
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
        env={"HF_HOME": str(home), "PATH": "/usr/bin:/bin", "HOME": str(home)},
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_offline_opens_no_connection(tiny, adapter, tmp_path):
    cached(tmp_path, "some/model", tiny, branch="v1")
    cached(tmp_path, "some/adapter", adapter)
    results, tried = in_a_process_without_network(
        tmp_path,
        {"model": str(tiny), "offline": True},
        {"model": "some/model", "revision": "v1", "lora": "some/adapter", "offline": True},
        {"model": "some/model", "revision": COMMIT, "offline": True},
        {"model": "some/absent", "offline": True},
        {"model": str(tiny), "lora": "some/absent", "offline": True},
        {"model": str(tiny), "tokenizer": "some/absent", "offline": True},
    )
    assert results[0] == {}
    assert results[1] == {"model": COMMIT, "tokenizer": COMMIT, "lora": COMMIT}
    assert results[2]["model"] == COMMIT
    for result, name in zip(results[3:], ["model", "lora adapter", "model"], strict=True):
        assert f"the {name} " in result
        assert "cannot be loaded" in result
        assert "\n" not in result
    assert tried == []


def test_without_it_a_hub_name_is_looked_up(tmp_path):
    results, tried = in_a_process_without_network(tmp_path, {"model": "some/absent"})
    assert "cannot be loaded" in results[0]
    assert tried


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_hub_what_is_cached_says_the_task(tiny, tmp_path, offline):
    cached(tmp_path, "some/model", tiny)
    script = OFFLINE.replace("loading import load", "tasks import task_of").replace("dict(load(", "task_of(")
    script = script.replace(").commits)", ")")
    results, tried = in_a_process_without_network(tmp_path, {"model": "some/model", "offline": offline}, script=script)
    assert results == ["generate"]
    assert bool(tried) is not offline


def test_a_branch_is_looked_up_once(monkeypatch):
    class Resolved(str):
        __slots__ = ()
        resolved = COMMIT

    asked = []
    monkeypatch.setattr(sources, "resolve_revision", lambda *a, **_: asked.append(a) or Resolved("main"))
    found = [{}, {}]
    for commits in found:
        sources.pinned("model", "some/model", "looked-up-once", offline=True, commits=commits)
    assert asked == [("some/model", "looked-up-once")]
    assert found == [{"model": COMMIT}] * 2
